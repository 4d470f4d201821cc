"""The universe and every limit, read once by a door and validated there.

`load_settings` reads `data/universe.yaml` (or the file in `MARKETDATA_UNIVERSE`) and the
environment: each top-level key may also come from `MARKETDATA_<KEY>`, written as the same YAML, and
wins over the file. Nothing reads the environment at import. Relative paths count from the current
folder.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import yaml

from marketdata_assets.errors import BadInput
from marketdata_assets.model.market import CONSOLIDATED_VENUE, Market
from marketdata_assets.model.partition import Partition, partitions_of
from marketdata_assets.model.timeframe import EPOCH, MINUTE, TIMEFRAMES, Timeframe, parse_timeframe
from marketdata_assets.model.window import Window, format_time, month_of, parse_time

DEFAULT_FILE = "data/universe.yaml"
PREFIX = "MARKETDATA_"


@dataclass(frozen=True, slots=True)
class Venue:
    """What the universe wants of one venue."""

    name: str
    symbols: tuple[str, ...]
    since: datetime
    until: datetime | None = None
    base: Timeframe = TIMEFRAMES["1m"]
    reference: tuple[Timeframe, ...] = ()
    base_url: str | None = None
    ws_url: str | None = None
    requests_per_minute: int | None = None

    @property
    def markets(self) -> tuple[Market, ...]:
        """Its markets, in the order written."""
        return tuple(Market(self.name, symbol) for symbol in self.symbols)

    @property
    def fetched(self) -> tuple[Timeframe, ...]:
        """The timeframes asked from the venue: the base first, then the references."""
        return (self.base, *self.reference)


@dataclass(frozen=True, slots=True)
class Automation:
    """What the sensors and schedules may do by themselves. Minutes and days are of our clock."""

    refresh_minutes: int = 5
    lookback_days: int | None = None
    runs: int = 4
    attempts: int = 3
    cooldown_minutes: int = 2


@dataclass(frozen=True, slots=True)
class Corrections:
    """How far back closed bars are fetched again: in each run, every night, and every month. 0: not at
    all.
    """

    run_minutes: int = 60
    night_days: int = 1
    month_days: int = 31


@dataclass(frozen=True, slots=True)
class Limits:
    """How far a market's newest bar may lie behind before that is a warning, and before it is an
    error.
    """

    warn: timedelta
    error: timedelta


@dataclass(frozen=True, slots=True)
class Delta:
    """Which tables are published as Delta Lake tables, where, and how many days a version can still be
    read.
    """

    location: str
    timeframes: tuple[Timeframe, ...]
    history_days: int = 7


@dataclass(frozen=True, slots=True)
class Cold:
    """Where months go that ended more than `after_days` ago: another place, or another storage class
    of the same bucket.
    """

    after_days: int
    lake: str | None = None
    storage_class: str | None = None


@dataclass(frozen=True, slots=True)
class Clock:
    """A clock of our own for tests and replays: it stood at `start` at the real moment `since`, and
    runs `speed` times as fast.
    """

    start: datetime
    speed: float = 0.0
    since: datetime | None = None

    def now(self) -> datetime:
        """Its moment, UTC."""
        return (
            self.start + (datetime.now(UTC) - self.since) * self.speed if self.since else self.start
        )


@dataclass(frozen=True, slots=True)
class Settings:
    """One validated universe. `clock` replaces the real one (`MARKETDATA_NOW`), for tests and
    replays.
    """

    venues: Mapping[str, Venue]
    timeframes: tuple[Timeframe, ...]
    lake: str
    rollups: str
    duckdb: Path
    state: Path
    database: str | None = field(default=None, repr=False)
    broker: str | None = field(default=None, repr=False)
    consolidate: Mapping[Market, tuple[Market, ...]] = field(default_factory=dict)
    delta: Delta | None = None
    retention: Mapping[str, int] = field(default_factory=dict)
    cold: Cold | None = None
    automation: Automation = Automation()
    corrections: Corrections = Corrections()
    freshness: Mapping[str, Limits] = field(default_factory=dict)
    alerts: tuple[str, ...] = field(default=(), repr=False)
    retention_days: int = 14
    clock: Clock | None = None
    source: str = "settings"
    _markets: Mapping[str, Market] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        markets = {m.key: m for v in self.venues.values() for m in v.markets}
        object.__setattr__(self, "_markets", markets)

    @property
    def markets(self) -> tuple[Market, ...]:
        """Every market of the universe, in the order written."""
        return tuple(self._markets.values())

    def now(self) -> datetime:
        """Our own clock, UTC."""
        return self.clock.now() if self.clock else datetime.now(UTC)

    def limits(self, timeframe: Timeframe) -> Limits:
        """What counts as late for a timeframe: as written in the universe, else 10 and 60 minutes, or
        1 and 3 bars where that is more.
        """
        usual = Limits(max(10 * MINUTE, timeframe.width), max(60 * MINUTE, 3 * timeframe.width))
        return self.freshness.get(timeframe.name, usual)

    @property
    def since(self) -> datetime:
        """The first day that is wanted of any venue."""
        return min(venue.since for venue in self.venues.values())

    def market(self, key: str) -> Market:
        """The market of a key; raises BadInput with the nearest known one."""
        if key in self._markets:
            return self._markets[key]
        made_of = next(
            (
                " ".join(m.key for m in parts)
                for market, parts in self.consolidate.items()
                if market.key == key
            ),
            None,
        )
        if made_of:
            raise BadInput(
                f"{key} is no market of a venue; it is made of {made_of}: name one of those"
            )
        near = difflib.get_close_matches(key, self._markets, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise BadInput(f"market {key!r} is not in {self.source}{hint}")

    def span(self, market: Market) -> Window:
        """What is wanted of a market: since its venue's first day, as far as retention keeps it, until
        its last one or our now.

        Of a consolidated market: all that is wanted of any of its venues.
        """
        if market in self.consolidate:
            return _hull(map(self.span, self.consolidate[market]))
        venue, whole = self.venues[market.venue], self.history(market)
        return whole & Window(self.kept_since(f"raw/ohlcv_{venue.base.name}"), whole.end)

    def history(self, market: Market) -> Window:
        """All that was ever wanted of a market; of what retention has removed, coarser bars are still
        there.
        """
        if market in self.consolidate:
            return _hull(map(self.history, self.consolidate[market]))
        venue = self.venues[market.venue]
        return Window(venue.since, min(venue.until or self.now(), self.now()))

    def kept_since(self, table: str) -> datetime:
        """The first month of a table that retention keeps: the oldest one that ended less than so many
        days ago.
        """
        days = self.retention.get(table)
        return month_of(self.now() - timedelta(days=days)).start if days else EPOCH

    def base(self, market: Market) -> Timeframe:
        """The finest timeframe of a market, or of all venues of a consolidated one."""
        return self.venues[self.consolidate.get(market, (market,))[0].venue].base

    @property
    def consolidated_timeframes(self) -> tuple[Timeframe, ...]:
        """The base of every consolidated market, finest first."""
        return _ordered(self.base(market) for market in self.consolidate)

    def rolled(self, market: Market) -> tuple[Timeframe, ...]:
        """The timeframes rolled up for a market: those coarser than its base, finest first."""
        base = self.venues[market.venue].base
        return tuple(tf for tf in self.timeframes if tf.width > base.width)

    @property
    def raw_timeframes(self) -> tuple[Timeframe, ...]:
        """Every timeframe that some venue fetches, finest first."""
        return _ordered(tf for v in self.venues.values() for tf in v.fetched)

    @property
    def rollup_timeframes(self) -> tuple[Timeframe, ...]:
        """Every timeframe that is rolled up for some market, finest first."""
        return _ordered(tf for market in self.markets for tf in self.rolled(market))

    def partitions(self, markets: Iterable[Market], wanted: Window) -> list[Partition]:
        """The partitions of these markets that lie in the wanted window and in the universe, oldest
        first per market.
        """
        return [p for m in markets for p in partitions_of(m, self.span(m) & wanted)]


def _hull(windows: Iterable[Window]) -> Window:
    """The smallest window that holds all of these."""
    found = list(windows)
    return Window(min(w.start for w in found), max(w.end for w in found))


def _ordered(timeframes: Iterable[Timeframe]) -> tuple[Timeframe, ...]:
    return tuple(sorted(set(timeframes), key=lambda tf: tf.width))


def load_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """Read, check and return the universe. Raises BadInput that names the file, the line and the
    fix.
    """
    env = os.environ if environ is None else environ
    path = Path(env.get(PREFIX + "UNIVERSE") or DEFAULT_FILE)
    entries = _read_file(path)
    for key in _TOP:
        if text := env.get(PREFIX + key.upper()):
            entries[key] = _parse(text, f"environment {PREFIX}{key.upper()}")
    if "venues" not in entries:
        raise BadInput(
            f"{path}: there are no venues; write at least `venues: {{binance: {{symbols: [BTC/USDT], since: 2024-01-01}}}}`"
        )
    values = {key: _TOP[key](entry) for key, entry in entries.items()}
    settings = Settings(**{**_defaults(), **values}, clock=_clock(env), source=str(path))
    _check_dates(settings, entries["venues"])
    _check_places(settings, entries)
    if "consolidate" in entries:
        _check_venues(settings, entries["consolidate"])
    return settings


_MOVING = re.compile(r"(?P<start>\S+) x(?P<speed>[\d.]+) since (?P<since>\S+)")


def _clock(env: Mapping[str, str]) -> Clock | None:
    """`2024-01-10T00:00Z` stands still; `2024-01-10T00:00Z x60 since 2026-11-20T12:00Z` runs."""
    text = env.get(PREFIX + "NOW")
    try:
        if not text:
            return None
        if moving := _MOVING.fullmatch(text):
            return Clock(
                parse_time(moving["start"]), float(moving["speed"]), parse_time(moving["since"])
            )
        return Clock(parse_time(text))
    except (BadInput, ValueError) as error:
        raise BadInput(f"environment {PREFIX}NOW: {error}") from None


# --------------------------------------------------------------------------------- YAML with line n
@dataclass(frozen=True, slots=True)
class _Entry:
    """A YAML node, the key it stands under and where that is, so that every complaint can name its
    line.
    """

    node: yaml.Node
    place: str
    key: yaml.Node | None = None

    def fail(self, what: str) -> BadInput:
        return BadInput(f"{self.place} line {(self.key or self.node).start_mark.line + 1}: {what}")

    def text(self) -> str:
        if not isinstance(self.node, yaml.ScalarNode) or not self.node.value.strip():
            raise self.fail("one value is expected here")
        return str(self.node.value).strip()

    def items(self) -> dict[str, _Entry]:
        if not isinstance(self.node, yaml.MappingNode):
            raise self.fail("`key: value` lines are expected here")
        found: dict[str, _Entry] = {}
        for key, value in self.node.value:
            name = _Entry(key, self.place).text()
            if name in found:
                raise _Entry(key, self.place).fail(f"{name!r} is written twice; keep one")
            found[name] = _Entry(value, self.place, key)
        return found

    def elements(self) -> list[_Entry]:
        if not isinstance(self.node, yaml.SequenceNode):
            raise self.fail("a list such as [a, b] is expected here")
        return [_Entry(node, self.place) for node in self.node.value]

    def known_items(self, known: Iterable[str]) -> dict[str, _Entry]:
        items, names = self.items(), list(known)
        for name, entry in items.items():
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(names)}"
                raise entry.fail(f"unknown key {name!r}; {hint}")
        return items


def _parse(text: str, place: str) -> _Entry:
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise BadInput(f"{place} line {line}: not valid YAML ({error.problem})") from None
    except yaml.YAMLError:
        raise BadInput(f"{place}: not valid YAML") from None
    if node is None:
        raise BadInput(f"{place}: it is empty")
    return _Entry(node, place)


def _read_file(path: Path) -> dict[str, _Entry]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadInput(
            f"{path}: there is no universe file; write one or name it in {PREFIX}UNIVERSE"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: it cannot be read ({type(error).__name__})") from None
    return _parse(text, str(path)).known_items(_TOP)


# --------------------------------------------------------------------------------- one reader per k
def _time(entry: _Entry) -> datetime:
    try:
        return parse_time(entry.text())
    except BadInput as error:
        raise entry.fail(str(error)) from None


def _timeframe(entry: _Entry) -> Timeframe:
    try:
        return parse_timeframe(entry.text())
    except BadInput as error:
        raise entry.fail(str(error)) from None


def _timeframes(entry: _Entry) -> tuple[Timeframe, ...]:
    return _ordered(_timeframe(e) for e in entry.elements())


def _url(schemes: tuple[str, ...]) -> Callable[[_Entry], str]:
    def read(entry: _Entry) -> str:
        wrong = entry.fail(
            f"a URL that begins with {' or '.join(s + '://' for s in schemes)} is expected here"
        )
        parts = _public(entry, wrong)
        if parts.scheme not in schemes or not parts.hostname:
            raise wrong
        return entry.text().rstrip("/")

    return read


def _parts(entry: _Entry, wrong: BadInput) -> SplitResult:
    """The parts of a URL; `wrong` is raised for what is none."""
    try:
        parts = urlsplit(entry.text())
        _ = parts.port  # raises for what is no port
    except ValueError:
        raise wrong from None
    return parts


def _public(entry: _Entry, wrong: BadInput) -> SplitResult:
    """The parts of a URL that holds no secret; `wrong` is raised for what is no URL."""
    parts = _parts(entry, wrong)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise entry.fail(
            "a URL without user, password or query is expected here; secrets do not belong in it"
        )
    return parts


def _count(what: str, least: int = 1, most: int = 10**9) -> Callable[[_Entry], int]:
    def read(entry: _Entry) -> int:
        text = entry.text()
        if not text.isdecimal() or not least <= int(text) <= most:
            bound = f"{least} or more" if most == 10**9 else f"from {least} to {most}"
            raise entry.fail(f"a whole number of {what}, {bound}, is expected here")
        return int(text)

    return read


def _choice(*allowed: str) -> Callable[[_Entry], str]:
    def read(entry: _Entry) -> str:
        if entry.text() not in allowed:
            raise entry.fail(f"{entry.text()!r} is not one of {', '.join(allowed)}")
        return entry.text()

    return read


def _path(entry: _Entry) -> Path:
    return Path(entry.text()).expanduser().absolute()


def _lake(entry: _Entry) -> str:
    text = entry.text()
    wrong = entry.fail("a folder or s3://bucket/prefix is expected here")
    if text.startswith("s3://") and _public(entry, wrong).netloc:
        return text.rstrip("/")
    if "://" in text:
        raise wrong
    return str(_path(entry))


def _symbols(entry: _Entry, venue: str) -> tuple[str, ...]:
    symbols: list[str] = []
    for element in entry.elements():
        try:
            Market(venue, element.text())
        except BadInput as error:
            raise element.fail(str(error)) from None
        if element.text() in symbols:
            raise element.fail(f"{element.text()} is written twice; keep one")
        symbols.append(element.text())
    if not symbols:
        raise entry.fail("at least one symbol such as BTC/USDT is expected here")
    return tuple(symbols)


_VENUE: dict[str, Callable[[_Entry], Any]] = {
    "since": _time,
    "until": _time,
    "base": _timeframe,
    "reference": _timeframes,
    "base_url": _url(("http", "https")),
    "ws_url": _url(("ws", "wss")),
    "requests_per_minute": _count("requests per minute"),
}


def ccxt_venues() -> list[str]:
    """The ids of all ccxt venues, read from its folder: importing ccxt would cost seconds."""
    spec = importlib.util.find_spec("ccxt")
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        return []
    return sorted(p.stem for p in Path(next(iter(folders)), "async_support").glob("[a-z]*.py"))


def _venue(name: str, entry: _Entry) -> Venue:
    known = ccxt_venues()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise entry.fail(
            f"unknown venue {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
        )
    items = entry.known_items(("symbols", *_VENUE))
    for needed in ("symbols", "since"):
        if needed not in items:
            raise entry.fail(f"venue {name} needs `{needed}:`")
    values = {key: _VENUE[key](item) for key, item in items.items() if key != "symbols"}
    venue = Venue(name, _symbols(items["symbols"], name), **values)
    if venue.until is not None and venue.until <= venue.since:
        raise items["until"].fail(
            f"until {format_time(venue.until)} is not after since {format_time(venue.since)}; swap them"
        )
    if venue.base in venue.reference:
        raise items["reference"].fail(
            f"{venue.base.name} is the base already; a reference is another timeframe"
        )
    return venue


def _venues(entry: _Entry) -> dict[str, Venue]:
    venues = {name: _venue(name, item) for name, item in entry.items().items()}
    if not venues:
        raise entry.fail("at least one venue is expected here")
    return venues


def _check_dates(settings: Settings, entry: _Entry) -> None:
    now = settings.now()
    for name, item in entry.items().items():
        if settings.venues[name].since >= now:
            raise item.items()["since"].fail(
                f"since {format_time(settings.venues[name].since)} lies in the future (now {format_time(now)})"
            )


def _check_places(settings: Settings, entries: Mapping[str, _Entry]) -> None:
    """Delta's tables and the cold place hold files of their own, which must not be taken for the
    lake's.
    """
    others = {
        "delta": settings.delta and settings.delta.location,
        "cold": settings.cold and settings.cold.lake,
    }
    for key, place in others.items():
        if place and (place + "/").startswith(settings.lake + "/"):
            raise entries[key].fail(
                f"{place} is the lake or lies in it; give it a place of its own"
            )
    if settings.cold and settings.cold.storage_class and not settings.lake.startswith("s3://"):
        raise entries["cold"].fail(
            "storage classes are for a lake in S3; name another `lake:` instead"
        )


def _consolidate(entry: _Entry) -> dict[Market, tuple[Market, ...]]:
    found = {}
    for symbol, item in entry.items().items():
        try:
            market = Market(CONSOLIDATED_VENUE, symbol)
        except BadInput as error:
            raise item.fail(str(error)) from None
        names = [element.text() for element in item.elements()]
        if len(names) < 2:
            raise item.fail("at least two venues are expected here, the preferred one first")
        found[market] = tuple(_at(element, symbol) for element in item.elements())
    return found


def _at(entry: _Entry, symbol: str) -> Market:
    try:
        return Market(entry.text(), symbol)
    except BadInput as error:
        raise entry.fail(str(error)) from None


def _check_venues(settings: Settings, entry: _Entry) -> None:
    """Only the same symbol in bars of the same width is one series: BTC/USD is not BTC/USDT."""
    for symbol, item in entry.items().items():
        seen: list[Venue] = []
        for element in item.elements():
            venue = settings.venues.get(element.text())
            if venue is None:
                raise element.fail(
                    f"{element.text()!r} is not a venue of this universe; it has {', '.join(settings.venues)}"
                )
            if venue in seen:
                raise element.fail(f"{venue.name} is written twice; keep one")
            if symbol not in venue.symbols:
                raise element.fail(
                    f"{venue.name} has no {symbol} but {', '.join(venue.symbols)}; add it there, or leave {venue.name} out"
                )
            if seen and venue.base != seen[0].base:
                bars = f"{seen[0].name} has {seen[0].base.name} bars and {venue.name} has {venue.base.name} bars"
                raise element.fail(f"{bars}; only bars of the same width can be one series")
            seen.append(venue)


_AUTOMATION: dict[str, Callable[[_Entry], int]] = {
    "refresh_minutes": _count("minutes", most=59),
    "lookback_days": _count("days"),
    "runs": _count("runs"),
    "attempts": _count("attempts"),
    "cooldown_minutes": _count("minutes"),
}


def _automation(entry: _Entry) -> Automation:
    return Automation(
        **{key: _AUTOMATION[key](item) for key, item in entry.known_items(_AUTOMATION).items()}
    )


_CORRECTIONS: dict[str, Callable[[_Entry], int]] = {
    "run_minutes": _count("minutes", least=0, most=10_080),
    "night_days": _count("days", least=0, most=31),
    "month_days": _count("days", least=0, most=366),
}


def _corrections(entry: _Entry) -> Corrections:
    return Corrections(
        **{key: _CORRECTIONS[key](item) for key, item in entry.known_items(_CORRECTIONS).items()}
    )


def _freshness(entry: _Entry) -> dict[str, Limits]:
    read, found = _count("minutes"), {}
    for name, item in entry.known_items(TIMEFRAMES).items():
        limits = item.known_items(("warn", "error"))
        if set(limits) != {"warn", "error"} or read(limits["warn"]) > read(limits["error"]):
            raise item.fail("`{warn: minutes, error: minutes}` is expected here, the warning first")
        found[name] = Limits(read(limits["warn"]) * MINUTE, read(limits["error"]) * MINUTE)
    return found


def _service(schemes: tuple[str, ...], example: str) -> Callable[[_Entry], str]:
    """The URL of a server that may hold a password; no complaint repeats it."""

    def read(entry: _Entry) -> str:
        wrong = entry.fail(f"a URL such as {example} is expected here")
        parts = _parts(entry, wrong)
        if parts.scheme not in schemes or not (parts.hostname or parts.query):
            raise wrong
        if parts.password and not entry.place.startswith("environment"):
            raise entry.fail(
                "a password does not belong in this file; give the whole URL in the environment instead"
            )
        return entry.text()

    return read


def _delta(entry: _Entry) -> Delta:
    items = entry.known_items(("location", "timeframes", "history_days"))
    if not {"location", "timeframes"} <= set(items):
        raise entry.fail(
            "`{location: folder or s3://bucket/prefix, timeframes: [1m, 1h]}` is expected here"
        )
    days = (
        {"history_days": _count("days")(items["history_days"])} if "history_days" in items else {}
    )
    return Delta(_lake(items["location"]), _timeframes(items["timeframes"]), **days)


def _retention(entry: _Entry) -> dict[str, int]:
    known = [
        f"{layer}/ohlcv_{name}"
        for layer in ("raw", "rollup", "consolidated", "reconciled")
        for name in TIMEFRAMES
    ]
    return {name: _count("days")(item) for name, item in entry.known_items(known).items()}


def _cold(entry: _Entry) -> Cold:
    items = entry.known_items(("after_days", "lake", "storage_class"))
    if "after_days" not in items or len(items) != 2:
        raise entry.fail(
            "`{after_days: 365, lake: s3://bucket/prefix}` or `{after_days: 365, storage_class: STANDARD_IA}` is expected here"
        )
    place = _lake(items["lake"]) if "lake" in items else None
    kind = _choice(*STORAGE_CLASSES)(items["storage_class"]) if "storage_class" in items else None
    return Cold(_count("days", least=31)(items["after_days"]), place, kind)


STORAGE_CLASSES = (
    "STANDARD",
    "STANDARD_IA",
    "ONEZONE_IA",
    "INTELLIGENT_TIERING",
    "GLACIER_IR",
    "REDUCED_REDUNDANCY",
)
"""Those of which every object can be read at once."""


def _alerts(entry: _Entry) -> tuple[str, ...]:
    return tuple(element.text() for element in entry.elements())


_TOP: dict[str, Callable[[_Entry], Any]] = {
    "venues": _venues,
    "timeframes": _timeframes,
    "lake": _lake,
    "rollups": _choice("duckdb", "parquet"),
    "duckdb": _path,
    "state": _path,
    "database": _service(("postgresql", "postgres"), "postgresql://user@host:5432/name"),
    "broker": _service(("redis", "rediss", "amqp", "amqps"), "redis://host:6379/0"),
    "consolidate": _consolidate,
    "delta": _delta,
    "retention": _retention,
    "cold": _cold,
    "automation": _automation,
    "corrections": _corrections,
    "freshness": _freshness,
    "alerts": _alerts,
    "retention_days": _count("days"),
}


def _defaults() -> dict[str, Any]:
    return {
        "timeframes": tuple(tf for tf in TIMEFRAMES.values() if tf.parent),
        "lake": str(Path("data/lake").absolute()),
        "rollups": "duckdb",
        "duckdb": Path("data/market.duckdb").absolute(),
        "state": Path("data/state").absolute(),
    }

"""The universe as one pydantic model: what a person writes in `data/universe.yaml`, key by key.

`Universe` is the file, and `marketdata schema` prints its JSON schema. `Settings` adds the clock
and everything that follows from the file. `load_settings` in `load` makes them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    Field,
    GetPydanticSchema,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic_core import core_schema

from marketdata_assets.errors import BadInput
from marketdata_assets.model.market import CONSOLIDATED_VENUE, Market
from marketdata_assets.model.partition import Partition, partitions_of
from marketdata_assets.model.timeframe import DEFAULT_ROLLUPS, EPOCH, MINUTE, Timeframe
from marketdata_assets.model.window import Window, month_of
from marketdata_assets.settings.fields import (
    BrokerUrl,
    DatabaseUrl,
    Keyed,
    Listed,
    LocalPath,
    Place,
    RollupStore,
    SecretText,
    Symbol,
    TableName,
    Text,
    TimeframeName,
    TimeframeNames,
    VenueId,
    days,
    fault,
    name_from,
    sort_timeframes,
    suggest_name,
)
from marketdata_assets.settings.parts import (
    Automation,
    Clock,
    ColdStorage,
    Corrections,
    DeltaSettings,
    FreshnessLimits,
    StrictModel,
    Venue,
    WebAccess,
    markets_of,
)


def _read_consolidation(written: Mapping[str, tuple[str, ...]]) -> dict[Market, tuple[Market, ...]]:
    found = {}
    for symbol, venues in written.items():
        if len(venues) < 2:
            raise fault(
                "at least two venues are expected here, the preferred one first", at=(symbol,)
            )
        parts = []
        for index, venue in enumerate(venues):
            try:
                parts.append(Market(venue, symbol))
            except BadInput as error:
                raise fault(str(error), at=(symbol, index)) from None
        found[Market(CONSOLIDATED_VENUE, symbol)] = tuple(parts)
    return found


Consolidation = Annotated[
    Mapping[Market, tuple[Market, ...]],
    GetPydanticSchema(
        lambda _, handler: core_schema.no_info_after_validator_function(
            _read_consolidation, handler(Keyed[Symbol, Listed[Text]])
        )
    ),
]
"""Written as `{BTC/USDT: [binance, kraken]}`, kept as the markets that these names mean."""


class Universe(StrictModel):
    """What you want to have: the keys of `data/universe.yaml`. Each may also come from the variable
    `MARKETDATA_<KEY>`, written as the same YAML, which wins over the file.
    """

    venues: Keyed[VenueId, Venue] = Field(
        examples=[{"binance": {"symbols": ["BTC/USDT"], "since": "2024-01-01"}}],
        json_schema_extra={"minProperties": 1},
    )
    """The venues by their ccxt ids, such as binance or kraken. At least one."""
    timeframes: TimeframeNames = DEFAULT_ROLLUPS
    """The timeframes that are rolled up for every market whose base is finer. Default:
    1m 5m 15m 30m 1h 4h 12h 1d 1w.
    """
    lake: Place = Field(default_factory=lambda: str(Path("data/lake").absolute()))
    """Where the bars are stored: a folder or s3://bucket/prefix. Default: data/lake."""
    rollups: Annotated[RollupStore, name_from(RollupStore, RollupStore)] = RollupStore.DUCKDB
    """Where rolled-up bars are stored: duckdb (the file `duckdb`) or parquet (the lake). Default:
    duckdb.
    """
    duckdb: LocalPath = Field(default_factory=Path("data/market.duckdb").absolute)
    """The DuckDB file. Default: data/market.duckdb."""
    state: LocalPath = Field(default_factory=Path("data/state").absolute)
    """The folder of the ledger, alerts.jsonl and all that Dagster keeps. Default: data/state."""
    automation: Automation = Field(default_factory=Automation)
    """What runs by itself, and how often."""
    corrections: Corrections = Field(default_factory=Corrections)
    """How far back closed bars are fetched again."""
    freshness: Keyed[TimeframeName, FreshnessLimits] = Field(default_factory=dict)
    """Minutes behind that count as late, by timeframe. Default: 10 and 60, or 1 and 3 bars where
    that is more.
    """
    database: DatabaseUrl | None = Field(
        default=None, examples=["postgresql://user@host:5432/market"]
    )
    """A PostgreSQL URL for the ledger and Dagster's storage, shared by many machines. A password
    belongs into MARKETDATA_DATABASE, not into the file. Default: SQLite in `state`.
    """
    broker: BrokerUrl | None = Field(default=None, examples=["redis://host:6379/0"])
    """A Redis or AMQP URL: runs are then done by `marketdata serve worker`. A password belongs into
    MARKETDATA_BROKER, not into the file. Default: each run is a process of this machine.
    """
    consolidate: Consolidation = Field(
        default_factory=dict, examples=[{"BTC/USDT": ["binance", "kraken"]}]
    )
    """Symbols whose venues become one series, each with at least two venues of this universe in
    order of preference, all with the same base. Default: none.
    """
    delta: DeltaSettings | None = None
    """Publish tables as Delta Lake tables. Default: none."""
    retention: Keyed[TableName, Annotated[int, days()]] = Field(
        default_factory=dict, examples=[{"raw/ohlcv_1m": 400}]
    )
    """Days a table keeps, by table; whole months go. Default: for ever."""
    cold: ColdStorage | None = None
    """Where older months go. Default: they stay in the lake."""
    alerts: Listed[SecretText] = ()
    """Apprise URLs that get every alert, besides alerts.jsonl. They hold secrets: better write them
    into MARKETDATA_ALERTS. Default: none.
    """
    web: WebAccess = Field(default_factory=WebAccess)
    """Who may use the UI besides a browser on its own machine."""
    retention_days: Annotated[int, days()] = 14
    """Days for which run logs, recovered alerts and the fetch log are kept; results and events stay
    for ever. Default: 14.
    """

    @field_validator("venues")
    @classmethod
    def name_venues(cls, venues: Mapping[str, Venue]) -> Mapping[str, Venue]:
        """Give each venue the name that is its key."""
        if not venues:
            raise fault("at least one venue is expected here")
        for name, venue in venues.items():
            venue._name = name
        return venues

    @field_serializer("consolidate")
    def serialize_consolidate(self, value: Mapping[Market, tuple[Market, ...]]) -> dict[str, Any]:
        """As it is written: symbols and venue ids."""
        return {whole.symbol: [part.venue for part in parts] for whole, parts in value.items()}

    @model_validator(mode="after")
    def check_places(self) -> Self:
        """Refuse files of other kinds inside the lake, where they would be taken for its own, and a
        folder that Dagster cannot open.
        """
        if unusable := set(str(self.state)) & set("?%"):
            raise fault(
                f"{self.state} has {' and '.join(sorted(unusable))} in it, and Dagster makes URLs "
                "of the paths of its databases; name another folder",
                at=("state",),
            )
        others = {
            "delta": self.delta and self.delta.location,
            "cold": self.cold and self.cold.lake,
        }
        for key, place in others.items():
            if place and f"{place}/".startswith(f"{self.lake}/"):
                raise fault(
                    f"{place} is the lake or lies in it; give it a place of its own", at=(key,)
                )
        if self.cold and self.cold.storage_class and not self.lake.startswith("s3://"):
            raise fault(
                "storage classes are for a lake in S3; name another `lake:` instead", at=("cold",)
            )
        return self

    @model_validator(mode="after")
    def check_consolidate(self) -> Self:
        """Refuse what is not one series: other symbols, or bars of other widths."""
        for whole, parts in self.consolidate.items():
            for index, part in enumerate(parts):
                if problem := self._find_consolidation_problem(part, parts[:index]):
                    raise fault(problem, at=("consolidate", whole.symbol, index))
        return self

    def _find_consolidation_problem(self, part: Market, before: tuple[Market, ...]) -> str | None:
        venue = self.venues.get(part.venue)
        if venue is None:
            hint = suggest_name(part.venue, self.venues)
            return (
                f"{part.venue!r} is not a venue of this universe; "
                f"it has {', '.join(self.venues)}{hint}"
            )
        if part in before:
            return f"{venue.name} is written twice; keep one"
        if part.symbol not in venue.symbols and not venue.patterns:
            return (
                f"{venue.name} has no {part.symbol} but {', '.join(venue.symbols)}; "
                f"add it there, or leave {venue.name} out"
            )
        first = self.venues[before[0].venue] if before else venue
        if venue.base != first.base:
            return (
                f"{first.name} has {first.base.name} bars and {venue.name} has "
                f"{venue.base.name} bars; only bars of the same width can be one series"
            )
        return None


class Settings(Universe):
    """One validated universe, the clock, and everything that follows from them."""

    clock: Clock | None = None
    """Replaces the real clock (MARKETDATA_NOW), for tests and replays."""
    source: str = Field("settings")
    """The file that the universe was read from."""

    def now(self) -> datetime:
        """Our own clock, UTC."""
        return self.clock.now() if self.clock else datetime.now(UTC)

    @property
    def markets(self) -> tuple[Market, ...]:
        """Every market of the universe, in the order written."""
        return tuple(market for venue in self.venues.values() for market in venue.markets)

    @property
    def since(self) -> datetime:
        """The first moment that is wanted of any venue, UTC, inclusive."""
        return min(venue.since for venue in self.venues.values())

    def limits(self, timeframe: Timeframe) -> FreshnessLimits:
        """What counts as late for a timeframe: as written in the universe, else 10 and 60 minutes,
        or 1 and 3 bars where that is more.
        """
        width = -(-timeframe.width // MINUTE)
        usual = {"warn": max(10, width), "error": max(60, 3 * width)}
        return self.freshness.get(timeframe) or FreshnessLimits.model_validate(usual)

    def market(self, key: str) -> Market:
        """The market of a key. Raises BadInput with the nearest known key."""
        venue = self.venues.get(key.partition(":")[0])
        if venue and (market := markets_of(venue.name, venue.symbols).get(key)):
            return market
        for whole, parts in self.consolidate.items():
            if whole.key == key:
                names = " ".join(part.key for part in parts)
                raise BadInput(
                    f"{key} is no market of a venue; it is made of {names}: name one of those"
                )
        near = difflib.get_close_matches(key, [m.key for m in self.markets], n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise BadInput(f"market {key!r} is not in {self.source}{hint}")

    def span(self, market: Market) -> Window:
        """What is wanted of a market: since its venue's first day, as far as retention keeps it,
        until its last day or our now.

        Of a consolidated market: all that is wanted of any of its venues.
        """
        if market in self.consolidate:
            return _hull(map(self.span, self.consolidate[market]))
        venue, whole = self.venues[market.venue], self.history(market)
        return whole & Window(self.kept_since(f"raw/ohlcv_{venue.base.label}"), whole.end)

    def history(self, market: Market) -> Window:
        """All that was ever wanted of a market, until a dated contract ends. Where retention has
        removed the base bars, coarser bars are still there.
        """
        if market in self.consolidate:
            return _hull(map(self.history, self.consolidate[market]))
        venue = self.venues[market.venue]
        ends = (venue.until, market.expires, self.now())
        return Window(venue.since, min(end for end in ends if end))

    def kept_since(self, table: str) -> datetime:
        """The start of the first month of a table that retention keeps: the oldest month that ended
        less than so many days ago. 1970 for a table without retention.
        """
        age = self.retention.get(table)
        return month_of(self.now() - timedelta(days=age)).start if age else EPOCH

    def base(self, market: Market) -> Timeframe:
        """The finest timeframe of a market, or of all venues of a consolidated one."""
        return self.venues[self.consolidate.get(market, (market,))[0].venue].base

    @property
    def raw_timeframes(self) -> tuple[Timeframe, ...]:
        """Every timeframe that some venue fetches, finest first."""
        return sort_timeframes(
            timeframe for venue in self.venues.values() for timeframe in venue.fetched_timeframes
        )

    def rollup_timeframes_of(self, market: Market) -> tuple[Timeframe, ...]:
        """The timeframes that are rolled up for a market: those made of its base, finest first."""
        base = self.venues[market.venue].base
        return tuple(tf for tf in self.timeframes if tf != base and tf.is_made_of(base))

    @property
    def rollup_timeframes(self) -> tuple[Timeframe, ...]:
        """Every timeframe that is rolled up for some market, finest first."""
        bases = {venue.base for venue in self.venues.values()}
        return tuple(
            tf
            for tf in self.timeframes
            if any(tf != base and tf.is_made_of(base) for base in bases)
        )

    @property
    def consolidated_timeframes(self) -> tuple[Timeframe, ...]:
        """The base of every consolidated market, finest first."""
        return sort_timeframes(self.base(market) for market in self.consolidate)

    def partitions(self, markets: Iterable[Market], wanted: Window) -> list[Partition]:
        """The partitions of these markets that touch the wanted window and lie in the universe,
        oldest first per market.
        """
        return [p for m in markets for p in partitions_of(m, self.span(m) & wanted)]


def _hull(windows: Iterable[Window]) -> Window:
    """The smallest window that holds all of these."""
    found = list(windows)
    return Window(min(w.start for w in found), max(w.end for w in found))

"""What the name of an archive file means: a format, a market, a timeframe and a span."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from marketdata_assets.errors import BadInput
from marketdata_assets.model.market import Market
from marketdata_assets.model.timeframe import MINUTE, TIMEFRAME_OF_LABEL, TIMEFRAMES, Timeframe
from marketdata_assets.model.window import Window, month_of, parse_time
from marketdata_assets.sources.archive.options import ImportOptions
from marketdata_assets.venues.facts import ArchiveFormat, MarketType, market_type
from marketdata_assets.venues.registry import ARCHIVE_FORMATS, facts_of

_USD_MARGINED, _COIN_MARGINED = "UMFUT", "CMFUT"
_KINDS = {
    _USD_MARGINED: " (USD-margined futures)",
    _COIN_MARGINED: " (coin-margined futures)",
}


@dataclass(frozen=True, slots=True)
class FileName:
    """The parts of an archive file's name. `window` is None where the name has no date."""

    format: ArchiveFormat
    symbol_id: str
    timeframe: Timeframe
    window: Window | None
    kind: str = ""

    @property
    def is_coin_margined(self) -> bool:
        """Whether its contracts are settled in coins, by the name."""
        return self.kind == _COIN_MARGINED or self.symbol_id.endswith("_PERP")

    def fits(self, market: Market) -> bool:
        """Return whether a file of this name can hold the market's bars."""
        archive = facts_of(market.venue).archive
        return (
            archive is not None
            and archive.format == self.format
            and archive.symbol_id(market.symbol) == self.symbol_id
            and (not self.kind or market_type(market.symbol) != MarketType.SPOT)
        )

    def __str__(self) -> str:
        return f"{self.format.name}'s {self.symbol_id}{_KINDS.get(self.kind, '')}"


def parse_file_name(path: Path, inner: str | None) -> FileName | None:
    """Return the parts of a file's name, or of the name of the one file inside a zip (`inner`).

    None where neither is a known archive's. Raises BadInput where they contradict each other.
    """
    outer = _parse_stem(path, path.stem)
    held = _parse_stem(path, Path(inner).stem) if inner else None
    if outer and held and _meaning(outer) != _meaning(held):
        raise BadInput(
            f"{path}: it holds {inner}, which is another file; give the zip its own name again"
        )
    return outer or held


def find_market(
    path: Path,
    name: FileName | None,
    options: ImportOptions,
    *,
    markets: Sequence[Market],
    has_header: bool,
) -> Market:
    """Return the market of a file: that of `options`, or the only one that fits its name.

    Raises BadInput for none, for several, and for one that the name contradicts.
    """
    if name and name.is_coin_margined:
        raise BadInput(
            f"{path}: coin-margined futures count contracts where other files count coins; "
            "they cannot be imported"
        )
    if options.market:
        if name and not name.fits(options.market):
            raise BadInput(
                f"{path}: it is {name}, and not {options.market.key}; name its market with --market"
            )
        return options.market
    if name is None:
        raise BadInput(f"{path}: its name does not contain the market; name it with --market")
    return _only_fitting(path, name, markets, has_header=has_header)


def find_timeframe(path: Path, name: FileName | None, options: ImportOptions) -> Timeframe:
    """Return the timeframe of a file by its name or by `options`. Raises BadInput."""
    found = name.timeframe if name else options.timeframe
    if found is None:
        raise BadInput(f"{path}: its name does not contain the timeframe; name it with --timeframe")
    if options.timeframe and options.timeframe != found:
        raise BadInput(
            f"{path}: its name says {found.name} and --timeframe {options.timeframe.name}"
        )
    return found


def month_file_url(
    market: Market, timeframe: Timeframe, month: Window, *, now: datetime
) -> str | None:
    """Return where a venue publishes the bars of a month; None where it does not, or not yet.

    A month's file appears on the first Monday after it; from the day after that it is expected.
    """
    archive = facts_of(market.venue).archive
    if archive is None:
        return None
    url = archive.month_urls.get(market_type(market.symbol))
    monday = month.end + timedelta(days=(7 - month.end.weekday()) % 7)
    if url is None or now < monday + timedelta(days=1):
        return None
    return url.format(
        id=archive.symbol_id(market.symbol),
        timeframe=timeframe.label,
        month=month.start.strftime("%Y-%m"),
    )


def _meaning(name: FileName) -> tuple[str, Timeframe, Window | None]:
    return name.symbol_id, name.timeframe, name.window


def _only_fitting(
    path: Path, name: FileName, markets: Sequence[Market], *, has_header: bool
) -> Market:
    fitting = [market for market in markets if name.fits(market)]
    if not fitting:
        known = ", ".join(market.key for market in markets)
        raise BadInput(f"{path}: no market of the universe is {name}; it has {known}")
    if len(fitting) > 1:
        keys = " or ".join(market.key for market in fitting)
        raise BadInput(f"{path}: it may be {keys}; say which with --market")
    (market,) = fitting
    is_spot = market_type(market.symbol) == MarketType.SPOT
    if has_header and is_spot and not name.format.spot_has_header:
        raise BadInput(
            f"{path}: it has a header, as {name.format.name}'s futures files have and its spot "
            f"files do not; if these are bars of {market.key}, say so with --market"
        )
    return market


# --------------------------------------------------------------------------------- parts of a name
def _parse_stem(path: Path, stem: str) -> FileName | None:
    for archive_format in ARCHIVE_FORMATS:
        if found := archive_format.file_name.fullmatch(stem):
            return FileName(
                archive_format,
                found["id"],
                timeframe=_timeframe_of(path, found),
                window=_window_of(found),
                kind=_kind_of(path, found),
            )
    return None


def _timeframe_of(path: Path, found: re.Match[str]) -> Timeframe:
    groups = found.groupdict()
    if "timeframe" in groups:
        if groups["timeframe"] not in TIMEFRAME_OF_LABEL:
            known = " ".join(TIMEFRAME_OF_LABEL)
            raise BadInput(f"{path}: {groups['timeframe']} is not one of {known}")
        return TIMEFRAME_OF_LABEL[groups["timeframe"]]
    minutes = int(groups["minutes"])
    fitting = [tf for tf in TIMEFRAMES.values() if tf.width == minutes * MINUTE]
    if not fitting:
        raise BadInput(f"{path}: bars of {minutes} minutes are none of {' '.join(TIMEFRAMES)}")
    return fitting[0]


def _window_of(found: re.Match[str]) -> Window | None:
    """The month or the day of the name's date."""
    date = found.groupdict().get("date")
    if date is None:
        return None
    if len(date) == len("2024-01"):
        return month_of(parse_time(f"{date}-01"))
    day = parse_time(date)
    return Window(day, day + timedelta(days=1))


def _kind_of(path: Path, found: re.Match[str]) -> str:
    """The kind of futures contract, by the name's prefix or by the folders of Binance's archive."""
    groups = found.groupdict()
    if "kind" not in groups or groups["kind"]:
        return groups.get("kind") or ""
    if "futures" not in path.parts:
        return ""
    return _COIN_MARGINED if "cm" in path.parts else _USD_MARGINED

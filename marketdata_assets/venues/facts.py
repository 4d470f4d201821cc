"""What can be known of a venue. The defaults hold for every venue without a file of its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from enum import StrEnum
from typing import Any, NamedTuple

from marketdata_assets.model.window import Window, parse_time


class MarketType(StrEnum):
    """What a symbol trades, in ccxt's words."""

    SPOT = "spot"
    LINEAR = "linear"
    """A contract that is settled in its quote currency: `BTC/USDT:USDT`."""
    INVERSE = "inverse"
    """A contract that is settled in another currency: `BTC/USD:BTC`."""
    OPTION = "option"
    """`BTC/USD:BTC-240329-60000-C`."""


def market_type(symbol: str) -> MarketType:
    """Return the type of a unified symbol."""
    quote, _, contract = symbol.partition("/")[2].partition(":")
    if not contract:
        return MarketType.SPOT
    settled, *terms = contract.split("-")
    if len(terms) > 1:
        return MarketType.OPTION
    return MarketType.LINEAR if settled == quote else MarketType.INVERSE


class VolumeUnit(StrEnum):
    """What ccxt's volume of a bar counts. A bar of ours counts the base currency."""

    BASE = "base"
    CONTRACTS = "contracts"
    """Contracts of `contractSize` each, which is an amount of base currency: linear ones only.
    Those of an inverse market are an amount of quote currency, from which no volume follows.
    """


DEFAULT_PAGE_SIZE = 300
"""Bars that a request returns at most, where neither the facts nor ccxt state a number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BarsEndpoint:
    """How a venue's API serves the bars of one market type."""

    page_size: int | None = None
    """Bars that one request really returns at most; None: as many as ccxt states."""
    requests_per_minute: int = 60
    """Requests for bars that the venue lets through in a minute, for estimates."""
    klines_method: str | None = None
    """ccxt's method for raw klines in Binance's format; None: bars come through `fetch_ohlcv`."""
    weight_per_minute: int | None = None
    """Request weight that the venue allows in a minute; None: it counts no weights."""
    newest_bars_only: int | None = None
    """The API returns only so many of the newest bars, whatever is requested; None: all bars."""
    has_start: bool = True
    """False: ccxt sends no start, and every answer holds the newest bars."""
    takes_until: bool = False
    """A request also says until when bars are wanted, by ccxt's parameter `until`."""
    limits: tuple[int, ...] | None = None
    """The only numbers of bars that a request may name, in order; none of them: it may name none;
    None: any.
    """
    volume_unit: VolumeUnit | None = VolumeUnit.BASE
    """What ccxt's volume counts, or that of `row_keys`; None: not known, so nothing is fetched."""
    row_keys: Mapping[str, int | str] = field(default_factory=dict)
    """By column of a bar: its key in the venue's own row, where that says more than ccxt's bar.
    `closed` is the venue's flag of a closed bar, true for 1, "1", True and "true".
    """

    def limit(self, bars: int, page_size: int) -> int | None:
        """Return the number of bars that a request names to get `bars`; None: it names none."""
        if not self.has_start:
            return page_size
        if self.limits is None:
            return bars
        return next((limit for limit in self.limits if limit >= bars), None)


@dataclass(frozen=True, slots=True)
class ArchiveFormat:
    """One kind of file in which venues publish bars."""

    name: str
    columns: tuple[str, ...]
    """The file's columns in order, those of a bar by their names in `model.bar`."""
    file_name: re.Pattern[str]
    """The name without its suffix. Groups: `id` (`Archive.symbol_id`), `timeframe` or `minutes`,
    and, where the name has them, `date` (a month or a day) and `kind` (of a futures contract)."""
    is_distinctive: bool = True
    """False where other files may well have such names."""
    spot_has_header: bool = True
    """False where files of spot markets never begin with a line of column names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Archive:
    """The files in which one venue publishes its bars."""

    format: ArchiveFormat
    market_types: tuple[MarketType, ...] = (MarketType.SPOT,)
    """The market types of which there are files."""
    asset_names: Mapping[str, str] = field(default_factory=dict)
    """By ccxt's name of an asset: its name in the files, where that differs."""
    month_urls: Mapping[MarketType, str] = field(default_factory=dict)
    """Where the file of one month is published: a URL with `{id}`, `{timeframe}` and `{month}`."""
    files_per_month: int = 1
    """Downloads that one month takes, for estimates."""
    overview_url: str | None = None
    """The page that lists the files, where they have no URL by month."""
    is_final: bool = False
    """True where bars that a file does not hold never existed; no request can return them."""

    def symbol_id(self, symbol: str) -> str | None:
        """Return a unified symbol as file names write it; None where there are no such files."""
        if market_type(symbol) not in self.market_types:
            return None
        base, _, rest = symbol.partition("/")
        quote, _, contract = rest.partition(":")
        expiry = contract.partition("-")[2]
        names = self.asset_names
        return names.get(base, base) + names.get(quote, quote) + (f"_{expiry}" if expiry else "")


def list_types(**words: Sequence[str]) -> Callable[[Collection[MarketType]], dict[str, list[str]]]:
    """Return a `markets_option` for a venue whose option is a list `types` of its own words.

    The keywords are market types; a type without one is not narrowed down.
    """

    def option(types: Collection[MarketType]) -> dict[str, list[str]]:
        wanted = (word for kind in MarketType if kind in types for word in words.get(kind, ()))
        return {"types": list(dict.fromkeys(wanted))}

    return option


class Halt(NamedTuple):
    """A halt of all markets of a venue, as somebody reported it. The bars have to confirm it.

    `window` is approximate. Only reports of others belong here: a row that was read off our own
    bars would confirm itself.
    """

    window: Window
    description: str
    reported_by: str


def parse_halts(rows: str, *, description: str, reported_by: str) -> tuple[Halt, ...]:
    """Return one halt for each line `start end` (ISO times in UTC, `end` exclusive)."""
    spans = [line.split() for line in rows.splitlines() if line]
    return tuple(
        Halt(Window(parse_time(start), parse_time(end)), description, reported_by)
        for start, end in spans
    )


class Tolerance(NamedTuple):
    """How far a venue's own coarse bar may differ from the sum of its finer bars, in one column.

    Within either limit counts: `absolute`, in the column's unit, or `relative`, a share of the
    venue's own value.
    """

    absolute: Decimal
    relative: Decimal
    reason: str
    measured: str
    """On which bars the limits were measured, and what was found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VenueFacts:
    """All that is known of one venue."""

    venue: str
    """ccxt's id."""
    endpoints: Mapping[MarketType, BarsEndpoint] = field(default_factory=dict)
    """By market type. Without one, spot bars are ccxt's, and bars of contracts are not fetched,
    because the unit of their volume is not known.
    """
    markets_option: Callable[[Collection[MarketType]], Any] | None = None
    """ccxt's option `fetchMarkets` of this venue that lists these types only; None: what ccxt lists
    by itself.
    """
    market_lists: Mapping[MarketType, str] = field(default_factory=dict)
    """By market type: ccxt's method that lists it, for a venue without such an option. Those of
    other types are not called.
    """
    repairs: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    """By ccxt's method of a request: what its answer needs before ccxt can read it."""
    archive: Archive | None = None
    """The files in which it publishes bars; None: none that we can read."""
    odd_timeframes: Mapping[str, str] = field(default_factory=dict)
    """By timeframe: why the venue's bars of that name are none of ours. They are not fetched."""
    halts: tuple[Halt, ...] = ()
    """Halts of all of its markets, oldest first."""
    tolerances: Mapping[str, Tolerance] = field(default_factory=dict)
    """By column of a bar. A column that is not here is compared digit for digit; no tolerance is
    wider than what was measured."""

    def endpoint(self, symbol: str) -> BarsEndpoint:
        """Return how the bars of a unified symbol are requested."""
        kind = market_type(symbol)
        unit = VolumeUnit.BASE if kind is MarketType.SPOT else None
        return self.endpoints.get(kind) or BarsEndpoint(volume_unit=unit)

    def halts_in(self, window: Window) -> list[Halt]:
        """Return the known halts that share a moment with the window."""
        return [halt for halt in self.halts if halt.window & window]

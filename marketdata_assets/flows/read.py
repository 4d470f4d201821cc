"""Read: bars of any timeframe, and the coverage that explains every bar that is not there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import polars as pl

from marketdata_assets.errors import BadInput
from marketdata_assets.lake.ledger import State
from marketdata_assets.lake.tables import Table, raw, rollup
from marketdata_assets.model.market import Market
from marketdata_assets.model.window import Timeframe, Window, partitions_of
from marketdata_assets.toolbox import Toolbox


def table_of(toolbox: Toolbox, market: Market, timeframe: Timeframe) -> Table:
    """Where the bars of a timeframe are: the base as fetched, coarser ones rolled up, else a reference. Raises BadInput."""
    venue = toolbox.settings.venues[market.venue]
    if timeframe == venue.base:
        return raw(timeframe)
    if timeframe in toolbox.settings.rolled(market):
        return rollup(timeframe)
    if timeframe in venue.reference:
        return raw(timeframe)
    known = [tf.name for tf in (venue.base, *toolbox.settings.rolled(market), *venue.reference)]
    raise BadInput(f"{market.key} has no {timeframe.name} bars; it has {' '.join(dict.fromkeys(known))}")


def read_bars(toolbox: Toolbox, market: Market, timeframe: Timeframe, window: Window) -> pl.DataFrame:
    """The bars that open inside the window, sorted by open_time; what is not stored is not there. Raises Damaged."""
    table = table_of(toolbox, market, timeframe)
    if table.layer == "rollup" and toolbox.settings.rollups == "duckdb":
        return toolbox.warehouse.read(table, market, window)
    span = toolbox.settings.span(market) & Window(window.start, window.end + timeframe.width)
    frames = [frame for p in partitions_of(market, span) if (frame := toolbox.lake.read(table, p)) is not None]
    if not frames:
        return pl.DataFrame(schema={column.name: column.dtype for column in table.columns})
    inside = pl.col("open_time").is_between(window.start, window.end, closed="left")
    return pl.concat(frames).filter(inside)


@dataclass(slots=True)
class Coverage:
    """What became of every expected bar of a market, in base bars counted as 1m: the parts sum to `expected`."""

    market: str
    expected: int = 0
    present: int = 0
    quarantined: int = 0
    no_trade: int = 0
    halted: int = 0
    not_listed: int = 0
    delisted: int = 0
    missing_at_source: int = 0
    not_fetched: int = 0

    def as_dict(self) -> dict[str, str | int]:
        """In the order of the contract."""
        return asdict(self)


_PARTS = {"no_bars": "missing_at_source", "unanswered": "missing_at_source", "quarantined": "quarantined"}


def coverage(toolbox: Toolbox, markets: Iterable[Market]) -> list[Coverage]:
    """One sum per market. Bars count as present only while the object that holds them lies in the lake."""
    return [_coverage(toolbox, market) for market in markets]


def _coverage(toolbox: Toolbox, market: Market) -> Coverage:
    base = toolbox.settings.venues[market.venue].base
    table, span = raw(base), toolbox.settings.span(market)
    states, gaps = toolbox.ledger.states(table, market), toolbox.ledger.gap_totals(table, market)
    listed = toolbox.ledger.listed(market)
    found = Coverage(market.key)
    for partition in partitions_of(market, span):
        wanted = partition.opens(base) & Window(base.ceil(span.start), base.floor(span.end))
        expected = wanted.count(base)
        early = (wanted & Window(wanted.start, base.floor(listed))).count(base) if listed else 0
        state = states.get(partition.month_key)
        found.expected += expected
        found.not_listed += early
        if state is None or state.bytes is None or toolbox.lake.size(table, partition) != state.bytes:
            found.not_fetched += expected - early
            continue
        _add_partition(found, state, expected - early, {r: n for (m, r), n in gaps.items() if m == partition.month_key})
    return _in_minutes(found, base)


def _add_partition(found: Coverage, state: State, expected: int, gaps: dict[str, int]) -> None:
    present = min(state.rows, expected)
    found.present += present
    left = expected - present
    for reason, bars in gaps.items():
        part = min(bars, left)
        setattr(found, _PARTS[reason], getattr(found, _PARTS[reason]) + part)
        left -= part
    found.not_fetched += left


def _in_minutes(found: Coverage, base: Timeframe) -> Coverage:
    for name, value in asdict(found).items():
        if isinstance(value, int):
            setattr(found, name, value * base.minutes)
    return found

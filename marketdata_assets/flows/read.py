"""Read: bars of any timeframe, and the coverage that explains every bar that is not there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import polars as pl

from marketdata_assets.errors import BadInput
from marketdata_assets.lake.ledger import State
from marketdata_assets.lake.tables import Table, raw, rollup
from marketdata_assets.model.market import Market
from marketdata_assets.model.window import Partition, Timeframe, Window, partitions_of
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
    span, listed = toolbox.settings.span(market), toolbox.ledger.listed(market)
    states = toolbox.ledger.states(raw(base), market)
    found = Coverage(market.key)
    for partition in partitions_of(market, span):
        wanted = partition.opens(base) & Window(base.ceil(span.start), base.floor(span.end))
        late = Window(max(wanted.start, base.floor(listed)), wanted.end) if listed else wanted
        found.expected += wanted.count(base)
        found.not_listed += wanted.count(base) - late.count(base)
        _add_partition(toolbox, found, raw(base), partition, late, states.get(partition.month_key))
    return _in_minutes(found, base)


def _add_partition(toolbox: Toolbox, found: Coverage, table: Table, partition: Partition, wanted: Window, state: State | None) -> None:
    """One month's wanted window: what lies in the lake, what the ledger explains, and the rest that was not fetched."""
    left = wanted.count(table.timeframe)
    if state is not None and state.bytes is not None and toolbox.lake.size(table, partition) == state.bytes:
        present = _present(toolbox, table, partition, wanted, state)
        found.present += present
        left -= present
        for gap in toolbox.ledger.gaps(table, partition):
            part = min(left, (gap.window & wanted).count(table.timeframe))
            setattr(found, _PARTS[gap.reason], getattr(found, _PARTS[gap.reason]) + part)
            left -= part
    found.not_fetched += left


def _present(toolbox: Toolbox, table: Table, partition: Partition, wanted: Window, state: State) -> int:
    """Bars inside the window: the ledger's count, or the object's own where it also holds bars that are not wanted now."""
    if wanted.start <= state.start and (state.newest is None or state.newest < wanted.end):
        return state.rows
    bars = toolbox.lake.read(table, partition)
    return 0 if bars is None else int(bars["open_time"].is_between(wanted.start, wanted.end, closed="left").sum())


def _in_minutes(found: Coverage, base: Timeframe) -> Coverage:
    for name, value in asdict(found).items():
        if isinstance(value, int):
            setattr(found, name, value * base.minutes)
    return found

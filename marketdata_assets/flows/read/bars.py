"""Read: bars of any timeframe, and the coverage that explains every bar that is not there."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from marketdata_assets.context import Toolbox
from marketdata_assets.errors import BadInput
from marketdata_assets.model.market import CONSOLIDATED_VENUE, Market
from marketdata_assets.model.partition import partitions_of
from marketdata_assets.model.table import Table, consolidated_table, raw_table, rollup_table
from marketdata_assets.model.timeframe import TIMEFRAMES, Timeframe
from marketdata_assets.model.window import Window


def known_market(toolbox: Toolbox, key: str) -> Market:
    """A market of the universe, or one that was taken out of it and whose bars are still stored.
    Raises BadInput.
    """
    for market in toolbox.settings.consolidate:
        if market.key == key:
            return market
    try:
        return toolbox.settings.market(key)
    except BadInput:
        try:
            former = Market.parse(key)
        except BadInput:
            former = None
        if former is not None and toolbox.ledger.stored_span(former):
            return former
        raise


def table_of(toolbox: Toolbox, market: Market, timeframe: Timeframe) -> Table:
    """Where the bars of a timeframe are: the base as fetched, coarser ones rolled up, else a
    reference. Raises BadInput.
    """
    if market.venue == CONSOLIDATED_VENUE:
        return _consolidated_table(toolbox, market, timeframe)
    base, rolled, reference = _timeframes(toolbox, market)
    if timeframe == base:
        return raw_table(timeframe)
    if timeframe in rolled:
        return rollup_table(timeframe)
    if timeframe in reference:
        return raw_table(timeframe)
    known = [tf.name for tf in (base, *rolled, *reference)]
    raise BadInput(
        f"{market.key} has no {timeframe.name} bars; it has {' '.join(dict.fromkeys(known))}"
    )


def base_of(toolbox: Toolbox, market: Market) -> Timeframe:
    """The finest timeframe that is fetched of a market; of a former one, that is stored."""
    return _timeframes(toolbox, market)[0]


def _consolidated_table(toolbox: Toolbox, market: Market, timeframe: Timeframe) -> Table:
    settings, stored = toolbox.settings, toolbox.ledger.stored_span(market)
    known = [tf for tf in TIMEFRAMES.values() if consolidated_table(tf).name in stored]
    base = [settings.base(market)] if market in settings.consolidate else known
    if timeframe not in base:
        raise BadInput(
            f"{market.key} has no {timeframe.name} bars; it has {' '.join(tf.name for tf in base)}"
        )
    return consolidated_table(timeframe)


def in_warehouse(toolbox: Toolbox, table: Table) -> bool:
    """Whether a table lies in DuckDB, and not in the lake."""
    return table.layer == "rollup" and toolbox.settings.rollups == "duckdb"


def _timeframes(
    toolbox: Toolbox, market: Market
) -> tuple[Timeframe, Sequence[Timeframe], Sequence[Timeframe]]:
    """The base, what is rolled up from it and the references of a market; of a former one by what is
    stored.
    """
    settings = toolbox.settings
    if market in settings.markets:
        venue = settings.venues[market.venue]
        return venue.base, settings.rolled(market), venue.reference
    base, *reference = [
        tf for tf in TIMEFRAMES.values() if raw_table(tf).name in toolbox.ledger.stored_span(market)
    ]
    return base, [tf for tf in settings.timeframes if tf.width > base.width], reference


def read_bars(
    toolbox: Toolbox, market: Market, timeframe: Timeframe, window: Window
) -> pl.DataFrame:
    """The bars that open inside the window, sorted by open_time; what is not stored is not there.
    Raises Damaged.
    """
    table = table_of(toolbox, market, timeframe)
    if in_warehouse(toolbox, table):
        return toolbox.warehouse.read(table, market, window)
    span = _stored_span(toolbox, market) & Window(window.start, window.end + timeframe.width)
    frames = [
        frame
        for p in partitions_of(market, span)
        if (frame := toolbox.lake.read(table, p)) is not None
    ]
    if not frames:
        return pl.DataFrame(schema=table.schema)
    inside = pl.col("open_time").is_between(window.start, window.end, closed="left")
    return pl.concat(frames).filter(inside)


def _stored_span(toolbox: Toolbox, market: Market) -> Window:
    if market in toolbox.settings.markets or market in toolbox.settings.consolidate:
        return toolbox.settings.history(market)
    spans = toolbox.ledger.stored_span(market).values()
    return Window(min(span.start for span in spans), max(span.end for span in spans))

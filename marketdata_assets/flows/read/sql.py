"""SQL: views of all tables in a DuckDB connection, each over the files that are there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from marketdata_assets.context import Toolbox
from marketdata_assets.flows.read.bars import known_market
from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import partitions_of
from marketdata_assets.model.table import (
    Table,
    consolidated_table,
    parity_table,
    raw_table,
    reconciled_table,
    rollup_table,
)
from marketdata_assets.model.window import Window
from marketdata_assets.storage.views import open_views

if TYPE_CHECKING:
    from marketdata_assets.storage.views import Connection


@contextmanager
def connected(toolbox: Toolbox, keys: Sequence[str] | None, window: Window) -> Iterator[Connection]:
    """Views `raw.ohlcv_<timeframe>`, `rollup.ohlcv_<timeframe>` and so on over these markets' (or all)
    months in the window.
    """
    settings = toolbox.settings
    markets = (
        [known_market(toolbox, key) for key in keys]
        if keys
        else [*settings.markets, *settings.consolidate]
    )
    tables = [raw_table(tf) for tf in settings.raw_timeframes]
    tables += [
        table(tf)
        for tf in settings.consolidated_timeframes
        for table in (consolidated_table, reconciled_table)
    ]
    in_lake = (
        [rollup_table(tf) for tf in settings.rollup_timeframes]
        if settings.rollups == "parquet"
        else []
    )
    judged = [
        parity_table(tf)
        for tf in settings.rollup_timeframes
        if any(tf in venue.reference for venue in settings.venues.values())
    ]
    files = {
        table: _files(toolbox, table, markets, window) for table in (*tables, *in_lake, *judged)
    }
    warehouse = None if in_lake or not toolbox.warehouse.exists else toolbox.warehouse
    with open_views(files, warehouse) as connection:
        yield connection


def _files(toolbox: Toolbox, table: Table, markets: Sequence[Market], window: Window) -> list[str]:
    """One walk or one listing of the table, and of it what is wanted."""
    there = toolbox.lake.list_sizes(table)
    wanted = Window(window.start, window.end + table.timeframe.width)
    partitions = [
        p
        for market in markets
        for p in partitions_of(market, wanted)
        if (market.key, p.month_key) in there
    ]
    return toolbox.lake.find_uris(table, partitions, all_exist=True)

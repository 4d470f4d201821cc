"""SQL: views of all tables in a DuckDB connection, each over the files that are there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from marketdata_assets.flows.read.bars import BarReader
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import partitions_of
from marketdata_assets.model.table import Table, consolidated, parity, raw, reconciled, rollup
from marketdata_assets.model.window import Window
from marketdata_assets.settings.universe import Settings
from marketdata_assets.storage.bars import BarStorage
from marketdata_assets.storage.parquet import Lake
from marketdata_assets.storage.views import open_views

if TYPE_CHECKING:
    from marketdata_assets.storage.views import Connection


@contextmanager
def connected(
    settings: Settings,
    ledger: Ledger,
    storage: BarStorage,
    *,
    keys: Sequence[str] | None,
    window: Window,
) -> Iterator[Connection]:
    """Views `raw.ohlcv_<timeframe>`, `rollup.ohlcv_<timeframe>` and so on over these markets' (or all)
    months in the window.
    """
    settings = settings
    markets = (
        [BarReader(settings, ledger, storage).find_market(key) for key in keys]
        if keys
        else [*settings.markets, *settings.consolidate]
    )
    tables = [raw(tf) for tf in settings.raw_timeframes]
    tables += [
        table(tf) for tf in settings.consolidated_timeframes for table in (consolidated, reconciled)
    ]
    in_lake = (
        [rollup(tf) for tf in settings.rollup_timeframes] if settings.rollups == "parquet" else []
    )
    judged = [
        parity(tf)
        for tf in settings.rollup_timeframes
        if any(tf in venue.reference for venue in settings.venues.values())
    ]
    files = {
        table: _files(storage.lake, table, markets, window=window)
        for table in (*tables, *in_lake, *judged)
    }
    warehouse = None if in_lake or not storage.warehouse.exists else storage.warehouse
    with open_views(files, warehouse) as connection:
        yield connection


def _files(lake: Lake, table: Table, markets: Sequence[Market], *, window: Window) -> list[str]:
    """One walk or one listing of the table, and of it what is wanted."""
    there = lake.sizes(table)
    wanted = Window(window.start, window.end + table.timeframe.width)
    partitions = [
        p
        for market in markets
        for p in partitions_of(market, wanted)
        if (market.key, p.month_key) in there
    ]
    return lake.uris(table, partitions, known=True)

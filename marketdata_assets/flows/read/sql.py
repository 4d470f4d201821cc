"""SQL: views of all tables in a DuckDB connection, each over the files that exist."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from marketdata_assets.flows.read.bars import BarReader
from marketdata_assets.ledger.ledger import Ledger
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
from marketdata_assets.settings.universe import Settings
from marketdata_assets.storage.bars import BarStorage
from marketdata_assets.storage.lake import Lake
from marketdata_assets.storage.views import open_views, restrict

if TYPE_CHECKING:
    from marketdata_assets.storage.views import Connection


@contextmanager
def open_sql_views(
    settings: Settings,
    ledger: Ledger,
    storage: BarStorage,
    *,
    keys: Sequence[str] | None,
    window: Window,
    unsafe: bool = True,
) -> Iterator[Connection]:
    """Open views `raw.ohlcv_<timeframe>`, `rollup.ohlcv_<timeframe>` and so on.

    They show the months in the window of the markets with these keys; None means all of them.
    Unless `unsafe`, queries read no other files.
    Raises BadInput, Damaged, StoreFailed.
    """
    reader = BarReader(settings, ledger, storage)
    every = [*settings.markets, *settings.consolidate]
    markets = [reader.find_market(key) for key in keys] if keys else every
    files = {
        table: _files(storage.lake, table, markets, window=window)
        for table in _tables_in_lake(settings, storage)
    }
    if storage.rollups_in_warehouse and settings.rollup_timeframes:
        reader.ensure_rolled_up(markets, settings.rollup_timeframes[-1], window)
    cold = storage.lake.cold_location
    uses_warehouse = storage.rollups_in_warehouse and storage.warehouse.exists
    with open_views(files, storage.warehouse if uses_warehouse else None) as connection:
        if not unsafe:
            restrict(connection, [place for place in (storage.lake.location, cold) if place])
        yield connection


def _tables_in_lake(settings: Settings, storage: BarStorage) -> list[Table]:
    tables = [raw_table(tf) for tf in settings.raw_timeframes]
    for timeframe in settings.consolidated_timeframes:
        tables += [consolidated_table(timeframe), reconciled_table(timeframe)]
    references = {tf for venue in settings.venues.values() for tf in venue.reference}
    for timeframe in settings.rollup_timeframes:
        if not storage.rollups_in_warehouse:
            tables.append(rollup_table(timeframe))
        if timeframe in references:
            tables.append(parity_table(timeframe))
    return tables


def _files(lake: Lake, table: Table, markets: Sequence[Market], *, window: Window) -> list[str]:
    """Return the wanted objects of a table, from one listing. Raises Damaged and
    BarsMissing.
    """
    stored = lake.list_proven_sizes(table)
    wanted = Window(window.start, table.timeframe.shift(window.end, 1))
    months = [p for market in markets for p in partitions_of(market, wanted)]
    wanted_months = [p for p in months if p.stored_key in stored]
    known = lake.records(table, months)
    for partition in months:
        key = partition.stored_key
        if stored.get(key) is None and (key in stored or known is None or key in known):
            lake.read_stored(table, partition, wanted, known=known)
    return [*lake.find_uris(table, wanted_months, all_exist=True).values()]

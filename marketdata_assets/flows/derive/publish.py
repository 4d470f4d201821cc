"""Publish: what the lake and the warehouse hold goes into Delta Lake tables, for whoever reads
those.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import polars as pl

from marketdata_assets.context import Toolbox
from marketdata_assets.errors import BadInput, MarketDataError
from marketdata_assets.flows.read.bars import in_warehouse, table_of
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import Table, raw_table, rollup_table
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.storage.delta import DeltaTables, open_delta_tables
from marketdata_assets.storage.delta_maintenance import DeltaMaintenance


@dataclass(frozen=True, slots=True)
class Published:
    """One partition after a publication. `version` is None where nothing is stored that could be
    published.

    `changed`: the Delta table held something else before. `error` is set when it failed; then it
    holds what it held.
    """

    partition: Partition
    rows: int = 0
    changed: bool = False
    version: int | None = None
    bytes: int = 0
    error: MarketDataError | None = None


def publish(
    toolbox: Toolbox, timeframe: Timeframe, partitions: Sequence[Partition]
) -> Iterator[Published]:
    """Make the Delta tables of a timeframe hold what is stored of each partition; one that fails does
    not keep the others.

    What is not stored here erases nothing there: a Delta table keeps what retention has removed
    from the lake.
    """
    tables = _tables(toolbox)
    for partition in partitions:
        try:
            done = _publish(toolbox, tables, timeframe, partition)
        except MarketDataError as error:
            done = Published(partition, error=error)
        yield done


def maintain(toolbox: Toolbox, dry_run: bool = False) -> dict[str, DeltaMaintenance]:
    """Compact and clean every Delta table that is there; what was done, or would be, by the table's
    name.
    """
    tables, settings = _tables(toolbox), toolbox.settings.delta
    wanted = [
        table(tf)
        for tf in (settings.timeframes if settings else ())
        for table in (raw_table, rollup_table)
    ]
    found = {
        table.name: tables.maintain(
            table, settings.history_days if settings else 0, dry_run=dry_run
        )
        for table in wanted
    }
    return {name: done for name, done in found.items() if done is not None}


def _tables(toolbox: Toolbox) -> DeltaTables:
    settings = toolbox.settings
    if settings.delta is None:
        raise BadInput(
            f"{settings.source}: there is no `delta:`; write `delta: {{location: data/delta, timeframes: [1h]}}`"
        )
    return open_delta_tables(settings.delta.location)


def _publish(
    toolbox: Toolbox, tables: DeltaTables, timeframe: Timeframe, partition: Partition
) -> Published:
    try:
        table = table_of(toolbox, partition.market, timeframe)
    except BadInput:
        return Published(partition)  # a market with another base has no such bars
    bars = _stored(toolbox, table, partition)
    if bars is None:
        return Published(partition)
    done = tables.replace(table, partition, bars)
    return Published(partition, done.rows, done.changed, done.version, done.bytes)


def _stored(toolbox: Toolbox, table: Table, partition: Partition) -> pl.DataFrame | None:
    """The partition's bars, or None where it is not stored."""
    if not in_warehouse(toolbox, table):
        return toolbox.lake.read(table, partition)
    bars = toolbox.warehouse.read(table, partition.market, partition.open_times(table.timeframe))
    return None if bars.is_empty() else bars

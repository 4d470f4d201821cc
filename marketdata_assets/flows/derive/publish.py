"""Publish: what the lake and the warehouse hold goes into Delta Lake tables, for whoever reads
those.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import polars as pl

from marketdata_assets.errors import BadInput, MarketDataError
from marketdata_assets.flows.read.bars import BarReader
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import Table, raw, rollup
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.settings.universe import Settings
from marketdata_assets.storage.bars import BarStorage
from marketdata_assets.storage.delta import DeltaTables, Maintained, delta_tables


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


@dataclass(frozen=True, slots=True)
class DeltaPublisher:
    """."""

    settings: Settings
    ledger: Ledger
    storage: BarStorage

    def publish(self, timeframe: Timeframe, partitions: Sequence[Partition]) -> Iterator[Published]:
        """Make the Delta tables of a timeframe hold what is stored of each partition; one that fails does
        not keep the others.

        What is not stored here erases nothing there: a Delta table keeps what retention has removed
        from the lake.
        """
        tables = _delta_tables(self.settings)
        for partition in partitions:
            try:
                done = self._publish(tables, timeframe, partition)
            except MarketDataError as error:
                done = Published(partition, error=error)
            yield done

    def _publish(
        self, tables: DeltaTables, timeframe: Timeframe, partition: Partition
    ) -> Published:
        try:
            table = BarReader(self.settings, self.ledger, self.storage).table_of(
                partition.market, timeframe
            )
        except BadInput:
            return Published(partition)  # a market with another base has no such bars
        bars = self._stored(table, partition)
        if bars is None:
            return Published(partition)
        done = tables.replace(table, partition, bars)
        return Published(partition, done.rows, done.changed, done.version, done.bytes)

    def _stored(self, table: Table, partition: Partition) -> pl.DataFrame | None:
        """The partition's bars, or None where it is not stored."""
        if not self.storage.in_warehouse(table):
            return self.storage.lake.read(table, partition)
        bars = self.storage.warehouse.read(
            table, partition.market, partition.opens(table.timeframe)
        )
        return None if bars.is_empty() else bars


def maintain(settings: Settings, dry_run: bool = False) -> dict[str, Maintained]:
    """Compact and clean every Delta table that is there; what was done, or would be, by the table's
    name.
    """
    tables, delta = _delta_tables(settings), settings.delta
    wanted = [table(tf) for tf in (delta.timeframes if delta else ()) for table in (raw, rollup)]
    found = {
        table.name: tables.maintain(table, delta.history_days if delta else 0, dry_run)
        for table in wanted
    }
    return {name: done for name, done in found.items() if done is not None}


def _delta_tables(settings: Settings) -> DeltaTables:
    if settings.delta is None:
        raise BadInput(
            f"{settings.source}: there is no `delta:`; write `delta: {{location: data/delta, timeframes: [1h]}}`"
        )
    return delta_tables(settings.delta.location)

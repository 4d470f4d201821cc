"""Every stored table of bars: the lake, and the warehouse where rollups go to DuckDB."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import polars as pl

from marketdata_assets.errors import Damaged
from marketdata_assets.model.partition import Partition, PartitionKey
from marketdata_assets.model.table import Table
from marketdata_assets.storage.lake import Lake
from marketdata_assets.storage.warehouse import Warehouse

WAREHOUSE_LOCK = "warehouse"
"""The lock that a process holds while it writes to the warehouse."""


@dataclass(frozen=True, slots=True)
class BarStorage:
    """The lake, the warehouse, and which of them holds a table."""

    lake: Lake
    warehouse: Warehouse
    rollups_in_warehouse: bool

    def in_warehouse(self, table: Table) -> bool:
        """Return whether the table lies in DuckDB; otherwise it lies in the lake."""
        return table.layer == "rollup" and self.rollups_in_warehouse

    def outdated_rollups(self, expected: Mapping[PartitionKey, str]) -> list[PartitionKey]:
        """Return the partitions whose rollups in the warehouse were made of other raw rows than the
        ledger says (`expected`: their digests), because the file is lost, older or damaged.
        """
        try:
            found = self.warehouse.sources()
        except Damaged:
            found = {}
        if found is None:
            return []
        return [key for key, source in expected.items() if found.get(key) != source]

    def read(self, table: Table, partition: Partition) -> pl.DataFrame:
        """Return the bars of a partition, sorted by open_time; none when nothing is stored.

        Raises Damaged, StoreFailed.
        """
        if self.in_warehouse(table):
            return self.warehouse.read(
                table, partition.market, partition.open_times(table.timeframe)
            )
        stored = self.lake.read(table, partition)
        return pl.DataFrame(schema=table.schema) if stored is None else stored

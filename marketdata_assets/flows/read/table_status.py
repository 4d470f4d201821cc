"""The status of every partition of a raw table, from one reading of the ledger and the lake."""

from __future__ import annotations

from collections.abc import Container

from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.model.partition import PartitionKey
from marketdata_assets.model.partition_status import PartitionStatus, partition_status
from marketdata_assets.model.table import Table
from marketdata_assets.storage.lake import Lake


class TableStatus:
    """One raw table. With `search_lake`, objects that are lost are found; else the ledger counts.

    `with_gaps` holds the partitions with a gap that makes them incomplete.
    """

    def __init__(
        self,
        ledger: Ledger,
        lake: Lake,
        table: Table,
        *,
        search_lake: bool,
        with_gaps: Container[PartitionKey],
    ) -> None:
        self.summaries = ledger.partitions.summaries(table)
        self._sizes = lake.list_proven_sizes(table) if search_lake else None
        self._with_gaps = with_gaps

    def of(self, key: PartitionKey, wanted: tuple[str, str]) -> PartitionStatus:
        """Return the status of a partition; `wanted` is `[start, end)` as ISO text."""
        summary = self.summaries.get(key)
        size = summary.bytes if summary else None
        if self._sizes is not None:
            size = self._sizes.get(key)
        return partition_status(summary, size, wanted, has_due_gap=key in self._with_gaps)

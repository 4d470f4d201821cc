"""Retire: old months leave the lake, or move to cheaper storage, as the universe says per table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import NamedTuple

from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.ledger.records import PartitionSummary
from marketdata_assets.model.partition import Partition, PartitionKey, adjacent_partition
from marketdata_assets.model.table import (
    Table,
    consolidated_table,
    raw_table,
    reconciled_table,
    rollup_table,
)
from marketdata_assets.model.window import format_time, month_of
from marketdata_assets.settings.parts import ColdStorage
from marketdata_assets.settings.universe import Settings
from marketdata_assets.storage.bars import WAREHOUSE_LOCK, BarStorage

IN_USE = "a run works on it"


class RetirementAction(StrEnum):
    """What happens to an old month."""

    REMOVED = "removed"
    MOVED = "moved"
    KEPT = "kept"


class Retirement(NamedTuple):
    """What happened to one month of one table, or would in a dry run.

    `message` is why, or where to. Without a partition, it is all old bars of a table in the
    warehouse.
    """

    table: Table
    partition: Partition | None
    action: RetirementAction
    message: str
    bytes: int = 0

    def as_dict(self) -> dict[str, str | int]:
        """Return it as a row of a table."""
        return {
            "table": self.table.name,
            "partition": self.partition.key if self.partition else "all",
            "what": self.action.value,
            "bytes": self.bytes,
            "says": self.message,
        }


@dataclass(frozen=True, slots=True)
class Retirer:
    """Removes and moves old months."""

    settings: Settings
    ledger: Ledger
    storage: BarStorage

    def retire(self, dry_run: bool = False) -> Iterator[Retirement]:
        """Remove what is older than its table's retention, then move what `cold:` says.

        A raw month is removed only when its rollups are made, and the month after it is too old as
        well: a week of the first month that is kept begins in the one before. A month that a run
        works on is left for the next time. Raises StoreFailed.
        """
        settings = self.settings
        in_lake = [raw_table(tf) for tf in settings.raw_timeframes]
        rollups = [rollup_table(tf) for tf in settings.rollup_timeframes]
        if self.storage.rollups_in_warehouse:
            yield from self._remove_from_warehouse(rollups, dry_run)
        else:
            in_lake += rollups
        for timeframe in settings.consolidated_timeframes:
            in_lake += [consolidated_table(timeframe), reconciled_table(timeframe)]
        for table in in_lake:
            if table.name in settings.retention:
                yield from self._remove_from_lake(table, dry_run)
            if settings.cold:
                yield from self._move_to_cold(table, settings.cold, dry_run)

    def _remove_from_warehouse(self, tables: list[Table], dry_run: bool) -> Iterator[Retirement]:
        for table in tables:
            if table.name not in self.settings.retention:
                continue
            before = self.settings.kept_since(table.name)
            with self.ledger.lock(WAREHOUSE_LOCK):
                bars = self.storage.warehouse.delete_before(table, before, dry_run=dry_run)
            if bars:
                message = f"{bars} bars before {format_time(before)}"
                yield Retirement(table, None, RetirementAction.REMOVED, message)

    def _remove_from_lake(self, table: Table, dry_run: bool) -> Iterator[Retirement]:
        summaries = self.ledger.partitions.summaries(table)
        kept_since = self.settings.kept_since(table.name)
        for key, size in sorted(self.storage.lake.list_sizes(table).items()):
            partition = Partition.from_stored_key(key)
            if partition.month.start >= kept_since:
                continue
            reason = self._reason_to_keep(table, partition, summaries)
            if reason is None and not dry_run:
                reason = self._remove(table, partition)
            action = RetirementAction.KEPT if reason else RetirementAction.REMOVED
            message = reason or "it is older than its table keeps"
            yield Retirement(table, partition, action, message, size)

    def _reason_to_keep(
        self,
        table: Table,
        partition: Partition,
        summaries: Mapping[PartitionKey, PartitionSummary],
    ) -> str | None:
        """Return what still needs a month that is old enough to go; None when nothing does."""
        venue = self.settings.venues.get(partition.market.venue)
        is_base = venue is not None and table.layer == "raw" and table.timeframe == venue.base
        if not is_base or not self.settings.rollup_timeframes_of(partition.market):
            return None
        following = adjacent_partition(partition, +1)
        if following.month.start >= self.settings.kept_since(table.name):
            return "a week of the first month that is kept begins in it"
        for month in (partition, following):
            summary = summaries.get(month.stored_key)
            if summary and summary.bytes is not None and not summary.is_rolled_up:
                return f"the rollups of {month.month_key[:7]} are not made yet"
        return None

    def _remove(self, table: Table, partition: Partition) -> str | None:
        """Remove a month; return why it could not be removed."""
        with self.ledger.lock(partition.key, wait=False) as is_free:
            if not is_free:
                return IN_USE
            self.ledger.partitions.mark_retired(table, partition)
            self.storage.lake.delete(table, partition)
        return None

    def _move_to_cold(self, table: Table, cold: ColdStorage, dry_run: bool) -> Iterator[Retirement]:
        lake, place = self.storage.lake, f"to {cold.lake or cold.storage_class}"
        before = month_of(self.settings.now() - timedelta(days=cold.after_days)).start
        classes = lake.list_storage_classes(table) if cold.storage_class else {}
        for key, size in sorted(lake.list_hot_sizes(table).items()):
            partition = Partition.from_stored_key(key)
            is_moved = (
                cold.storage_class and classes.get(table.path(partition)) == cold.storage_class
            )
            if partition.month.start >= before or is_moved:
                continue
            if dry_run or self._move(table, partition, cold):
                yield Retirement(table, partition, RetirementAction.MOVED, place, size)
            else:
                yield Retirement(table, partition, RetirementAction.KEPT, IN_USE, size)

    def _move(self, table: Table, partition: Partition, cold: ColdStorage) -> bool:
        """Move a month; return False when a run works on it."""
        with self.ledger.lock(partition.key, wait=False) as is_free:
            if is_free and cold.storage_class:
                self.storage.lake.set_storage_class(table, partition, cold.storage_class)
            elif is_free:
                self.storage.lake.move_to_cold(table, partition)
            return is_free

"""Retire: old months leave the lake, or move to a cheaper place, by what the universe says of each
table.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import NamedTuple

from marketdata_assets.context import Toolbox
from marketdata_assets.ledger.ledger import WAREHOUSE, Outline
from marketdata_assets.model.partition import Partition, adjacent_partition
from marketdata_assets.model.table import (
    Table,
    consolidated_table,
    raw_table,
    reconciled_table,
    rollup_table,
)
from marketdata_assets.model.window import format_time, month_of
from marketdata_assets.settings.universe import Cold

REMOVED, MOVED, KEPT = "removed", "moved", "kept"


class Retired(NamedTuple):
    """What became of one month of one table, or would in a dry run. `says` is why, or where to."""

    table: Table
    partition: Partition | None
    what: str
    says: str
    bytes: int = 0

    def as_dict(self) -> dict[str, str | int]:
        """As a row of a table."""
        partition = self.partition.key if self.partition else "all"
        return {
            "table": self.table.name,
            "partition": partition,
            "what": self.what,
            "bytes": self.bytes,
            "says": self.says,
        }


def retire(toolbox: Toolbox, dry_run: bool = False) -> Iterator[Retired]:
    """Remove what is older than each table's retention, then move what is older than `cold:` says, one
    month at a time.

    A raw month goes only when its rollups are made, and the month after it is too old as well: a
    week of the first month that is kept begins in the one before. A month that a run works on is
    left for the next time.
    """
    settings = toolbox.settings
    in_lake = [raw_table(tf) for tf in settings.raw_timeframes]
    rolled = [rollup_table(tf) for tf in settings.rollup_timeframes]
    if settings.rollups == "duckdb":
        yield from _from_warehouse(toolbox, rolled, dry_run)
    else:
        in_lake += rolled
    in_lake += [
        table(tf)
        for tf in settings.consolidated_timeframes
        for table in (consolidated_table, reconciled_table)
    ]
    for table in in_lake:
        if table.name in settings.retention:
            yield from _from_lake(toolbox, table, dry_run)
        if settings.cold:
            yield from _to_cold(toolbox, table, settings.cold, dry_run)


def _from_warehouse(toolbox: Toolbox, tables: list[Table], dry_run: bool) -> Iterator[Retired]:
    for table in tables:
        if table.name in toolbox.settings.retention:
            before = toolbox.settings.kept_since(table.name)
            with toolbox.ledger.lock(WAREHOUSE):
                bars = toolbox.warehouse.delete_before(table, before, dry_run=dry_run)
            if bars:
                yield Retired(table, None, REMOVED, f"{bars} bars before {format_time(before)}")


def _from_lake(toolbox: Toolbox, table: Table, dry_run: bool) -> Iterator[Retired]:
    outlines = toolbox.ledger.outlines(table)
    for (market, month), size in sorted(toolbox.lake.list_sizes(table).items()):
        partition = Partition.parse(f"{market}|{month}")
        if partition.month.start >= toolbox.settings.kept_since(table.name):
            continue
        needed = _needed(toolbox, table, partition, outlines)
        if needed is None:
            needed = _remove(toolbox, table, partition, dry_run)
        yield Retired(
            table,
            partition,
            KEPT if needed else REMOVED,
            needed or "it is older than its table keeps",
            size,
        )


def _needed(
    toolbox: Toolbox, table: Table, partition: Partition, outlines: dict[tuple[str, str], Outline]
) -> str | None:
    """What still needs a month that is old enough to go; None when nothing does."""
    venue = toolbox.settings.venues.get(partition.market.venue)
    if (
        table.layer != "raw"
        or venue is None
        or table.timeframe != venue.base
        or not toolbox.settings.rolled(partition.market)
    ):
        return None
    after = adjacent_partition(partition, +1)
    if after.month.start >= toolbox.settings.kept_since(table.name):
        return "a week of the first month that is kept begins in it"
    for needed in (partition, after):
        outline = outlines.get(needed.stored_key)
        if outline and outline.bytes is not None and not outline.rolled:
            return f"the rollups of {needed.month_key[:7]} are not made yet"
    return None


def _remove(toolbox: Toolbox, table: Table, partition: Partition, dry_run: bool) -> str | None:
    if dry_run:
        return None
    with toolbox.ledger.lock(partition.key, wait=False) as free:
        if not free:
            return "a run works on it"
        toolbox.ledger.retire(table, partition)
        toolbox.lake.delete(table, partition)
    return None


def _to_cold(toolbox: Toolbox, table: Table, cold: Cold, dry_run: bool) -> Iterator[Retired]:
    before = month_of(toolbox.settings.now() - timedelta(days=cold.after_days)).start
    classes = toolbox.lake.list_storage_classes(table) if cold.storage_class else {}
    for (market, month), size in sorted(toolbox.lake.list_hot_sizes(table).items()):
        partition = Partition.parse(f"{market}|{month}")
        if partition.month.start >= before or (
            cold.storage_class and classes.get(table.path(partition)) == cold.storage_class
        ):
            continue
        if not dry_run:
            with toolbox.ledger.lock(partition.key, wait=False) as free:
                if not free:
                    yield Retired(table, partition, KEPT, "a run works on it", size)
                    continue
                if cold.storage_class:
                    toolbox.lake.set_storage_class(table, partition, cold.storage_class)
                else:
                    toolbox.lake.move_to_cold(table, partition)
        yield Retired(table, partition, MOVED, f"to {cold.lake or cold.storage_class}", size)

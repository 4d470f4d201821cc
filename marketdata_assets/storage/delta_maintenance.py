"""How files of Delta tables are written and commits are labeled, and the maintenance of a table:
sorted files, and no file that a kept version does not need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import polars as pl

if TYPE_CHECKING:
    from deltalake import CommitProperties, DeltaTable, WriterProperties

MIN_LOG_DAYS = 30
"""The log of commits is kept for this long at least, which is Delta's own default."""


class DeltaMaintenance(NamedTuple):
    """The result of a maintenance, or of its dry run: how many partitions were made one file again,
    and how many files, with how many bytes, were removed.
    """

    version: int
    partitions_compacted: int
    files_removed: int
    bytes_removed: int


def maintain_table(
    delta: DeltaTable, options: dict[str, str], history_days: int, *, dry_run: bool
) -> DeltaMaintenance:
    """Keep versions of the last `history_days`, sort partitions of several files into one, and
    remove files that no kept version needs. `options` are those of the table's storage.
    """
    if not dry_run:
        _set_retention(delta, history_days)
    crowded = _partitions_of_several_files(delta)
    if not dry_run:
        for market, month in crowded:
            delta.optimize.z_order(
                ["open_time"],
                [("market", "=", market), ("month", "=", month)],
                writer_properties=writer_properties(),
                commit_properties=commit_properties(f"sort {market}|{month}-01"),
            )
    hours = history_days * 24
    unneeded = delta.vacuum(hours, dry_run=True, enforce_retention_duration=False, full=True)
    sizes = _existing_sizes(delta, options, unneeded)
    if sizes and not dry_run:
        delta.vacuum(hours, dry_run=False, full=True)
    return DeltaMaintenance(delta.version(), len(crowded), len(sizes), sum(sizes))


def _set_retention(delta: DeltaTable, history_days: int) -> None:
    properties = {
        "delta.deletedFileRetentionDuration": f"interval {history_days} days",
        "delta.logRetentionDuration": f"interval {max(MIN_LOG_DAYS, history_days)} days",
    }
    if not properties.items() <= delta.metadata().configuration.items():
        delta.alter.set_table_properties(
            properties, commit_properties=commit_properties(f"keep {history_days} days")
        )


def _partitions_of_several_files(delta: DeltaTable) -> list[tuple[str, str]]:
    """Return market and month of each, sorted."""
    files = pl.DataFrame(delta.get_add_actions(flatten=True))
    counts = files.group_by("partition.market", "partition.month").len()
    return sorted(counts.filter(pl.col("len") > 1).drop("len").rows())


def _existing_sizes(delta: DeltaTable, options: dict[str, str], paths: list[str]) -> list[int]:
    """Return the sizes in bytes of those files that exist: a vacuum also names files that an
    earlier one has removed.
    """
    from deltalake.fs import DeltaStorageHandler
    from pyarrow.fs import PyFileSystem

    files = PyFileSystem(DeltaStorageHandler(delta.table_uri, options)).get_file_info(paths)
    return [file.size for file in files if file.is_file]


def writer_properties() -> WriterProperties:
    """Return the smallest format that every reader understands: Polars reads decimals of 38 digits
    in plain encoding only.
    """
    from deltalake import ColumnProperties, WriterProperties

    packed = ColumnProperties(dictionary_enabled=False, encoding="DELTA_BINARY_PACKED")
    integers = ("open_time", "trades", "bars_expected", "bars_present")
    return WriterProperties(
        compression="ZSTD",
        compression_level=3,
        default_column_properties=ColumnProperties(dictionary_enabled=False),
        column_properties=dict.fromkeys(integers, packed),
    )


def commit_properties(note: str) -> CommitProperties:
    """Return the properties of a commit with this note. The retries let commits to other partitions
    pass, which are no conflict.
    """
    from deltalake import CommitProperties

    return CommitProperties(custom_metadata={"userMetadata": note}, max_commit_retries=100)

"""Tags of runs and their values. Both are stored with the runs, so they never change."""

from __future__ import annotations

from enum import StrEnum

from marketdata_assets.defs.partitions import RANGE_END, RANGE_START
from marketdata_assets.model.partition import Partition

KIND = "marketdata/kind"
"""Why a run was launched: a RunKind. Runs that a person launches have no such tag."""
VENUE = "marketdata/venue"
REASON = "marketdata/reason"
"""How many partitions of the run needed work, by reason."""
REPAIR_START, REPAIR_END = "marketdata/repair_start", "marketdata/repair_end"
"""The first and the last partition of a repair; both are keys, inclusive."""
RECEIPT = "marketdata/receipt"
"""The number of the receipt that a repair wrote."""
PARTITION, PRIORITY = "dagster/partition", "dagster/priority"


class RunKind(StrEnum):
    """What launched a run."""

    MISSED = "missed"
    """The sensor `backfill_missed`."""
    REFRESH = "refresh"
    """The schedule `refresh_open`. A refresh that stores nothing new writes no event."""
    CONSOLIDATE = "consolidate"
    """The sensor `keep_consolidated`."""
    IMPORT = "import"
    """`marketdata import`. The run audits what files have brought and asks no venue."""


class RunPriority(StrEnum):
    """The order of runs in the queue: the highest number first."""

    LIVE = "10"
    """The open month."""
    HISTORY = "-10"
    """Closed months."""


def range_tags(
    first: Partition, last: Partition, kind: RunKind, *, priority: RunPriority
) -> dict[str, str]:
    """Return the tags of a run over the grid's rectangle from `first` to `last` (inclusive)."""
    return {
        RANGE_START: first.key,
        RANGE_END: last.key,
        KIND: kind.value,
        PRIORITY: priority.value,
    }

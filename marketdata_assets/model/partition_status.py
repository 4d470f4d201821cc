"""The one rule of what a partition needs, and the guard against a lost disk."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Protocol

from marketdata_assets.errors import StoreFailed

LOST_REASON = "its object is not in the lake any more"
LOST_AT_ONCE = 100
"""Up to this many lost objects count as lost, whatever their share is."""


class PartitionStatus(StrEnum):
    """What a partition of a fetched table needs, the most urgent first."""

    MISSING = "missing"
    """Nothing is stored."""
    LOST = "lost"
    """The ledger has it, but its object is not in the lake, or has another size."""
    FAILED = "failed"
    """It is stored, but the last attempt to bring it up to date failed."""
    STALE = "stale"
    """Wanted bars have not been requested yet."""
    INCOMPLETE = "incomplete"
    """It holds a gap whose time to be requested again has come."""
    WHOLE = "whole"
    """Everything wanted is stored or explained."""

    @property
    def is_stored(self) -> bool:
        """Whether its object lies in the lake as the ledger says."""
        return self not in (PartitionStatus.MISSING, PartitionStatus.LOST)


class PartitionFacts(Protocol):
    """What the ledger says of one partition; `start` and `through` bound what was requested.

    They are moments, or ISO text of moments, which compares like them.
    """

    @property
    def start(self) -> Any: ...  # noqa: D102

    @property
    def through(self) -> Any: ...  # noqa: D102

    @property
    def is_complete(self) -> bool: ...  # noqa: D102

    @property
    def bytes(self) -> int | None: ...  # noqa: D102

    @property
    def error(self) -> str | None: ...  # noqa: D102


def partition_status(
    facts: PartitionFacts | None, size: int | None, wanted: tuple[Any, Any], *, has_due_gap: bool
) -> PartitionStatus:
    """Return the status of a partition.

    `size` is that of its object in the lake, in bytes; None when there is none. `wanted` is the
    window of open times wanted, `[start, end)`, of the same type as `facts.start`.
    """
    if facts is None or facts.bytes is None:
        return PartitionStatus.MISSING
    if size != facts.bytes:
        return PartitionStatus.LOST
    if facts.error:
        return PartitionStatus.FAILED
    if facts.start > wanted[0] or facts.through < wanted[1]:
        return PartitionStatus.STALE
    if has_due_gap or not facts.is_complete:
        return PartitionStatus.INCOMPLETE
    return PartitionStatus.WHOLE


def status_reason(status: PartitionStatus, error: str | None) -> str | None:
    """Return why a partition needs a run; None when it needs none. `error` is its last failure."""
    if status == PartitionStatus.WHOLE:
        return None
    if status == PartitionStatus.LOST:
        return LOST_REASON
    if error:
        return f"failed: {error}"
    if status == PartitionStatus.MISSING:
        return "never fetched"
    return "holds a gap that may still be filled"


def ensure_lake_mounted(lost: int, stored: int, lake: str) -> None:
    """Raise StoreFailed when most of the stored objects are lost at once.

    A lake that lost most of itself is taken for a disk that is not mounted: nothing is fetched into
    what lies in its place.
    """
    if lost > LOST_AT_ONCE and 2 * lost >= stored:
        raise StoreFailed(
            f"{lost} of {stored} objects are not in {lake}: is it mounted? Nothing is fetched and "
            "nothing forgotten; if they are gone for good, `marketdata backfill` fetches them again"
        )

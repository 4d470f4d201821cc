"""What the ledger holds of a partition, and what an ingest of one writes down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, NamedTuple

from marketdata_assets.model.gap import Gap
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import Table
from marketdata_assets.model.window import Window

if TYPE_CHECKING:
    import polars as pl


@dataclass(frozen=True, slots=True)
class PartitionState:
    """What the ledger holds of one partition.

    The window `[start, through)` has been requested, in open times. `newest` is the open time of
    the last stored bar. `is_complete`: the window reaches the end of what the universe wants, and
    no gap in it is unsettled. `bytes` is the size of the object (None: there is none), `digest` the
    hash of its rows, and `rollup_source_digest` the digest of the rows that its rollups were made
    of. `attempts` counts ingests, `failures` those in a row that failed, the last with `error`.
    `completed_at` is when, by our clock, all that will ever be wanted had been requested.
    """

    start: datetime
    through: datetime
    newest: datetime | None
    is_complete: bool
    rows: int
    bytes: int | None
    digest: str | None
    rollup_source_digest: str | None
    attempts: int
    failures: int
    error: str | None
    completed_at: datetime | None = None


class PartitionSummary(NamedTuple):
    """The part of a PartitionState that is read of all partitions at once. `start` and `through`
    are ISO text.
    """

    start: str
    through: str
    is_complete: bool
    bytes: int | None
    is_rolled_up: bool
    error: str | None


class NewestBar(NamedTuple):
    """A market's newest stored bar, with month key and size of the object that holds it."""

    open_time: datetime
    month: str
    bytes: int


class FailureStreak(NamedTuple):
    """How many ingests of one partition failed in a row, and why the last one did."""

    failures: int
    error: str


@dataclass(frozen=True, slots=True)
class RowAccount:
    """The rows of one ingest: received = stored + identical + quarantined."""

    received: int = 0
    stored: int = 0
    identical: int = 0
    quarantined: int = 0

    @property
    def is_balanced(self) -> bool:
        """Whether every row is accounted for."""
        return self.received == self.stored + self.identical + self.quarantined


class LoggedFetch(NamedTuple):
    """One request as the fetch log holds it. `asked_at` is our clock, in seconds since 1970."""

    window: Window
    asked_at: float
    seconds: float
    outcome: str
    status: int | None
    rows: int | None
    error: str | None


@dataclass(frozen=True, slots=True)
class IngestRecord:
    """All that one ingest of a partition writes down, in one transaction.

    `rejected` has the columns of quality.split.REJECTED_SCHEMA; `answers[i]` is the index in
    `fetches` of the request that gave its answer i. `sources` names, by answer, where the rows came
    from; empty: from the venue.
    """

    table: Table
    partition: Partition
    state: PartitionState
    account: RowAccount
    gaps: Sequence[Gap]
    fetches: Sequence[LoggedFetch]
    rejected: pl.DataFrame
    answers: Sequence[int]
    now: datetime
    sources: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class IngestFailure:
    """An ingest of a partition that failed. `wanted` is the window that it was to request.

    `is_excused`: its venue or a store does not answer, so that the failure does not count against
    the partition, nor does the last attempt of a backfill.
    """

    table: Table
    partition: Partition
    wanted: Window
    error: str
    fetches: Sequence[LoggedFetch]
    now: datetime
    is_excused: bool = False

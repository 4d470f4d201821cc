"""One partition of a raw table before and after an ingest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import polars as pl

from marketdata_assets.errors import MarketDataError
from marketdata_assets.ledger.records import PartitionState, RowAccount
from marketdata_assets.model.bar import COLUMN_NAMES, STORED_RAW_SCHEMA, TIME
from marketdata_assets.model.gap import Gap
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import Table
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import Window
from marketdata_assets.quality.agreement import StoredComparison
from marketdata_assets.settings.universe import Settings


def empty_raw_bars(*more_times: str) -> pl.DataFrame:
    """Return no bars, with provenance and these further columns of moments."""
    return pl.DataFrame(schema={**STORED_RAW_SCHEMA, **dict.fromkeys(more_times, TIME)})


@dataclass(frozen=True, slots=True)
class IngestResult:
    """One partition after an ingest.

    `wanted` is the window of open times that the universe asks for, up to the venue's clock. `bars`
    are all stored bars of it (model.bar.COLUMN_NAMES), `replaced` the revisions that moved to the
    history now. After a failure `error` is set and everything stored is as it was before.
    `comparison` says what became of bars that did not come from the venue's API.
    """

    partition: Partition
    timeframe: Timeframe
    wanted: Window
    bars: pl.DataFrame
    gaps: tuple[Gap, ...]
    account: RowAccount
    bytes: int
    complete: bool
    requests: int = 0
    retries: int = 0
    seconds_waited: float = 0.0
    note: str | None = None
    error: MarketDataError | None = None
    replaced: pl.DataFrame = field(default_factory=lambda: empty_raw_bars("replaced_at"))
    comparison: StoredComparison | None = None


@dataclass(frozen=True, slots=True)
class OpenPartition:
    """One partition before an ingest; `stored` holds its bars with their provenance."""

    partition: Partition
    table: Table
    wanted: Window
    stored: pl.DataFrame = field(default_factory=empty_raw_bars)
    gaps: Sequence[Gap] = ()
    state: PartitionState | None = None
    note: str | None = None

    def as_result(self, bars: pl.DataFrame, gaps: Sequence[Gap], *, bytes: int) -> IngestResult:
        """Return the partition as it is stored, before anything is counted."""
        return IngestResult(
            partition=self.partition,
            timeframe=self.table.timeframe,
            wanted=self.wanted,
            bars=bars.select(COLUMN_NAMES),
            gaps=tuple(gaps),
            account=RowAccount(),
            bytes=bytes,
            complete=False,
            note=self.note,
        )


def wanted_window(settings: Settings, timeframe: Timeframe, partition: Partition) -> Window:
    """Return the open times that the universe wants of a partition.

    These are whole bars between `since` and `until` (or our now); none when the venue's universe
    does not fetch the timeframe.
    """
    venue = settings.venues[partition.market.venue]
    if timeframe not in venue.fetched_timeframes:
        return Window(partition.month.start, partition.month.start)
    span = settings.span(partition.market)
    return partition.open_times(timeframe) & Window(
        timeframe.ceil(span.start), timeframe.floor(span.end)
    )

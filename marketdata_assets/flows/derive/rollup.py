"""Roll up the stored bars of a partition to all coarser timeframes in one step from one read.

While the objects of one partition are written, the next one is read and rolled up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from typing import NamedTuple

import polars as pl

from marketdata_assets.errors import MarketDataError
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.ledger.records import PartitionState
from marketdata_assets.model.bar import empty_bars
from marketdata_assets.model.partition import Partition, adjacent_partition
from marketdata_assets.model.table import Table, raw_table, rollup_table
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import Window
from marketdata_assets.settings.universe import Settings
from marketdata_assets.storage.bars import WAREHOUSE_LOCK, BarStorage
from marketdata_assets.storage.lake import Lake
from marketdata_assets.transforms.rollup import roll_up

CONCURRENT_WRITES = 4
"""How many objects of one partition are written to S3 at once."""


@dataclass(frozen=True, slots=True)
class RollupResult:
    """The rollups of one partition: the stored bars and the number of changed rows, by timeframe.

    `requested` is the window of base bars that were requested: every bar that lies wholly inside it
    was rolled up.
    """

    partition: Partition
    frames: dict[Timeframe, pl.DataFrame]
    changed: dict[Timeframe, int]
    requested: Window


class _PendingRollup(NamedTuple):
    """The rollups of one partition while they are written.

    `source` is the digest of the raw rows that all of its rollups are made of; None when only some
    are built.
    """

    result: RollupResult
    changed: Future[dict[Timeframe, int]]
    source: str | None = None


class _RawBars:
    """Reads the raw bars of partitions; the last object that was read is kept for the next one."""

    def __init__(self, lake: Lake) -> None:
        self._lake = lake
        self._partition: Partition | None = None
        self._bars: pl.DataFrame | None = None

    def read(self, table: Table, partition: Partition) -> pl.DataFrame:
        """Return the bars of a partition; none where there is no object."""
        self._partition, self._bars = partition, self._lake.read(table, partition)
        return empty_bars() if self._bars is None else self._bars

    def read_since(
        self, table: Table, partition: Partition, first: datetime
    ) -> pl.DataFrame | None:
        """Return the bars of a partition that open at or after a moment; None without object."""
        bars = self._bars
        if partition != self._partition:
            bars = self._lake.read(table, partition, inside=Window(first, partition.month.end))
        return None if bars is None else bars[bars["open_time"].search_sorted(first) :]


@dataclass(frozen=True, slots=True)
class RollupBuilder:
    """Builds rollups from stored raw bars; only rows that differ are written."""

    settings: Settings
    ledger: Ledger
    storage: BarStorage

    def build(self, partitions: Sequence[Partition]) -> Iterator[RollupResult]:
        """Roll up each partition; one without raw bars has no rollups. Raises Damaged, StoreFailed.

        A bar that begins in one month and ends in the next one belongs to the next one: it is built
        again when that month was rolled up before.
        """
        raw = _RawBars(self.storage.lake)
        with ThreadPoolExecutor(1) as writer:  # one thread writes in the order of the partitions
            before: list[_PendingRollup] = []
            for partition in partitions:
                started = self._start_both(writer, raw, partition)
                if before:
                    yield self._finish(before)
                before = started
            if before:
                yield self._finish(before)

    def _start_both(
        self, writer: Executor, raw: _RawBars, partition: Partition
    ) -> list[_PendingRollup]:
        """Start a partition, and the one after it where its first bars begin in this one."""
        try:
            started = [self._start(writer, raw, partition, timeframes=self._timeframes(partition))]
            following = adjacent_partition(partition, +1)
            state = self._state(following)
            if state is not None and state.rollup_source_digest is not None:
                straddling = self._straddling_timeframes(following)
                started.append(self._start(writer, raw, following, timeframes=straddling))
        except MarketDataError as error:  # raised when the partitions before are finished
            failed: Future[dict[Timeframe, int]] = Future()
            failed.set_exception(error)
            return [_PendingRollup(_nothing(partition), failed)]
        return started

    def _finish(self, started: Sequence[_PendingRollup]) -> RollupResult:
        """Wait until everything is written; return the result of the first partition."""
        results = []
        for result, changed, source in started:
            results.append(replace(result, changed=changed.result()))
            if source is not None:
                table = raw_table(self.settings.venues[result.partition.market.venue].base)
                self.ledger.partitions.set_rollup_source(table, result.partition, source)
        return results[0]

    def _timeframes(self, partition: Partition) -> list[Timeframe]:
        """Return the timeframes of the market whose retention keeps this month."""
        settings, start = self.settings, partition.month.start
        wanted = settings.rollup_timeframes_of(partition.market)
        return [tf for tf in wanted if start >= settings.kept_since(rollup_table(tf).name)]

    def _straddling_timeframes(self, partition: Partition) -> list[Timeframe]:
        """Return the timeframes whose first bar here begins in the month before."""
        start = partition.month.start
        return [tf for tf in self._timeframes(partition) if partition.open_times(tf).start < start]

    def _start(
        self,
        writer: Executor,
        raw: _RawBars,
        partition: Partition,
        *,
        timeframes: Sequence[Timeframe],
    ) -> _PendingRollup:
        """Read and roll up a partition, and begin to write it."""
        base = self.settings.venues[partition.market.venue].base
        state = self._state(partition)
        if state is None or state.bytes is None or not timeframes:
            nothing: Future[dict[Timeframe, int]] = Future()
            nothing.set_result({})
            return _PendingRollup(_nothing(partition), nothing)
        earlier, start_earlier = self._end_of_month_before(raw, partition, base)
        joined = pl.concat([earlier, raw.read(raw_table(base), partition)])
        window = Window(start_earlier or state.start, state.through)
        requested = requested_window(joined["open_time"], base, window)
        owned = {tf: partition.open_times(tf) for tf in timeframes}
        frames = roll_up(joined, base, timeframes, whole=requested, owned=owned)
        is_all = len(timeframes) == len(self._timeframes(partition))
        source = state.digest if is_all else None
        return _PendingRollup(
            RollupResult(partition, frames, changed={}, requested=requested),
            writer.submit(self._write, partition, frames, owned, source),
            source,
        )

    def _end_of_month_before(
        self, raw: _RawBars, partition: Partition, base: Timeframe
    ) -> tuple[pl.DataFrame, datetime | None]:
        """Return the last bars of the month before, and since when they were requested."""
        month, earlier = partition.month.start, adjacent_partition(partition, -1)
        timeframes = self.settings.rollup_timeframes_of(partition.market)
        first = min((partition.open_times(tf).start for tf in timeframes), default=month)
        state = self._state(earlier)
        if first >= month or state is None or state.through < month:
            return empty_bars(), None
        bars = raw.read_since(raw_table(base), earlier, first)
        return (empty_bars(), None) if bars is None else (bars, max(first, state.start))

    def _state(self, partition: Partition) -> PartitionState | None:
        base = self.settings.venues[partition.market.venue].base
        return self.ledger.partitions.get(raw_table(base), partition)

    def _write(
        self,
        partition: Partition,
        frames: dict[Timeframe, pl.DataFrame],
        owned: dict[Timeframe, Window],
        source: str | None,
    ) -> dict[Timeframe, int]:
        """Store the frames; return how many rows each changed."""
        if self.storage.rollups_in_warehouse:
            with self.ledger.lock(WAREHOUSE_LOCK):
                made_of = (partition.month_key, source) if source else None
                changed = self.storage.warehouse.replace(partition.market, frames, owned, made_of)
            return {tf: changed[tf.name] for tf in frames}
        lake = self.storage.lake

        def write(timeframe: Timeframe) -> bool:
            return lake.write_if_changed(rollup_table(timeframe), partition, frames[timeframe])

        with ThreadPoolExecutor(1 if lake.is_local else CONCURRENT_WRITES) as pool:
            has_changed = pool.map(write, frames)
            return {
                tf: frames[tf].height * changed
                for tf, changed in zip(frames, has_changed, strict=True)
            }


def _nothing(partition: Partition) -> RollupResult:
    start = partition.month.start
    return RollupResult(partition, {}, changed={}, requested=Window(start, start))


def requested_window(opens: pl.Series, base: Timeframe, requested: Window) -> Window:
    """Return what was requested, with what is stored beyond it.

    More is stored when another machine, or an earlier `since`, wanted more.
    """
    if opens.is_empty():
        return requested
    return Window(min(requested.start, opens[0]), max(requested.end, base.shift(opens[-1], 1)))

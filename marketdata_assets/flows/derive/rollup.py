"""Roll up the stored bars of a partition to all coarser timeframes in one step from one read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime

import polars as pl

from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.ledger.records import PartitionState
from marketdata_assets.model.bar import empty_bars
from marketdata_assets.model.intervals import opens_inside
from marketdata_assets.model.partition import Partition, adjacent_partition
from marketdata_assets.model.table import raw_table, rollup_table
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import Window
from marketdata_assets.settings.universe import Settings
from marketdata_assets.storage.bars import WAREHOUSE_LOCK, BarStorage
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
        for partition in partitions:
            yield self._build(partition, self._timeframes(partition))
            following = adjacent_partition(partition, +1)
            state = self._state(following)
            if state is not None and state.rollup_source_digest is not None:
                self._build(following, self._straddling_timeframes(following))

    def _timeframes(self, partition: Partition) -> list[Timeframe]:
        """Return the timeframes of the market whose retention keeps this month."""
        settings, start = self.settings, partition.month.start
        wanted = settings.rollup_timeframes_of(partition.market)
        return [tf for tf in wanted if start >= settings.kept_since(rollup_table(tf).name)]

    def _straddling_timeframes(self, partition: Partition) -> list[Timeframe]:
        """Return the timeframes whose first bar here begins in the month before."""
        start = partition.month.start
        return [tf for tf in self._timeframes(partition) if partition.open_times(tf).start < start]

    def _build(self, partition: Partition, timeframes: Sequence[Timeframe]) -> RollupResult:
        base = self.settings.venues[partition.market.venue].base
        state = self._state(partition)
        if state is None or state.bytes is None or not timeframes:
            start = partition.month.start
            return RollupResult(partition, {}, changed={}, requested=Window(start, start))
        bars = self.storage.lake.read(raw_table(base), partition)
        earlier, start_earlier = self._end_of_month_before(partition, base)
        joined = pl.concat([earlier, empty_bars() if bars is None else bars])
        window = Window(start_earlier or state.start, state.through)
        requested = requested_window(joined["open_time"], base, window)
        frames = roll_up(joined, base, timeframes, whole=requested)
        owned = {tf: partition.open_times(tf) for tf in timeframes}
        frames = {tf: frame.filter(opens_inside(owned[tf])) for tf, frame in frames.items()}
        changed = self._write(partition, frames, owned)
        if len(timeframes) == len(self._timeframes(partition)) and state.digest:
            self.ledger.partitions.set_rollup_source(raw_table(base), partition, state.digest)
        return RollupResult(partition, frames, changed=changed, requested=requested)

    def _end_of_month_before(
        self, partition: Partition, base: Timeframe
    ) -> tuple[pl.DataFrame, datetime | None]:
        """Return the last bars of the month before, and since when they were requested."""
        month, earlier = partition.month.start, adjacent_partition(partition, -1)
        timeframes = self.settings.rollup_timeframes_of(partition.market)
        first = min((partition.open_times(tf).start for tf in timeframes), default=month)
        state = self._state(earlier)
        if first >= month or state is None or state.through < month:
            return empty_bars(), None
        bars = self.storage.lake.read(raw_table(base), earlier, since=first)
        if bars is None:
            return empty_bars(), None
        return bars.filter(pl.col("open_time") >= first), max(first, state.start)

    def _state(self, partition: Partition) -> PartitionState | None:
        base = self.settings.venues[partition.market.venue].base
        return self.ledger.partitions.get(raw_table(base), partition)

    def _write(
        self,
        partition: Partition,
        frames: dict[Timeframe, pl.DataFrame],
        owned: dict[Timeframe, Window],
    ) -> dict[Timeframe, int]:
        """Store the frames; return how many rows each changed."""
        if self.storage.rollups_in_warehouse:
            with self.ledger.lock(WAREHOUSE_LOCK):
                changed = self.storage.warehouse.replace(partition.market, frames, owned)
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


def requested_window(opens: pl.Series, base: Timeframe, requested: Window) -> Window:
    """Return what was requested, with what is stored beyond it.

    More is stored when another machine, or an earlier `since`, wanted more.
    """
    if opens.is_empty():
        return requested
    return Window(min(requested.start, opens[0]), max(requested.end, opens[-1] + base.width))

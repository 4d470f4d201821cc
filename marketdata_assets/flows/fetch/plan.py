"""Plan: what a backfill would do and what it would cost, before anything runs. Sends no request."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

from marketdata_assets.flows.fetch.known_gaps import missing_windows
from marketdata_assets.flows.fetch.open_partition import wanted_window
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.ledger.records import PartitionState
from marketdata_assets.model.bar import empty_bars
from marketdata_assets.model.intervals import count_bars
from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import Partition, PartitionKey
from marketdata_assets.model.partition_status import PartitionStatus, partition_status
from marketdata_assets.model.table import Table, raw_table, rollup_table
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import Window
from marketdata_assets.settings.parts import Venue
from marketdata_assets.settings.universe import Settings
from marketdata_assets.sources.archive.names import month_file_url
from marketdata_assets.storage.bars import BarStorage
from marketdata_assets.venues.facts import DEFAULT_PAGE_SIZE
from marketdata_assets.venues.registry import facts_of

OVERLAP = 2
"""How many bars of a page are in the adjacent pages as well."""


@dataclass(frozen=True, slots=True)
class ArchiveOffer:
    """Bars of one table of a partition that files at `url` provide for less. Nothing is downloaded.

    `requests`: how many the files save; None when the venue's API does not have these bars at all.
    """

    timeframe: Timeframe
    bars: int
    requests: int | None
    url: str


@dataclass(frozen=True, slots=True)
class PlannedPartition:
    """One partition that needs work: bars to fetch, about how many requests that takes, and why."""

    partition: Partition
    bars: int
    requests: int
    reason: str
    offers: tuple[ArchiveOffer, ...] = ()


_DuePartitions = Mapping[Table, Container[PartitionKey]]
"""By table: market key and month key of the partitions with a due gap."""


@dataclass(frozen=True, slots=True)
class BackfillPlanner:
    """Plans backfills by the ledger and the lake."""

    settings: Settings
    ledger: Ledger
    storage: BarStorage

    def plan(self, partitions: Sequence[Partition]) -> list[PlannedPartition]:
        """Return the partitions that are missing, open or not rolled up, in the order given."""
        tables = [raw_table(timeframe) for timeframe in self.settings.raw_timeframes]
        due = {table: self.ledger.gaps.due(table, self.settings.now()) for table in tables}
        planned = (self._plan_partition(partition, due) for partition in partitions)
        return [partition for partition in planned if partition is not None]

    def _plan_partition(self, partition: Partition, due: _DuePartitions) -> PlannedPartition | None:
        venue = self.settings.venues[partition.market.venue]
        page = new_bars_per_request(partition.market)
        missing = {tf: self._count_missing(tf, partition, due) for tf in venue.fetched_timeframes}
        requests = {tf: math.ceil(bars / page) for tf, bars in missing.items()}
        state = self.ledger.partitions.get(raw_table(venue.base), partition)
        if any(missing.values()):
            offers = (
                self._find_archive(tf, partition, bars, requests=requests[tf])
                for tf, bars in missing.items()
                if bars
            )
            return PlannedPartition(
                partition,
                bars=sum(missing.values()),
                requests=sum(requests.values()),
                reason=_reason(state),
                offers=tuple(offer for offer in offers if offer),
            )
        if state is None or self._is_rolled_up(partition, state):
            return None
        return PlannedPartition(partition, 0, 0, reason="rollups are not up to date")

    def _count_missing(
        self, timeframe: Timeframe, partition: Partition, due: _DuePartitions
    ) -> int:
        """Count the bars that a backfill would request; reads the object only when it has to."""
        table, wanted = raw_table(timeframe), wanted_window(self.settings, timeframe, partition)
        if not wanted:
            return 0
        state = self.ledger.partitions.get(table, partition)
        size = self.storage.lake.proven_size(table, partition) if state else None
        has_due_gap, bounds = partition.stored_key in due[table], (wanted.start, wanted.end)
        status = partition_status(state, size, bounds, has_due_gap=has_due_gap)
        if status == PartitionStatus.WHOLE:
            return 0
        if not status.is_stored:
            return wanted.count(timeframe)
        stored = self.storage.lake.read(table, partition)
        opens = (empty_bars() if stored is None else stored)["open_time"]
        gaps, now = self.ledger.gaps.of(table, partition), self.settings.now()
        missing = missing_windows(opens, timeframe, wanted, gaps=gaps, now=now)
        return count_bars(missing, timeframe)

    def _find_archive(
        self, timeframe: Timeframe, partition: Partition, bars: int, *, requests: int
    ) -> ArchiveOffer | None:
        """Return the files that cost less than requests, or that alone have these bars."""
        market, now = partition.market, self.settings.now()
        facts = facts_of(market.venue)
        archive = facts.archive
        if archive is None:
            return None
        newest = facts.endpoint(market.symbol).newest_bars_only
        if newest and archive.overview_url:
            oldest = timeframe.shift(timeframe.floor(now), -newest)
            wanted = wanted_window(self.settings, timeframe, partition)
            unserved = wanted & Window(partition.month.start, oldest)
            count = min(bars, unserved.count(timeframe))
            return ArchiveOffer(timeframe, count, None, archive.overview_url) if count else None
        url = month_file_url(market, timeframe, partition.month, now=now)
        saved = requests - archive.files_per_month
        return ArchiveOffer(timeframe, bars, saved, url) if url and saved > 0 else None

    def _is_rolled_up(self, partition: Partition, state: PartitionState) -> bool:
        timeframes = self.settings.rollup_timeframes_of(partition.market)
        if not timeframes:
            return True
        source = state.rollup_source_digest
        if source is None or source != state.digest:
            return False
        if self.storage.rollups_in_warehouse:
            return not self.storage.outdated_rollups({partition.stored_key: source})
        sizes = (self.storage.lake.proven_size(rollup_table(tf), partition) for tf in timeframes)
        return all(size is not None for size in sizes)


def minutes_needed(planned: Sequence[PlannedPartition], venue: Venue) -> float:
    """Return how many minutes the venue's limit makes these requests take at least."""
    mine = (each for each in planned if each.partition.market.venue == venue.name)
    return sum(each.requests for each in mine) / requests_per_minute(venue)


def requests_per_minute(venue: Venue) -> int:
    """Return how many requests a minute the venue's limit lets through."""
    endpoint = facts_of(venue.name).endpoint(venue.symbols[0])
    return venue.requests_per_minute or endpoint.requests_per_minute


def new_bars_per_request(market: Market) -> int:
    """Return about how many new bars a request brings; its neighbors bring the others as well."""
    endpoint = facts_of(market.venue).endpoint(market.symbol)
    return (endpoint.page_size or DEFAULT_PAGE_SIZE) - OVERLAP


def _reason(state: PartitionState | None) -> str:
    if state is None:
        return "missing"
    return (
        f"failed: {state.error}" if state.error else "open, or holds a gap that may still be filled"
    )

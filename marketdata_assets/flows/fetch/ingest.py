"""Ingest: request what partitions are missing, and store what the venue's answers agree on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import NamedTuple

from marketdata_assets.errors import MarketDataError
from marketdata_assets.flows.fetch.answers import FetchResult, FetchSpan
from marketdata_assets.flows.fetch.collect import collect
from marketdata_assets.flows.fetch.open_partition import IngestResult, OpenPartition
from marketdata_assets.flows.fetch.partition_store import PartitionStore
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import Table, raw_table
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import Window
from marketdata_assets.settings.universe import Settings
from marketdata_assets.sources.clients import VenueClients
from marketdata_assets.storage.lake import Lake


class _Started(NamedTuple):
    """A partition whose requests are under way while its lock is held."""

    partition: OpenPartition
    answer: Future[FetchResult]
    lock: ExitStack


@dataclass(frozen=True, slots=True)
class Ingester:
    """Brings partitions of raw tables up to date with their venues."""

    settings: Settings
    ledger: Ledger
    lake: Lake
    venues: VenueClients

    @property
    def store(self) -> PartitionStore:
        """Where results are stored."""
        return PartitionStore(self.settings, self.ledger, self.lake)

    def ingest(
        self, timeframe: Timeframe, partitions: Sequence[Partition], again: Window | None = None
    ) -> Iterator[IngestResult]:
        """Bring each partition up to date, in order; the next one's requests run meanwhile.

        Bars that open inside `again` are requested once more; a bar that the venue delivers
        otherwise in two answers replaces the stored one, which moves to the history. A partition
        that fails is yielded with its error, and the others continue. Partitions are locked against
        other processes one at a time, so that whoever comes second finds the work done.
        """
        table = raw_table(timeframe)
        following: _Started | None = None
        for i, partition in enumerate(partitions):
            current = following or self._start(table, partition, again)
            assert current is not None, "a start that waits for the lock succeeds"
            following = None
            if i + 1 < len(partitions):
                # waiting for a second lock could end in a deadlock
                following = self._start(table, partitions[i + 1], again, wait=False)
            with current.lock:
                yield self._finish(current)

    def _start(
        self, table: Table, partition: Partition, again: Window | None, *, wait: bool = True
    ) -> _Started | None:
        """Lock a partition and send its requests; None when it is locked and `wait` is off."""
        with ExitStack() as lock:
            if not lock.enter_context(self.ledger.lock(partition.key, wait=wait)):
                return None
            try:
                before = self.store.open(table, partition)
            except MarketDataError as error:
                failed: Future[FetchResult] = Future()
                failed.set_exception(error)
                start = partition.month.start
                before = OpenPartition(partition, table, Window(start, start))
                return _Started(before, failed, lock.pop_all())
            span = FetchSpan(
                partition.market,
                timeframe=table.timeframe,
                wanted=before.wanted,
                stored=before.stored,
                gaps=before.gaps,
                again=again & before.wanted if again else None,
            )
            client = self.venues.client(partition.market.venue)
            work = collect(self.settings, self.ledger, client, span=span)
            return _Started(before, self.venues.submit(work), lock.pop_all())

    def _finish(self, started: _Started) -> IngestResult:
        try:
            fetched = started.answer.result()
            result = self.store.save(started.partition, fetched)
        except MarketDataError as error:
            return self.store.record_failure(started.partition, error)
        if fetched.error:
            self.store.record_failure(started.partition, fetched.error)
        return replace(result, error=fetched.error)

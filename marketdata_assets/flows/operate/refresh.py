"""Refresh: which venues' open month may be brought to the last closed bar now. Sends no request."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass

from marketdata_assets.flows.fetch.open_partition import wanted_window
from marketdata_assets.flows.operate.backfill import GRACE
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.partition_status import PartitionStatus, partition_status
from marketdata_assets.model.table import raw_table
from marketdata_assets.model.window import month_of
from marketdata_assets.settings.parts import Venue
from marketdata_assets.settings.universe import Settings
from marketdata_assets.storage.lake import Lake


@dataclass(frozen=True, slots=True)
class Refresh:
    """One venue: the corners of what a run is asked for, or None, and why."""

    venue: str
    message: str
    corners: tuple[Partition, Partition] | None = None


@dataclass(frozen=True, slots=True)
class RefreshPlanner:
    """Plans the refresh of every venue's open month."""

    settings: Settings
    ledger: Ledger
    lake: Lake
    clock: Callable[[], float]

    def plan(self, busy: Container[str]) -> list[Refresh]:
        """Return one refresh per venue of the universe.

        `busy` holds the Dagster keys of partitions that a run works on or waits for. In the first
        hour of a month the month before is refreshed as well.
        """
        return [self._plan_venue(venue, busy) for venue in self.settings.venues.values()]

    def _plan_venue(self, venue: Venue, busy: Container[str]) -> Refresh:
        now, name = self.settings.now(), venue.name
        if venue.until and venue.until <= now - GRACE:
            return Refresh(name, f"{name}: nothing is wanted after {venue.until.date()}")
        if self.ledger.venues.health(name).broken_until > self.clock():
            return Refresh(name, f"{name}: its circuit breaker is open")
        open_month = month_of(now)
        months = {month_of(now - GRACE), open_month}
        wanted = sorted(m for m in months if m == open_month or m.end > venue.since)
        partitions = [Partition(market, m) for m in wanted for market in venue.markets]
        outdated = [p for p in partitions if self._needs_refresh(venue, p)]
        if not outdated:
            return Refresh(name, f"{name}: no bar has closed since the last refresh")
        if any(partition.key in busy for partition in partitions):
            return Refresh(name, f"{name}: a run is under way")
        first = Partition(venue.markets[0], min(p.month for p in outdated))
        last = Partition(venue.markets[-1], max(p.month for p in outdated))
        message = f"{name}: {len(outdated)} partitions are missing closed bars"
        return Refresh(name, message, (first, last))

    def _needs_refresh(self, venue: Venue, partition: Partition) -> bool:
        """Return whether closed bars of a fetched timeframe were not requested, or are lost."""
        for timeframe in venue.fetched_timeframes:
            table, window = raw_table(timeframe), wanted_window(self.settings, timeframe, partition)
            if not window:
                continue
            state = self.ledger.partitions.get(table, partition)
            size = self.lake.size(table, partition) if state else None
            # what was requested before `since` moved is not a matter of the refresh
            wanted = (state.start if state else window.start, window.end)
            status = partition_status(state, size, wanted, has_due_gap=False)
            if status not in (PartitionStatus.WHOLE, PartitionStatus.INCOMPLETE):
                return True
        return False

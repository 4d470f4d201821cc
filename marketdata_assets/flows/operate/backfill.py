"""Backfill: which closed months need work, and which may be requested now. Sends no request.

The truth is the ledger and the lake's own listing: a partition is wanted when its status is not
`whole`, its rollups are not up to date, or Dagster does not show it. The open month belongs to
`flows.operate.refresh`, and so does the month before it for the first hour of a month (GRACE).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Container, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from marketdata_assets.flows.fetch.open_partition import wanted_window
from marketdata_assets.flows.operate.blocks import Block, count_reasons, plan_blocks
from marketdata_assets.flows.read.table_status import TableStatus
from marketdata_assets.ledger.attempts import BackfillAttempt
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import Partition, PartitionKey, partitions_of
from marketdata_assets.model.partition_status import (
    LOST_REASON,
    PartitionStatus,
    ensure_lake_mounted,
    status_reason,
)
from marketdata_assets.model.table import Table, raw_table, rollup_table
from marketdata_assets.model.timeframe import MINUTE, Timeframe
from marketdata_assets.model.window import format_time
from marketdata_assets.settings.parts import Venue
from marketdata_assets.settings.universe import Settings
from marketdata_assets.storage.bars import BarStorage

GRACE = timedelta(hours=1)
"""A month belongs to the refresh for so long after its end."""
PARTITIONS_A_RUN = 24
FEWEST_A_RUN = 2
"""With warm workers a run costs little, and what is ready is shared among them in small runs."""
COOLDOWN_GROWTH = 5
"""Each attempt waits so many times as long as the one before."""
SEARCH_INTERVAL = timedelta(minutes=10)
"""How often S3 is listed to find lost objects."""
PARKED = "are parked after too many attempts (`marketdata parked`)"
ROLLUPS_OUTDATED = "its rollups are not up to date"
ROLLUPS_HIDDEN = "Dagster does not show its rollups"


@dataclass(slots=True)
class BackfillPlan:
    """What one look found.

    `lost` names, by table, the partitions that the ledger has and the lake has not; an empty list
    means the whole table. `waiting` counts the partitions that are not requested now, by reason.
    """

    blocks: list[Block] = field(default_factory=list)
    lost: dict[Table, list[Partition]] = field(default_factory=lambda: defaultdict(list))
    parked: list[Partition] = field(default_factory=list)
    waiting: Counter[str] = field(default_factory=Counter)

    @property
    def message(self) -> str:
        """One line: what is requested, and why the rest is not."""
        parts = [f"asked for {block}" for block in self.blocks]
        if self.waiting:
            parts.append(count_reasons(self.waiting))
        return "; ".join(parts) or "nothing is missing"


@dataclass(frozen=True, slots=True)
class BacklogFinder:
    """Finds the closed months that need work."""

    settings: Settings
    ledger: Ledger
    storage: BarStorage
    clock: Callable[[], float]

    def plan_backfill(
        self, room: int, busy: Container[str], shown: Mapping[Table, Collection[str]]
    ) -> BackfillPlan:
        """Return what needs work, in at most `room` blocks, the newest months first.

        `busy` holds the Dagster keys of partitions that a run works on or waits for, `shown` the
        keys that Dagster shows as materialized, by table. Each partition of a block is recorded as
        one more attempt: whoever calls this launches the runs. Raises StoreFailed when most of the
        lake is lost.
        """
        plan, now = BackfillPlan(), self.settings.now()
        attempts = self.ledger.attempts.all()
        wanted = dict(self._find_wanted(shown, plan, now))
        self._drop_what_is_stored(plan, wanted)
        done = [
            attempt.partition
            for key, attempt in attempts.items()
            if key not in wanted and attempt.partition.key not in busy
        ]
        if done:
            self.ledger.attempts.clear(done)
        ready = self._find_ready(wanted, attempts, busy, plan=plan, now=now)
        most = PARTITIONS_A_RUN
        if self.settings.broker and room:
            most = min(most, max(FEWEST_A_RUN, -(-len(ready) // room)))
        markets = [venue.markets for venue in self.settings.venues.values()]
        reasons = {key: wanted[key] for key in ready}
        plan.blocks = plan_blocks(markets, reasons, room, most=most)
        requested = [p for block in plan.blocks for p in block.partitions]
        if len(ready) > len(requested):
            plan.waiting["wait for their turn"] = len(ready) - len(requested)
        if requested:
            self.ledger.attempts.add([(p, wanted[p.stored_key]) for p in requested], now)
        return plan

    # ------------------------------------------------------------------------------ what is wanted
    def _find_wanted(
        self, shown: Mapping[Table, Collection[str]], plan: BackfillPlan, now: datetime
    ) -> Iterator[tuple[PartitionKey, str]]:
        """Yield everything that needs work, with the reason."""
        due = is_search_due(self.ledger, self.storage, now)
        lost_rollups = self._find_lost_rollups(plan, due)
        hidden_rollups = self._find_hidden_rollups(shown)
        for venue in self.settings.venues.values():
            tables = [
                self._read_table(raw_table(timeframe), shown, due, now=now)
                for timeframe in venue.fetched_timeframes
            ]
            months = list(self._closed_months(venue, now))
            for market in venue.markets:
                has_rollups = bool(self.settings.rollup_timeframes_of(market))
                for month, windows in months:
                    key = (market.key, month)
                    reasons = (
                        table.reason(key, window, plan)
                        for table, window in zip(tables, windows, strict=True)
                        if window
                    )
                    reason = next(filter(None, reasons), None)
                    if reason is None and has_rollups and windows[0]:
                        is_rolled_up = tables[0].summaries[key].is_rolled_up
                        if not is_rolled_up or key in lost_rollups:
                            reason = ROLLUPS_OUTDATED
                        elif hidden_rollups(market, key):
                            reason = ROLLUPS_HIDDEN
                    if reason is not None:
                        yield key, reason

    def _read_table(
        self, table: Table, shown: Mapping[Table, Collection[str]], search: bool, *, now: datetime
    ) -> _RawTable:
        due = self.ledger.gaps.due(table, now)
        status = TableStatus(
            self.ledger, self.storage.lake, table, search_lake=search, with_gaps=due
        )
        return _RawTable(table, status, shown.get(table))

    def _closed_months(
        self, venue: Venue, now: datetime
    ) -> Iterator[tuple[str, list[tuple[str, str] | None]]]:
        """Yield month keys with the window wanted of each timeframe, as ISO text; None for none."""
        market, days = venue.markets[0], self.settings.automation.lookback_days
        for partition in partitions_of(market, self.settings.span(market)):
            end = min(partition.month.end, venue.until or partition.month.end)
            is_too_old = days is not None and end < now - timedelta(days=days)
            if end > now - GRACE or is_too_old:
                continue
            windows = [
                wanted_window(self.settings, tf, partition) for tf in venue.fetched_timeframes
            ]
            texts = [(format_time(w.start), format_time(w.end)) if w else None for w in windows]
            yield partition.month_key, texts

    def _drop_what_is_stored(self, plan: BackfillPlan, wanted: dict[PartitionKey, str]) -> None:
        """Keep only what is really lost: not what a run stores just now, nor an unmounted lake."""
        lost = {table: found for table, found in plan.lost.items() if table.layer == "raw"}
        stored = sum(len(self.ledger.partitions.summaries(table)) for table in lost)
        ensure_lake_mounted(sum(map(len, lost.values())), stored, self.settings.lake)
        for table, partitions in lost.items():
            plan.lost[table] = [p for p in partitions if self._is_lost(table, p)]
            for partition in set(partitions) - set(plan.lost[table]):
                wanted.pop(partition.stored_key, None)
            if not plan.lost[table]:
                del plan.lost[table]

    def _is_lost(self, table: Table, partition: Partition) -> bool:
        with self.ledger.lock(partition.key, wait=False) as is_free:
            state = self.ledger.partitions.get(table, partition)
            size = self.storage.lake.proven_size(table, partition)
            return is_free and state is not None and state.bytes != size

    def _find_lost_rollups(self, plan: BackfillPlan, search: bool) -> set[PartitionKey]:
        """Return the partitions whose rollups are gone; in the lake, one table is searched at a
        time.
        """
        timeframes = self.settings.rollup_timeframes
        if self.storage.rollups_in_warehouse:
            if not self.storage.warehouse.exists:
                self.ledger.partitions.clear_rollup_sources()
                for timeframe in timeframes:
                    plan.lost[rollup_table(timeframe)] = []
                return set()
            outdated = self.storage.outdated_rollups(self.ledger.partitions.rollup_sources())
            for timeframe in timeframes:
                lost = {key for key in outdated if self._is_rolled_up(key[0], timeframe)}
                if lost:
                    plan.lost[rollup_table(timeframe)] = [*map(Partition.from_stored_key, lost)]
            return set(outdated)
        if not timeframes or not search:
            return set()
        lake = self.storage.lake
        table = self._rollup_in_turn(MINUTE if lake.is_local else SEARCH_INTERVAL)
        kept = f"{self.settings.kept_since(table.name):%Y-%m-%d}"
        sizes = lake.list_proven_sizes(table)
        bases = {venue.base for venue in self.settings.venues.values()}
        rolled_up = (
            key
            for base in bases
            for key, summary in self.ledger.partitions.summaries(raw_table(base)).items()
            if summary.is_rolled_up and key[1] >= kept and sizes.get(key) is None
        )
        lost = {key for key in rolled_up if self._is_rolled_up(key[0], table.timeframe)}
        if lost:
            plan.lost[table] = [Partition.from_stored_key(key) for key in lost]
        return lost

    @property
    def shown_tables(self) -> set[Table]:
        """The tables whose materializations are looked at now: what rollups are made of, and one
        rolled-up table in each minute.
        """
        shown = {raw_table(venue.base) for venue in self.settings.venues.values()}
        if self.settings.rollup_timeframes:
            shown.add(self._rollup_in_turn(MINUTE))
        return shown

    def _rollup_in_turn(self, pace: timedelta) -> Table:
        """Return one rolled-up table after the other, each for this time."""
        timeframes, turn = self.settings.rollup_timeframes, self.settings.now().timestamp()
        return rollup_table(timeframes[int(turn // pace.total_seconds()) % len(timeframes)])

    def _find_hidden_rollups(
        self, shown: Mapping[Table, Collection[str]]
    ) -> Callable[[Market, PartitionKey], bool]:
        """Return whether Dagster does not show a partition of the rolled-up table that `shown` has:
        someone wiped it.
        """
        table = next((table for table in shown if table.layer == "rollup"), None)
        if table is None:
            return lambda market, key: False
        keys, kept = shown[table], f"{self.settings.kept_since(table.name):%Y-%m-%d}"

        def is_hidden(market: Market, key: PartitionKey) -> bool:
            is_made = table.timeframe in self.settings.rollup_timeframes_of(market)
            return is_made and key[1] >= kept and "|".join(key) not in keys

        return is_hidden

    def _is_rolled_up(self, market_key: str, timeframe: Timeframe) -> bool:
        market = next((m for m in self.settings.markets if m.key == market_key), None)
        return market is not None and timeframe in self.settings.rollup_timeframes_of(market)

    # ------------------------------------------------------------------------------ what may run
    def _find_ready(
        self,
        wanted: Mapping[PartitionKey, str],
        attempts: Mapping[PartitionKey, BackfillAttempt],
        busy: Container[str],
        *,
        plan: BackfillPlan,
        now: datetime,
    ) -> set[PartitionKey]:
        """Return what may be requested now; count why the rest may not; park what failed often."""
        ready, parking = set(), []
        clock = self.clock()
        broken = {
            name
            for name in self.settings.venues
            if self.ledger.venues.health(name).broken_until > clock
        }
        for key, reason in wanted.items():
            attempt = attempts.get(key)
            wait = self._reason_to_wait(key, attempt, busy, broken=broken, now=now)
            if wait is None and attempt and attempt.attempts >= self.settings.automation.attempts:
                parking.append((attempt.partition, reason))
                wait = PARKED
            if wait is None:
                ready.add(key)
                continue
            plan.waiting[wait] += 1
            if wait == PARKED:
                plan.parked.append(Partition.from_stored_key(key))
        if parking:
            self.ledger.attempts.park(parking, now)
        return ready

    def _reason_to_wait(
        self,
        key: PartitionKey,
        attempt: BackfillAttempt | None,
        busy: Container[str],
        *,
        broken: Container[str],
        now: datetime,
    ) -> str | None:
        if "|".join(key) in busy:
            return "are under way"
        if attempt and attempt.parked_at:
            return PARKED
        venue = key[0].partition(":")[0]
        if venue in broken:
            return f"wait for {venue}, whose circuit breaker is open"
        if attempt and timedelta(0) <= now - attempt.attempted_at < cooldown(
            self.settings, attempt
        ):
            return "wait for their cooldown"
        return None


class _RawTable:
    """The status of a raw table's partitions, and which of them Dagster shows."""

    def __init__(self, table: Table, status: TableStatus, shown: Collection[str] | None) -> None:
        self._table, self._status, self._shown = table, status, shown
        self.summaries = status.summaries

    def reason(self, key: PartitionKey, wanted: tuple[str, str], plan: BackfillPlan) -> str | None:
        """Return why this partition needs a run; None when it needs none. `wanted` is ISO text."""
        status, summary = self._status.of(key, wanted), self.summaries.get(key)
        if status == PartitionStatus.LOST:
            plan.lost[self._table].append(Partition.from_stored_key(key))
            return LOST_REASON
        reason = status_reason(status, summary.error if summary else None)
        if reason is None and self._shown is not None and "|".join(key) not in self._shown:
            return "Dagster does not show it"
        return reason


def cooldown(settings: Settings, attempt: BackfillAttempt) -> timedelta:
    """Return how long after its last attempt a partition is left alone."""
    growth: int = COOLDOWN_GROWTH ** max(0, attempt.attempts - 1)
    return settings.automation.cooldown_minutes * MINUTE * growth


def is_search_due(
    ledger: Ledger, storage: BarStorage, now: datetime, *, what: str = "lost objects"
) -> bool:
    """Return whether to search for lost objects now: always where that is free.

    `what` names the search; the ledger records when it was done last.
    """
    if storage.lake.is_local:
        return True
    last = ledger.heartbeats.last(what)
    if last is not None and timedelta(0) <= now - last < SEARCH_INTERVAL:
        return False
    ledger.heartbeats.record(what, now)
    return True

"""Coverage: the sum that explains every expected bar, per market and per day."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, time, timedelta

from marketdata_assets.flows.read.table_status import TableStatus
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.ledger.records import PartitionState
from marketdata_assets.model.intervals import count_bars
from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import Partition, partitions_of
from marketdata_assets.model.partition_status import PartitionStatus, partition_status
from marketdata_assets.model.table import Table, raw_table
from marketdata_assets.model.timeframe import MINUTE, Timeframe
from marketdata_assets.model.window import Window, format_time, parse_time
from marketdata_assets.settings.universe import Settings
from marketdata_assets.storage.lake import Lake

DAY, MIDNIGHT = timedelta(days=1), time(0)


@dataclass(slots=True)
class Coverage:
    """What became of every expected bar of a market; the parts sum to `expected`.

    Base bars are counted as the 1m bars that they hold, and those of less than a minute one by one.
    """

    market: str
    expected: int = 0
    present: int = 0
    quarantined: int = 0
    no_trade: int = 0
    halted: int = 0
    not_listed: int = 0
    delisted: int = 0
    missing_at_source: int = 0
    unexplained: int = 0
    not_fetched: int = 0

    def add(self, other: Coverage, units: int) -> None:
        """Add a sum whose bars count for so many units each."""
        for name, bars in asdict(other).items():
            if isinstance(bars, int):
                setattr(self, name, getattr(self, name) + bars * units)

    def as_dict(self) -> dict[str, str | int]:
        """Return it in the order of the contract."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class DailyCoverage:
    """By market key, for each day since `first_day`: which share of the wanted bars is explained.

    A share is between 0 and 1; None where no bar is wanted.
    """

    shares: dict[str, list[float | None]]
    first_day: date


@dataclass(frozen=True, slots=True)
class CoverageReporter:
    """Counts what is stored and explained, by the ledger and the lake; sends no request."""

    settings: Settings
    ledger: Ledger
    lake: Lake

    def report(self, markets: Iterable[Market], window: Window | None = None) -> list[Coverage]:
        """Return one sum per market, of everything wanted or of the bars that open in a window.

        Bars are present only while the object that holds them lies in the lake. Raises Damaged.
        """
        return [self._report_market(market, window) for market in markets]

    def daily(self, table: Table) -> DailyCoverage:
        """Return the coverage of all markets of a table by day.

        A rollup covers what its base covers and what was rolled up. Reads the ledger and the sizes
        of a local lake's objects, no object.
        """
        settings, shares = self.settings, dict[str, list[float | None]]()
        is_rollup = table.layer == "rollup"
        for venue in settings.venues.values():
            source = raw_table(venue.base if is_rollup else table.timeframe)
            if source.timeframe not in venue.fetched_timeframes:
                continue
            days = _DailyShares(
                settings, self.ledger, self.lake, source=source, needs_rollup=is_rollup
            )
            for market in venue.markets:
                span = settings.span(market)
                before = (span.start.date() - settings.since.date()).days
                months = partitions_of(market, span)
                wanted = (share for partition in months for share in days.of(partition, span))
                shares[market.key] = [*[None] * before, *wanted]
        return DailyCoverage(shares, settings.since.date())

    def _report_market(self, market: Market, window: Window | None) -> Coverage:
        base = self.settings.venues[market.venue].base
        first_bar = self.ledger.markets.first_bar(market)
        span = self.settings.span(market)
        span = span if window is None else span & window
        states = self.ledger.partitions.of_market(raw_table(base), market)
        coverage, unit = Coverage(market.key), min(MINUTE, base.width)
        for partition in partitions_of(market, span):
            wanted = partition.open_times(base) & Window(
                base.ceil(span.start), base.floor(span.end)
            )
            month = Coverage(market.key, expected=wanted.count(base))
            bar = (base.shift(wanted.start, 1) - wanted.start) // unit
            if first_bar:
                listed = Window(max(wanted.start, base.floor(first_bar)), wanted.end)
                month.not_listed += wanted.count(base) - listed.count(base)
                wanted = listed
            state = states.get(partition.month_key)
            self._add_partition(month, raw_table(base), partition, wanted=wanted, state=state)
            coverage.add(month, bar)
        return coverage

    def _add_partition(
        self,
        coverage: Coverage,
        table: Table,
        partition: Partition,
        *,
        wanted: Window,
        state: PartitionState | None,
    ) -> None:
        """Add one month: what the lake holds, what the ledger explains, and the rest."""
        remaining = wanted.count(table.timeframe)
        size = self.lake.proven_size(table, partition) if remaining and state else None
        bounds = (wanted.start, wanted.end)
        status = partition_status(state, size, bounds, has_due_gap=False)
        if remaining and state and status.is_stored:
            present = self._count_present(table, partition, wanted, state=state)
            coverage.present += present
            remaining -= present
            for gap in self.ledger.gaps.between(table, partition.market, wanted):
                bars = min(remaining, (gap.window & wanted).count(table.timeframe))
                setattr(coverage, gap.kind, getattr(coverage, gap.kind) + bars)
                remaining -= bars
        coverage.not_fetched += remaining

    def _count_present(
        self, table: Table, partition: Partition, wanted: Window, *, state: PartitionState
    ) -> int:
        """Return the ledger's count of a whole month, else count the bars inside the window."""
        if wanted == partition.open_times(table.timeframe):
            return state.rows
        bars = self.lake.read(table, partition)
        if bars is None:
            return 0
        return int(bars["open_time"].is_between(wanted.start, wanted.end, closed="left").sum())


class _DailyShares:
    """The shares of the days of one raw table, or of the rollups that are made of it."""

    def __init__(
        self, settings: Settings, ledger: Ledger, lake: Lake, *, source: Table, needs_rollup: bool
    ) -> None:
        self._timeframe, self._needs_rollup = source.timeframe, needs_rollup
        self._unsettled = ledger.gaps.unsettled(source)
        # in S3, `backfill_missed` searches for lost objects from time to time
        self._status = TableStatus(
            ledger, lake, source, search_lake=lake.is_local, with_gaps=self._unsettled
        )
        # bars that have closed since then may be on their way
        self._settled = settings.now() - settings.limits(source.timeframe).warn

    def of(self, partition: Partition, span: Window) -> Iterator[float | None]:
        """Yield the share of each day of a month inside the span wanted of its market."""
        key = partition.stored_key
        wanted = partition.month & span & Window(span.start, self._settled)
        summary = self._status.summaries.get(key)
        status = self._status.of(key, (format_time(wanted.start), format_time(wanted.end)))
        is_usable = summary and (summary.is_rolled_up or not self._needs_rollup)
        if status == PartitionStatus.WHOLE and is_usable:
            yield from [1.0] * (-(-(wanted.end - wanted.start) // DAY))
            return
        requested = Window(wanted.start, wanted.start)
        if summary and status.is_stored and is_usable:
            requested = Window(parse_time(summary.start), parse_time(summary.through))
        day = datetime(wanted.start.year, wanted.start.month, wanted.start.day, tzinfo=UTC)
        gaps = self._unsettled.get(key, ())
        while day < wanted.end:
            yield _explained_share(
                Window(day, day + DAY) & wanted, requested, gaps, timeframe=self._timeframe
            )
            day += DAY


def _explained_share(
    day: Window, requested: Window, gaps: Iterable[Window], *, timeframe: Timeframe
) -> float | None:
    """Return the share of a day's bars that were requested and lie in no unsettled gap."""
    is_whole = day.end.time() == MIDNIGHT
    end = timeframe.ceil(day.end) if is_whole else timeframe.floor(day.end)
    opens = Window(timeframe.ceil(day.start), end)
    wanted = opens.count(timeframe)
    if not wanted:
        return None
    unexplained = count_bars((gap & opens for gap in gaps), timeframe)
    return ((opens & requested).count(timeframe) - unexplained) / wanted

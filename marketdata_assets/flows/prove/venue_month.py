"""What the ledger says of all markets of a venue in one month: where each has bars, and how often
not.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from itertools import accumulate

from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.ledger.records import PartitionState
from marketdata_assets.model.gap import Gap, GapCause, GapReason
from marketdata_assets.model.intervals import coalesce_windows, count_bars, subtract_windows
from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import Table
from marketdata_assets.model.window import Window
from marketdata_assets.quality.evidence import EmptyBarRate, EmptyBarRates
from marketdata_assets.settings.universe import Settings

AROUND = timedelta(hours=12)
"""How far around a gap the rate of empty bars is measured besides the whole month."""
MIN_EMPTY_AROUND = 10
"""With fewer empty bars around a gap, their rate says nothing about that time of day."""


def is_confirmed_absent(gap: Gap, state: PartitionState | None) -> bool:
    """Return whether two answers say that there are no bars in a gap.

    Either within one answer each, or page by page between bars that exist.
    """
    if gap.reason != GapReason.UNANSWERED or state is None:
        return gap.reason == GapReason.NO_BARS
    is_inside = state.start < gap.window.start and gap.window.end < state.through
    return gap.answers > 1 and is_inside


class VenueMonth:
    """The markets of a venue in one month of one table, read once."""

    def __init__(
        self, settings: Settings, ledger: Ledger, table: Table, *, venue: str, month: Window
    ) -> None:
        self.settings, self.ledger = settings, ledger
        self.table, self.venue, self.month = table, venue, month
        self.markets = settings.venues[venue].markets if venue in settings.venues else ()
        self._gaps = ledger.gaps.of_month(table, venue, f"{month.start:%Y-%m-%d}")
        self._market_months: dict[Market, MarketMonth] = {}
        self._other_venues: dict[str, VenueMonth] = {}
        gaps = (gap for found in self._gaps.values() for gap in found)
        self._halts = [gap.window for gap in gaps if gap.cause == GapCause.HALTED]

    def gaps(self, market: Market) -> list[Gap]:
        """Return the gaps of one market as they were when the month was read."""
        return self._gaps.get(market.key, [])

    def market(self, market: Market) -> MarketMonth:
        """Return what is known of one market."""
        if market not in self._market_months:
            state = self.ledger.partitions.get(self.table, Partition(market, self.month))
            first_bar = self.ledger.markets.first_bar(market)
            self._market_months[market] = MarketMonth(
                self.table, state, first_bar, gaps=self.gaps(market), halts=self._halts
            )
        return self._market_months[market]

    def exclude_halt(self, halt: Window) -> None:
        """Leave a halt out of all rates: it says nothing about how often markets are silent."""
        self._halts.append(halt)
        for market_month in self._market_months.values():
            market_month.exclude_halts([halt])

    def other_venues(self, market: Market) -> Iterator[tuple[Market, MarketMonth]]:
        """Yield other venues' markets of the same base asset, where they have this table."""
        asset = market.symbol.partition("/")[0]
        for name, venue in self.settings.venues.items():
            same_asset = [m for m in venue.markets if m.symbol.partition("/")[0] == asset]
            has_table = self.table.timeframe in venue.fetched_timeframes
            if name == self.venue or not same_asset or not has_table:
                continue
            if name not in self._other_venues:
                self._other_venues[name] = VenueMonth(
                    self.settings, self.ledger, self.table, venue=name, month=self.month
                )
            for other in same_asset:
                yield other, self._other_venues[name].market(other)


class MarketMonth:
    """One market in one month by the ledger: where it has bars, and where it has none."""

    def __init__(
        self,
        table: Table,
        state: PartitionState | None,
        first_bar: datetime | None,
        *,
        gaps: Sequence[Gap],
        halts: Sequence[Window],
    ) -> None:
        self.state, self._timeframe = state, table.timeframe
        self._since = max(state.start, first_bar or state.start) if state else None
        absent = [gap.window for gap in gaps if is_confirmed_absent(gap, state)]
        self._absent = coalesce_windows(absent)
        self._starts = [window.start for window in self._absent]
        self._rejected = [gap.window for gap in gaps if gap.is_rejected]
        self._unknown = [
            gap.window
            for gap in gaps
            if not gap.is_rejected and not is_confirmed_absent(gap, state)
        ]
        self._usual = self._absent
        self.exclude_halts(halts)

    def exclude_halts(self, halts: Sequence[Window]) -> None:
        """Leave halts out of the rate of empty bars."""
        if halts:
            self._usual = subtract_windows(self._usual, coalesce_windows(halts))
        self._usual_starts = [window.start for window in self._usual]
        counts = (window.count(self._timeframe) for window in self._usual)
        self._sums = list(accumulate(counts, initial=0))

    def covers(self, window: Window) -> bool:
        """Return whether it is known of every bar of a window if the market has it."""
        if self.state is None or self.state.bytes is None or self._since is None:
            return False
        is_requested = self._since <= window.start and window.end <= self.state.through
        return is_requested and not any(window & gap for gap in self._unknown)

    def is_pending(self, window: Window) -> bool:
        """Return whether the window has still to be requested, and no failure prevents it."""
        return self.state is None or (self.state.through < window.end and not self.state.error)

    def count_bars(self, window: Window) -> int:
        """Return how many bars of a covered window the market has."""
        gaps = [*self.absent_in(window), *(gap & window for gap in self._rejected)]
        return window.count(self._timeframe) - count_bars(gaps, self._timeframe)

    def absent_in(self, window: Window) -> list[Window]:
        """Return the stretches of a window of which answers say that there are no bars."""
        first = max(0, bisect_right(self._starts, window.start) - 1)
        last = bisect_left(self._starts, window.end)
        return [part for absent in self._absent[first:last] if (part := absent & window)]

    def empty_bar_rates(self, gap: Window) -> EmptyBarRates:
        """Return how often the market is silent outside of a gap: in the month, and around the gap.

        Around the gap only where it is silent often.
        """
        if self.state is None:
            return (EmptyBarRate(0, 0, 0),)
        month = Window(self.state.start, self.state.through)
        around = Window(gap.start - AROUND, gap.end + AROUND) & month
        wide, near = self._empty_bar_rate(month, gap), self._empty_bar_rate(around, gap)
        return (wide, near) if near.empty >= MIN_EMPTY_AROUND else (wide,)

    def _empty_bar_rate(self, span: Window, gap: Window) -> EmptyBarRate:
        starts = self._usual_starts
        first, last = bisect_left(starts, span.start), bisect_left(starts, span.end)
        begin = max(first, bisect_right(starts, gap.start) - 1)
        end = min(last, bisect_left(starts, gap.end))
        own = [window for window in self._usual[begin:end] if window & gap]
        excluded = count_bars(own, self._timeframe)
        bars = max(0, span.count(self._timeframe) - excluded)
        empty = self._sums[last] - self._sums[first] - excluded
        return EmptyBarRate(bars, empty, last - first - len(own))

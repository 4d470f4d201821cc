"""The evidence about the gaps of one partition, gathered for `quality.gap_causes` to judge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any

import polars as pl

from marketdata_assets.errors import MarketDataError
from marketdata_assets.flows.prove.venue_month import (
    MarketMonth,
    VenueMonth,
    is_confirmed_absent,
)
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.model.bar import TIME, empty_bars, format_number
from marketdata_assets.model.gap import Gap, GapReason
from marketdata_assets.model.intervals import opens_inside
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import Table, raw_table
from marketdata_assets.model.window import Window, format_time
from marketdata_assets.quality.evidence import (
    FinerGap,
    GapEvidence,
    NativeBar,
    Neighbor,
    SilentWindow,
)
from marketdata_assets.quality.gap_causes import GapPart
from marketdata_assets.settings.universe import Settings
from marketdata_assets.sources.clients import VenueClients
from marketdata_assets.storage.lake import Lake
from marketdata_assets.venues.registry import facts_of

NATIVE_AGREEMENT = 0.99
"""A timeframe whose native bars add up less often than this proves nothing by not adding up."""
LONG_SILENCE = timedelta(days=1)
"""A market that has been silent for so long may have left its venue."""
FIRST_REQUESTS, LAST_REQUESTS = 2, 4
"""Of more requests than both together, a proof keeps the first and the last ones."""


class GapInvestigation:
    """One partition whose gaps are investigated.

    Without `venues`, no venue is asked whether it still lists the market.
    """

    def __init__(
        self, month: VenueMonth, partition: Partition, lake: Lake, *, venues: VenueClients | None
    ) -> None:
        self.month, self._partition, self._lake, self._venues = month, partition, lake, venues
        self._settings, self._ledger, self._table = month.settings, month.ledger, month.table
        stored = lake.read(self._table, partition)
        self._bars = empty_bars() if stored is None else stored
        self._bars_without_volume = int((self._bars["volume"] == 0).sum())
        self._own = month.market(partition.market)
        others = (market for market in month.markets if market != partition.market)
        self._others = {market.key: month.market(market) for market in others}
        self._other_venues = dict(month.other_venues(partition.market))
        natives = _native_bars(
            self._settings, lake, self._table, partition=partition, bars=self._bars
        )
        self._natives = list(natives)
        self._requests = _RequestLog(self._ledger, self._table, partition)

    def gather(self, gap: Gap) -> GapEvidence:
        """Return everything that is known about one gap."""
        window = gap.window
        covering = {key: m for key, m in self._others.items() if m.covers(window)}
        uncovered = (m for key, m in self._others.items() if key not in covering)
        is_pending = any(m.is_pending(window) for m in uncovered)
        is_trailing = self._is_trailing(gap)
        others = {key: m.count_bars(window) for key, m in covering.items()}
        before, after = self._neighbors(window)
        return GapEvidence(
            window=window,
            timeframe=self._table.timeframe,
            is_confirmed_absent=is_confirmed_absent(gap, self._own.state),
            horizon=gap.evidence if gap.reason == GapReason.NOT_SERVED else None,
            has_archive=facts_of(self.month.venue).archive is not None,
            answers=gap.answers,
            empty_bar_rates=self._own.empty_bar_rates(window),
            silent_windows=tuple(_silent_windows(window, list(covering.values()))),
            native_bars=tuple(native for native in self._natives if native.window & window),
            other_markets=others or (self._active_markets(window) if is_trailing else {}),
            is_fetch_pending=(is_pending or self._is_native_pending(window)) and not is_trailing,
            finer_gaps=self._finer_gaps(window),
            traded_elsewhere=None if covering else self._traded_elsewhere(window),
            halts=tuple(facts_of(self.month.venue).halts_in(window)),
            before=before,
            after=after,
            bars_without_volume=self._bars_without_volume,
            is_trailing=is_trailing,
            is_listed=self._is_listed() if is_trailing else None,
        )

    def prove(self, gap: Gap, evidence: GapEvidence, part: GapPart) -> dict[str, Any]:
        """Return what shows the cause of one part of a gap, as JSON holds it."""
        window = part.window
        venue = {k: m.count_bars(window) for k, m in self._others.items() if m.covers(window)}
        elsewhere = {
            market.key: m.count_bars(window)
            for market, m in self._other_venues.items()
            if m.covers(window)
        }
        found: dict[str, Any] = {
            "words": part.message,
            "requests": self._requests.about(window, gap.proof.get("requests", [])),
            "before": _describe_bar(evidence.before),
            "after": _describe_bar(evidence.after),
            "venue": venue,
            "elsewhere": elsewhere,
            "native": [str(native) for native in evidence.native_bars if native.window & window],
            "known_halts": [
                {
                    "window": str(halt.window),
                    "what": halt.description,
                    "told_by": halt.reported_by,
                }
                for halt in evidence.halts
            ],
            "listed": evidence.is_listed,
        }
        return {name: value for name, value in found.items() if value not in (None, [], {})}

    def _neighbors(self, window: Window) -> tuple[Neighbor | None, Neighbor | None]:
        opens, last = self._bars["open_time"], self._table.timeframe.shift(window.start, -1)
        at = int(opens.search_sorted(window.start))
        before = self._neighbor(at - 1, last) if at else None
        after = self._neighbor(at, window.end) if at < opens.len() else None
        return before, after

    def _neighbor(self, at: int, expected: datetime) -> Neighbor | None:
        open_time, close, volume = self._bars.select("open_time", "close", "volume").row(at)
        return Neighbor(open_time, close, volume) if open_time == expected else None

    def _is_trailing(self, gap: Gap) -> bool:
        """Return whether the market has been silent for long, to the end of what was requested."""
        window, state = gap.window, self._own.state
        if gap.reason == GapReason.NO_BARS or state is None or window.end < state.through:
            return False
        last = self._ledger.partitions.last_bar(self._table, self._partition.market)
        is_long = window.end - window.start >= LONG_SILENCE
        return is_long and last is not None and last < window.start

    def _active_markets(self, window: Window) -> dict[str, int]:
        """Return the other markets of the venue that have bars after the begin of a window."""
        newest = {key: m.state.newest for key, m in self._others.items() if m.state}
        return {key: 1 for key, bar in newest.items() if bar and bar >= window.start}

    def _is_native_pending(self, window: Window) -> bool:
        """Return whether a coarser bar over the window has still to be fetched."""
        for timeframe in self._settings.venues[self.month.venue].fetched_timeframes:
            if timeframe.width <= self._table.timeframe.width:
                continue
            state = self._ledger.partitions.get(raw_table(timeframe), self._partition)
            end = min(timeframe.floor(window.end), self._partition.open_times(timeframe).end)
            if state is None or (state.through < end and not state.error):
                return True
        return False

    def _finer_gaps(self, window: Window) -> tuple[FinerGap, ...]:
        """Return the causes of base bars that are missing in a gap of a coarser table."""
        base = raw_table(self._settings.venues[self.month.venue].base)
        if base == self._table:
            return ()
        gaps = self._ledger.gaps.between(base, self._partition.market, window)
        return tuple(FinerGap(gap.window, gap.cause) for gap in gaps if gap.cause)

    def _is_listed(self) -> bool | None:
        """Return whether the venue lists the market; None when it is not asked or is down."""
        if self._venues is None:
            return None
        source = self._venues.client(self._partition.market.venue).source
        try:
            return self._venues.submit(source.is_listed(self._partition.market)).result()
        except MarketDataError:
            return None

    def _traded_elsewhere(self, window: Window) -> str | None:
        """Return another venue's market of the same asset that traded in the window."""
        for market, market_month in self._other_venues.items():
            if market_month.covers(window) and market_month.count_bars(window):
                partition = Partition(market, self._partition.month)
                bars = self._lake.read(self._table, partition)
                if bars is not None and bars.filter(opens_inside(window))["volume"].sum() > 0:
                    return market.key
        return None


def _silent_windows(window: Window, others: Sequence[MarketMonth]) -> Iterator[SilentWindow]:
    """Yield the stretches of a gap in which all others have no bars either; all of it without
    others.
    """
    stretches = [window]
    for other in others:
        stretches = [part for stretch in stretches for part in other.absent_in(stretch)]
    for stretch in stretches:
        yield SilentWindow(stretch, tuple(other.empty_bar_rates(stretch) for other in others))


def _native_bars(
    settings: Settings, lake: Lake, table: Table, *, partition: Partition, bars: pl.DataFrame
) -> Iterator[NativeBar]:
    """Yield the venue's coarser bars in which ours are missing.

    Only of timeframes whose native bars equal the sum of ours where none is missing.
    """
    venue = settings.venues.get(partition.market.venue)
    for timeframe in venue.fetched_timeframes if venue else ():
        is_coarser = timeframe.width > table.timeframe.width and timeframe.is_made_of(
            table.timeframe
        )
        native = lake.read(raw_table(timeframe), partition) if is_coarser else None
        if native is None:
            continue
        bucket, width = timeframe.floors(pl.col("open_time")), table.timeframe.width
        sums = bars.group_by(bucket).agg(pl.col("volume").sum().alias("ours"), pl.len())
        whole_length = timeframe.closes(pl.col("open_time")) - pl.col("open_time")
        full = whole_length.dt.total_seconds() // int(width.total_seconds())
        missing = (full - pl.col("len").fill_null(0)).alias("missing")
        both = native.select("open_time", "volume").join(sums, on="open_time", how="left")
        both = both.with_columns(pl.col("ours").fill_null(0), missing)
        # the bars that an earlier month holds of a week are not read here
        both = both.filter(pl.col("open_time") >= partition.month.start)
        whole = both.filter(pl.col("missing") == 0)
        equal = (whole["volume"] == whole["ours"]).sum()
        if whole.height and equal >= NATIVE_AGREEMENT * whole.height:
            short = both.filter(pl.col("missing") > 0)
            rows = short.select("open_time", "volume", "ours", "missing").iter_rows()
            yield from (NativeBar(timeframe, *row) for row in rows)


class _RequestLog:
    """The logged requests about a partition, for the proofs of its gaps."""

    def __init__(self, ledger: Ledger, table: Table, partition: Partition) -> None:
        window = partition.open_times(table.timeframe)
        self._requests = ledger.fetches.about(table, partition.market, window)
        windows = [request.window for request in self._requests]
        self._starts = pl.Series([window.start for window in windows], dtype=TIME)
        self._ends = pl.Series([window.end for window in windows], dtype=TIME)

    def about(self, window: Window, earlier: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the requests about a window and those of an earlier proof; of many, a few."""
        touching = (self._starts < window.end) & (self._ends > window.start)
        found = {request["id"]: request for request in earlier}
        for request in (self._requests[i] for i in touching.arg_true()):
            found[request.id] = {
                "id": request.id,
                "at": request.at,
                "from": format_time(request.window.start),
                "until": format_time(request.window.end),
                "outcome": request.outcome,
                "rows": request.rows,
            }
        every = [found[number] for number in sorted(found)]
        if len(every) <= FIRST_REQUESTS + LAST_REQUESTS:
            return every
        return every[:FIRST_REQUESTS] + every[-LAST_REQUESTS:]


def _describe_bar(neighbor: Neighbor | None) -> dict[str, str] | None:
    if neighbor is None:
        return None
    return {
        "open_time": format_time(neighbor.open_time),
        "close": format_number(neighbor.close),
        "volume": format_number(neighbor.volume),
    }

"""Facts: what the ledger and the lake know about the holes of one month, gathered for `quality.causes`
to judge.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from itertools import accumulate
from typing import Any

import polars as pl

from marketdata_assets.context import Toolbox
from marketdata_assets.errors import MarketDataError
from marketdata_assets.ledger.ledger import Gap, State
from marketdata_assets.model.bar import empty_bars, format_number
from marketdata_assets.model.intervals import without
from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import Table, raw_table
from marketdata_assets.model.window import Window, format_time
from marketdata_assets.quality.gap_causes import (
    HALTED,
    Facts,
    Habit,
    Habits,
    Native,
    Neighbour,
    Part,
    Silence,
)
from marketdata_assets.quality.halts import known_halts

AROUND = timedelta(hours=12)
FEW = 10
"""Fewer empty bars than this around a hole say nothing about that time of day."""
NATIVES_AGREE = 0.99
"""A timeframe whose native bars add up less often than this proves nothing by not adding up."""
LONG = timedelta(days=1)
"""A market that has been silent for so long may have left its venue."""
FIRST_REQUESTS, LAST_REQUESTS = 2, 4
"""Of more requests than both together, a proof keeps the first and the last ones."""


class Month:
    """What the ledger has of a venue's markets in one month of one table, read once."""

    def __init__(self, toolbox: Toolbox, table: Table, venue: str, month: Window) -> None:
        self.toolbox, self.table, self.venue, self.month = toolbox, table, venue, month
        self.markets = (
            toolbox.settings.venues[venue].markets if venue in toolbox.settings.venues else ()
        )
        self._gaps = toolbox.gaps.of_month(table, venue, f"{month.start:%Y-%m-%d}")
        self._known: dict[Market, _Known] = {}
        self._elsewhere: dict[str, Month] = {}
        self._halts = [
            gap.window for found in self._gaps.values() for gap in found if gap.cause == HALTED
        ]

    def gaps(self, market: Market) -> list[Gap]:
        """The gaps of one market, as they were when this was made."""
        return self._gaps.get(market.key, [])

    def known(self, market: Market) -> _Known:
        """What is known of one market."""
        if market not in self._known:
            state = self.toolbox.ledger.state(self.table, Partition(market, self.month))
            self._known[market] = _Known(
                self.table,
                state,
                self.toolbox.ledger.listed(market),
                self.gaps(market),
                self._halts,
            )
        return self._known[market]

    def set_aside(self, halt: Window) -> None:
        """A halt of the venue says nothing about how often its markets are silent."""
        self._halts.append(halt)
        for known in self._known.values():
            known.set_aside([halt])

    def elsewhere(self, market: Market) -> Iterator[tuple[Market, _Known]]:
        """Other venues' markets of the same base asset, where they have this table."""
        asset = market.symbol.partition("/")[0]
        for name, venue in self.toolbox.settings.venues.items():
            alike = [other for other in venue.markets if other.symbol.partition("/")[0] == asset]
            if name == self.venue or not alike or self.table.timeframe not in venue.fetched:
                continue
            if name not in self._elsewhere:
                self._elsewhere[name] = Month(self.toolbox, self.table, name, self.month)
            yield from ((other, self._elsewhere[name].known(other)) for other in alike)


class _Known:
    """One market in one month, by the ledger: where it has bars, where answers say it has none, and
    how often that is so.
    """

    def __init__(
        self,
        table: Table,
        state: State | None,
        listed: datetime | None,
        gaps: Sequence[Gap],
        halts: Sequence[Window],
    ) -> None:
        self.state, self._timeframe = state, table.timeframe
        self._since = max(state.start, listed or state.start) if state else None
        told = [is_told(gap, state) for gap in gaps]
        self._told = _together(gap.window for gap, is_so in zip(gaps, told, strict=True) if is_so)
        self._refused = [gap.window for gap in gaps if gap.reason == "quarantined"]
        self._untold = [
            gap.window
            for gap, is_so in zip(gaps, told, strict=True)
            if not is_so and gap.reason != "quarantined"
        ]
        self._starts = [w.start for w in self._told]
        self._usual = self._told
        self.set_aside(halts)

    def set_aside(self, halts: Sequence[Window]) -> None:
        """Leave these out of its habits."""
        self._usual = [
            rest for told in self._usual for rest in (without(told, halts) if halts else [told])
        ]
        self._usual_starts = [w.start for w in self._usual]
        self._sums = list(accumulate((w.count(self._timeframe) for w in self._usual), initial=0))

    def covers(self, window: Window) -> bool:
        """Whether it is known of every bar of a window if the market has it."""
        if self.state is None or self.state.bytes is None or self._since is None:
            return False
        asked = self._since <= window.start and window.end <= self.state.through
        return asked and not any(window & gap for gap in self._untold)

    def pending(self, window: Window) -> bool:
        """Whether the window has still to be asked for, and nothing says that this fails."""
        return self.state is None or (self.state.through < window.end and not self.state.error)

    def bars_in(self, window: Window) -> int:
        """How many bars of a window that it covers it has."""
        gaps = [*self.lacks(window), *(gap & window for gap in self._refused)]
        return window.count(self._timeframe) - sum(gap.count(self._timeframe) for gap in gaps)

    def lacks(self, window: Window) -> list[Window]:
        """The stretches of a window of which answers say that there are no bars."""
        first = max(0, bisect_right(self._starts, window.start) - 1)
        last = bisect_left(self._starts, window.end)
        return [part for told in self._told[first:last] if (part := told & window)]

    def habits(self, hole: Window) -> Habits:
        """How often it is silent apart from what it lacks in the hole: in the month, and around the
        hole where that is often.
        """
        if self.state is None:
            return (Habit(0, 0, 0),)
        month = Window(self.state.start, self.state.through)
        wide, near = (
            self._habit(month, hole),
            self._habit(Window(hole.start - AROUND, hole.end + AROUND) & month, hole),
        )
        return (wide, near) if near.empty >= FEW else (wide,)

    def _habit(self, span: Window, hole: Window) -> Habit:
        starts = self._usual_starts
        first, last = bisect_left(starts, span.start), bisect_left(starts, span.end)
        near = slice(
            max(first, bisect_right(starts, hole.start) - 1),
            min(last, bisect_left(starts, hole.end)),
        )
        own = [window for window in self._usual[near] if window & hole]
        cut = sum(window.count(self._timeframe) for window in own)
        minutes = max(0, span.count(self._timeframe) - cut)
        return Habit(minutes, self._sums[last] - self._sums[first] - cut, last - first - len(own))


def is_told(gap: Gap, state: State | None) -> bool:
    """Whether answers say twice that there are no bars: in one of them, or page by page between bars
    that are there.
    """
    if gap.reason != "unanswered" or state is None:
        return gap.reason == "no_bars"
    return gap.answers > 1 and state.start < gap.window.start and gap.window.end < state.through


def _together(windows: Iterable[Window]) -> list[Window]:
    joined: list[Window] = []
    for window in windows:
        if joined and joined[-1].end == window.start:
            joined[-1] = Window(joined[-1].start, window.end)
        else:
            joined.append(window)
    return joined


class Look:
    """One partition whose gaps are looked at. `ask`: its venue may be asked whether it still lists the
    market.
    """

    def __init__(self, month: Month, partition: Partition, ask: bool) -> None:
        self.month, self._partition, self._ask = month, partition, ask
        self._toolbox, self._table = month.toolbox, month.table
        stored = self._toolbox.lake.read(self._table, partition)
        self._bars = empty_bars() if stored is None else stored
        self._zeros = int((self._bars["volume"] == 0).sum())
        self._own = month.known(partition.market)
        self._others = {
            other: month.known(other) for other in month.markets if other != partition.market
        }
        self._elsewhere = dict(month.elsewhere(partition.market))
        self._natives = list(_natives(self._toolbox, self._table, partition, self._bars))
        self._requests = _Requests(self._toolbox, self._table, partition)

    def facts(self, gap: Gap) -> Facts:
        """All that is known about one gap."""
        hole, timeframe = gap.window, self._table.timeframe
        known = {other.key: it for other, it in self._others.items() if it.covers(hole)}
        pending = any(
            it.pending(hole) for other, it in self._others.items() if other.key not in known
        )
        before, after = self._neighbours(hole)
        trailing = self._ends_here(gap)
        return Facts(
            hole=hole,
            timeframe=timeframe,
            told=is_told(gap, self._own.state),
            answers=gap.answers,
            habits=self._own.habits(hole),
            silences=tuple(_silences(hole, list(known.values()))),
            natives=tuple(native for native in self._natives if native.window & hole),
            others={key: it.bars_in(hole) for key, it in known.items()}
            or self._going_on(gap, trailing),
            pending=(pending or self._natives_pending(hole)) and not trailing,
            finer=self._finer(hole),
            elsewhere=None if known else self._traded_elsewhere(hole),
            halts=tuple(known_halts(self.month.venue, hole)),
            before=before,
            after=after,
            zeros=self._zeros,
            trailing=trailing,
            listed=self._lists() if trailing and self._ask else None,
        )

    def proof(self, gap: Gap, facts: Facts, part: Part) -> dict[str, Any]:
        """What shows the cause of one part of a gap, as JSON holds it."""
        window = part.window
        elsewhere = {
            other.key: it.bars_in(window)
            for other, it in self._elsewhere.items()
            if it.covers(window)
        }
        found: dict[str, Any] = {
            "words": part.words,
            "requests": self._requests.about(window, json.loads(gap.proof).get("requests", [])),
            "before": _bar(facts.before),
            "after": _bar(facts.after),
            "venue": {
                o.key: it.bars_in(window) for o, it in self._others.items() if it.covers(window)
            },
            "elsewhere": elsewhere,
            "native": [str(native) for native in facts.natives if native.window & window],
            "known_halts": [
                {"window": str(halt.window), "what": halt.what, "told_by": halt.told_by}
                for halt in facts.halts
            ],
            "listed": facts.listed,
        }
        return {name: value for name, value in found.items() if value not in (None, [], {})}

    def _neighbours(self, hole: Window) -> tuple[Neighbour | None, Neighbour | None]:
        opens, step = self._bars["open_time"], self._table.timeframe.width
        at = int(opens.search_sorted(hole.start))
        before = self._neighbour(at - 1, hole.start - step) if at else None
        return before, self._neighbour(at, hole.end) if at < opens.len() else None

    def _neighbour(self, at: int, expected: datetime) -> Neighbour | None:
        open_time, close, volume = self._bars.select("open_time", "close", "volume").row(at)
        return Neighbour(open_time, close, volume) if open_time == expected else None

    def _ends_here(self, gap: Gap) -> bool:
        """Whether the market has been silent for long, to the end of all that was asked for."""
        window, state = gap.window, self._own.state
        if (
            gap.reason == "no_bars"
            or state is None
            or window.end < state.through
            or window.end - window.start < LONG
        ):
            return False
        last = self._toolbox.gaps.last_bar(self._table, self._partition.market)
        return last is not None and last < window.start

    def _going_on(self, gap: Gap, trailing: bool) -> dict[str, int]:
        if not trailing:
            return {}
        states = {other.key: it.state for other, it in self._others.items()}
        return {
            key: 1
            for key, state in states.items()
            if state and state.newest and state.newest >= gap.window.start
        }

    def _natives_pending(self, hole: Window) -> bool:
        """Whether a coarser bar over the hole has still to be fetched."""
        for timeframe in self._toolbox.settings.venues[self.month.venue].fetched:
            if timeframe.width > self._table.timeframe.width:
                state = self._toolbox.ledger.state(raw_table(timeframe), self._partition)
                end = min(timeframe.floor(hole.end), self._partition.open_times(timeframe).end)
                if state is None or (state.through < end and not state.error):
                    return True
        return False

    def _finer(self, hole: Window) -> tuple[tuple[Window, str], ...]:
        """The causes of base bars that lack in a hole of a coarser table."""
        base = raw_table(self._toolbox.settings.venues[self.month.venue].base)
        if base == self._table:
            return ()
        return tuple(
            (gap.window, gap.cause)
            for gap in self._toolbox.gaps.between(base, self._partition.market, hole)
            if gap.cause
        )

    def _lists(self) -> bool | None:
        try:
            source = self._toolbox.source(self._partition.market)
            return self._toolbox.submit(source.lists(self._partition.market)).result()
        except MarketDataError:
            return None

    def _traded_elsewhere(self, hole: Window) -> str | None:
        for other, it in self._elsewhere.items():
            if it.covers(hole) and it.bars_in(hole):
                bars = self._toolbox.lake.read(self._table, Partition(other, self._partition.month))
                inside = pl.col("open_time").is_between(hole.start, hole.end, closed="left")
                if bars is not None and bars.filter(inside)["volume"].sum() > 0:
                    return other.key
        return None


def _silences(hole: Window, others: Sequence[_Known]) -> Iterator[Silence]:
    """The stretches of a hole in which all others lack their bars too; the whole of it where there are
    no others.
    """
    stretches = [hole]
    for other in others:
        stretches = [part for stretch in stretches for part in other.lacks(stretch)]
    for stretch in stretches:
        yield Silence(stretch, tuple(other.habits(stretch) for other in others))


def _natives(
    toolbox: Toolbox, table: Table, partition: Partition, bars: pl.DataFrame
) -> Iterator[Native]:
    """The venue's coarser bars of a partition in which ours lack, of timeframes that add up where
    nothing lacks.
    """
    venue = toolbox.settings.venues.get(partition.market.venue)
    for timeframe in venue.fetched if venue else ():
        native = (
            toolbox.lake.read(raw_table(timeframe), partition)
            if timeframe.width > table.timeframe.width
            else None
        )
        if native is None:
            continue
        full = timeframe.width // table.timeframe.width
        sums = bars.group_by(pl.col("open_time").dt.truncate(timeframe.every)).agg(
            pl.col("volume").sum().alias("ours"), pl.len()
        )
        both = native.select("open_time", "volume").join(sums, on="open_time", how="left")
        both = both.with_columns(
            pl.col("ours").fill_null(0), (full - pl.col("len").fill_null(0)).alias("lacking")
        )
        both = both.filter(
            pl.col("open_time") >= partition.month.start
        )  # what an earlier month holds of a week is not here
        whole = both.filter(pl.col("lacking") == 0)
        if (
            whole.height
            and (whole["volume"] == whole["ours"]).sum() >= NATIVES_AGREE * whole.height
        ):
            short = both.filter(pl.col("lacking") > 0).select(
                "open_time", "volume", "ours", "lacking"
            )
            yield from (Native(timeframe, *row) for row in short.iter_rows())


class _Requests:
    """The requests about a partition, for the proofs of its gaps."""

    def __init__(self, toolbox: Toolbox, table: Table, partition: Partition) -> None:
        self._asked = toolbox.gaps.requests(
            table, partition.market, partition.open_times(table.timeframe)
        )
        windows = [asked.window for asked in self._asked]
        self._starts = pl.Series(
            [window.start for window in windows], dtype=pl.Datetime("us", "UTC")
        )
        self._ends = pl.Series([window.end for window in windows], dtype=pl.Datetime("us", "UTC"))

    def about(self, window: Window, earlier: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those about a window, with those that an earlier proof names; of many, the first and the
        last.
        """
        touching = (self._starts < window.end) & (self._ends > window.start)
        found = {request["id"]: request for request in earlier}
        for asked in (self._asked[i] for i in touching.arg_true()):
            page = {"from": format_time(asked.window.start), "until": format_time(asked.window.end)}
            found[asked.id] = {
                "id": asked.id,
                "at": asked.at,
                **page,
                "outcome": asked.outcome,
                "rows": asked.rows,
            }
        every = [found[id] for id in sorted(found)]
        return (
            every
            if len(every) <= FIRST_REQUESTS + LAST_REQUESTS
            else every[:FIRST_REQUESTS] + every[-LAST_REQUESTS:]
        )


def _bar(neighbour: Neighbour | None) -> dict[str, str] | None:
    if neighbour is None:
        return None
    return {
        "open_time": format_time(neighbour.open_time),
        "close": format_number(neighbour.close),
        "volume": format_number(neighbour.volume),
    }

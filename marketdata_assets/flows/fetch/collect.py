"""Collect: ask the venue for a span in pages until its answers agree, and account for every row and
every hole.

Pages overlap by one bar, so that each page's end is witnessed by the next. Whatever is
contradicted, refused by a rule or missing is asked for again: a bar is believed when answers about
it agree, a hole when two answers delivered both its neighbours and nothing between.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import polars as pl

from marketdata_assets.context import Toolbox
from marketdata_assets.errors import BadInput, MarketDataError, VenueRefused
from marketdata_assets.ledger.gaps import REOPENED
from marketdata_assets.ledger.ledger import PROMPT_ASKS, Account, Gap, LoggedFetch, logged
from marketdata_assets.model.bar import NAMES, empty_bars
from marketdata_assets.model.intervals import (
    find_gaps,
    group_consecutive,
    pack_windows,
    subtract_window,
    subtract_windows,
)
from marketdata_assets.model.market import Market
from marketdata_assets.model.timeframe import EPOCH, MINUTE, Timeframe
from marketdata_assets.model.window import Window, iso
from marketdata_assets.quality.agreement import ResolvedAnswers, coalesce_optional, resolve_answers
from marketdata_assets.quality.gap_causes import next_request_at
from marketdata_assets.quality.split import (
    REJECTED_SCHEMA,
    SplitRows,
    add_request_columns,
    reject_bars,
    split_rows,
)
from marketdata_assets.sources.base import BarsPage, Request

ROUNDS = 7
ASKS_DISPUTED = 4
ASKS_MISSING = 2
WITNESSES = 3
"""How many stored bars beside a new span are asked again, at the least: a venue that contradicts most
of them is not believed.
"""
STORED = -1
"""The answer number of bars that are stored already."""


@dataclass(frozen=True, slots=True)
class Collected:
    """What the venue said about a span.

    `bars` are new or replace stored ones (`corrected` of them). `through` is the end of what has
    been asked for. `answers[i]` is the index in `fetches` of the request that gave answer i.
    """

    bars: pl.DataFrame = field(default_factory=empty_bars)
    rejected: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=REJECTED_SCHEMA))
    gaps: tuple[Gap, ...] = ()
    account: Account = field(default_factory=Account)
    fetches: tuple[LoggedFetch, ...] = ()
    answers: tuple[int, ...] = ()
    retries: int = 0
    waited: float = 0.0
    through: datetime = EPOCH
    corrected: int = 0


async def collect(
    toolbox: Toolbox,
    market: Market,
    timeframe: Timeframe,
    wanted: Window,
    stored: pl.DataFrame,
    known: Sequence[Gap],
    again: Window | None = None,
) -> Collected:
    """Ask for all bars of `wanted` that are neither stored nor settled as a gap, and for those of
    `again`, stored or not.

    No request when nothing is lacking and nothing is asked again.
    """
    ours = toolbox.settings.now()
    if not again and not _lacking(stored["open_time"], timeframe, wanted, known, ours):
        return Collected(gaps=tuple(known), through=wanted.end)
    now = await toolbox.venue_now(market, wanted.end + timeframe.width)
    listed = await _listed(toolbox, market, timeframe, stored, wanted.start)
    asked = Window(
        max(wanted.start, listed or wanted.start),
        max(wanted.start, min(wanted.end, timeframe.floor(now))),
    )
    lacking = _lacking(stored["open_time"], timeframe, asked, known, ours)
    windows = [*lacking, *([again & asked] if again and again & asked else [])]
    if not windows:
        return Collected(gaps=tuple(known), through=asked.end)
    inquiry = _Inquiry(toolbox, market, timeframe, asked, stored, list(known), now)
    try:
        return await inquiry.run([*windows, *inquiry.last_stored(lacking)])
    except (BadInput, VenueRefused) as error:
        if not await _ended(toolbox, market):
            raise
        return inquiry.ended(error.requests)


async def _ended(toolbox: Toolbox, market: Market) -> bool:
    """Whether a market of which bars are stored has left the venue's list. A list that does not come
    says nothing.
    """
    try:
        return bool(toolbox.ledger.stored_span(market)) and not await toolbox.source(
            market
        ).is_listed(market)
    except MarketDataError:
        return False


def still_lacking(gaps: Iterable[Gap], opens: pl.Series, timeframe: Timeframe) -> list[Gap]:
    """What remains of gaps beside the bars that are there now; `opens` is sorted."""
    moments, left = opens.to_list(), []
    for gap in gaps:
        if bisect_left(moments, gap.window.start) == bisect_left(moments, gap.window.end):
            left.append(gap)
        else:
            left += [
                gap._replace(window=w, bars=w.count(timeframe))
                for w in find_gaps(opens, timeframe, gap.window)
            ]
    return left


def _lacking(
    opens: pl.Series, timeframe: Timeframe, window: Window, gaps: Iterable[Gap], now: datetime
) -> list[Window]:
    """The windows of which no bar is among `opens` and for which no gap waits. `now`: our clock."""
    return subtract_windows(
        find_gaps(opens, timeframe, window), [gap.window for gap in gaps if not gap.due(now)]
    )


async def _listed(
    toolbox: Toolbox, market: Market, timeframe: Timeframe, stored: pl.DataFrame, start: datetime
) -> datetime | None:
    """The market's first bar, on this timeframe's grid; only believed when two answers agree, then
    never asked again.
    """
    listed = toolbox.ledger.listed(market)
    if listed is None and (stored.is_empty() or stored["open_time"][0] > start):
        base = toolbox.settings.venues[market.venue].base
        source = toolbox.source(market)
        first, second = [await source.first_open(market, base) for _ in range(2)]
        if first is not None and first == second:
            toolbox.ledger.set_listed(market, first, f"first bar of {base.name}, told twice")
            listed = first
    return timeframe.floor(listed) if listed else None


@dataclass(slots=True)
class _Inquiry:
    """One span under inquiry: all answers so far, and what still has to be asked."""

    toolbox: Toolbox
    market: Market
    timeframe: Timeframe
    asked: Window
    stored: pl.DataFrame
    known: list[Gap]
    now: datetime
    answers: list[BarsPage] = field(default_factory=list)
    kept: list[pl.DataFrame] = field(default_factory=list)
    rejected: list[pl.DataFrame] = field(default_factory=list)
    reach: list[tuple[datetime, datetime]] = field(default_factory=list)
    received: int = 0
    unserved: datetime = EPOCH
    asks: Counter[Window] = field(default_factory=Counter)

    async def run(self, lacking: list[Window]) -> Collected:
        queue = await self._served(self._pages(lacking))
        for _ in range(ROUNDS):
            await self._ask(queue)
            agreement = self._agreement()
            queue = self._doubts(agreement)
            if not queue:
                break
        return self._settle(agreement)

    # ------------------------------------------------------------------------------------------ ask
    def last_stored(self, lacking: Sequence[Window]) -> list[Window]:
        """The bars stored last, asked again with those that are new where one page holds both: venues
        correct them.
        """
        back = self.toolbox.settings.corrections.run_minutes * MINUTE
        if not back or not lacking or lacking[-1].end < self.asked.end or self.stored.is_empty():
            return []
        begin = lacking[-1].start
        tail, room = (
            Window(begin - back, begin) & self.asked,
            self.toolbox.source(self.market).page_size - 2,
        )
        fits = Window(tail.start, self.asked.end).count(self.timeframe) <= room
        return [tail] if tail and fits and self.stored["open_time"][-1] >= tail.start else []

    def _pages(self, lacking: list[Window]) -> list[Window]:
        """Pages over what is lacking and the stored bars around it, each with the next bar as its
        witness.
        """
        size = max(1, self.toolbox.source(self.market).page_size - 2)
        back = (WITNESSES - 1) * self.timeframe.width
        wide = (Window(w.start - back, w.end + back) & self.asked for w in lacking)
        near = pack_windows(wide, self.timeframe, max_bars=size)
        return [
            self._fenced(page) for window in near for page in window.pages(self.timeframe, size)
        ]

    async def _served(self, pages: list[Window]) -> list[Window]:
        """The pages a venue can answer. Some keep only their newest bars, or began late: the first
        answer tells.
        """
        if self.toolbox.source(self.market).skips_gaps or len(pages) < 3:
            return pages
        await self._ask(pages[:1])
        if self.answers[0].first_available is None:
            return pages[1:]
        await self._ask(pages[:1])
        self.unserved = min(answer.first_available or self.asked.start for answer in self.answers)
        return [page for page in pages if page.end > self.unserved] or pages[-1:]

    def _fenced(self, window: Window) -> Window:
        """One bar more on both sides, as far as the venue's clock allows."""
        step = self.timeframe.width
        last = self.timeframe.floor(self.now)
        first = window.start - step if window.start > self.asked.start else window.start
        return Window(first, max(window.end, min(window.end + step, last)))

    async def _ask(self, queue: list[Window]) -> None:
        self.asks.update(queue)
        turns, source = self.toolbox.turns(self.market), self.toolbox.source(self.market)

        async def one(window: Window) -> BarsPage:
            async with turns:
                fetched = await source.fetch(self.market, self.timeframe, window)
            self.toolbox.tell({"bars": fetched.rows.height, "requests": len(fetched.requests)})
            return fetched

        tasks = [asyncio.create_task(one(window)) for window in queue]
        try:
            fetched = await asyncio.gather(*tasks)
        except MarketDataError as error:
            error.requests = (*(r for f in self.answers for r in f.requests), *await _end(tasks))
            raise
        self._judge(fetched)

    def _judge(self, fetched: Sequence[BarsPage]) -> None:
        """Split the rows of new answers; the witnesses beyond the span are looked at, and not
        counted.
        """
        first = len(self.answers)
        self.answers.extend(fetched)
        frames = [add_request_columns(f.rows, first + i, f.window) for i, f in enumerate(fetched)]
        columns = self.toolbox.source(self.market).columns
        kept, rejected = split_rows(
            pl.concat(frames), self.timeframe, closed_before=self.now, columns=columns
        )
        spans = kept.group_by("answer").agg(
            pl.col("open_time").min().alias("a"), pl.col("open_time").max().alias("b")
        )
        self.reach.extend((a, b) for _, a, b in spans.sort("answer").iter_rows())
        beyond = (pl.col("open_time") < self.asked.start) | (pl.col("open_time") >= self.asked.end)
        witness = beyond & pl.col("open_time").is_between(
            self.asked.start - self.timeframe.width, self.asked.end, closed="both"
        )
        inside = SplitRows(kept.filter(~witness), rejected.filter(~witness.fill_null(False)))
        self.kept.append(inside.valid)
        self.rejected.append(inside.rejected)
        self.received += inside.valid.height + inside.rejected.height

    # ------------------------------------------------------------------------------------------ dou
    def _agreement(self) -> ResolvedAnswers:
        fresh = self._told()
        old = self.stored.join(fresh.select("open_time").unique(), on="open_time", how="semi")
        old = coalesce_optional(
            old.select(pl.lit(STORED, pl.Int64).alias("answer"), *NAMES),
            fresh.unique("open_time", keep="first"),
        )
        return resolve_answers(pl.concat([fresh, old]))

    def _told(self) -> pl.DataFrame:
        """The good rows of all answers, beside stored bars with what only these give."""
        return coalesce_optional(pl.concat(self.kept), self.stored)

    def _holes(self, agreement: ResolvedAnswers) -> list[Window]:
        """What is neither stored, nor believed, nor a gap that waits."""
        return _lacking(
            self._opens(agreement),
            self.timeframe,
            self.asked,
            self.known,
            self.toolbox.settings.now(),
        )

    def _opens(self, agreement: ResolvedAnswers) -> pl.Series:
        return pl.concat([self.stored["open_time"], agreement.bars["open_time"]]).unique().sort()

    def _refused(self) -> pl.DataFrame:
        """Rejected rows by the bar they stand for, with how many answers gave each of them."""
        rows = pl.concat(self.rejected)
        grid = pl.col("open_time").dt.truncate(self.timeframe.every)
        return rows.group_by(grid.alias("open_time"), "fields").agg(
            pl.col("answer").n_unique().alias("votes")
        )

    def _insisted(self) -> list[Window]:
        """Bars that the venue delivered broken, the same way, in two answers."""
        return group_consecutive(
            self._refused().filter(pl.col("votes") > 1)["open_time"].drop_nulls().to_list(),
            self.timeframe,
        )

    def _explained(self, hole: Window) -> int:
        """How many answers delivered both neighbours of a hole and nothing between."""
        return sum(a < hole.start and b >= hole.end for a, b in self.reach)

    def _doubts(self, agreement: ResolvedAnswers) -> list[Window]:
        """The windows to ask again: pages with a contradiction, and what surrounds holes that are not
        explained yet.
        """
        disputed = agreement.unresolved["open_time"].unique().to_list()
        pages = {w for w in self.asks for moment in disputed if w.start <= moment < w.end}
        insisted, unserved = self._insisted(), Window(self.asked.start, self.unserved)
        doubtful = [
            self._fenced(rest)
            for hole in self._holes(agreement)
            for rest in subtract_window(
                hole, [*insisted, *group_consecutive(disputed, self.timeframe), unserved]
            )
            if self._explained(rest) < 2
        ]
        again = [w for w in self._sized(doubtful) if self.asks[w] < ASKS_MISSING]
        if not self.received:
            again = again[
                -1:
            ]  # a span without a single row is not asked for page by page once more
        return sorted({w for w in pages if self.asks[w] < ASKS_DISPUTED} | set(again))

    def _sized(self, windows: list[Window]) -> list[Window]:
        """Windows joined into as few requests as the venue allows."""
        source = self.toolbox.source(self.market)
        joined = pack_windows(windows, self.timeframe, max_bars=source.page_size)
        if source.skips_gaps:
            return joined
        return [
            page for window in joined for page in window.pages(self.timeframe, source.page_size)
        ]

    # ------------------------------------------------------------------------------------------ set
    def _settle(self, agreement: ResolvedAnswers) -> Collected:
        stored = pl.col("answer") == STORED
        lost = pl.concat([agreement.outvoted, agreement.unresolved]).filter(~stored)
        fresh = pl.concat([*self.rejected, reject_bars(lost, "conflict")])
        denied = agreement.outvoted.filter(stored)["open_time"]
        self._refuse_contradiction(denied)
        bars = agreement.bars.join(self.stored, on=NAMES, how="anti", nulls_equal=True)
        account = Account(self.received, bars.height, self._repeated(agreement), fresh.height)
        fetches, answers = self._log()
        return Collected(
            bars=bars.sort("open_time"),
            rejected=fresh,
            gaps=tuple(self._gaps(agreement)),
            account=account,
            fetches=fetches,
            answers=answers,
            retries=sum(len(f.requests) - 1 for f in self.answers),
            waited=sum(f.wait_seconds for f in self.answers),
            through=self.asked.end,
            corrected=denied.len(),
        )

    def _refuse_contradiction(self, denied: pl.Series) -> None:
        """A venue corrects some bars. One that denies most of those it was asked again for speaks of
        something else.
        """
        in_a_row = [
            w
            for w in group_consecutive(denied.to_list(), self.timeframe)
            if w.count(self.timeframe) > 1
        ]
        told = (
            self.stored["open_time"]
            .is_in(pl.concat(self.kept)["open_time"].unique().implode())
            .sum()
        )
        if in_a_row and 2 * denied.len() > told:
            error = VenueRefused(
                f"{self.market.venue}: its answers contradict the stored bars of {in_a_row[0]}, {denied.len()} of {told} told again; "
                "nothing of them is stored. If it did correct them, repair a longer span, of which most agrees"
            )
            error.requests = tuple(r for answer in self.answers for r in answer.requests)
            raise error

    def _repeated(self, agreement: ResolvedAnswers) -> int:
        """Rows that only said again what is believed, counted from the rows themselves."""
        same = self._told().join(agreement.bars, on=NAMES, how="semi", nulls_equal=True).height
        new = agreement.bars.join(self.stored, on=NAMES, how="anti", nulls_equal=True).height
        return same - new

    def _gaps(self, agreement: ResolvedAnswers) -> list[Gap]:
        gaps = self._waiting(self._opens(agreement))
        broken = (
            self._refused()["open_time"].drop_nulls().to_list()
            + agreement.unresolved["open_time"].to_list()
        )
        quarantined = group_consecutive(broken, self.timeframe)
        for hole in self._holes(agreement):
            rest = subtract_window(hole, quarantined)
            gaps += [self._again(w, "quarantined") for w in subtract_window(hole, rest)]
            gaps += [self._unexplained(w) for w in rest]
        return sorted(gaps)

    def _waiting(self, opens: pl.Series) -> list[Gap]:
        """The known gaps that no run asks for now, without bars that are there all the same (they were
        asked again).
        """
        now = self.toolbox.settings.now()
        return still_lacking([gap for gap in self.known if not gap.due(now)], opens, self.timeframe)

    def ended(self, requests: Sequence[Request]) -> Collected:
        """The venue lists the market no more and answers nothing: what lacks has not been answered
        for.
        """
        gaps = self._waiting(self.stored["open_time"])
        lacking = _lacking(
            self.stored["open_time"],
            self.timeframe,
            self.asked,
            self.known,
            self.toolbox.settings.now(),
        )
        gaps += [self._again(window, "unanswered") for window in lacking]
        return Collected(
            gaps=tuple(sorted(gaps)),
            fetches=tuple(logged(requests, self.asked)),
            through=self.asked.end,
        )

    def _unexplained(self, window: Window) -> Gap:
        answers = self._explained(window)
        return (
            self._gap(window, "no_bars", answers)
            if answers > 1
            else self._again(window, "unanswered")
        )

    def _again(self, window: Window, reason: str) -> Gap:
        """A gap that nobody has told apart; it counts the runs that ended like this one."""
        return self._gap(window, reason, 1)

    def _gap(self, window: Window, reason: str, answers: int) -> Gap:
        """A gap as it stands now: what was known of it before is counted in, and it is asked again at
        a growing distance.
        """
        about = [f for f in self.answers if f.window & window]
        evidence = "; ".join(
            f"asked {f.window} at {_moment(f)}, {f.rows.height} rows" for f in about[-2:]
        )
        before = [gap for gap in self.known if gap.window & window]
        answers += max((gap.answers for gap in before), default=0)
        now = self.toolbox.settings.now().replace(microsecond=0)
        first = min((gap.first_asked for gap in before if gap.first_asked), default=now)
        proof = next(
            (gap.proof for gap in before if gap.window == window and REOPENED not in gap.proof),
            "{}",
        )
        following = (
            now if reason != "no_bars" and answers < PROMPT_ASKS else next_request_at(first, now)
        )
        return Gap(
            window,
            window.count(self.timeframe),
            reason,
            answers,
            evidence,
            "",
            proof,
            first,
            now,
            following,
        )

    def _log(self) -> tuple[tuple[LoggedFetch, ...], tuple[int, ...]]:
        fetches: list[LoggedFetch] = []
        answers = []
        for fetched in self.answers:
            fetches += logged(fetched.requests, fetched.window)
            answers.append(len(fetches) - 1)
        return tuple(fetches), tuple(answers)


def _moment(fetched: BarsPage) -> str:
    return (
        iso(datetime.fromtimestamp(int(fetched.requests[-1].sent_at), UTC))
        if fetched.requests
        else "?"
    )


async def _end(tasks: Sequence[asyncio.Task[BarsPage]]) -> list[Request]:
    """Cancel what still runs; all requests of all that have ended, for the fetch log."""
    for task in tasks:
        task.cancel()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    return [
        request
        for end in ended
        if isinstance(end, BarsPage | MarketDataError)
        for request in end.requests
    ]

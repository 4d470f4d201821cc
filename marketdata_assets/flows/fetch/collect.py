"""Collect: request a span in pages until the answers agree about every bar and every gap.

Pages overlap by one bar, so that the next page confirms the end of each. Whatever is contradicted,
rejected by a rule or missing is requested again, a limited number of times.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from marketdata_assets.errors import BadInput, MarketDataError, VenueRefused
from marketdata_assets.flows.fetch.answers import (
    Answers,
    FetchResult,
    FetchSpan,
    missing_windows,
)
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.model.events import BarsReceived
from marketdata_assets.model.intervals import (
    group_consecutive,
    pack_windows,
    subtract_window,
)
from marketdata_assets.model.timeframe import EPOCH, MINUTE
from marketdata_assets.model.window import Window
from marketdata_assets.quality.agreement import ResolvedAnswers
from marketdata_assets.settings.universe import Settings
from marketdata_assets.sources.base import BarsPage, Request
from marketdata_assets.sources.clients import VenueClient

ROUNDS = 7
"""How often the pages of one span are requested at most."""
REQUESTS_DISPUTED, REQUESTS_MISSING = 4, 2
"""How often one window is requested while answers contradict each other, and while bars are
missing.
"""
NEIGHBORS = 3
"""How many stored bars on each side of a new span are requested again at least: an answer that
contradicts most of them is rejected.
"""


async def collect(
    settings: Settings, ledger: Ledger, client: VenueClient, span: FetchSpan
) -> FetchResult:
    """Fetch the bars of a span that are neither stored nor covered by a waiting gap.

    Bars of `span.again` are fetched whether they are stored or not. Sends no request when nothing
    is missing. Raises VenueDown, VenueRefused, BadInput.
    """
    opens, timeframe, wanted = span.stored["open_time"], span.timeframe, span.wanted
    now = settings.now()
    if not span.again and not missing_windows(opens, timeframe, wanted, gaps=span.gaps, now=now):
        return FetchResult(gaps=tuple(span.gaps), through=wanted.end)
    closed_before = await client.now(wanted.end + timeframe.width)
    first_bar = await _find_first_bar(settings, ledger, client, span)
    start = max(wanted.start, first_bar or wanted.start)
    end = max(wanted.start, min(wanted.end, timeframe.floor(closed_before)))
    window = Window(start, end)
    missing = missing_windows(opens, timeframe, window, gaps=span.gaps, now=now)
    again = span.again & window if span.again else None
    windows = [*missing, *([again] if again else [])]
    if not windows:
        return FetchResult(gaps=tuple(span.gaps), through=window.end)
    answers = Answers(span, window, closed_before, now, client.source.columns)
    session = FetchSession(client, answers)
    recent = session.last_stored(missing, settings.corrections.run_minutes)
    try:
        return await session.run([*windows, *recent])
    except (BadInput, VenueRefused) as error:
        if not await _is_delisted(ledger, client, span):
            raise
        return answers.build_unanswered(error.requests)


async def _is_delisted(ledger: Ledger, client: VenueClient, span: FetchSpan) -> bool:
    """Return whether a market with stored bars has left the venue's list; False when unknown."""
    try:
        has_bars = bool(ledger.partitions.stored_span(span.market))
        return has_bars and not await client.source.is_listed(span.market)
    except MarketDataError:
        return False


async def _find_first_bar(
    settings: Settings, ledger: Ledger, client: VenueClient, span: FetchSpan
) -> datetime | None:
    """Return the market's first bar on the span's grid, once two answers agree on it."""
    first_bar, stored = ledger.markets.first_bar(span.market), span.stored
    if first_bar is None and (stored.is_empty() or stored["open_time"][0] > span.wanted.start):
        base = settings.venues[span.market.venue].base
        one, two = [await client.source.first_open(span.market, base) for _ in range(2)]
        if one is not None and one == two:
            ledger.markets.set_first_bar(
                span.market, one, f"first bar of {base.name}, in two answers"
            )
            first_bar = one
    return span.timeframe.floor(first_bar) if first_bar else None


@dataclass(slots=True)
class FetchSession:
    """Requests the pages of one span, round by round."""

    client: VenueClient
    answers: Answers
    served_from: datetime = EPOCH
    """The first open time that the venue still serves."""
    requests: Counter[Window] = field(default_factory=Counter)
    """How often each window was requested."""

    async def run(self, windows: list[Window]) -> FetchResult:
        """Request the windows until their answers agree, at most ROUNDS times."""
        queue = await self._served_pages(self._pages(windows))
        for _ in range(ROUNDS):
            await self._request(queue)
            resolved = self.answers.resolve()
            queue = self.windows_to_refetch(resolved)
            if not queue:
                break
        return self.answers.build_result(resolved)

    def last_stored(self, missing: Sequence[Window], minutes: int) -> list[Window]:
        """Return the last stored bars, which venues correct, if one page holds them as well."""
        window, stored = self.answers.window, self.answers.span.stored
        if not minutes or not missing or missing[-1].end < window.end or stored.is_empty():
            return []
        begin = missing[-1].start
        tail = Window(begin - minutes * MINUTE, begin) & window
        bars = Window(tail.start, window.end).count(self.answers.span.timeframe)
        fits = bars <= self.client.source.page_size - 2
        return [tail] if tail and fits and stored["open_time"][-1] >= tail.start else []

    def windows_to_refetch(self, resolved: ResolvedAnswers) -> list[Window]:
        """Return the pages with a contradiction and the surroundings of unconfirmed gaps."""
        timeframe = self.answers.span.timeframe
        disputed = resolved.unresolved["open_time"].unique().to_list()
        pages = {w for w in self.requests for moment in disputed if w.start <= moment < w.end}
        explained = [
            *self.answers.confirmed_rejections(),
            *group_consecutive(disputed, timeframe),
            Window(self.answers.window.start, self.served_from),
        ]
        unconfirmed = [
            self._with_neighbors(part)
            for window in self.answers.missing(resolved)
            for part in subtract_window(window, explained)
            if self.answers.count_confirmations(part) < 2
        ]
        again = [w for w in self._join(unconfirmed) if self.requests[w] < REQUESTS_MISSING]
        if not self.answers.received:
            again = again[-1:]  # an empty span is not requested page by page once more
        return sorted({w for w in pages if self.requests[w] < REQUESTS_DISPUTED} | set(again))

    def _pages(self, windows: list[Window]) -> list[Window]:
        """Return pages over the windows and the stored bars around them."""
        timeframe = self.answers.span.timeframe
        size = max(1, self.client.source.page_size - 2)
        back = (NEIGHBORS - 1) * timeframe.width
        wide = (Window(w.start - back, w.end + back) & self.answers.window for w in windows)
        joined = pack_windows(wide, timeframe, max_bars=size)
        pages = (page for window in joined for page in window.pages(timeframe, size))
        return [self._with_neighbors(page) for page in pages]

    async def _served_pages(self, pages: list[Window]) -> list[Window]:
        """Return the pages that the venue can answer: some keep only their newest bars."""
        if self.client.source.skips_gaps or len(pages) < 3:
            return pages
        await self._request(pages[:1])
        if self.answers.fetched[0].first_available is None:
            return pages[1:]
        await self._request(pages[:1])
        start = self.answers.window.start
        self.served_from = min(answer.first_available or start for answer in self.answers.fetched)
        return [page for page in pages if page.end > self.served_from] or pages[-1:]

    def _with_neighbors(self, window: Window) -> Window:
        """Return the window with one bar more on both sides, as far as the venue's clock allows."""
        timeframe = self.answers.span.timeframe
        last = timeframe.floor(self.answers.closed_before)
        is_first = window.start <= self.answers.window.start
        start = window.start if is_first else window.start - timeframe.width
        return Window(start, max(window.end, min(window.end + timeframe.width, last)))

    def _join(self, windows: list[Window]) -> list[Window]:
        """Return the windows in as few requests as the venue allows."""
        source, timeframe = self.client.source, self.answers.span.timeframe
        joined = pack_windows(windows, timeframe, max_bars=source.page_size)
        if source.skips_gaps:
            return joined
        return [page for window in joined for page in window.pages(timeframe, source.page_size)]

    async def _request(self, windows: list[Window]) -> None:
        self.requests.update(windows)
        tasks = [asyncio.create_task(self._request_one(window)) for window in windows]
        try:
            fetched = await asyncio.gather(*tasks)
        except MarketDataError as error:
            earlier = (r for answer in self.answers.fetched for r in answer.requests)
            error.requests = (*earlier, *await _cancel(tasks))
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


    async def _request_one(self, window: Window) -> BarsPage:
        span = self.answers.span
        async with self.client.slots:
            fetched = await self.client.source.fetch(span.market, span.timeframe, window)
        self.client.on_progress(BarsReceived(fetched.rows.height, len(fetched.requests)))
        return fetched


async def _cancel(tasks: Sequence[asyncio.Task[BarsPage]]) -> list[Request]:
    """Cancel what still runs; return the requests of what has ended, for the fetch log."""
    for task in tasks:
        task.cancel()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    return [r for end in ended if isinstance(end, BarsPage | MarketDataError) for r in end.requests]

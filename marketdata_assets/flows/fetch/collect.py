"""Collect: request a span in pages until the answers agree about every bar and every gap.

Pages overlap by one bar, so that the next page confirms the end of each. Whatever is contradicted,
rejected by a rule or missing is requested again, a limited number of times.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from marketdata_assets.errors import BadInput, MarketDataError, VenueDown, VenueRefused
from marketdata_assets.flows.fetch.answers import (
    Answers,
    FetchResult,
    FetchSpan,
)
from marketdata_assets.flows.fetch.first_bar import FirstBarSearch, has_older_bars, settle_beginning
from marketdata_assets.flows.fetch.known_gaps import clip_gaps, missing_windows
from marketdata_assets.ledger.fetches import to_log
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.model.events import BarsReceived
from marketdata_assets.model.intervals import (
    coalesce_windows,
    group_consecutive,
    pack_windows,
    subtract_window,
)
from marketdata_assets.model.timeframe import MINUTE
from marketdata_assets.model.window import Window, format_time
from marketdata_assets.quality.agreement import ResolvedAnswers
from marketdata_assets.settings.universe import Settings
from marketdata_assets.sources.base import BarsPage, MarketTraits, Request
from marketdata_assets.sources.clients import VenueClient
from marketdata_assets.venues.registry import facts_of

ROUNDS = 7
"""How often the pages of one span are requested at most."""
REQUESTS_DISPUTED, REQUESTS_MISSING = 4, 2
"""How often one window is requested while answers contradict each other, and while bars are
missing.
"""
FEWEST_CUT = 8
"""A page of fewer bars is requested again as it is."""
CUTS = (0.5, 0.3, 0.7, 0.4, 0.6, 0.2, 0.8)
"""Where a page is cut that is requested again, by round."""
NEWEST_BARS = 10
"""Bars that show whether a venue refuses only old ones."""
CLOCK_BEHIND = timedelta(hours=6)
"""A clock of a venue that is further behind ours than this is an error, or ours is."""
NEIGHBORS = 3
"""How many stored bars on each side of a new span are requested again at least: an answer that
contradicts most of them is rejected.
"""


async def collect(
    settings: Settings, ledger: Ledger, client: VenueClient, *, span: FetchSpan
) -> FetchResult:
    """Fetch the bars of a span that are neither stored nor covered by a waiting gap.

    Bars of `span.again` are fetched whether they are stored or not. Sends no request when nothing
    is missing. Raises VenueDown, VenueRefused, BadInput.
    """
    opens, timeframe, wanted = span.stored["open_time"], span.timeframe, span.wanted
    now = settings.now()
    if not span.again and not missing_windows(opens, timeframe, wanted, gaps=span.gaps, now=now):
        return FetchResult(gaps=tuple(span.gaps), through=wanted.end)
    closed_before = await client.now(span.market, timeframe.shift(wanted.end, 1))
    listing = FirstBarSearch(settings, ledger, client, span)
    await listing.find()
    start = wanted.start if listing.is_reopened else listing.start
    end = max(wanted.start, min(wanted.end, timeframe.floor(closed_before)))
    window = Window(start, end)
    missing = missing_windows(opens, timeframe, window, gaps=span.gaps, now=now)
    again = span.again & window if span.again else None
    windows = [*missing, *([again] if again else [])]
    if not windows:
        gaps = (*listing.gaps_before(start), *clip_gaps(span.gaps, start, timeframe))
        fetches = (entry for page in listing.probes for entry in to_log(page.requests, page.window))
        result = FetchResult(gaps=gaps, fetches=tuple(fetches), through=end)
        return replace(result, error=_late_clock(span, closed_before, now))
    traits = client.traits(span.market)
    answers = Answers(span, window, closed_before, now, traits.columns, traits.page_size)
    answers.probes += listing.probes
    session = FetchSession(client, answers, has_older_bars(ledger, span))
    recent = session.last_stored(missing, settings.corrections.run_minutes)
    try:
        resolved = await session.run([*windows, *recent])
    except (BadInput, VenueRefused) as error:
        if not await _is_delisted(ledger, client, span):
            raise
        return answers.build_unanswered(error.requests)
    if not traits.skips_gaps:
        await settle_beginning(listing, answers)
    if answers.first_delivered_in(Window(start, listing.start)) is None:
        answers.start_at(listing.start)
    result = answers.build_result(resolved)
    gaps = (*listing.gaps_before(answers.window.start), *result.gaps)
    return replace(result, gaps=gaps, error=_late_clock(span, closed_before, now))


def _late_clock(span: FetchSpan, closed_before: datetime, now: datetime) -> VenueDown | None:
    """Return why bars at the end of the span are not there, where the clocks are far apart."""
    if span.wanted.end - closed_before <= CLOCK_BEHIND:
        return None
    return VenueDown(
        f"{span.market.venue}: its clock says {format_time(closed_before)} and ours "
        f"{format_time(now)}; one of them is wrong, and bars after the first are not fetched"
    )


async def _is_delisted(ledger: Ledger, client: VenueClient, span: FetchSpan) -> bool:
    """Return whether a market with stored bars has left the venue's list; False when unknown."""
    try:
        has_bars = bool(ledger.partitions.stored_span(span.market))
        return has_bars and not await client.source.is_listed(span.market)
    except MarketDataError:
        return False


@dataclass(slots=True)
class FetchSession:
    """Requests the pages of one span, round by round."""

    client: VenueClient
    answers: Answers
    has_older_bars: bool = False
    """Bars of an earlier month are stored."""
    requests: Counter[Window] = field(default_factory=Counter)
    """How often each window was requested."""
    rounds: int = 0

    async def run(self, windows: list[Window]) -> ResolvedAnswers:
        """Request the windows until their answers agree, at most ROUNDS times."""
        queue = await self._served_pages(self._pages(windows))
        for _ in range(ROUNDS):
            await self._request(queue)
            await self._settle_refusals()
            resolved = self.answers.resolve()
            queue = self.windows_to_refetch(resolved)
            if not queue:
                break
            self.rounds += 1
        return resolved

    @property
    def _traits(self) -> MarketTraits:
        return self.client.traits(self.answers.span.market)

    def last_stored(self, missing: Sequence[Window], minutes: int) -> list[Window]:
        """Return the last stored bars, which venues correct, if one page holds them as well."""
        window, stored = self.answers.window, self.answers.span.stored
        if not minutes or not missing or missing[-1].end < window.end or stored.is_empty():
            return []
        begin = missing[-1].start
        tail = Window(begin - minutes * MINUTE, begin) & window
        bars = Window(tail.start, window.end).count(self.answers.span.timeframe)
        fits = bars <= self._traits.page_size - 2
        return [tail] if tail and fits and stored["open_time"][-1] >= tail.start else []

    def windows_to_refetch(self, resolved: ResolvedAnswers) -> list[Window]:
        """Return the pages with a contradiction and the surroundings of unconfirmed gaps."""
        timeframe = self.answers.span.timeframe
        disputed = resolved.unresolved["open_time"].unique().to_list()
        doubted = self.answers.doubted_bars()
        contradicted = {
            self.answers.fetched[answer].window
            for answer in self.answers.judgement.contradicted
            if answer >= 0
        }
        pages = {w for w in self.requests for moment in disputed if w.start <= moment < w.end}
        pages = {*self._other_cuts(pages | contradicted)}
        explained = [
            *self.answers.confirmed_rejections(),
            *group_consecutive(disputed, timeframe),
            *group_consecutive(doubted, timeframe),
            Window(self.answers.window.start, self.answers.served_from),
            Window(self.answers.window.start, self.answers.silent_until),
        ]
        unconfirmed = [
            part
            for window in self.answers.missing(resolved)
            for part in subtract_window(window, explained)
            if self.answers.count_confirmations(part) < 2
        ]
        around, pieces = list[Window](), list[Window]()
        for part in unconfirmed:
            if self._can_be_spanned(part):
                around.append(self._reach_around(part))
            else:
                pieces += self._pieces(part)
        wanted = [*self._join(around), *pieces]
        again = [w for w in wanted if self.requests[w] < REQUESTS_MISSING]
        if not self.answers.received:
            again = again[-1:]  # an empty span is not requested page by page once more
        return sorted({w for w in pages if self.requests[w] < REQUESTS_DISPUTED} | set(again))

    def _other_cuts(self, pages: Iterable[Window]) -> list[Window]:
        """Return requests for the bars of these pages that begin and end elsewhere: what lies about
        one request may not lie about another. Each round cuts in another place.
        """
        timeframe, size = self.answers.span.timeframe, max(1, self._traits.page_size - 4)
        found = []
        for span in coalesce_windows(pages):
            bars = span.count(timeframe)
            more = (self.rounds + 1) * max(NEIGHBORS, bars // 4)
            wide = Window(timeframe.shift(span.start, -more), timeframe.shift(span.end, more))
            wide = wide & self.answers.window
            if wide.count(timeframe) <= size and (wide != span or bars < FEWEST_CUT):
                found.append(wide)
                continue
            length = min(bars, size)
            start = timeframe.shift(span.start, -int(length * CUTS[self.rounds % len(CUTS)]))
            every = Window(start, span.end).pages(timeframe, length)
            found += [part & self.answers.window for part in every]
        return [self._with_neighbors(part) for part in found if part]

    def _pages(self, windows: list[Window]) -> list[Window]:
        """Return pages over the windows and the stored bars around them."""
        timeframe = self.answers.span.timeframe
        size = max(1, self._traits.page_size - 2)
        more = NEIGHBORS - 1
        wide = (
            Window(timeframe.shift(w.start, -more), timeframe.shift(w.end, more))
            & self.answers.window
            for w in windows
        )
        joined = pack_windows(wide, timeframe, max_bars=size)
        pages = (page for window in joined for page in window.pages(timeframe, size))
        return [self._with_neighbors(page) for page in pages]

    async def _served_pages(self, pages: list[Window]) -> list[Window]:
        """Return the pages that have still to be requested: some venues keep only newer bars.

        Where the oldest page is refused, or answered with later bars as is a page before it, the
        first one that is served is searched by halves, beginning where it may lie.
        """
        if self._traits.skips_gaps or await self._serves(pages[0]):
            return [page for page in pages if not self.requests[page]]
        is_refused = pages[0] in self.answers.refused
        if not is_refused and (older := await self._probe(_before(pages[0]))) and older.rows.height:
            return pages[1:]  # the market was silent
        low, high = 0, len(pages)
        hint = self._known_horizon() or self._later_bar(pages[0])
        near = next((i for i, page in enumerate(pages) if hint and page.end > hint), high - 1)
        probes = [near - 1, near]
        while high - low > 1:
            middle = probes.pop(0) if probes else (low + high) // 2
            if low < middle < high:
                low, high = (low, middle) if await self._serves(pages[middle]) else (middle, high)
        if pages[low] not in self.answers.refused:
            first = self.answers.first_delivered_in(pages[high]) if high < len(pages) else None
            if first is None or first == pages[high].start:
                first = await self._first_served(pages[low])
            self.answers.silent_until = first
        return [page for page in pages[high:] if not self.requests[page]]

    async def _first_served(self, page: Window) -> datetime:
        """Return from where on the venue answers for the rest of a page that it does not serve.

        The end of the page where it serves none of it.
        """
        timeframe = self.answers.span.timeframe
        low, high, known = page.start, page.end, self._known_horizon()
        if known and known >= high:
            return high
        if known and low < known and await self._serves(Window(known, high)):
            return known
        while low < high:
            middle = timeframe.shift(low, timeframe.count(low, high) // 2)
            if await self._serves(Window(middle, page.end)):
                high = middle
            else:
                low = timeframe.shift(middle, 1)
        return high

    async def _probe(self, window: Window) -> BarsPage | None:
        """Return what the venue answers for bars outside of the span, which are not kept."""
        page = await self._request_one(window)
        self.answers.probes.extend([page] if page else [])
        return page

    async def _serves(self, page: Window) -> bool:
        """Request a page; return whether the venue answers for it at all."""
        await self._request([page])
        if page in self.answers.refused:
            return False
        return self.answers.fetched[-1].first_available is None

    def _later_bar(self, page: Window) -> datetime | None:
        """Return the first bar that the venue sent instead of a page."""
        sent = [a.first_available for a in self.answers.fetched if a.window == page]
        return sent[-1] if sent else None

    def _known_horizon(self) -> datetime | None:
        """Return the first bar that the venue serves by what is known of it."""
        market, timeframe = self.answers.span.market, self.answers.span.timeframe
        newest = facts_of(market.venue).endpoint(market.symbol).newest_bars_only
        last = timeframe.floor(self.answers.closed_before)
        return timeframe.shift(last, 1 - newest) if newest else None

    def _with_neighbors(self, window: Window) -> Window:
        """Return the window with one bar more on both sides, as far as the venue's clock allows."""
        timeframe = self.answers.span.timeframe
        last = timeframe.floor(self.answers.closed_before)
        is_first = window.start <= self.answers.window.start
        start = window.start if is_first else timeframe.shift(window.start, -1)
        return Window(start, max(window.end, min(timeframe.shift(window.end, 1), last)))

    def _can_be_spanned(self, part: Window) -> bool:
        """Return whether one request may deliver bars on both sides of a window.

        It may not where the window is longer than a page, or where the first such request found
        that the market is silent beyond the end of the span as well.
        """
        bars = part.count(self.answers.span.timeframe)
        is_short = self._traits.skips_gaps or bars + 2 <= self._traits.page_size
        may_be_silent_beyond = self.rounds and any(self._ends_beyond(part))
        return is_short and not (may_be_silent_beyond and not self.answers.count_spanning(part))

    def _ends_beyond(self, part: Window) -> tuple[bool, bool]:
        """Return whether bars before the span, and after it, may say more about a window."""
        span, timeframe = self.answers.window, self.answers.span.timeframe
        is_first = part.start == span.start and self.has_older_bars
        is_last = part.end == span.end < timeframe.floor(self.answers.closed_before)
        return is_first, is_last

    def _reach_around(self, part: Window) -> Window:
        """Return a window with one bar more on both sides, and with half of what a page has left
        beyond an end of the span.
        """
        timeframe = self.answers.span.timeframe
        more = max(1, (self._traits.page_size - part.count(timeframe)) // 2)
        is_first, (_, last) = part.start == self.answers.window.start, self._ends_beyond(part)
        start = timeframe.shift(part.start, -more if is_first else -1)
        latest = max(part.end, timeframe.floor(self.answers.closed_before))
        return Window(start, min(timeframe.shift(part.end, more if last else 1), latest))

    def _pieces(self, part: Window) -> list[Window]:
        """Return pages that hold nothing but a window, and one beyond each end of the span: the
        next one in each round.
        """
        timeframe, size = self.answers.span.timeframe, self._traits.page_size
        pieces, (first, last) = list(part.pages(timeframe, size)), self._ends_beyond(part)
        far, near = size * (self.rounds + 1), size * self.rounds
        if first and not self.answers.has_bars_before(part.start):
            pieces.append(
                Window(timeframe.shift(part.start, -far), timeframe.shift(part.start, -near))
            )
        latest = timeframe.floor(self.answers.closed_before)
        beyond = Window(
            timeframe.shift(part.end, near), min(timeframe.shift(part.end, far), latest)
        )
        if last and beyond and not self.answers.has_bars_after(part.end):
            pieces.append(beyond)
        return pieces

    def _join(self, windows: list[Window]) -> list[Window]:
        """Return the windows in as few requests as the venue allows."""
        traits, timeframe = self._traits, self.answers.span.timeframe
        joined = pack_windows(windows, timeframe, max_bars=traits.page_size)
        if traits.skips_gaps:
            return joined
        return [page for window in joined for page in window.pages(timeframe, traits.page_size)]

    async def _request(self, windows: list[Window]) -> None:
        self.requests.update(windows)
        tasks = [asyncio.create_task(self._request_one(window)) for window in windows]
        try:
            fetched = await asyncio.gather(*tasks)
        except MarketDataError as error:
            earlier = (r for answer in self.answers.fetched for r in answer.requests)
            error.requests = (*earlier, *await _cancel(tasks))
            raise
        answered = [page for page in fetched if page]
        self.client.learn_page_size(self.answers.span.market, self.answers.span.timeframe, answered)
        self.answers.add(answered)

    async def _request_one(self, window: Window) -> BarsPage | None:
        """Return the answer; None where the venue refused it, which `answers` then knows."""
        span = self.answers.span
        async with self.client.slots:
            try:
                fetched = await self.client.source.fetch(span.market, span.timeframe, window)
            except VenueRefused as error:
                if self._traits.skips_gaps:
                    raise
                self.answers.refused[window] = error
                return None
        self.client.on_progress(BarsReceived(fetched.rows.height, len(fetched.requests)))
        return fetched

    async def _settle_refusals(self) -> None:
        """Find out from which bar on the venue answers, where it refused windows as too old.

        Raises VenueRefused where it is no matter of age: newer bars are refused as well.
        """
        answers, timeframe = self.answers, self.answers.span.timeframe
        refused = max(
            (window for window in answers.refused if window.end > answers.served_from),
            key=lambda window: window.end,
            default=None,
        )
        if refused is None:
            return
        error, last = answers.refused[refused], timeframe.floor(answers.closed_before)
        first = max(timeframe.shift(refused.start, 1), timeframe.shift(last, -NEWEST_BARS))
        newest = await self._probe(Window(first, last)) if first < last else None
        if newest is None or any(page.window.end <= refused.start for page in answers.fetched):
            raise error
        first = await self._first_served(refused)
        answers.set_served_from(first, f"the venue refused what is older: {error}")


def _before(window: Window) -> Window:
    """Return the window of the same length that ends where this one begins."""
    return Window(window.start - (window.end - window.start), window.start)


async def _cancel(tasks: Sequence[asyncio.Task[BarsPage | None]]) -> list[Request]:
    """Cancel what still runs; return the requests of what has ended, for the fetch log."""
    for task in tasks:
        task.cancel()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    return [r for end in ended if isinstance(end, BarsPage | MarketDataError) for r in end.requests]

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
    closed_before = await client.now(wanted.end + timeframe.width)
    first_bar = await _find_first_bar(settings, ledger, client, span=span)
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
    settings: Settings, ledger: Ledger, client: VenueClient, *, span: FetchSpan
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
        self.answers.add(fetched)

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

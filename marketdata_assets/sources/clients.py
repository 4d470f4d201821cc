"""The venues of one process: one guarded source each, opened when it is first used."""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from datetime import datetime
from typing import Any, TypeVar

from marketdata_assets.model.events import ProgressCallback, no_progress
from marketdata_assets.model.intervals import LAST_MS
from marketdata_assets.model.market import Market
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import Window, from_ms, to_ms
from marketdata_assets.settings.parts import Venue
from marketdata_assets.sources.base import BarsPage, MarketTraits, Source
from marketdata_assets.sources.guards import GuardedSource, RetryPolicy, VenueState

T = TypeVar("T")

REQUESTS_IN_FLIGHT = 8
"""How many requests one process has under way at one venue."""
MIN_PAGE = 10
"""Fewer bars than this are no page."""


class VenueClient:
    """One venue: its guarded source, its free request slots, the newest reading of its clock."""

    def __init__(self, source: Source, on_progress: ProgressCallback) -> None:
        self.source, self.on_progress = source, on_progress
        self.slots = asyncio.Semaphore(REQUESTS_IN_FLIGHT)
        self._clock: datetime | None = None
        self._page_sizes: dict[Market, int] = {}
        self._cuts: defaultdict[tuple[Market, int], set[Window]] = defaultdict(set)

    def traits(self, market: Market) -> MarketTraits:
        """Return how the market's bars are served, with the page that its answers really had."""
        traits = self.source.traits(market)
        page = self._page_sizes.get(market)
        if page is None or page >= traits.page_size:
            return traits
        return traits._replace(page_size=page, skips_gaps=False)

    def learn_page_size(
        self, market: Market, timeframe: Timeframe, pages: Sequence[BarsPage]
    ) -> None:
        """Take the number of bars at which the answers for two windows were cut for a page."""
        for page in pages:
            bars = _cut_at(page, timeframe)
            if bars:
                windows = self._cuts[market, bars]
                windows.add(page.window)
                if len(windows) > 1 and bars < self.traits(market).page_size:
                    self._page_sizes[market] = bars

    async def now(self, market: Market, at_least: datetime) -> datetime:
        """Return the venue's own clock, UTC; it is read again unless the last reading suffices.

        The market matters where the venue tells no time (`Source.now`).
        """
        if self._clock is None or self._clock < at_least:
            now = await self.source.now(market)
            self._clock = now if self._clock is None else max(now, self._clock)
        return self._clock


def _cut_at(page: BarsPage, timeframe: Timeframe) -> int | None:
    """Return the number of bars of an answer that holds one end of its window and not the other."""
    opens = page.rows["open_time"].drop_nulls().unique().sort()
    if opens.len() < MIN_PAGE:
        return None
    first, last = opens[0], opens[-1]
    if first < 0 or last > LAST_MS:
        return None
    at_start = first == to_ms(page.window.start)
    at_end = last == to_ms(timeframe.shift(page.window.end, -1))
    is_whole = opens.len() == timeframe.count(from_ms(first), from_ms(last)) + 1
    return opens.len() if is_whole and at_start != at_end else None


class VenueClients:
    """The clients of all venues of a universe; their requests run in a thread of their own."""

    def __init__(
        self,
        venues: Mapping[str, Venue],
        state: VenueState,
        policy: RetryPolicy,
        *,
        on_progress: ProgressCallback = no_progress,
    ) -> None:
        self._venues, self._state, self._policy = venues, state, policy
        self._on_progress = on_progress
        self._clients: dict[str, VenueClient] = {}
        self._requests = _RequestThread()

    def client(self, venue: str) -> VenueClient:
        """Return the client of a venue of the universe."""
        if venue not in self._clients:
            self._clients[venue] = VenueClient(self._open_source(venue), self._on_progress)
        return self._clients[venue]

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start work on requests; any thread may wait for its result."""
        return self._requests.submit(work)

    def close(self) -> None:
        """Close all connections and end the thread of the requests."""
        for client in self._clients.values():
            self.submit(client.source.close()).result(timeout=10)
        self._clients.clear()
        self._requests.close()

    def _open_source(self, name: str) -> Source:
        from marketdata_assets.sources.ccxt_rest import CcxtSource

        venue = self._venues[name]
        return GuardedSource(
            CcxtSource(venue),
            name,
            self._state,
            requests_per_minute=venue.requests_per_minute,
            policy=self._policy,
        )


class _RequestThread:
    """One event loop in a thread of its own: requests run while the caller works on answers."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            run = self._loop.run_forever
            self._thread = threading.Thread(target=run, name="requests", daemon=True)
            self._thread.start()
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        if self._loop is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            self._loop = self._thread = None

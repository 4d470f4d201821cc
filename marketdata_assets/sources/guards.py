"""The guard around a source: a queue, retries and a circuit breaker that all processes share.

The state of a venue (when the next request may go, until when requests are held back, how often it
failed) lies behind `VenueState`. Clock, sleep and randomness come in by hand.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field, replace
from datetime import datetime
from decimal import Decimal
from typing import Protocol, TypeVar

from marketdata_assets.errors import MarketDataError, Retry, VenueDown, Wait
from marketdata_assets.model.instrument import Instrument
from marketdata_assets.model.market import Market
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.venue_health import VenueHealth
from marketdata_assets.model.window import Window, format_time, from_ms
from marketdata_assets.retry import Backoff
from marketdata_assets.sources.base import BarsPage, MarketTraits, Request, Source
from marketdata_assets.venues.facts import MarketType

T = TypeVar("T")

LONGEST_PAUSE = 3 * 86400.0
"""Seconds: the longest ban that Binance gives. A header that names more time is cut to this."""


class VenueState(Protocol):
    """What all processes share about one venue. Moments are our clock, in seconds since 1970."""

    def reserve(self, venue: str, now: float, requests_per_minute: int | None) -> float:
        """Take one request's place in the queue; return the moment at which it may be sent."""
        ...

    def pause(self, venue: str, until: float) -> None:
        """Hold back all requests until this moment; a later one that is set already stays."""
        ...

    def health(self, venue: str) -> VenueHealth:
        """Return what is held against the venue; reading changes nothing."""
        ...

    def record(self, venue: str, ok: bool, now: float) -> None:
        """Record a success, which closes the breaker, or a failure, which counts towards it."""
        ...

    def broken_until(self, venue: str, now: float) -> float:
        """Return until when the breaker stays open; 0 where requests may go.

        After that moment one caller may try.
        """
        ...


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often one request is tried, and how long it may wait. All times are in seconds."""

    attempts: int = 6
    """Failures of one request after which the venue counts as down."""
    waits: int = 30
    """Times that one request may be answered with a wait."""
    backoff: float = 0.5
    """The longest pause after the first failure; it doubles with each further one."""
    backoff_cap: float = 20.0
    longest_wait: float = 900.0
    """Seconds that one request waits in all because of such answers."""
    sleep: Callable[[float], Awaitable[None]] = field(default=asyncio.sleep)
    clock: Callable[[], float] = field(default=time.time)
    jitter: Callable[[], float] = field(default=random.random)

    @property
    def pauses(self) -> Backoff:
        """The pauses between the attempts."""
        return Backoff(self.backoff, self.backoff_cap, self.jitter)


@dataclass(slots=True)
class _CallLog:
    """What happened to one guarded call: its failed requests, and the seconds it waited."""

    failed_requests: list[Request] = field(default_factory=list)
    wait_seconds: float = 0.0

    def venue_down(self, message: str) -> VenueDown:
        """Return the error that ends the call, with the requests that led to it."""
        error = VenueDown(message)
        error.requests = tuple(self.failed_requests)
        return error


class GuardedSource:
    """A source whose requests wait for their turn, obey the venue's waits, and are retried.

    Every method raises VenueDown where the venue fails too often, where its circuit breaker is
    open, or where it demands a longer wait than the policy allows.
    """

    def __init__(
        self,
        source: Source,
        venue: str,
        state: VenueState,
        *,
        requests_per_minute: int | None = None,
        policy: RetryPolicy | None = None,
    ) -> None:
        self._source, self._venue, self._state = source, venue, state
        self._limit, self._policy = requests_per_minute, policy or RetryPolicy()

    def traits(self, market: Market) -> MarketTraits:
        """Return how the market's bars are served; sends no request."""
        return self._source.traits(market)

    @property
    def weight_limit(self) -> int | None:
        """The request weight that the venue allows in a minute; None: it counts no weights."""
        return self._source.weight_limit

    @property
    def used_weight(self) -> int:
        """The weight of this minute, by the venue's own count in its last answer."""
        return self._source.used_weight

    async def fetch(self, market: Market, timeframe: Timeframe, window: Window) -> BarsPage:
        """Return the bars that open inside `window` (end exclusive, every bar in it closed).

        The page also has the failed requests and the seconds that were waited.
        """
        log = _CallLog()
        page = await self._call(lambda: self._source.fetch(market, timeframe, window), log)
        return replace(
            page, requests=(*log.failed_requests, *page.requests), wait_seconds=log.wait_seconds
        )

    async def now(self, market: Market) -> datetime:
        """Return the venue's own clock, UTC."""
        return await self._call(lambda: self._source.now(market), _CallLog())

    async def first_open(self, market: Market, timeframe: Timeframe) -> datetime | None:
        """Return the open time of the market's first bar; None where the venue does not say."""
        return await self._call(lambda: self._source.first_open(market, timeframe), _CallLog())

    async def is_listed(self, market: Market) -> bool:
        """Return whether the venue lists the market as active; requests the list each time."""
        return await self._call(lambda: self._source.is_listed(market), _CallLog())

    async def instruments(self, types: Collection[MarketType]) -> list[Instrument]:
        """Return the venue's whole list of markets of these types; others may be among them."""
        return await self._call(lambda: self._source.instruments(types), _CallLog())

    async def traded_volumes(self, kind: MarketType) -> dict[str, Decimal]:
        """Return what was traded in the last 24 hours, in quote currency, by symbol."""
        return await self._call(lambda: self._source.traded_volumes(kind), _CallLog())

    async def close(self) -> None:
        """Close all connections."""
        await self._source.close()

    async def _call(self, operation: Callable[[], Awaitable[T]], log: _CallLog) -> T:
        policy, last = self._policy, ""
        failures, waits, wait_left = 0, 0, policy.longest_wait
        while True:
            try:
                has_failed = await self._wait_for_turn(log, last)
                value = await operation()
            except Wait as error:
                log.failed_requests.extend(error.requests)
                last, waits = str(error), waits + 1
                wait_left -= self._pause_venue(error, waits)
                if wait_left < 0 or waits > policy.waits:
                    until = _moment(self._state.health(self._venue).paused_until)
                    raise log.venue_down(
                        f"{error}; requests are held back until {until}, which is too long to wait"
                    ) from None
            except Retry as error:
                log.failed_requests.extend(error.requests)
                last, failures = str(error), failures + 1
                self._state.record(self._venue, False, policy.clock())
                if failures >= policy.attempts:
                    raise log.venue_down(f"{error}; given up after {failures} attempts") from None
                await policy.sleep(policy.pauses.pause(failures))
            except MarketDataError as error:
                error.requests = (*log.failed_requests, *error.requests)
                raise
            else:
                self._note_success(has_failed)
                return value

    async def _wait_for_turn(self, log: _CallLog, last: str) -> bool:
        """Wait for every pause of the venue, then for the limiter; return whether the venue's last
        request failed.

        `last` is the last error, for the message of VenueDown. The place in the queue is taken only
        when no pause is left: places from before a pause would all be used at its end.
        """
        clock, begun = self._policy.clock, self._policy.clock()
        because = f" (last error: {last})" if last else ""
        health = self._state.health(self._venue)
        if health.broken_until and (broken := self._state.broken_until(self._venue, begun)):
            raise VenueDown(
                f"{self._venue} failed too often; its circuit breaker stays open until "
                f"{_moment(broken)}{because}"
            )
        while True:
            if (until := health.paused_until) > clock():
                if until - clock() > self._policy.longest_wait:
                    raise VenueDown(
                        f"{self._venue} accepts no request before {_moment(until)}{because}"
                    )
                await self._policy.sleep(until - clock())
                health = self._state.health(self._venue)
                continue
            turn = self._state.reserve(self._venue, clock(), self._limit)
            if turn > clock():
                await self._policy.sleep(turn - clock())
                health = self._state.health(self._venue)
            if health.paused_until <= clock():
                log.wait_seconds += clock() - begun
                return health.failures > 0

    def _pause_venue(self, error: Wait, waits: int) -> float:
        """Hold back all processes for as long as the answer demands; return the seconds.

        Where that is less than a second, the pause grows with each wait of this call.
        """
        least = self._policy.pauses.longest_pause(waits) if error.seconds < 1 else 0.0
        seconds = min(max(error.seconds, least), LONGEST_PAUSE)
        self._state.pause(self._venue, self._policy.clock() + seconds)
        return seconds

    def _note_success(self, has_failed: bool) -> None:
        """End the venue's failures in a row. Hold back all processes until the next minute when its
        count of weights nears the limit, so that no request provokes HTTP 429.
        """
        if has_failed:
            self._state.record(self._venue, True, self._policy.clock())
        used, limit = self._source.used_weight, self._source.weight_limit
        if not used or not limit:
            return
        margin = min(max(40, limit // 50), limit // 2)
        if used >= limit - margin:
            now = self._policy.clock()
            self._state.pause(self._venue, now - now % 60 + 60.5)


def _moment(seconds: float) -> str:
    return format_time(from_ms(int(seconds) * 1000))

"""The guard around a source: paced, retried, circuit-broken, the same for every process of an
instance.

The state of a venue (when the next request may go, until when it asked for peace, how often it
failed) lives behind `VenueState`, so that processes share it. Clock, sleep and randomness come in
by hand.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Protocol, TypeVar

from marketdata_assets.errors import MarketDataError, Retry, VenueDown, Wait
from marketdata_assets.model.market import Market
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import Window, format_time, from_ms
from marketdata_assets.sources.base import Fetched, Request, Source

T = TypeVar("T")

LONGEST_PAUSE = 3 * 86400.0
"""Seconds: the longest ban that Binance gives; a header that says more is not believed."""


class VenueState(Protocol):
    """What all processes know of one venue. Moments are our clock, in seconds since 1970."""

    def reserve(self, venue: str, now: float, requests_per_minute: int | None) -> float:
        """Take one request's place in the queue; the moment at which it may be sent."""
        ...

    def pause(self, venue: str, until: float) -> None:
        """No request before `until`."""
        ...

    def paused_until(self, venue: str) -> float:
        """The moment the venue asked for (0 when it did not)."""
        ...

    def record(self, venue: str, ok: bool, now: float) -> None:
        """One request succeeded or failed: closes the breaker, or counts towards opening it."""
        ...

    def broken_until(self, venue: str, now: float) -> float:
        """0 when requests may go; else until when the breaker stays open. After that, one caller may
        try.
        """
        ...


@dataclass(frozen=True, slots=True)
class Policy:
    """How patient a guard is with one request. Backoff is exponential, capped, fully jittered;
    seconds.
    """

    attempts: int = 6
    waits: int = 30
    backoff: float = 0.5
    backoff_cap: float = 20.0
    longest_wait: float = 900.0
    sleep: Callable[[float], Awaitable[None]] = field(default=asyncio.sleep)
    clock: Callable[[], float] = field(default=time.time)
    jitter: Callable[[], float] = field(default=random.random)

    def delay(self, failures: int) -> float:
        """How long to wait after so many failures of one request."""
        return self.longest_delay(failures) * self.jitter()

    def longest_delay(self, failures: int) -> float:
        """The same without jitter."""
        return min(self.backoff_cap, self.backoff * 2.0 ** (failures - 1))


class Guarded:
    """A source that waits its turn, honours every wait the venue asks for, tries again, and stops when
    it is down.
    """

    def __init__(
        self,
        source: Source,
        venue: str,
        state: VenueState,
        requests_per_minute: int | None,
        policy: Policy | None = None,
    ) -> None:
        self._source, self._venue, self._state = source, venue, state
        self._limit, self._policy = requests_per_minute, policy or Policy()

    @property
    def page_size(self) -> int:
        """The wrapped source's."""
        return self._source.page_size

    @property
    def columns(self) -> tuple[str, ...]:
        """The wrapped source's."""
        return self._source.columns

    @property
    def skips_gaps(self) -> bool:
        """The wrapped source's."""
        return self._source.skips_gaps

    async def fetch(self, market: Market, timeframe: Timeframe, window: Window) -> Fetched:
        """As the wrapped source, with the failed requests and the time spent waiting for limits
        added.
        """
        failed: list[Request] = []
        waited: list[float] = []
        fetched = await self._call(
            lambda: self._source.fetch(market, timeframe, window), failed, waited
        )
        return replace(fetched, requests=(*failed, *fetched.requests), waited=sum(waited))

    async def now(self) -> datetime:
        """As the wrapped source."""
        return await self._call(self._source.now, [], [])

    async def first_open(self, market: Market, timeframe: Timeframe) -> datetime | None:
        """As the wrapped source."""
        return await self._call(lambda: self._source.first_open(market, timeframe), [], [])

    async def lists(self, market: Market) -> bool:
        """As the wrapped source."""
        return await self._call(lambda: self._source.lists(market), [], [])

    async def close(self) -> None:
        """As the wrapped source."""
        await self._source.close()

    async def _call(
        self, operation: Callable[[], Awaitable[T]], failed: list[Request], waited: list[float]
    ) -> T:
        failures, waits, patience, last = 0, 0, self._policy.longest_wait, ""
        while True:
            try:
                waited.append(await self._wait_turn(last))
                value = await operation()
            except Wait as error:
                failed.extend(error.requests)
                last = str(error)
                waits += 1
                patience -= self._respect(error, waits)
                if patience < 0 or waits > self._policy.waits:
                    until = _moment(self._state.paused_until(self._venue))
                    raise self._down(
                        f"{error}; no request before {until}: too long to wait for", failed
                    ) from None
            except Retry as error:
                failed.extend(error.requests)
                last = str(error)
                failures += 1
                self._state.record(self._venue, False, self._policy.clock())
                if failures >= self._policy.attempts:
                    raise self._down(f"{error}; given up after {failures} tries", failed) from None
                await self._policy.sleep(self._policy.delay(failures))
            except MarketDataError as error:
                error.requests = (*failed, *error.requests)
                raise
            else:
                self._state.record(self._venue, True, self._policy.clock())
                self._mind_weight()
                return value

    def _down(self, message: str, failed: list[Request]) -> VenueDown:
        down = VenueDown(message)
        down.requests = tuple(failed)
        return down

    async def _wait_turn(self, last: str) -> float:
        """Wait for every pause the venue asked for, then for the limiter; seconds waited. Raises
        VenueDown.

        The place in the queue is taken when no pause is left: places kept through one would all be
        used at its end.
        """
        clock, begun = self._policy.clock, self._policy.clock()
        because = f" (last: {last})" if last else ""
        broken = self._state.broken_until(self._venue, begun)
        if broken:
            raise VenueDown(
                f"{self._venue} failed too often; its circuit breaker stays open until {_moment(broken)}{because}"
            )
        while True:
            if (until := self._state.paused_until(self._venue)) > clock():
                if until - clock() > self._policy.longest_wait:
                    raise VenueDown(
                        f"{self._venue} wants no request before {_moment(until)}{because}"
                    )
                await self._policy.sleep(until - clock())
                continue
            turn = self._state.reserve(self._venue, clock(), self._limit)
            if turn > clock():
                await self._policy.sleep(turn - clock())
            if self._state.paused_until(self._venue) <= clock():
                return clock() - begun

    def _respect(self, error: Wait, waits: int) -> float:
        """Pause the venue for all processes as long as it asks, and each time longer where it asks for
        next to nothing.
        """
        least = self._policy.longest_delay(waits) if error.seconds < 1 else 0.0
        seconds = min(max(error.seconds, least), LONGEST_PAUSE)
        self._state.pause(self._venue, self._policy.clock() + seconds)
        return seconds

    def _mind_weight(self) -> None:
        """Stop before the venue's own count of this minute reaches its limit: no 429 is ever
        provoked.
        """
        used, limit = (
            getattr(self._source, "used_weight", 0),
            getattr(self._source, "weight_limit", None),
        )
        if used and limit:
            margin = min(max(40, limit // 50), limit // 2)
            if used >= limit - margin:
                now = self._policy.clock()
                self._state.pause(self._venue, now - now % 60 + 60.5)


def _moment(seconds: float) -> str:
    return format_time(from_ms(int(seconds) * 1000))

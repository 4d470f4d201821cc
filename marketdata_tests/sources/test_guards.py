"""Guards in simulated time: retries, waits, the weight count, the breaker and the limiter, shared
through one ledger.

The far side is faked here and nowhere else: minutes of waiting pass in no time, and every request's
moment is known.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from marketdata_assets.errors import (
    BadInput,
    Garbled,
    MarketDataError,
    Retry,
    VenueDown,
    VenueRefused,
    Wait,
)
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.ledger.venues import BREAKER_FIRST, BREAKER_LIMIT, BREAKER_LONGEST
from marketdata_assets.model.market import Market
from marketdata_assets.model.timeframe import TIMEFRAMES, Timeframe
from marketdata_assets.model.window import Window
from marketdata_assets.sources.base import BarsPage, MarketTraits, Request
from marketdata_assets.sources.guards import GuardedSource, RetryPolicy

MARKET = Market("binance", "BTC/USDT")
MINUTE = TIMEFRAMES["1m"]
START = datetime(2024, 3, 1, tzinfo=UTC)
WINDOW = Window(START, START + timedelta(minutes=5))
NOON = datetime(2024, 3, 1, 12, tzinfo=UTC).timestamp()
MANY = 2000


class World:
    """Simulated time: it stands still while anybody works, and jumps to the next alarm when all
    sleep.
    """

    def __init__(self, now: float = NOON) -> None:
        self.now = now
        self.slept: list[float] = []
        self._alarms: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = itertools.count()

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        await self.until(self.now + seconds)

    async def until(self, moment: float) -> None:
        alarm = asyncio.get_running_loop().create_future()
        heapq.heappush(self._alarms, (moment, next(self._order), alarm))
        await alarm

    def run(self, *work: Coroutine[Any, Any, Any]) -> list[Any]:
        """All of it, side by side; results and errors in order."""

        async def drive() -> list[Any]:
            tasks = [asyncio.ensure_future(w) for w in work]
            while not all(task.done() for task in tasks):
                for _ in range(5):
                    await asyncio.sleep(0)  # everything that can continue does
                if self._alarms:
                    moment, _, alarm = heapq.heappop(self._alarms)
                    self.now = max(self.now, moment)
                    alarm.set_result(None)
            return await asyncio.gather(*tasks, return_exceptions=True)

        return asyncio.run(drive())

    def policy(self, jitter: float = 1.0, **limits: Any) -> RetryPolicy:
        return RetryPolicy(sleep=self.sleep, clock=self.clock, jitter=lambda: jitter, **limits)


Script = Iterable[Exception | None]


class FakeVenue:
    """Answers by script, where None is a good answer and so is all after the script; records when
    each request came.
    """

    weight_limit: int | None = None
    used_weight = 0

    def __init__(self, world: World, script: Script = (), takes: float = 0.0) -> None:
        self.world, self.takes = world, takes
        self._script: Iterator[Exception | None] = iter(script)
        self.request_times: list[float] = []
        self.closed = False

    async def fetch(self, market: Market, timeframe: Timeframe, window: Window) -> BarsPage:
        request = await self._answer()
        return BarsPage(pl.DataFrame({"open_time": [1]}), window, requests=(request,))

    def traits(self, market: Market) -> MarketTraits:
        return MarketTraits(page_size=123, columns=("open",), skips_gaps=True)

    async def now(self, market: Market) -> datetime:
        await self._answer()
        return START

    async def first_open(self, market: Market, timeframe: Timeframe) -> datetime | None:
        await self._answer()
        return START

    async def close(self) -> None:
        self.closed = True

    async def _answer(self) -> Request:
        assert len(self.request_times) < MANY, "asked without end"
        self.request_times.append(self.world.now)
        if self.takes:
            await self.world.until(self.world.now + self.takes)
        error = next(self._script, None)
        if error is not None:
            if isinstance(error, MarketDataError):
                error.requests = (
                    Request(
                        "bars",
                        self.request_times[-1],
                        0.1,
                        type(error).__name__.lower(),
                        500,
                        None,
                        str(error),
                    ),
                )
            raise error
        return Request("bars", self.request_times[-1], 0.1, "answered", 200, 1)


def for_ever(make: Callable[[], Exception]) -> Script:
    return (make() for _ in itertools.count())


def retry() -> Retry:
    return Retry("binance: HTTP 502, Bad gateway")


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path)


def fetch(guarded: GuardedSource) -> Coroutine[Any, Any, BarsPage]:
    return guarded.fetch(MARKET, MINUTE, WINDOW)


def outcomes(requests: Iterable[Request]) -> list[str]:
    return [request.outcome for request in requests]


# ------------------------------------------------------------ retries


def test_a_good_answer_costs_one_request_and_no_wait(world: World, ledger: Ledger) -> None:
    venue = FakeVenue(world)
    guarded = GuardedSource(venue, "binance", ledger.venues, policy=world.policy())
    (fetched,) = world.run(fetch(guarded))
    assert fetched.window == WINDOW
    assert fetched.rows.height == 1
    assert (outcomes(fetched.requests), fetched.wait_seconds, world.slept) == (
        ["answered"],
        0.0,
        [],
    )
    assert guarded.traits(MARKET) == (123, ("open",), True)
    world.run(guarded.close())
    assert venue.closed


def test_retries_back_off_exponentially(world: World, ledger: Ledger) -> None:
    """0.5, 1, 2, 4, 8 seconds at full jitter; then the sixth answer is good, and the page has all
    six requests.
    """
    venue = FakeVenue(world, [retry(), Garbled("binance: text"), retry(), retry(), retry()])
    (fetched,) = world.run(
        fetch(GuardedSource(venue, "binance", ledger.venues, policy=world.policy()))
    )
    assert world.slept == [0.5, 1.0, 2.0, 4.0, 8.0]
    assert [moment - NOON for moment in venue.request_times] == [0, 0.5, 1.5, 3.5, 7.5, 15.5]
    assert outcomes(fetched.requests) == ["retry", "garbled", "retry", "retry", "retry", "answered"]


def test_backoff_is_capped_and_jittered(world: World, ledger: Ledger) -> None:
    """A cap of 3 s at jitter 1, and of half of that at jitter 0.5."""
    for jitter, expected in (
        (1.0, [0.5, 1.0, 2.0, 3.0, 3.0]),
        (0.5, [0.25, 0.5, 1.0, 1.5, 1.5]),
        (0.0, [0.0] * 5),
    ):
        world.slept.clear()
        venue = FakeVenue(world, [retry() for _ in range(5)])
        policy = world.policy(jitter, backoff_cap=3.0)
        world.run(fetch(GuardedSource(venue, "binance", ledger.venues, policy=policy)))
        assert world.slept == expected


def test_jitter_is_full_by_default() -> None:
    """Uniform below the exponential delay: two clients that failed together do not come back
    together.
    """
    policy = RetryPolicy()
    delays = [policy.pauses.pause(4) for _ in range(400)]
    assert 0 <= min(delays) < 0.5
    assert 3.5 < max(delays) <= 4.0
    assert len(set(delays)) > 390
    assert max(policy.pauses.pause(40) for _ in range(400)) <= policy.backoff_cap == 20.0


def test_six_failures_end_a_call_with_the_last_reason(world: World, ledger: Ledger) -> None:
    """The error has the last reason and every request, and no pause follows the last attempt."""
    venue = FakeVenue(world, for_ever(retry))
    (error,) = world.run(
        fetch(GuardedSource(venue, "binance", ledger.venues, policy=world.policy()))
    )
    assert type(error) is VenueDown
    assert error.exit_code == 3
    assert "502" in str(error)
    assert "6" in str(error)
    assert len(venue.request_times) == 6
    assert outcomes(error.requests) == ["retry"] * 6
    assert len(world.slept) == 5


@pytest.mark.parametrize(
    "final", [VenueRefused("binance: Invalid symbol."), BadInput("no such symbol")]
)
def test_a_final_no_is_not_requested_again(
    world: World, ledger: Ledger, final: MarketDataError
) -> None:
    """Neither at once, nor after earlier retries; the error has the requests so far."""
    venue = FakeVenue(world, [retry(), final])
    (error,) = world.run(
        fetch(GuardedSource(venue, "binance", ledger.venues, policy=world.policy()))
    )
    assert error is final
    assert len(venue.request_times) == 2
    assert outcomes(error.requests) == ["retry", type(final).__name__.lower()]


def test_a_bug_is_not_retried(world: World, ledger: Ledger) -> None:
    """Only errors of our tree are the venue's; all others come up as they are."""
    venue = FakeVenue(world, [ZeroDivisionError()])
    (error,) = world.run(
        fetch(GuardedSource(venue, "binance", ledger.venues, policy=world.policy()))
    )
    assert type(error) is ZeroDivisionError
    assert len(venue.request_times) == 1


def test_clock_and_listing_are_guarded_too(world: World, ledger: Ledger) -> None:
    venue = FakeVenue(world, [retry(), None, Wait("binance: slow down", 7)])
    guarded = GuardedSource(venue, "binance", ledger.venues, policy=world.policy())
    assert world.run(guarded.now(MARKET)) == [START]
    assert world.run(guarded.first_open(MARKET, MINUTE)) == [START]
    assert [moment - NOON for moment in venue.request_times] == [0, 0.5, 0.5, 7.5]


# ------------------------------------------------------------ waits and pauses


def test_retry_after_is_obeyed(world: World, ledger: Ledger) -> None:
    """No request is sent before the time is up; a wait is no failure, however often it comes."""
    pauses = [2.0, 30.0, 1.0, 5.0, 60.0, 3.0, 2.5, 1.0, 1.0, 4.0]
    venue = FakeVenue(world, [Wait("binance: HTTP 429", seconds) for seconds in pauses])
    (fetched,) = world.run(
        fetch(GuardedSource(venue, "binance", ledger.venues, policy=world.policy()))
    )
    gaps = [later - sooner for sooner, later in itertools.pairwise(venue.request_times)]
    assert all(gap >= pause for gap, pause in zip(gaps, pauses, strict=True))
    assert fetched.wait_seconds == sum(pauses) == world.now - NOON
    assert outcomes(fetched.requests) == ["wait"] * 10 + ["answered"]


def test_a_pause_holds_for_all_who_share_the_ledger(world: World, tmp_path: Path) -> None:
    """Eight requests of two instances in flight: after the first 429 none is sent before the time
    is up.
    """
    first, second = (FakeVenue(world, takes=0.2) for _ in range(2))
    first._script = iter([Wait("binance: HTTP 429", 45.0)])
    guards = [
        GuardedSource(venue, "binance", Ledger(tmp_path).venues, policy=world.policy())
        for venue in (first, second)
    ]

    async def visitor(guarded: GuardedSource, begin: float) -> BarsPage:
        await world.until(begin)
        return await fetch(guarded)

    found = world.run(*(visitor(guarded, NOON + 0.15 * i) for i in range(4) for guarded in guards))
    answered = NOON + 0.2
    assert all(isinstance(answer, BarsPage) for answer in found)
    assert not [
        moment
        for moment in first.request_times + second.request_times
        if answered < moment < answered + 45.0
    ]
    assert (
        sum(moment >= answered + 45.0 for moment in first.request_times + second.request_times) == 5
    )


def test_a_pause_belongs_to_its_venue(world: World, ledger: Ledger) -> None:
    ledger.venues.pause("binance", NOON + 600)
    venue = FakeVenue(world)
    world.run(fetch(GuardedSource(venue, "kraken", ledger.venues, policy=world.policy())))
    assert venue.request_times == [NOON]


def test_a_shorter_pause_does_not_end_a_longer_one(world: World, ledger: Ledger) -> None:
    ledger.venues.pause("binance", NOON + 600)
    ledger.venues.pause("binance", NOON + 5)
    venue = FakeVenue(world)
    world.run(fetch(GuardedSource(venue, "binance", ledger.venues, policy=world.policy())))
    assert venue.request_times == [NOON + 600]


def test_a_ban_longer_than_the_longest_wait_is_venue_down(world: World, ledger: Ledger) -> None:
    """The error has the moment it ends, for this call and for later ones; none of them sends a
    request.
    """
    venue = FakeVenue(world, [Wait("binance: HTTP 418", 7200)])
    guarded = GuardedSource(venue, "binance", ledger.venues, policy=world.policy())
    for _ in range(3):
        (error,) = world.run(fetch(guarded))
        assert type(error) is VenueDown
        assert "2024-03-01T14:00:00Z" in str(error)
    assert venue.request_times == [NOON]
    assert world.now == NOON


def test_a_ban_keeps_the_requests_that_led_to_it(world: World, ledger: Ledger) -> None:
    """The 503 and the 418 belong in the fetch log."""
    venue = FakeVenue(world, [retry(), Wait("binance: HTTP 418", 7200)])
    (error,) = world.run(
        fetch(GuardedSource(venue, "binance", ledger.venues, policy=world.policy()))
    )
    assert type(error) is VenueDown
    assert outcomes(error.requests) == ["retry", "wait"]


@pytest.mark.parametrize("seconds", [0.0, 0.5, 1.0, 100.0])
def test_a_venue_that_demands_waits_for_ever_is_given_up(
    world: World, ledger: Ledger, seconds: float
) -> None:
    """`longest_wait` bounds the waits of one request in all, and a Retry-After of 0 does not cause
    a flood of requests.
    """
    venue = FakeVenue(world, for_ever(lambda: Wait("binance: HTTP 429", seconds)))
    (error,) = world.run(
        fetch(GuardedSource(venue, "binance", ledger.venues, policy=world.policy(longest_wait=900)))
    )
    assert type(error) is VenueDown
    assert "429" in str(error)
    assert world.now - NOON <= 1000
    assert len(venue.request_times) <= 100


@pytest.mark.parametrize("seconds", [1e12, float("inf")])
def test_an_absurd_retry_after_is_an_error_of_ours(
    world: World, ledger: Ledger, seconds: float
) -> None:
    """One mad header must not stop a venue for good."""
    venue = FakeVenue(world, [Wait("binance: HTTP 429", seconds)])
    guarded = GuardedSource(venue, "binance", ledger.venues, policy=world.policy())
    (error,) = world.run(fetch(guarded))
    assert type(error) is VenueDown
    world.now += 7 * 86400
    assert isinstance(world.run(fetch(guarded))[0], BarsPage)


# ------------------------------------------------------------ weights


class WeighedVenue(FakeVenue):
    """Binance's count: `weight` a request, so much allowed in each of its minutes, 429 beyond.
    `meter` is shared.
    """

    def __init__(self, world: World, limit: int, weight: int, meter: dict[int, int]) -> None:
        super().__init__(world, takes=0.05)
        self.weight_limit, self.weight, self.meter = limit, weight, meter
        self.refused = 0

    async def _answer(self) -> Request:
        minute = int(self.world.now // 60)
        self.meter[minute] = used = self.meter.get(minute, 0) + self.weight
        await self.world.until(self.world.now + self.takes)
        self.used_weight = used
        if used > self.weight_limit:
            self.refused += 1
            raise Wait("binance: HTTP 429", 60 - self.world.now % 60)
        return Request("bars", self.world.now, 0.05, "answered", 200, 1)


def test_the_weight_limit_is_never_reached(world: World, tmp_path: Path) -> None:
    """Two instances, eight requests in flight each, as fast as they can: no 429, and the budget is
    well used.
    """
    meter: dict[int, int] = {}
    venues = [WeighedVenue(world, 1200, 2, meter) for _ in range(2)]
    guards = [
        GuardedSource(venue, "binance", Ledger(tmp_path).venues, policy=world.policy())
        for venue in venues
    ]

    async def worker(guarded: GuardedSource) -> None:
        for _ in range(100):
            await fetch(guarded)

    world.run(*(worker(guarded) for guarded in guards for _ in range(8)))
    assert sum(meter.values()) == 2 * 16 * 100
    assert [venue.refused for venue in venues] == [0, 0]
    assert max(meter.values()) <= 1200
    assert sorted(meter.values())[-2] > 1000


@pytest.mark.parametrize(("used", "paused"), [(5600, False), (5900, True), (6000, True)])
def test_a_nearly_used_up_minute_is_left_alone(
    world: World, ledger: Ledger, used: int, paused: bool
) -> None:
    """At 12:00:20 the next request waits for 12:01 when little weight is left, and is sent at once
    otherwise.
    """
    world.now = NOON + 20
    venue = FakeVenue(world)
    venue.weight_limit, venue.used_weight = 6000, used
    guarded = GuardedSource(venue, "binance", ledger.venues, policy=world.policy())
    world.run(fetch(guarded))
    world.run(fetch(guarded))
    assert (venue.request_times[1] >= NOON + 60) is paused
    assert venue.request_times[1] in (NOON + 20, pytest.approx(NOON + 60, abs=2))


# ------------------------------------------------------------ the circuit breaker


def broken(world: World, ledger: Ledger, script: Script = ()) -> tuple[FakeVenue, GuardedSource]:
    """A guard whose venue has just failed often enough; the script has its further answers."""
    venue = FakeVenue(world, itertools.chain((retry() for _ in range(BREAKER_LIMIT)), script))
    guarded = GuardedSource(venue, "binance", ledger.venues, policy=world.policy(0.0))
    for _ in range(BREAKER_LIMIT // 6):
        world.run(fetch(guarded))
    assert len(venue.request_times) == BREAKER_LIMIT == 30
    venue.request_times.clear()
    return venue, guarded


def test_the_breaker_fails_fast(world: World, tmp_path: Path) -> None:
    """After 30 failures in a row no instance sends a request, and the error says until when."""
    venue, guarded = broken(world, Ledger(tmp_path))
    other = FakeVenue(world)
    second = GuardedSource(other, "binance", Ledger(tmp_path).venues, policy=world.policy())
    for error in world.run(
        fetch(guarded), fetch(second), guarded.now(MARKET), second.first_open(MARKET, MINUTE)
    ):
        assert type(error) is VenueDown
        assert "2024-03-01T12:00:30Z" in str(error)
    assert venue.request_times == other.request_times == []
    third = FakeVenue(world)
    world.run(fetch(GuardedSource(third, "kraken", Ledger(tmp_path).venues, policy=world.policy())))
    assert third.request_times == [NOON]


def test_a_success_starts_the_count_anew(world: World, ledger: Ledger) -> None:
    """29 failures, one success, 29 failures: still closed."""
    run = [retry() for _ in range(29)]
    venue = FakeVenue(world, [*run, None, *run, None])
    guarded = GuardedSource(venue, "binance", ledger.venues, policy=world.policy(0.0, attempts=100))
    assert all(
        isinstance(fetched, BarsPage)
        for fetched in world.run(fetch(guarded)) + world.run(fetch(guarded))
    )
    assert len(venue.request_times) == 60


def test_the_breaker_stops_retries_that_are_under_way(world: World, ledger: Ledger) -> None:
    """Eight at once against a dead venue: about 30 requests in all and not 48."""
    venue = FakeVenue(world, for_ever(retry), takes=0.1)
    guarded = GuardedSource(venue, "binance", ledger.venues, policy=world.policy(0.0))
    found = world.run(*(fetch(guarded) for _ in range(8)))
    assert all(type(error) is VenueDown for error in found)
    assert 30 <= len(venue.request_times) < 30 + 8


def test_calls_that_the_breaker_stops_have_their_reason(world: World, ledger: Ledger) -> None:
    """The failed requests belong in the fetch log, and the reason in the error a person reads."""
    venue = FakeVenue(world, for_ever(retry), takes=0.1)
    guarded = GuardedSource(venue, "binance", ledger.venues, policy=world.policy(0.0))
    found = world.run(*(fetch(guarded) for _ in range(8)))
    assert sum(len(error.requests) for error in found) == len(venue.request_times)
    assert all("502" in str(error) for error in found)


def test_half_open_lets_one_through_and_its_success_closes(world: World, ledger: Ledger) -> None:
    """Of four callers after 30 s one may try; once it succeeded, all may."""
    venue, guarded = broken(world, ledger)
    venue.takes = 1.0
    world.now = NOON + BREAKER_FIRST - 0.1
    assert type(world.run(fetch(guarded))[0]) is VenueDown
    assert venue.request_times == []
    world.now = NOON + BREAKER_FIRST + 0.1
    found = world.run(*(fetch(guarded) for _ in range(4)))
    assert sorted(type(answer).__name__ for answer in found) == ["BarsPage"] + ["VenueDown"] * 3
    assert len(venue.request_times) == 1
    assert all(
        isinstance(fetched, BarsPage) for fetched in world.run(*(fetch(guarded) for _ in range(4)))
    )


def test_half_open_and_still_down_stays_shut(world: World, ledger: Ledger) -> None:
    """The trial request fails, is not retried against the open breaker, and the next trial is 30 s
    away.
    """
    venue, guarded = broken(world, ledger, for_ever(retry))
    world.now = NOON + BREAKER_FIRST + 1
    assert type(world.run(fetch(guarded))[0]) is VenueDown
    assert len(venue.request_times) == 1
    world.now += BREAKER_FIRST - 1
    assert type(world.run(fetch(guarded))[0]) is VenueDown
    assert len(venue.request_times) == 1


def test_the_breaker_stays_open_longer_each_time(world: World, ledger: Ledger) -> None:
    """Two hours of outage, a call every 5 s: the time between trials grows from 30 s to ten
    minutes.
    """
    venue, guarded = broken(world, ledger, for_ever(retry))
    while world.now < NOON + 7200:
        world.now += 5
        world.run(fetch(guarded))
    gaps = [later - sooner for sooner, later in itertools.pairwise(venue.request_times)]
    assert all(longer >= shorter for shorter, longer in itertools.pairwise(gaps[:6]))
    assert gaps[0] <= 2 * BREAKER_FIRST + 10
    assert max(gaps) == pytest.approx(BREAKER_LONGEST, abs=10)
    assert len(gaps) < 7200 / BREAKER_LONGEST + 8


def test_a_refusal_is_an_answer(world: World, ledger: Ledger) -> None:
    """A venue that refuses is not down: refusals open no breaker."""
    venue = FakeVenue(world, for_ever(lambda: VenueRefused("binance: Invalid symbol.")))
    guarded = GuardedSource(venue, "binance", ledger.venues, policy=world.policy())
    for _ in range(BREAKER_LIMIT + 5):
        assert type(world.run(fetch(guarded))[0]) is VenueRefused
    assert len(venue.request_times) == BREAKER_LIMIT + 5


# ------------------------------------------------------------ the limiter


def busiest(moments: Iterable[float], seconds: float) -> int:
    """The most requests in any window `[t, t + seconds)`, by the moments they were sent."""
    ordered = sorted(moments)
    ends = (
        next((j for j in range(i, len(ordered)) if ordered[j] >= t + seconds - 1e-6), len(ordered))
        for i, t in enumerate(ordered)
    )
    return max(end - i for i, end in enumerate(ends))


def crowd(
    world: World, folder: Path, per_minute: int | None, instances: int, workers: int, each: int
) -> list[FakeVenue]:
    """The venues of so many instances, after each of their workers has fetched so often."""
    venues = [FakeVenue(world, takes=0.02) for _ in range(instances)]
    guards = [
        GuardedSource(
            venue,
            "binance",
            Ledger(folder).venues,
            requests_per_minute=per_minute,
            policy=world.policy(),
        )
        for venue in venues
    ]

    async def worker(guarded: GuardedSource) -> None:
        for _ in range(each):
            await fetch(guarded)

    world.run(*(worker(guarded) for guarded in guards for _ in range(workers)))
    return venues


@pytest.mark.parametrize("per_minute", [6, 60, 600])
def test_the_limiter_holds_over_all_instances(
    world: World, tmp_path: Path, per_minute: int
) -> None:
    """Never more than `per_minute` in any 60 s, and at least as many less one."""
    venues = crowd(
        world, tmp_path, per_minute, instances=2, workers=4, each=max(4, per_minute * 3 // 8)
    )
    moments = [moment for venue in venues for moment in venue.request_times]
    assert busiest(moments, 60) <= per_minute
    assert busiest(moments, 1) <= max(1, per_minute / 60 * 2 + 1)
    minutes = (max(moments) - NOON) / 60
    assert len(moments) >= 0.99 * (per_minute - 1) * minutes
    assert all(venue.request_times for venue in venues)


def test_the_limiter_holds_after_a_pause(world: World, tmp_path: Path) -> None:
    """Requests that waited through a pause are not all sent at its end."""
    Ledger(tmp_path).venues.pause("binance", NOON + 120)
    venues = crowd(world, tmp_path, 60, instances=2, workers=8, each=10)
    moments = [moment for venue in venues for moment in venue.request_times]
    assert min(moments) >= NOON + 120
    assert busiest(moments, 1) <= 3
    assert busiest(moments, 60) <= 60


def test_without_a_limit_nobody_waits(world: World, tmp_path: Path) -> None:
    crowd(world, tmp_path, None, instances=2, workers=4, each=20)
    assert world.slept == []
    assert world.now == pytest.approx(NOON + 20 * 0.02)


def test_waits_for_the_limiter_are_counted(world: World, ledger: Ledger) -> None:
    """Ten at once at 60 a minute: the last one waited about nine seconds."""
    venue = FakeVenue(world)
    guarded = GuardedSource(
        venue, "binance", ledger.venues, requests_per_minute=60, policy=world.policy()
    )
    found = world.run(*(fetch(guarded) for _ in range(10)))
    assert [fetched.wait_seconds for fetched in found] == pytest.approx(
        [i * 60 / 59 for i in range(10)]
    )
    assert [fetched.wait_seconds for fetched in found] == pytest.approx(
        [moment - NOON for moment in venue.request_times]
    )


def test_places_are_unique_among_threads(tmp_path: Path) -> None:
    """Four threads with their own ledgers take 100 places each: all differ, one interval apart."""
    places: list[float] = []

    def take() -> None:
        ledger = Ledger(tmp_path)
        mine = [ledger.venues.reserve("binance", NOON, 60) for _ in range(100)]
        places.extend(mine)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ordered = sorted(places)
    assert ordered[0] == pytest.approx(NOON)
    assert len(ordered) == 400
    assert min(later - sooner for sooner, later in itertools.pairwise(ordered)) > 1.0


def test_facts_are_frozen(world: World, ledger: Ledger) -> None:
    """The guard adds to the facts of the source and changes none of them."""
    venue = FakeVenue(world)
    (fetched,) = world.run(
        fetch(GuardedSource(venue, "binance", ledger.venues, policy=world.policy()))
    )
    assert replace(fetched, requests=(), wait_seconds=0.0).rows.equals(
        pl.DataFrame({"open_time": [1]})
    )
    with pytest.raises(AttributeError):
        fetched.wait_seconds = 1.0

"""One contract for all venues: the same battery over each venue's own wire format."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from marketdata_assets.errors import BadInput, MarketDataError, VenueDown, VenueRefused
from marketdata_assets.flows.fetch.answers import FetchResult, FetchSpan
from marketdata_assets.flows.fetch.collect import collect
from marketdata_assets.flows.fetch.open_partition import empty_raw_bars
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.model.events import no_progress
from marketdata_assets.model.gap import GapCause, GapReason
from marketdata_assets.model.market import Market
from marketdata_assets.model.timeframe import TIMEFRAMES, Timeframe
from marketdata_assets.model.window import Window, from_ms, to_ms
from marketdata_assets.settings.universe import Settings
from marketdata_assets.sources.ccxt_rest import CcxtSource
from marketdata_assets.sources.clients import VenueClient
from marketdata_assets.sources.guards import GuardedSource
from marketdata_tests.fake_venues import VENUES, bybit, gate, okx
from marketdata_tests.fake_venues.frame import (
    DAY,
    MINUTE,
    FakeVenue,
    Refusal,
    serving_venue,
    true_bar,
)
from marketdata_tests.steps import SkippingClock

pytestmark = pytest.mark.server

ONE_MINUTE = TIMEFRAMES["1m"]
NEWEST_ONLY = {"kraken": 720, "hyperliquid": 5000, "phemex": 1000, "bithumb": 200, "gemini": 1440}
"""Venues that serve only so many bars: their day is the last one, as far as that goes."""
SERVED = {"kraken": 200, "phemex": 200, "gemini": 200, "bithumb": 70}
"""Minutes that such a venue serves where it has lost its older ones; 500 elsewhere."""
MAIN = list(VENUES)
SPOT = [name for name, venue in VENUES.items() if venue.spot]
LINEAR = [name for name, venue in VENUES.items() if venue.linear]


def real_now() -> int:
    """The real clock, which ccxt reads as well, in the middle of a minute."""
    return int(time.time() * 1000) // MINUTE * MINUTE + 30_000


def a_day(name: str, now: int) -> tuple[int, int]:
    """Return the bounds of a day that the venue still serves."""
    if name in NEWEST_ONLY:
        end = now // MINUTE * MINUTE - 30 * MINUTE
        return max(end - DAY, end - (NEWEST_ONLY[name] - 60) * MINUTE), end
    start = now // DAY * DAY - 2 * DAY
    return start, start + DAY


@dataclass
class Battery:
    """One venue behind its wire format, and the ledger of one test."""

    venue: FakeVenue
    symbol: str
    ledger: Ledger
    url: str
    clock: SkippingClock

    @property
    def market(self) -> Market:
        return Market(self.venue.name, self.symbol)

    def settings(self) -> Settings:
        entry = {"symbols": [self.symbol], "since": "2020-01-01", "base_url": self.url}
        return Settings.model_validate({"venues": {self.venue.name: entry}})

    def collect(self, start: int, end: int, timeframe: Timeframe = ONE_MINUTE) -> FetchResult:
        """Fetch what opens in `[start, end)` through the guarded source, as an ingest does."""
        settings = self.settings()
        span = FetchSpan(
            self.market,
            timeframe,
            Window(from_ms(start), from_ms(end)),
            empty_raw_bars(),
            (),
        )

        async def visit() -> FetchResult:
            source = GuardedSource(
                CcxtSource(settings.venues[self.venue.name]),
                self.venue.name,
                self.ledger.venues,
                policy=self.clock.policy(),
            )
            try:
                client = VenueClient(source, no_progress)
                return await collect(settings, self.ledger, client, span=span)
            finally:
                await source.close()

        return asyncio.run(visit())


@pytest.fixture
def battery(tmp_path: Path) -> Iterator[Callable[..., Battery]]:
    """Yield `start(name, symbol="main", **truth)`, which serves a venue on loopback."""
    with ExitStack() as servers:

        def start(name: str, symbol: str = "main", skew: int = 0, **truth: Any) -> Battery:
            venue = VENUES[name](now=real_now() + skew, **truth)
            url = servers.enter_context(serving_venue(venue))
            wanted = venue.linear if symbol == "linear" else venue.spot or venue.linear
            assert wanted
            ledger = Ledger(tmp_path)
            return Battery(venue, wanted, ledger, url, SkippingClock())

        yield start


def assert_true(
    bars: pl.DataFrame,
    start: int,
    end: int,
    silent: frozenset[int] = frozenset(),
    *,
    width: int = MINUTE,
) -> None:
    """Every closed bar of the span, exactly as the truth has it, and no other."""
    expected = [true_bar(t, width=width) for t in range(start, end, width) if t not in silent]
    assert bars["open_time"].to_list() == [from_ms(bar.t) for bar in expected]
    for column, values in {
        "open": [bar.o for bar in expected],
        "high": [bar.h for bar in expected],
        "low": [bar.l for bar in expected],
        "close": [bar.c for bar in expected],
        "volume": [bar.v for bar in expected],
    }.items():
        assert bars[column].to_list() == values, column
    given = bars["quote_volume"].drop_nulls()
    assert given.len() in (0, len(expected))
    assert given.to_list() in ([], [bar.quote for bar in expected])


@pytest.mark.parametrize("name", SPOT)
def test_a_day_of_spot(battery: Callable[..., Battery], name: str) -> None:
    tried = battery(name)
    start, end = a_day(name, tried.venue.now)
    result = tried.collect(start, end)
    assert_true(result.bars, start, end)
    assert result.gaps == ()
    assert result.rejected.is_empty()


@pytest.mark.parametrize("name", LINEAR)
def test_a_day_of_a_perpetual(battery: Callable[..., Battery], name: str) -> None:
    """Its volume is in base currency, whatever the venue counts."""
    tried = battery(name, "linear")
    start, end = a_day(name, tried.venue.now)
    result = tried.collect(start, end)
    assert_true(result.bars, start, end)
    assert result.gaps == ()


@pytest.mark.parametrize("name", ["binance", "upbit"])
def test_twenty_minutes_of_seconds(battery: Callable[..., Battery], name: str) -> None:
    tried = battery(name)
    start = tried.venue.now // DAY * DAY - DAY
    end = start + 20 * MINUTE
    result = tried.collect(start, end, TIMEFRAMES["1s"])
    assert_true(result.bars, start, end, width=1000)
    assert result.gaps == ()


def test_a_timeframe_that_the_venue_lacks_is_refused(battery: Callable[..., Battery]) -> None:
    tried = battery("gate")
    start, end = a_day("gate", tried.venue.now)
    with pytest.raises(BadInput, match="gate has no 3m bars; it has 1m 5m 15m 30m 1h 2h 4h"):
        tried.collect(start, end, TIMEFRAMES["3m"])


def test_bars_of_another_length_under_the_same_name_are_refused(
    battery: Callable[..., Battery],
) -> None:
    """ccxt's 1w of Bitstamp are three days, and a venue may err: minutes for hours."""
    tried = battery("bitstamp")
    start, end = a_day("bitstamp", tried.venue.now)
    with pytest.raises(BadInput, match="1w bars are not fetched: they are three days long"):
        tried.collect(start - 30 * DAY, end, TIMEFRAMES["1w"])
    with pytest.raises(VenueDown, match="not 1h bars: they are 0:01:00 apart"):
        tried.collect(start, end, TIMEFRAMES["1h"])


# ------------------------------------------------------------ how answers are cut and ordered


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("truth", [{"reverse": True}, {"page": 97}, {"overlap": 1}])
def test_order_length_and_borders_of_a_page_do_not_matter(
    battery: Callable[..., Battery], name: str, truth: dict[str, Any]
) -> None:
    tried = battery(name, **truth)
    start, end = a_day(name, tried.venue.now)
    if name in SERVED:
        start = end - 60 * MINUTE  # the newest page is all that it ever sends
    result = tried.collect(start, end)
    assert_true(result.bars, start, end)
    assert result.gaps == ()


@pytest.mark.parametrize("name", MAIN)
def test_minutes_without_trades_are_gaps_that_two_answers_confirm(
    battery: Callable[..., Battery], name: str
) -> None:
    now = real_now()
    start, end = a_day(name, now)
    middle = start + (end - start) // MINUTE // 2 * MINUTE
    silent = frozenset([middle, middle + MINUTE, middle + 7 * MINUTE])
    result = battery(name, silent=silent).collect(start, end)
    assert_true(result.bars, start, end, silent)
    assert [(gap.window, gap.reason) for gap in result.gaps] == [
        (Window(from_ms(middle), from_ms(middle + 2 * MINUTE)), GapReason.NO_BARS),
        (Window(from_ms(middle + 7 * MINUTE), from_ms(middle + 8 * MINUTE)), GapReason.NO_BARS),
    ]


# ------------------------------------------------------------ where a market begins and ends


@pytest.mark.parametrize("name", MAIN)
def test_what_lies_before_the_listing_is_not_listed(
    battery: Callable[..., Battery], name: str
) -> None:
    now = real_now()
    start, end = a_day(name, now)
    listed = start + (end - start) // MINUTE // 2 * MINUTE
    tried = battery(name, listed=listed)
    result = tried.collect(start, end)
    assert_true(result.bars, listed, end)
    assert [(gap.window, gap.kind, bool(gap.next_request)) for gap in result.gaps] == [
        (Window(from_ms(start), from_ms(listed)), GapCause.NOT_LISTED, True)
    ]
    assert tried.ledger.markets.first_bar(tried.market) == from_ms(listed)


@pytest.mark.parametrize("horizon", ["empty", "later", "refused"])
@pytest.mark.parametrize("name", [name for name in MAIN if not VENUES[name].counts_rows])
def test_what_lies_beyond_the_horizon_is_not_served(
    battery: Callable[..., Battery], name: str, horizon: str
) -> None:
    """Told by empty answers, by later bars or by an error; the market was listed long before."""
    if horizon != "empty" and not VENUES[name].has_start:
        pytest.skip("it does not know from when on bars are wanted")
    now = real_now()
    start, end = a_day(name, now)
    oldest = end - SERVED.get(name, 500) * MINUTE
    tried = battery(name, serves_from=oldest, horizon=horizon)
    result = tried.collect(start, end)
    assert_true(result.bars, oldest, end)
    assert [(gap.window, gap.reason) for gap in result.gaps] == [
        (Window(from_ms(start), from_ms(oldest)), GapReason.NOT_SERVED)
    ]
    assert tried.ledger.markets.first_bar(tried.market) is None


@pytest.mark.parametrize("name", MAIN)
def test_a_market_that_is_gone_leaves_what_is_missing_unanswered(
    battery: Callable[..., Battery], name: str
) -> None:
    tried = battery(name)
    start, end = a_day(name, tried.venue.now)
    tried.venue.is_gone = True
    with pytest.raises(MarketDataError) as error:
        tried.collect(start, end)
    assert str(error.value).startswith(name)


# ------------------------------------------------------------ which bars are closed


@pytest.mark.parametrize("skew", [-300_000, 0, 300_000])
@pytest.mark.parametrize("name", MAIN)
def test_only_bars_that_the_venues_clock_closed_are_stored(
    battery: Callable[..., Battery], name: str, skew: int
) -> None:
    tried = battery(name, skew=skew)
    end = tried.venue.now // MINUTE * MINUTE
    start = end - 60 * MINUTE
    ours = real_now() // MINUTE * MINUTE
    result = tried.collect(start, ours)
    assert_true(result.bars, start, min(end, ours))
    assert result.gaps == ()


# ------------------------------------------------------------ refusals that pass


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (200, "<html><body>We are down for maintenance.</body></html>", "not JSON"),
        (202, "<html><body>Checking your browser</body></html>", "not JSON"),
        (403, "<html><body>Request blocked. CloudFront</body></html>", "HTTP 403"),
        (403, {"code": 0, "msg": "service unavailable in your country"}, "HTTP 403"),
        (451, {"msg": "restricted location"}, "HTTP 451"),
        (503, "<html><body>Just a moment... Cloudflare</body></html>", "HTTP 503"),
    ],
)
@pytest.mark.parametrize("name", MAIN)
def test_a_refusal_that_passes_is_no_final_one(
    battery: Callable[..., Battery], name: str, status: int, body: Any, reason: str
) -> None:
    """It is tried again, and in the end the venue counts as down for that reason."""
    tried = battery(name, fault=lambda _: Refusal(status, body))
    start, end = a_day(name, tried.venue.now)
    with pytest.raises(VenueDown, match=reason):
        tried.collect(start, end)
    tried.venue.fault = lambda _: None
    assert_true(tried.collect(start, end).bars, start, end)


@pytest.mark.parametrize("headers", [{}, {"Retry-After": "7"}])
@pytest.mark.parametrize("name", MAIN)
def test_a_limit_is_waited_for(
    battery: Callable[..., Battery], name: str, headers: dict[str, str]
) -> None:
    refusal = Refusal(429, {"msg": "Too many requests"}, headers)
    tried = battery(name, fault=lambda number: refusal if number == 0 else None)
    start, end = a_day(name, tried.venue.now)
    began = tried.clock.now
    assert_true(tried.collect(start, end).bars, start, end)
    assert tried.clock.now - began >= (7 if headers else 1)


# ------------------------------------------------------------ answers that are odd
ODD = ["bybit", "okx", "kucoin", "gate", "htx", "bitget"]
"""Venues of different pages, orders and units; the code that is tried is the same for all."""


@pytest.mark.parametrize("name", ODD)
def test_a_page_that_becomes_shorter_on_the_way(battery: Callable[..., Battery], name: str) -> None:
    tried = battery(name)

    def shorten(number: int) -> None:
        tried.venue.page = 61 if number > 1 else None

    tried.venue.fault = shorten
    start, end = a_day(name, tried.venue.now)
    result = tried.collect(start - DAY, end)
    assert_true(result.bars, start - DAY, end)
    assert result.gaps == ()


@pytest.mark.parametrize("name", ODD)
def test_one_answer_about_another_market_is_outvoted(
    battery: Callable[..., Battery], name: str
) -> None:
    """Right in every shape and rule; its neighbors contradict it."""
    tried = battery(name, strangers=frozenset([1]))
    start, end = a_day(name, tried.venue.now)
    result = tried.collect(start - 2 * DAY, end)
    assert_true(result.bars, start - 2 * DAY, end)
    assert result.rejected.height > 0


@pytest.mark.parametrize("name", ODD)
def test_a_venue_that_sends_one_page_for_ever_is_not_believed(
    battery: Callable[..., Battery], name: str
) -> None:
    """What it sends is stored, and nothing is said of the rest."""
    tried = battery(name, is_stuck=True)
    start, end = a_day(name, tried.venue.now)
    result = tried.collect(start - DAY, end)
    stored = result.bars.height
    assert stored < 2 * DAY // MINUTE
    opens = {
        to_ms(opened): close for opened, close in result.bars.select("open_time", "close").rows()
    }
    assert all(true_bar(t).c == close for t, close in opens.items())
    reasons = {gap.reason for gap in result.gaps}
    assert GapReason.NO_BARS not in reasons
    assert len(tried.venue.requests) < 150


def test_a_contract_size_that_changes_is_noticed(
    battery: Callable[..., Battery], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The price proves it, as Gate sends quote volumes as well; nothing of it is stored."""
    tried = battery("gate", "linear")
    start, end = a_day("gate", tried.venue.now)
    assert_true(tried.collect(start, end).bars, start, end)
    monkeypatch.setitem(gate.CONTRACT, "quanto_multiplier", "0.001")
    with pytest.raises(VenueRefused, match="do not count its base currency"):
        tried.collect(start, end)


@pytest.mark.parametrize("name", ["bybit", "okx"])
def test_a_listing_moment_in_the_future_hides_no_bar(
    battery: Callable[..., Battery], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was delivered counts, whatever the venue's list says."""
    later = str(real_now() + 40 * DAY)
    monkeypatch.setitem(okx.SPOT, "listTime", later)
    monkeypatch.setitem(bybit.LINEAR, "launchTime", later)
    tried = battery(name, "main" if name == "okx" else "linear")
    start, end = a_day(name, tried.venue.now)
    result = tried.collect(start, end)
    assert_true(result.bars, start, end)
    assert result.gaps == ()

"""The sandbox exchange: its synthetic markets keep their promises, and its wire is Binance's."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import urllib.error
import urllib.request
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import cache
from itertools import groupby, pairwise
from typing import Any, NamedTuple
from urllib.parse import urlencode

import pytest
from aiohttp import web

from marketdata_assets.errors import BadInput
from marketdata_assets.model.bar import BAR_COLUMNS, BAR_SCHEMA
from marketdata_assets.model.window import Window
from marketdata_assets.sources.sandbox.bars import INTERVALS, generate_bars, generate_klines
from marketdata_assets.sources.sandbox.listings import LISTINGS
from marketdata_assets.sources.sandbox.server import (
    LOG_SIZE,
    SandboxExchange,
    serve_in_thread,
    serve_until_interrupted,
)

pytestmark = pytest.mark.server

Row = list[Any]
MINUTE, DAY = 60_000, 86_400_000


def ms(text: str) -> int:
    """Milliseconds of an ISO time in UTC."""
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() * 1000)


NOW = ms("2024-03-20T12:34:45.678")
LATER = ms("2025-01-01T00:00")
MONDAY = ms("2024-03-04")


def pages(symbol: str, start: int, end: int, interval: str = "1m", now: int = LATER) -> list[Row]:
    """Every bar that opens in `[start, end)`, page after page as a client requests them."""
    rows: list[Row] = []
    while page := generate_klines(symbol, interval, start, end=end - 1, limit=1000, now=now):
        assert page[-1][0] >= start
        rows += page
        start = page[-1][0] + 1
    return rows


@cache
def two_weeks(symbol: str) -> list[Row]:
    """The minutes of two weeks from Monday, with a halt among them."""
    return pages(symbol, MONDAY, MONDAY + 14 * DAY)


def merge_rows(rows: list[Row], open_time: int, width: int) -> Row:
    """One coarse row from its 1m rows, by plain decimals."""
    column = list(zip(*rows, strict=True))
    total = {i: f"{sum(map(Decimal, column[i])):.8f}" for i in (5, 7, 9, 10)}
    high, low = max(column[2], key=Decimal), min(column[3], key=Decimal)
    close_time = open_time + width - 1
    return [
        *(open_time, rows[0][1], high, low, rows[-1][4], total[5]),
        *(close_time, total[7], sum(column[8]), total[9], total[10], "0"),
    ]


def runs(times: Iterable[int]) -> list[list[int]]:
    """Consecutive minutes, grouped."""
    numbered = groupby(enumerate(sorted(times)), key=lambda pair: pair[1] - pair[0] * MINUTE)
    return [[time for _, time in run] for _, run in numbered]


class Answer(NamedTuple):
    """What came over the wire."""

    status: int
    body: Any
    headers: dict[str, str]


def get(url: str, path: str, **query: object) -> Answer:
    """One GET, whatever the status."""
    try:
        with urllib.request.urlopen(f"{url}{path}?{urlencode(query)}", timeout=10) as answer:
            return Answer(answer.status, json.loads(answer.read()), dict(answer.headers))
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, json.loads(error.read()), dict(error.headers))


def get_klines(url: str, **query: object) -> Answer:
    """GET klines, of BTCUSDT at 1m unless the query names others."""
    return get(url, "/api/v3/klines", **{"symbol": "BTCUSDT", "interval": "1m", **query})


# ------------------------------------------------------------ bars


def test_the_data_never_changes() -> None:
    """Pinned rows: a change of the generator would silently change what others compare against."""
    assert generate_klines("BTCUSDT", "1m", ms("2024-03-01"), end=LATER, limit=1, now=LATER) == [
        [
            1709251200000,
            "55688.73000000",
            "55692.06000000",
            "55644.54000000",
            "55677.86000000",
            "19.87427000",
            1709251259999,
            "1106728.36245510",
            1491,
            "14.86688000",
            "827884.38303480",
            "0",
        ]
    ]
    assert generate_klines("SHIBUSDT", "1w", ms("2024-03-04"), end=LATER, limit=1, now=LATER) == [
        [
            1709510400000,
            "0.00000955",
            "0.00000965",
            "0.00000921",
            "0.00000923",
            "500990962073.00000000",
            1710115199999,
            "4747157.08447400",
            606207,
            "250756215755.00000000",
            "2375973.10022135",
            "0",
        ]
    ]


@pytest.mark.parametrize("symbol", LISTINGS)
def test_a_minute_does_not_depend_on_the_range(symbol: str) -> None:
    """Long, short, shifted, backward and midnight-crossing pages agree row by row."""
    start, end = ms("2024-03-07T20:00"), ms("2024-03-08T08:00")
    rows = {row[0]: row for row in pages(symbol, start, end)}
    assert len(rows) > 600
    for offset, limit in ((0, 1), (1, 7), (333, 61), (700, 1000), (239, 2)):
        page = generate_klines(
            symbol, "1m", start + offset * MINUTE, end=end - 1, limit=limit, now=LATER
        )
        assert (
            page == [row for time, row in rows.items() if time >= start + offset * MINUTE][:limit]
        )
    for limit in (1, 2, 100, 500):
        assert (
            generate_klines(symbol, "1m", None, end=end - 1, limit=limit, now=LATER)
            == list(rows.values())[-limit:]
        )


@pytest.mark.parametrize("symbol", LISTINGS)
def test_every_minute_is_possible(symbol: str) -> None:
    """Order of prices, room for the quote amounts, ticks and steps: checked with decimals on the
    wire's own text.
    """
    listing = LISTINGS[symbol]
    tick, step = Decimal(1).scaleb(-listing.tick), Decimal(1).scaleb(-listing.step)
    for row in pages(symbol, ms("2024-03-06"), ms("2024-03-10")):
        assert [type(value) for value in row] == [int, *[str] * 5, int, str, int, str, str, str]
        assert all(re.fullmatch(r"[0-9]+\.[0-9]{8}", row[i]) for i in (1, 2, 3, 4, 5, 7, 9, 10))
        opened, high, low, close, volume, _, quote, _, taken, taken_quote, _ = map(Decimal, row[1:])
        assert 0 < low <= min(opened, close) <= max(opened, close) <= high
        assert low * volume <= quote <= high * volume
        assert low * taken <= taken_quote <= high * taken
        assert 0 <= taken <= volume
        assert 0 <= taken_quote <= quote
        assert not any(price % tick for price in (opened, high, low, close))
        assert not volume % step
        assert not taken % step
        assert (volume == 0) == (row[8] == 0)
        assert row[8] <= volume / step
        assert row[0] % MINUTE == 0
        assert row[6] == row[0] + MINUTE - 1
        assert row[11] == "0"


def test_prices_are_continuous_and_move() -> None:
    """A minute opens where the one before closed; over years a market moves by tens of percent."""
    rows = pages("BTCUSDT", ms("2024-03-01"), ms("2024-03-03"))
    assert all(
        after[1] == before[4] for before, after in pairwise(rows) if after[0] - before[0] == MINUTE
    )
    assert len({row[4] for row in rows}) > 2000
    weekly = [
        Decimal(row[4])
        for row in generate_klines("BTCUSDT", "1w", 0, end=LATER, limit=1000, now=LATER)
    ]
    assert max(weekly) > Decimal("1.5") * min(weekly)


@pytest.mark.parametrize("interval", [name for name in INTERVALS if name not in ("1m", "3d")])
@pytest.mark.parametrize("symbol", ["ADAUSDT", "SHIBUSDT"])
def test_coarse_bars_are_the_sum_of_their_minutes(symbol: str, interval: str) -> None:
    """Against plain Python over two weeks with a halt; and no bar where no minute is."""
    start, width = MONDAY, INTERVALS[interval] * MINUTE
    grouped = groupby(two_weeks(symbol), key=lambda row: start + (row[0] - start) // width * width)
    expected = [merge_rows(list(rows), time, width) for time, rows in grouped]
    assert pages(symbol, start, start + 14 * DAY, interval) == expected
    assert len(expected) == 14 * DAY // width - {
        "3m": 26,
        "5m": 16,
        "15m": 5,
        "30m": 2,
        "1h": 1,
    }.get(interval, 0)


def test_weeks_open_on_monday_and_the_first_may_be_short() -> None:
    """SHIB is listed on Monday 2021-05-10 at 11:30, BTC on Wednesday 2020-01-01."""
    first = generate_klines("SHIBUSDT", "1w", 0, end=LATER, limit=1, now=LATER)[0]
    assert first == merge_rows(pages("SHIBUSDT", 0, ms("2021-05-17")), ms("2021-05-10"), 7 * DAY)
    assert generate_klines("SHIBUSDT", "1m", 0, end=LATER, limit=1, now=LATER)[0][0] == ms(
        "2021-05-10T11:30"
    )
    assert generate_klines("BTCUSDT", "1w", 0, end=LATER, limit=1, now=LATER)[0][0] == ms(
        "2019-12-30"
    )
    assert generate_klines("BTCUSDT", "1m", 0, end=ms("2020-01-01") - 1, limit=10, now=LATER) == []


def test_halts_are_shared_and_gaps_are_not() -> None:
    """One halt of 80 minutes on the 8th for all; besides, each symbol misses a few minutes of its
    own.
    """
    month = Window(datetime(2024, 3, 1, tzinfo=UTC), datetime(2024, 4, 1, tzinfo=UTC))
    every = set(range(ms("2024-03-01"), ms("2024-04-01"), MINUTE))
    missing = {
        symbol: every
        - set(generate_bars(symbol, "1m", month)["open_time"].dt.epoch("ms").to_list())
        for symbol in LISTINGS
    }
    halt = set(range(ms("2024-03-08T02:00"), ms("2024-03-08T03:20"), MINUTE))
    assert set.intersection(*missing.values()) == halt
    gaps = {symbol: runs(times - halt) for symbol, times in missing.items()}
    assert all(len(run) <= 4 for found in gaps.values() for run in found)
    assert sum(map(len, gaps.values())) >= 6
    assert max(map(len, gaps.values())) <= 8


def test_quiet_stretches_are_flat() -> None:
    """A minute without volume stands at the last price, even where a page begins in the middle of
    the stretch.
    """
    rows = pages("SHIBUSDT", ms("2024-03-09"), ms("2024-03-23"))
    no_trade = [row for row in rows if row[5] == "0.00000000"]
    assert 3 <= len(runs(row[0] for row in no_trade)) <= 14
    assert max(map(len, runs(row[0] for row in no_trade))) <= 12
    assert all(
        len(set(row[1:5])) == 1 and {row[7], row[9], row[10]} == {"0.00000000"} for row in no_trade
    )
    closes = {row[0]: row[4] for row in rows}
    assert all(closes.get(row[0] - MINUTE, row[4]) == row[4] for row in no_trade)
    assert all(
        generate_klines("SHIBUSDT", "1m", row[0], end=row[0], limit=1, now=LATER) == [row]
        for row in no_trade
    )


def test_an_open_bar_grows_into_its_closed_self() -> None:
    """At the opening nothing has traded yet; nothing shrinks; at the end it is the closed bar."""
    opened, done = (
        ms("2024-03-20T12:34"),
        generate_klines("BTCUSDT", "1m", ms("2024-03-20T12:34"), end=LATER, limit=1, now=LATER)[0],
    )
    states = [
        generate_klines("BTCUSDT", "1m", opened, end=LATER, limit=5, now=opened + late)
        for late in (0, 1, 20_000, 59_999, 60_000)
    ]
    assert [len(rows) for rows in states] == [1, 1, 1, 1, 2]
    assert states[0][0][5] == "0.00000000"
    assert len(set(states[0][0][1:5])) == 1
    assert states[0][0][8] == 0
    assert states[1][0][8] > 0
    assert states[4][0] == done
    for before, after in pairwise(rows[0] for rows in states):
        assert all(Decimal(before[i]) <= Decimal(after[i]) for i in (2, 5, 7, 8, 9, 10))
        assert Decimal(before[3]) >= Decimal(after[3])
        assert (
            Decimal(after[3]) * Decimal(after[5])
            <= Decimal(after[7])
            <= Decimal(after[2]) * Decimal(after[5])
        )
    minutes = generate_klines(
        "BTCUSDT", "1m", ms("2024-03-20T12:00"), end=LATER, limit=100, now=NOW
    )
    assert generate_klines("BTCUSDT", "1h", None, end=LATER, limit=1, now=NOW) == [
        merge_rows(minutes, ms("2024-03-20T12:00"), 60 * MINUTE)
    ]


@pytest.mark.parametrize("interval", INTERVALS)
def test_generated_bars_are_what_the_wire_has(interval: str) -> None:
    """In the model's columns, over a window at whose ends no bar opens."""
    window = Window(
        datetime(2024, 3, 3, 13, 7, tzinfo=UTC), datetime(2024, 3, 13, 17, 33, tzinfo=UTC)
    )
    frame = generate_bars("SOLUSDT", interval, window)
    rows = pages("SOLUSDT", ms("2024-03-03T13:07"), ms("2024-03-13T17:33"), interval)
    assert dict(frame.schema) == BAR_SCHEMA
    assert sum(frame.null_count().row(0)) == 0
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    wire = [
        (
            epoch + timedelta(milliseconds=r[0]),
            *map(Decimal, r[1:6]),
            Decimal(r[7]),
            r[8],
            *map(Decimal, r[9:11]),
        )
        for r in rows
    ]
    assert [c.name for c in BAR_COLUMNS][5:8] == ["volume", "quote_volume", "trades"]
    assert frame.rows() == wire
    assert len(wire) > 0


def test_truth_needs_no_clock_and_refuses_strangers() -> None:
    """Empty windows are empty frames; unknown names are BadInput."""
    long_ago, soon = datetime(2010, 1, 1, tzinfo=UTC), datetime(2010, 1, 3, tzinfo=UTC)
    assert dict(generate_bars("BTCUSDT", "1h", Window(long_ago, soon)).schema) == BAR_SCHEMA
    assert generate_bars("BTCUSDT", "1h", Window(soon, long_ago)).is_empty()
    with pytest.raises(BadInput, match="XRPUSDT"):
        generate_bars("XRPUSDT", "1h", Window(long_ago, soon))
    with pytest.raises(BadInput, match="1s"):
        generate_bars("BTCUSDT", "1s", Window(long_ago, soon))


# ------------------------------------------------------------ the server


def test_endpoints_with_and_without_the_prefix() -> None:
    """Ping, time and klines under both roots; the log has the bare path, query and status."""
    exchange = SandboxExchange(now=lambda: NOW)
    with serve_in_thread(exchange) as url:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/binance", url)
        for root in (url, url.removesuffix("/binance")):
            assert get(root, "/api/v3/ping").body == {}
            assert get(root, "/api/v3/time").body == {"serverTime": NOW}
            assert get_klines(root, limit=2).body == generate_klines(
                "BTCUSDT", "1m", None, end=NOW, limit=2, now=NOW
            )
    assert exchange.requests[2:4] == [
        ("/api/v3/klines", {"symbol": "BTCUSDT", "interval": "1m", "limit": "2"}, 200),
        ("/api/v3/ping", {}, 200),
    ]


def test_pages_follow_binances_rules() -> None:
    """500 rows by default, 1000 at most, the newest without a start, both ends inclusive, nothing
    after the clock.
    """
    with serve_in_thread(SandboxExchange(now=lambda: NOW)) as url:
        opened = NOW // MINUTE * MINUTE
        newest = get_klines(url).body
        assert len(newest) == 500
        assert newest[-1][0] == opened
        assert len(get_klines(url, limit=5000, startTime=0).body) == 1000
        start = ms("2024-03-02T00:00")
        both = get_klines(url, startTime=start, endTime=start + 3 * MINUTE).body
        assert [row[0] for row in both] == [start + i * MINUTE for i in range(4)]
        inside = get_klines(url, startTime=start + 1, endTime=start + 3 * MINUTE - 1).body
        assert [row[0] for row in inside] == [start + MINUTE, start + 2 * MINUTE]
        assert [r[0] for r in get_klines(url, endTime=start, limit=2).body] == [
            start - MINUTE,
            start,
        ]
        assert get_klines(url, startTime=NOW + MINUTE).body == []
        assert get_klines(url, startTime=start, endTime=start - 1).body == []
        halted = get_klines(url, endTime=ms("2024-03-08T03:19"), limit=1).body
        assert halted[0][0] == ms("2024-03-08T01:59")


@pytest.mark.parametrize(
    ("path", "query", "status", "code"),
    [
        ("klines", {"symbol": "NOPEUSDT", "interval": "1m"}, 400, -1121),
        ("klines", {"symbol": "BTCUSDT", "interval": "7m"}, 400, -1120),
        ("klines", {"symbol": "BTCUSDT"}, 400, -1102),
        ("klines", {"interval": "1m"}, 400, -1102),
        ("klines", {"symbol": "BTCUSDT", "interval": "1m", "startTime": "soon"}, 400, -1100),
        ("klines", {"symbol": "BTCUSDT", "interval": "1m", "endTime": "-5"}, 400, -1100),
        ("klines", {"symbol": "BTCUSDT", "interval": "1m", "limit": "0"}, 400, -1130),
        ("klines", {"symbol": "BTCUSDT", "interval": "1m", "timeZone": "1"}, 400, -1104),
        ("exchangeInfo", {"symbol": "NOPEUSDT"}, 400, -1121),
        ("exchangeInfo", {"symbols": "BTCUSDT"}, 400, -1121),
        ("depth", {"symbol": "BTCUSDT"}, 404, -1),
    ],
)
def test_errors_are_binances(path: str, query: dict[str, str], status: int, code: int) -> None:
    """A code and a message, never a traceback."""
    exchange = SandboxExchange(now=lambda: NOW)
    with serve_in_thread(exchange) as url:
        answer = get(url, f"/api/v3/{path}", **query)
    assert (answer.status, answer.body["code"]) == (status, code)
    assert set(answer.body) == {"code", "msg"}
    assert answer.headers["Content-Type"].startswith("application/json")
    assert exchange.requests == [(f"/api/v3/{path}", query, status)]


def test_exchange_info_has_the_listed_markets() -> None:
    """A symbol that is not listed yet is neither named nor served."""
    early = ms("2020-06-01")
    with serve_in_thread(SandboxExchange(now=lambda: early, weight_limit=777)) as url:
        info = get(url, "/api/v3/exchangeInfo").body
        assert {entry["symbol"] for entry in info["symbols"]} == {
            "BTCUSDT",
            "ETHUSDT",
            "DOGEUSDT",
            "ADAUSDT",
        }
        assert info["rateLimits"][0]["rateLimitType"] == "REQUEST_WEIGHT"
        assert info["rateLimits"][0]["limit"] == 777
        assert info["serverTime"] == early
        assert get_klines(url, symbol="SHIBUSDT").body["code"] == -1121
        two = get(url, "/api/v3/exchangeInfo", symbols='["ADAUSDT","BTCUSDT"]').body["symbols"]
        assert [entry["symbol"] for entry in two] == ["ADAUSDT", "BTCUSDT"]
        one = get(url, "/api/v3/exchangeInfo", symbol="BTCUSDT").body["symbols"][0]
        filters = {entry["filterType"]: entry for entry in one["filters"]}
        assert filters["PRICE_FILTER"]["tickSize"] == "0.01000000"
        assert filters["LOT_SIZE"]["stepSize"] == "0.00001000"


def test_weight_is_counted_by_the_clock_minute() -> None:
    """429 with Retry-After above the limit, forgotten in the next minute even while the market's
    clock is frozen.
    """
    wall = [ms("2030-01-01T00:00:40.500")]
    with serve_in_thread(
        SandboxExchange(now=lambda: NOW, weight_limit=5, wall=lambda: wall[0])
    ) as url:
        used = [get_klines(url, limit=1) for _ in range(3)]
        assert [answer.status for answer in used] == [200, 200, 429]
        assert [answer.headers["X-MBX-USED-WEIGHT-1M"] for answer in used] == ["2", "4", "6"]
        assert used[2].headers["Retry-After"] == "20"
        assert used[2].body["code"] == -1003
        wall[0] = ms("2030-01-01T00:01:00")
        again = get_klines(url, limit=1)
        assert (again.status, again.headers["X-MBX-USED-WEIGHT-1M"]) == (200, "2")


def test_going_on_after_429_is_banned() -> None:
    """The eleventh request after the first 429 gets 418, and so does the next minute; after the ban
    all is well.
    """
    wall = [ms("2030-01-01T00:00:10")]
    exchange = SandboxExchange(now=lambda: NOW, weight_limit=0, wall=lambda: wall[0])
    with serve_in_thread(exchange) as url:
        assert [get(url, "/api/v3/ping").status for _ in range(13)] == [429] * 11 + [418] * 2
        wall[0] += 90_000
        banned = get(url, "/api/v3/ping")
        assert (banned.status, banned.headers["Retry-After"]) == (418, "30")
        wall[0] += 30_000
        exchange.weight_limit = 10
        assert get(url, "/api/v3/ping").status == 200


def test_tamper_plants_faults() -> None:
    """Other rows, a whole other answer, or nothing at all; a refusal may be raised."""

    async def tamper(
        request: web.Request, rows: list[Row]
    ) -> list[Row] | web.StreamResponse | None:
        fault = request.query["limit"]
        if fault == "3":
            return [*rows[:1], *rows]
        if fault == "4":
            return web.Response(status=502, text='"bad gateway"')
        if fault == "5":
            raise web.HTTPServiceUnavailable(text="{}")
        return None

    exchange = SandboxExchange(now=lambda: NOW, tamper=tamper)
    with serve_in_thread(exchange) as url:
        assert get_klines(url, limit=2).body == generate_klines(
            "BTCUSDT", "1m", None, end=NOW, limit=2, now=NOW
        )
        doubled = get_klines(url, limit=3).body
        assert len(doubled) == 4
        assert doubled[0] == doubled[1]
        assert get_klines(url, limit=4)[:2] == (502, "bad gateway")
        assert get_klines(url, limit=5).status == 503
        assert get(url, "/api/v3/time").status == 200
    assert [seen.status for seen in exchange.requests] == [200, 200, 502, 503, 200]


def test_the_log_is_bounded() -> None:
    """The newest requests stay."""
    exchange = SandboxExchange(now=lambda: NOW)
    with serve_in_thread(exchange) as url:
        get(url, "/api/v3/time")
        exchange.requests *= LOG_SIZE
        get(url, "/api/v3/ping")
    assert len(exchange.requests) == LOG_SIZE
    assert exchange.requests[-1].path == "/api/v3/ping"


def test_the_thread_stops_and_a_taken_port_is_named() -> None:
    """After the block no answer comes; a second exchange on that port is BadInput, and does not
    hang.
    """
    with serve_in_thread(SandboxExchange(now=lambda: NOW)) as url:
        port = int(url.split(":")[2].split("/")[0])
        with pytest.raises(BadInput, match=str(port)), serve_in_thread(SandboxExchange(), port):
            pass
    with pytest.raises(urllib.error.URLError):
        get(url, "/api/v3/ping")


def test_serve_ends_on_ctrl_c() -> None:
    """It prints its URL once it listens, and ends without an error."""
    urls: list[str] = []

    def ready(url: str) -> None:
        urls.append(url)
        signal.raise_signal(signal.SIGINT)

    serve_until_interrupted(SandboxExchange(now=lambda: NOW), 0, ready)
    assert len(urls) == 1
    assert urls[0].endswith("/binance")


def test_ccxt_takes_it_for_binance() -> None:
    """The real client, with only its hosts replaced: markets, precisions, clock and raw klines."""
    ccxt = pytest.importorskip("ccxt.async_support")

    async def visit(url: str) -> tuple[dict[str, Any], list[Row], int]:
        binance = ccxt.binance(
            {"options": {"fetchMarkets": {"types": ["spot"]}, "fetchCurrencies": False}}
        )
        api = binance.urls["api"].items()
        binance.urls["api"] = {
            name: re.sub(r"^https?://[^/]+", url, link) if isinstance(link, str) else link
            for name, link in api
        }
        try:
            markets = await binance.load_markets()
            query = {
                "symbol": "SHIBUSDT",
                "interval": "1m",
                "startTime": ms("2024-03-08T01:59"),
                "limit": 2,
            }
            return markets, await binance.publicGetKlines(query), await binance.fetch_time()
        finally:
            await binance.close()

    with serve_in_thread(SandboxExchange(now=lambda: NOW)) as url:
        markets, rows, clock = asyncio.run(visit(url))
    assert {listing.base + "/" + listing.quote for listing in LISTINGS.values()} == set(markets)
    assert markets["SHIB/USDT"]["precision"]["price"] == 1e-8
    assert markets["BTC/USDT"]["precision"]["amount"] == 1e-5
    assert all(market["active"] and market["spot"] for market in markets.values())
    assert [row[0] for row in rows] == [ms("2024-03-08T01:59"), ms("2024-03-08T03:20")]
    assert rows == generate_klines(
        "SHIBUSDT", "1m", ms("2024-03-08T01:59"), end=NOW, limit=2, now=NOW
    )
    assert clock == NOW

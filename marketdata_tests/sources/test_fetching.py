"""Fetching through real ccxt from real HTTP servers: exact numbers, closed bars, clear errors, no
secret anywhere.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import gc
import ipaddress
import socket
import ssl
import urllib.request
from collections.abc import Callable, Iterable
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from aiohttp import web

from marketdata_assets.errors import BadInput, MarketDataError, Retry, VenueDown, VenueRefused, Wait
from marketdata_assets.model.bar import BAR_SCHEMA, COLUMN_NAMES
from marketdata_assets.model.market import Market
from marketdata_assets.model.timeframe import TIMEFRAMES, Timeframe
from marketdata_assets.model.window import Window
from marketdata_assets.settings.parts import Venue
from marketdata_assets.settings.universe import Universe as UniverseModel
from marketdata_assets.sources import ccxt_rest
from marketdata_assets.sources.base import BarsPage
from marketdata_assets.sources.ccxt_rest import CcxtSource
from marketdata_assets.sources.sandbox.bars import generate_bars, generate_klines
from marketdata_assets.sources.sandbox.server import SandboxExchange, serve_in_thread
from marketdata_tests.conftest import SANDBOX_NOW, Universe, needs_shared
from marketdata_tests.steps import (
    assert_bars,
    at,
    bar_requests,
    coinbase,
    ms,
    run_ingest,
    serving,
    stored_bars,
    window,
)

pytestmark = pytest.mark.server

BTC = Market("binance", "BTC/USDT")
MINUTE = TIMEFRAMES["1m"]
TAKEN = ("open", "high", "low", "close", "volume")
Sandbox = tuple[SandboxExchange, str]


def venue(name: str, url: str, *symbols: str, since: str = "2024-01-01") -> Venue:
    entry = {"symbols": symbols or ("BTC/USDT",), "since": since, "base_url": url}
    return UniverseModel.model_validate({"venues": {name: entry}}).venues[name]


def fetch(
    wanted: Venue,
    span: Window,
    symbol: str | None = None,
    timeframe: Timeframe = MINUTE,
    deadline: float = 15.0,
    times: int = 1,
) -> BarsPage:
    """One page by a source of its own."""

    async def visit() -> BarsPage:
        source = CcxtSource(wanted, deadline)
        try:
            for _ in range(times):
                fetched = await source.fetch(
                    Market(wanted.name, symbol or wanted.symbols[0]), timeframe, span
                )
            return fetched
        finally:
            await source.close()

    return asyncio.run(visit())


# ------------------------------------------------------------ one request through ccxt


def test_binance_rows_are_the_texts_that_were_sent(sandbox: Sandbox) -> None:
    """All ten columns, digit by digit and zero by zero; nothing was a float on the way."""
    fetched = fetch(venue("binance", sandbox[1]), window("2024-01-07T23:00", "2024-01-08T01:00"))
    rows = generate_klines(
        "BTCUSDT",
        "1m",
        ms("2024-01-07T23:00"),
        end=ms("2024-01-08T00:59"),
        limit=1000,
        now=SANDBOX_NOW,
    )
    assert fetched.rows.columns == list(COLUMN_NAMES)
    assert fetched.rows.dtypes == [
        pl.Int64() if name in ("open_time", "trades") else pl.String() for name in COLUMN_NAMES
    ]
    assert fetched.rows.rows() == [(*row[:6], *row[7:11]) for row in rows]
    assert len(rows) == 120
    (request,) = fetched.requests
    assert (request.kind, request.outcome, request.status, request.rows, request.error) == (
        "bars",
        "answered",
        200,
        120,
        None,
    )


@pytest.mark.parametrize("interval", ["1m", "1h", "1w"])
def test_every_timeframe_is_the_venues_own(sandbox: Sandbox, interval: str) -> None:
    span = (
        window("2023-12-04", "2024-01-01")
        if interval != "1m"
        else window("2023-12-04", "2023-12-04T10:00")
    )
    fetched = fetch(venue("binance", sandbox[1]), span, timeframe=TIMEFRAMES[interval])
    expected = generate_bars("BTCUSDT", interval, span)
    assert fetched.rows["open_time"].to_list() == expected["open_time"].dt.epoch("ms").to_list()
    assert [Decimal(text) for text in fetched.rows["quote_volume"]] == expected[
        "quote_volume"
    ].to_list()


LONG = "12345678.123456789012"


def test_json_numbers_keep_every_digit(universe: Universe) -> None:
    """Venues that send numbers and not text: 20 digits, exponents, whole numbers; a float would
    have lost them.
    """
    start = ms("2024-01-01") // 1000
    rows = [
        f"[{start},{LONG},{LONG},{LONG},{LONG},1e-05]",
        f"[{start + 60},0.1,3,1.5,0.3,2.5E+3]",
        f"[{start + 120},7,7,7,7,0]",
    ]
    body = f"[{','.join(reversed(rows))}]"
    with serving(
        coinbase(
            lambda _: web.Response(text=body, content_type="application/json"),
            "2024-01-02T00:00:30",
        )
    ) as url:
        (done,) = run_ingest(
            universe(
                url,
                "[BTC/USD]",
                since="2024-01-01",
                until="2024-01-01T00:03",
                now="2024-01-02",
                venue="coinbaseexchange",
            )
        )
    assert done.error is None
    assert done.account.quarantined == 0
    exact, long = [Decimal(text) for text in ("1E-5", "2500", "0")], Decimal(LONG)
    assert done.bars["low"].to_list() == [long, Decimal("0.1"), 7]
    assert done.bars["open"].to_list() == [long, Decimal("1.5"), 7]
    assert done.bars["volume"].to_list() == exact


# ------------------------------------------------------------ real bars of three venues


def replayed(rows: Iterable[dict[str, Any]], columns: dict[str, str]) -> pl.DataFrame:
    """Rows of the replay's /_truth as bars."""
    texts = {
        "open_time": [row["t"] for row in rows],
        **{name: [row[key] for row in rows] for name, key in columns.items()},
    }
    frame = pl.DataFrame(texts).with_columns(
        (pl.col("open_time") * 1000).cast(BAR_SCHEMA["open_time"])
    )
    return frame.with_columns(pl.col(name).cast(BAR_SCHEMA[name]) for name in columns)


FIVE = {"open": "o", "high": "h", "low": "l", "close": "c", "volume": "v"}
NINE = {
    **FIVE,
    "quote_volume": "qv",
    "trades": "n",
    "taker_buy_volume": "tbv",
    "taker_buy_quote_volume": "tbq",
}
NOT_GIVEN = ("quote_volume", "trades", "taker_buy_volume", "taker_buy_quote_volume")


@needs_shared
def test_kraken(replay: Callable[..., Any], universe: Universe) -> None:
    """Kraken returns the newest 12 hours, flat bars without trades included; at mid-minute the last
    bar is open.
    """
    exchange = replay("2023-03-10T12:00:30Z", kraken_rate=0)
    settings = universe(
        f"{exchange.url}/kraken",
        "[BTC/USD]",
        since="2023-03-10T02:00",
        now="2023-03-10T12:10",
        venue="kraken",
    )
    (done,) = run_ingest(settings)
    real = replayed(
        exchange.truth("kraken", "XBTUSD", "1m", "2023-03-10T02:00:00Z", "2023-03-10T12:00:00Z"),
        {**FIVE, "trades": "n"},
    )
    bars = stored_bars(settings, "kraken%3ABTC-USD")
    assert done.error is None
    assert done.account.is_balanced
    assert bars["open_time"].to_list() == [
        at("2023-03-10T02:00") + i * MINUTE.width for i in range(600)
    ]
    assert_bars(bars.join(real, on="open_time", how="semi"), real)
    assert 500 < real.height <= 600
    no_trade = bars.join(real, on="open_time", how="anti")
    assert no_trade.filter((pl.col("volume") != 0) | (pl.col("open") != pl.col("close"))).is_empty()
    assert bars.select(pl.col(NOT_GIVEN).null_count()).row(0) == (600, 0, 600, 600)


@needs_shared
def test_coinbase(replay: Callable[..., Any], universe: Universe) -> None:
    """A day with its real maintenance, which is longer than a page; minutes without trades are
    missing, not made up.
    """
    exchange = replay("2023-03-05T12:00:30Z", coinbase_rate=0)
    settings = universe(
        f"{exchange.url}/coinbase",
        "[BTC/USD]",
        since="2023-03-04",
        until="2023-03-05",
        now="2023-03-11",
        venue="coinbaseexchange",
    )
    (done,) = run_ingest(settings)
    real = replayed(
        exchange.truth("coinbase", "BTC-USD", "1m", "2023-03-04T00:00:00Z", "2023-03-05T00:00:00Z"),
        FIVE,
    )
    bars = stored_bars(settings, "coinbaseexchange%3ABTC-USD")
    assert done.error is None
    assert done.account.is_balanced
    assert_bars(bars, real)
    assert 1100 < real.height < 1440
    assert bars.select(pl.col(NOT_GIVEN).null_count()).row(0) == (real.height,) * 4
    assert sum(gap.bars for gap in done.gaps) == 1440 - real.height
    assert len([entry for entry in exchange.log() if "candles" in entry["path"]]) <= 40


@needs_shared
@pytest.mark.parametrize("name", ["kraken", "coinbaseexchange"])
@pytest.mark.parametrize(
    ("fault", "params", "kind"),
    [
        ("rate_limit", {"retry_after": 5}, Wait),
        ("error_200", {}, Retry),
        ("http500", {}, Retry),
        ("html_error", {"status": 200}, Retry),
        ("empty_body", {}, Retry),
        ("truncate_json", {}, Retry),
        ("short_read", {}, Retry),
        ("reset", {}, Retry),
    ],
)
def test_errors_of_other_venues_are_recognized(
    replay: Callable[..., Any],
    name: str,
    fault: str,
    params: dict[str, Any],
    kind: type[MarketDataError],
) -> None:
    """Kraken sends `too many requests` and `busy` with status 200; neither is taken for bars or for
    the other.
    """
    exchange = replay("2023-03-10T12:00:30Z", kraken_rate=0, coinbase_rate=0)
    exchange.admin(fault=fault, match="OHLC|candles", params=params)
    url = f"{exchange.url}/{name.removesuffix('exchange')}"
    wanted = venue(name, url, "BTC/USD", since="2023-03-01")
    error = raised(lambda: fetch(wanted, window("2023-03-10T10:00", "2023-03-10T11:00")))
    assert isinstance(error, kind)
    assert str(error).startswith(name)


@needs_shared
def test_binance_us_keeps_nine_columns(replay: Callable[..., Any]) -> None:
    exchange = replay("2023-03-10T12:00:30Z")
    wanted = venue("binanceus", f"{exchange.url}/binanceus", since="2023-03-01")
    fetched = fetch(wanted, window("2023-03-10T02:00", "2023-03-10T12:00"))
    rows = exchange.truth(
        "binanceus", "BTCUSDT", "1m", "2023-03-10T02:00:00Z", "2023-03-10T12:00:00Z"
    )
    assert fetched.rows.rows() == [(row["t"], *(row[key] for key in NINE.values())) for row in rows]
    assert len(rows) == 600


# ------------------------------------------------------------ the first bars of a market


@pytest.mark.parametrize(
    "ours", ["2024-01-09T06:31:30", "2024-01-09T06:30:20", "2031-07-01", "2024-01-31T23:59:59"]
)
def test_closed_is_by_the_venues_clock(universe: Universe, ours: str) -> None:
    """The exchange stands at 06:31:59.999, in mid-minute; we are right, late, years ahead, or weeks
    ahead.
    """
    exchange = SandboxExchange(now=lambda: ms("2024-01-09T06:32") - 1, weight_limit=10**9)
    with serve_in_thread(exchange) as url:
        settings = universe(url, since="2024-01-09", until="2024-02-01", now=ours)
        done = run_ingest(settings)[0]
    is_far_ahead = at(ours) > at("2024-01-10")
    assert isinstance(done.error, VenueDown) is is_far_ahead
    assert not is_far_ahead or "its clock says 2024-01-09T06:31:59.999" in str(done.error)
    last = min(at(ours), at("2024-01-09T06:31"))
    assert_bars(
        stored_bars(settings),
        generate_bars("BTCUSDT", "1m", Window(at("2024-01-09"), MINUTE.floor(last))),
    )


def test_nothing_is_stored_of_a_minute_that_is_still_open(universe: Universe) -> None:
    """Even when the exchange hands it out unasked; a millisecond later it is closed and stored."""
    now = [ms("2024-01-09T00:05") - 1]

    async def generous(request: web.Request, rows: Any) -> Any:
        return generate_klines(
            "BTCUSDT", "1m", int(request.query["startTime"]), end=now[0], limit=1000, now=now[0]
        )

    with serve_in_thread(
        SandboxExchange(now=lambda: now[0], weight_limit=10**9, tamper=generous)
    ) as url:
        settings = universe(
            url, since="2024-01-09", until="2024-01-09T01:00", now="2024-01-09T00:05"
        )
        assert run_ingest(settings)[0].error is None
        assert stored_bars(settings).height == 4
        now[0] += 1
        assert run_ingest(settings)[0].error is None
    assert_bars(
        stored_bars(settings),
        generate_bars("BTCUSDT", "1m", window("2024-01-09", "2024-01-09T00:05")),
    )


# ------------------------------------------------------------ pages


@pytest.mark.parametrize("bars", [1, 2, 997, 998, 999, 1000, 1001, 1996, 1997, 2994])
def test_page_edges(sandbox: Sandbox, universe: Universe, bars: int) -> None:
    """Spans of one, two and three pages, give or take a bar, without gaps: all bars, and no more
    requests than needed.
    """
    start = at("2024-01-05T13:00")
    settings = universe(
        sandbox[1], since=start.isoformat(), until=(start + bars * MINUTE.width).isoformat()
    )
    (done,) = run_ingest(settings)
    expected = generate_bars("BTCUSDT", "1m", Window(start, start + bars * MINUTE.width))
    assert done.complete
    assert done.gaps == ()
    assert expected.height == bars
    assert_bars(stored_bars(settings), expected)
    assert len(bar_requests(sandbox[0])) == -(-bars // 998)


def test_a_span_over_two_months(sandbox: Sandbox, universe: Universe) -> None:
    settings = universe(sandbox[1], since="2023-12-31T20:00", until="2024-01-01T04:00")
    assert [done.bars.height for done in run_ingest(settings)] == [240, 240]
    assert_bars(
        stored_bars(settings),
        generate_bars("BTCUSDT", "1m", window("2023-12-31T20:00", "2024-01-01T04:00")),
    )


def test_several_pages_are_in_flight(universe: Universe) -> None:
    """The exchange holds every answer until four requests have come; never more than eight are
    open.
    """
    inside, peak, four = [0], [0], asyncio.Event()

    async def crowd(request: web.Request, rows: Any) -> None:
        if request.query["startTime"] == "0":
            return
        inside[0] += 1
        peak[0] = max(peak[0], inside[0])
        if inside[0] >= 4:
            four.set()
        try:
            await asyncio.wait_for(four.wait(), 10)
        finally:
            inside[0] -= 1

    with serve_in_thread(
        SandboxExchange(now=lambda: SANDBOX_NOW, weight_limit=10**9, tamper=crowd)
    ) as url:
        settings = universe(url, since="2024-01-01", until="2024-01-09")
        assert run_ingest(settings)[0].complete
    assert 4 <= peak[0] <= 8
    assert_bars(
        stored_bars(settings), generate_bars("BTCUSDT", "1m", window("2024-01-01", "2024-01-09"))
    )


def test_a_source_can_be_used_again_after_closing(sandbox: Sandbox) -> None:
    async def visit() -> list[int]:
        source, found = CcxtSource(venue("binance", sandbox[1])), []
        for _ in range(2):
            found.append(
                (
                    await source.fetch(BTC, MINUTE, window("2024-01-05", "2024-01-05T01:00"))
                ).rows.height
            )
            await source.close()
        await source.close()
        return found

    assert asyncio.run(visit()) == [60, 60]


# ------------------------------------------------------------ errors of the venue


def raised(action: Callable[[], object]) -> MarketDataError:
    with pytest.raises(MarketDataError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("symbol", "nearest"),
    [("BTC/USDC", "BTC/USDT"), ("SOLL/USDT", "SOL/USDT"), ("DOGE/USD", "DOGE/USDT")],
)
def test_an_unknown_symbol_names_the_nearest(sandbox: Sandbox, symbol: str, nearest: str) -> None:
    error = raised(
        lambda: fetch(venue("binance", sandbox[1], symbol), window("2024-01-05", "2024-01-06"))
    )
    assert type(error) is BadInput
    assert error.exit_code == 2
    assert symbol in str(error)
    assert nearest in str(error)
    assert bar_requests(sandbox[0]) == []


def test_a_symbol_like_no_other_is_still_clear(sandbox: Sandbox) -> None:
    error = raised(
        lambda: fetch(
            venue("binance", sandbox[1], "QQQQQ/ZZZZZ"), window("2024-01-05", "2024-01-06")
        )
    )
    assert type(error) is BadInput
    assert "did you mean" not in str(error)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_closed_port_is_venue_down(universe: Universe) -> None:
    """After all retries, with exit code 3; nothing is stored and the other partition is tried as
    well.
    """
    settings = universe(
        f"http://127.0.0.1:{free_port()}/binance",
        since="2023-12-31",
        until="2024-01-02",
        now="2024-01-10",
    )
    for done in run_ingest(settings):
        assert type(done.error) is VenueDown
        assert done.error.exit_code == 3
        assert "binance" in str(done.error)
        assert "cannot be reached" in str(done.error)
    assert stored_bars(settings).is_empty()


@pytest.mark.parametrize(
    ("status", "body", "kind", "message"),
    [
        (200, "<html><body>It works!</body></html>", Retry, "not JSON"),
        (200, '{"hello": "world"}', MarketDataError, "binance"),
        (200, "[]", MarketDataError, "binance"),
        (200, '{"symbols": [{"symbol": 5}], "serverTime": 1}', MarketDataError, "binance"),
        (404, "<html><body>Not Found</body></html>", VenueRefused, "check base_url"),
        (403, "<html><body>Forbidden</body></html>", Retry, "a firewall before it refuses"),
        (451, '{"code": 0, "msg": "restricted location"}', Retry, "a country block"),
        (405, "", VenueRefused, "check base_url"),
        (503, "<html><body>Down</body></html>", Retry, "HTTP 503"),
        (429, "slow down", Wait, "HTTP 429"),
    ],
)
def test_a_base_url_that_is_no_exchange(
    status: int, body: str, kind: type[MarketDataError], message: str
) -> None:
    """Each kind of foreign server gives one clear error of our tree that names the venue."""

    async def answer(_: web.Request) -> web.Response:
        return web.Response(text=body, status=status, content_type="text/html")

    with serving(answer) as url:
        error = raised(lambda: fetch(venue("binance", url), window("2024-01-05", "2024-01-06")))
    assert isinstance(error, kind)
    assert message in str(error)
    assert str(error).startswith("binance")
    assert "127.0.0.1" not in str(error)


def test_a_silent_server_ends_with_the_deadline() -> None:
    """The list of markets has a deadline, too."""

    async def silent(request: web.Request) -> web.Response:
        while request.transport is not None and not request.transport.is_closing():
            await asyncio.sleep(0.01)
        return web.Response()

    with serving(silent) as url:
        error = raised(
            lambda: fetch(venue("binance", url), window("2024-01-05", "2024-01-06"), deadline=0.3)
        )
    assert isinstance(error, Retry)


TOO_MUCH = {"code": -1003, "msg": "Too many requests."}


@pytest.mark.parametrize(
    ("header", "least"),
    [
        ("7", 7.0),
        ("0.5", 0.5),
        ("0", 0.0),
        ("-3", 0.0),
        ("soon", 1.0),
        (None, 1.0),
        ("nan", 1.0),
        ("inf", 1.0),
    ],
)
def test_retry_after_is_read(header: str | None, least: float) -> None:
    """The header's seconds; a pause of our own where it is missing or is no number."""

    async def answer(_: web.Request) -> web.Response:
        return web.json_response(
            TOO_MUCH, status=429, headers={"Retry-After": header} if header else {}
        )

    with serving(answer) as url:
        error = raised(lambda: fetch(venue("binance", url), window("2024-01-05", "2024-01-06")))
    assert isinstance(error, Wait)
    assert error.seconds >= least
    assert error.seconds <= 60


@pytest.mark.parametrize("status", [418, 429])
@pytest.mark.parametrize(
    "body",
    [
        "",
        "<html>",
        "{}",
        "null",
    ],
)
def test_a_demanded_wait_may_have_any_body(status: int, body: str) -> None:
    """Only the status and the header count."""

    async def answer(_: web.Request) -> web.Response:
        return web.Response(text=body, status=status, headers={"Retry-After": "33"})

    with serving(answer) as url:
        error = raised(lambda: fetch(venue("binance", url), window("2024-01-05", "2024-01-06")))
    assert isinstance(error, Wait)
    assert error.seconds == 33


def test_a_failed_start_leaves_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    """ccxt writes to standard error about each exchange that is not closed."""

    async def answer(_: web.Request) -> web.Response:
        return web.Response(text="<html>")

    with serving(answer) as url:
        raised(lambda: fetch(venue("binance", url), window("2024-01-05", "2024-01-06")))
    gc.collect()
    assert caplog.messages == []


def test_retry_after_may_be_a_date() -> None:
    """RFC 9110 allows `Retry-After: Fri, 31 Dec 2100 23:59:59 GMT`."""
    until = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=300)

    async def answer(_: web.Request) -> web.Response:
        return web.json_response(
            TOO_MUCH,
            status=429,
            headers={"Retry-After": until.strftime("%a, %d %b %Y %H:%M:%S GMT")},
        )

    with serving(answer) as url:
        error = raised(lambda: fetch(venue("binance", url), window("2024-01-05", "2024-01-06")))
    assert isinstance(error, Wait)
    assert 200 < error.seconds <= 300


# ------------------------------------------------------------ certificates


def self_signed(folder: Path) -> Path:
    """A certificate for 127.0.0.1 without an authority, and its key, in one file."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    builder = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    )
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(dt.datetime.now(dt.UTC) - dt.timedelta(days=1))
    builder = builder.not_valid_after(dt.datetime.now(dt.UTC) + dt.timedelta(days=2))
    builder = builder.add_extension(
        x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
        critical=False,
    )
    certificate = builder.sign(key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    file = folder / "self-signed.pem"
    file.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + certificate.public_bytes(pem)
    )
    return file


def test_a_certificate_without_an_authority_is_refused(tmp_path: Path) -> None:
    """The server would answer any client that trusts it, and never sees a request of ours."""
    file, seen = self_signed(tmp_path), []

    async def answer(request: web.Request) -> web.Response:
        seen.append(request.path)
        return web.json_response({"serverTime": 1})

    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(file)
    with serving(answer, tls) as url:
        with urllib.request.urlopen(
            f"{url}/control", context=ssl.create_default_context(cafile=file), timeout=10
        ) as control:
            assert control.status == 200
        error = raised(lambda: fetch(venue("binance", url), window("2024-01-05", "2024-01-06")))
    assert isinstance(error, Retry)
    assert seen == ["/control"]


# ------------------------------------------------------------ secrets and deadlines

CANARIES = {
    "AWS_SECRET_ACCESS_KEY": "canary-aws-7f3a",
    "BINANCE_APIKEY": "canary-binance-91bc",
    "BINANCE_SECRET": "canary-secret-55de",
    "KRAKEN_APIKEY": "canary-kraken-0a1b",
}


def grep(folder: Path, words: Iterable[str]) -> list[tuple[Path, str]]:
    """Every file that holds one of the words."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [(path, word) for path in files for word in words if word.encode() in path.read_bytes()]


def test_requests_carry_no_key(
    universe: Universe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys in the environment reach neither the exchange, nor an error, nor a file, on good days
    and on bad ones.
    """
    for name, word in CANARIES.items():
        monkeypatch.setenv(name, word)
    monkeypatch.setenv("HTTP_PROXY", "http://user:canary-proxy@127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    seen: list[str] = []
    ill = [False]

    async def watch(request: web.Request, _: Any) -> web.Response | None:
        seen.append(f"{dict(request.headers)} {request.path_qs}")
        echo = {"code": -1000, "msg": "cannot serve https://x.example/?apikey=canary-echo"}
        return web.json_response(echo, status=500) if ill[0] else None

    words = [*CANARIES.values(), "canary-proxy", "canary-echo"]
    with serve_in_thread(
        SandboxExchange(now=lambda: SANDBOX_NOW, weight_limit=10**9, tamper=watch)
    ) as url:
        settings = universe(url, since="2024-01-05", until="2024-01-06")
        assert run_ingest(settings)[0].error is None
        ill[0] = True
        settings = universe(url, since="2024-01-05", until="2024-01-07")
        error = run_ingest(settings)[0].error
    assert type(error) is VenueDown
    assert not [word for word in words if word in str(error) or word in repr(error.requests)]
    assert len(seen) > 5
    assert not [
        line
        for line in seen
        for word in ("canary", "apikey", "signature", "authorization", "cookie")
        if word in line.lower()
    ]
    assert grep(tmp_path, words) == []


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:9/binance?apikey=CANARY",
        "http://CANARY@127.0.0.1:9/binance",
        "http://u:CANARY@127.0.0.1:9",
        "http://127.0.0.1:9/#CANARY",
    ],
)
def test_a_key_in_base_url_is_refused_and_not_repeated(universe: Universe, url: str) -> None:
    error = raised(lambda: universe(f'"{url}"'))
    assert type(error) is BadInput
    assert "line 5" in str(error)
    assert "CANARY" not in str(error)


def test_the_deadline_has_a_seam(
    universe: Universe, monkeypatch: pytest.MonkeyPatch, sandbox: Sandbox
) -> None:
    """Tests that need a short deadline replace the class that the toolbox opens; this one proves
    that it is used.
    """
    built: list[Any] = []

    def build(*args: Any, **kwargs: Any) -> CcxtSource:
        built.append(kwargs)
        return CcxtSource(*args, **kwargs)

    monkeypatch.setattr(ccxt_rest, "CcxtSource", partial(build, deadline=5.0))
    assert run_ingest(universe(sandbox[1], since="2024-01-05", until="2024-01-05T01:00"))[
        0
    ].complete
    assert built == [{"deadline": 5.0}]

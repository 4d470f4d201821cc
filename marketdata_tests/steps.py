"""Steps that tests about fetching and storing share, independent of the code under test."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import json
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import polars as pl
from aiohttp import web
from polars.testing import assert_frame_equal

from marketdata_assets.context import open_context
from marketdata_assets.flows.derive.rollup import RollupBuilder, RollupResult
from marketdata_assets.flows.fetch.ingest import Ingester
from marketdata_assets.flows.fetch.open_partition import IngestResult
from marketdata_assets.model.bar import BAR_SCHEMA
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.model.window import Window, parse_time
from marketdata_assets.settings.universe import Settings
from marketdata_assets.sources.guards import RetryPolicy
from marketdata_assets.sources.sandbox.server import ReceivedRequest, SandboxExchange
from marketdata_assets.storage.ledger_files import NAME as LEDGER_ROWS
from marketdata_tests.samples import outcomes, run_sql


class SkippingClock:
    """A clock that jumps over every sleep: pauses pass on the clock, and no test waits."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds

    def policy(self, **limits: Any) -> RetryPolicy:
        return RetryPolicy(sleep=self.sleep, clock=self.clock, **limits)


def at(text: str) -> datetime:
    return parse_time(text)


def ms(text: str) -> int:
    return int(at(text).timestamp() * 1000)


def window(start: str, end: str) -> Window:
    return Window(at(start), at(end))


def partitions(settings: Settings) -> list[Partition]:
    """Return all partitions that the universe wants."""
    return [
        p
        for market in settings.markets
        for p in settings.partitions([market], settings.span(market))
    ]


def run_ingest(
    settings: Settings,
    policy: RetryPolicy | None = None,
    wanted: Sequence[Partition] | None = None,
    timeframe: str = "1m",
) -> list[IngestResult]:
    """One ingest in a context of its own, as a process of its own would do it."""
    with open_context(settings, policy=policy or SkippingClock().policy()) as context:
        return list(
            context.bind(Ingester).ingest(
                TIMEFRAMES[timeframe], partitions(settings) if wanted is None else wanted
            )
        )


def mark_gaps_final(settings: Settings) -> None:
    """Give all gaps a known cause, so that none of them is requested again."""
    with open_context(settings) as context:
        known = "cause = 'no_trade', status = 'final', next_ask = NULL"
        run_sql(context.ledger, f"UPDATE gaps SET {known}")


def run_derive(settings: Settings) -> list[RollupResult]:
    with open_context(settings) as context:
        return list(context.bind(RollupBuilder).build(partitions(settings)))


def lake_files(settings: Settings) -> dict[str, bytes]:
    """Return the bytes of every object of the lake by its relative path, without the copies of the
    ledger's rows, which hold the moments of requests.
    """
    root = Path(settings.lake)
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != LEDGER_ROWS
    }


def raw_file(settings: Settings, month: str = "2024-01") -> Path:
    """Return the path of the one raw 1m object of a month."""
    (found,) = Path(settings.lake).glob(f"raw/ohlcv_1m/*/month={month}/data.parquet")
    return found


def stored_bars(
    settings: Settings, market: str = "binance%3ABTC-USDT", timeframe: str = "1m"
) -> pl.DataFrame:
    """Read the bars of a market's raw objects with polars alone."""
    files = sorted(
        Path(settings.lake).glob(f"raw/ohlcv_{timeframe}/market={market}/month=*/data.parquet")
    )
    frames = [
        pl.read_parquet(file.read_bytes(), columns=list(BAR_SCHEMA)).cast(BAR_SCHEMA)
        for file in files
    ]  # type: ignore[arg-type]
    return pl.concat(frames) if frames else pl.DataFrame(schema=BAR_SCHEMA)


def assert_bars(found: pl.DataFrame, expected: pl.DataFrame) -> None:
    """Check that both frames hold equal bars in equal order, in all columns of `expected`."""
    assert expected.height > 0
    assert_frame_equal(found.select(expected.columns), expected, check_exact=True)


def bar_requests(exchange: SandboxExchange) -> list[ReceivedRequest]:
    """Return the klines requests for bars, without the requests for a listing date."""
    return [
        seen
        for seen in exchange.requests
        if seen.path.endswith("klines") and seen.query.get("startTime") != "0"
    ]


def quarantined(settings: Settings) -> list[dict[str, Any]]:
    with open_context(settings) as context:
        return context.ledger.quarantine.rows(
            None, window("1970-01-01", "2100-01-01"), limit=100_000
        )


def logged_requests(settings: Settings) -> dict[str, int]:
    """Return the number of requests in the fetch log by outcome."""
    with open_context(settings) as context:
        found = sorted((row[0], row[2]) for row in outcomes(context.ledger))
    return {
        outcome: sum(n for _, n in group)
        for outcome, group in itertools.groupby(found, key=lambda pair: pair[0])
    }


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@contextmanager
def serving(handler: Handler, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """Serve `handler` on a free port of loopback, in a thread, and yield the base URL."""
    loop = asyncio.new_event_loop()

    async def start() -> tuple[web.AppRunner, int]:
        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", handler)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
        return runner, runner.addresses[0][1]

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    runner, port = asyncio.run_coroutine_threadsafe(start(), loop).result()
    try:
        yield f"http{'s' if tls else ''}://127.0.0.1:{port}"
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def coinbase(candles: Callable[[web.Request], Any], now: str) -> Handler:
    """Return a handler for Coinbase with one product, BTC-USD; `candles` answers for its bars."""
    product = {
        "id": "BTC-USD",
        "base_currency": "BTC",
        "quote_currency": "USD",
        "quote_increment": "0.01",
        "base_increment": "0.00000001",
    }
    answers = {
        "products": json.dumps(
            [{**product, "status": "online", "trading_disabled": False, "min_market_funds": "1"}]
        ),
        "currencies": "[]",
        "time": json.dumps({"iso": now + "Z", "epoch": ms(now) / 1000}),
    }

    async def answer(request: web.Request) -> web.StreamResponse:
        path = request.path.rpartition("/")[2]
        if path in answers:
            return web.Response(text=answers[path], content_type="application/json")
        found = candles(request)
        return await found if inspect.isawaitable(found) else found

    return answer

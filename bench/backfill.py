"""Measures a backfill of a million bars against the venue's limit and against a bare loop.

    python bench/backfill.py [--bars 1000000] [--limit 3000] [--rollups duckdb]

The bare loop fetches the same pages. The exchange is the sandbox in a separate process; its pages
are created beforehand, so that their creation is not measured. All figures come from one run on one
machine: read the ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from datetime import UTC, datetime, timedelta
from pathlib import Path

import aiohttp
import orjson
from aiohttp import web

SINCE = datetime(2022, 1, 1, tzinfo=UTC)
SYMBOLS = {"BTC/USDT": "BTCUSDT", "ETH/USDT": "ETHUSDT"}
PAGE, IN_FLIGHT = 998, 8


def serve(port_file: str) -> None:
    """Serve the sandbox behind a cache of complete answers.

    /_first returns the times of the first and the last bar request and their number; /_forget
    clears them.
    """
    from marketdata_assets.sources.sandbox.server import SandboxExchange

    exchange = SandboxExchange(weight_limit=10**9)
    bodies: dict[str, bytes] = {}
    request_times: list[float] = []

    @web.middleware
    async def answer_from_cache(request: web.Request, handler: object) -> web.StreamResponse:
        if request.path == "/_first":
            return web.json_response(
                {
                    "first": request_times[0] if request_times else None,
                    "last": request_times[-1] if request_times else None,
                    "requests": len(request_times),
                }
            )
        if request.path == "/_forget":
            request_times.clear()
            return web.json_response({})
        if not request.path.endswith("klines"):
            return await handler(request)  # type: ignore[operator]
        request_times.append(time.time())
        if request.path_qs not in bodies:
            answer = await handler(request)  # type: ignore[operator]
            bodies[request.path_qs] = answer.body
        return web.Response(body=bodies[request.path_qs], content_type="application/json")

    app = exchange.app()
    app.middlewares.append(answer_from_cache)

    async def run() -> None:
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        Path(port_file).write_text(str(port))
        await asyncio.Event().wait()

    asyncio.run(run())


async def fetch_pages(url: str, until: datetime) -> int:
    """Fetch the same pages with the same concurrency and only parse the JSON; count the bars."""
    turns, bars = asyncio.Semaphore(IN_FLIGHT), 0

    async def one(session: aiohttp.ClientSession, symbol: str, start: datetime) -> int:
        query = {
            "symbol": symbol,
            "interval": "1m",
            "startTime": int(start.timestamp() * 1000),
            "limit": 1000,
        }
        async with turns, session.get(url + "/api/v3/klines", params=query) as answer:
            return len(orjson.loads(await answer.read()))

    async with aiohttp.ClientSession() as session:
        starts = [
            SINCE + timedelta(minutes=PAGE) * i
            for i in range((until - SINCE) // timedelta(minutes=PAGE) + 1)
        ]
        for symbol in SYMBOLS.values():
            bars += sum(await asyncio.gather(*(one(session, symbol, start) for start in starts)))
    return bars


def read_control(url: str, path: str) -> dict[str, float]:
    with urllib.request.urlopen(url.removesuffix("/binance") + path) as answer:
        return json.load(answer)


def backfill(
    folder: Path, url: str, until: datetime, limit: int | None, rollups: str
) -> dict[str, float]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    lines = [
        "venues:",
        "  binance:",
        f"    symbols: [{', '.join(SYMBOLS)}]",
        f"    since: {SINCE.date()}",
        f"    until: {until.date()}",
    ]
    lines += [f"    base_url: {url}", *([f"    requests_per_minute: {limit}"] if limit else [])]
    lines += [
        f"lake: {folder}/lake",
        f"rollups: {rollups}",
        f"duckdb: {folder}/m.duckdb",
        f"state: {folder}/state",
    ]
    (folder / "universe.yaml").write_text("\n".join(lines))
    read_control(url, "/_forget")
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    done = subprocess.run(
        [sys.executable, "-m", "marketdata_assets.cli.main", "backfill"],
        env={**os.environ, "MARKETDATA_UNIVERSE": str(folder / "universe.yaml")},
        capture_output=True,
        text=True,
        check=False,
    )
    ended, after = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    requests = read_control(url, "/_first")
    with sqlite3.connect(folder / "state/dagster/history/runs/index.db") as db:
        (events,) = db.execute("SELECT count(*) FROM event_logs").fetchone()
    return {
        "wall": ended - begun,
        "startup": requests["first"] - begun,
        "fetching": requests["last"] - requests["first"],
        "work": ended - requests["first"],
        "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "requests": requests["requests"],
        "asset_events": events,
        "peak_rss_mb_of_a_process": after.ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bars", type=int, default=1_000_000)
    parser.add_argument("--limit", type=int, default=3000)
    parser.add_argument("--rollups", default="duckdb")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    until = SINCE + timedelta(days=round(options.bars / len(SYMBOLS) / 1440))
    wanted = (until - SINCE) // timedelta(minutes=1) * len(SYMBOLS)
    with tempfile.TemporaryDirectory() as temp:
        port = Path(temp) / "port"
        server = subprocess.Popen([sys.executable, __file__, "--serve", str(port)])
        try:
            while not port.exists() or not port.read_text():
                time.sleep(0.05)
            url = f"http://127.0.0.1:{port.read_text()}/binance"
            asyncio.run(fetch_pages(url, until))
            folder = Path(temp) / "run"
            # creates the pages that only a backfill requests
            backfill(folder, url, until, None, options.rollups)
            begun = time.time()
            bars = asyncio.run(fetch_pages(url, until))
            loop = bars / (time.time() - begun)
            unlimited = backfill(folder, url, until, None, options.rollups)
            limited = backfill(folder, url, until, options.limit, options.rollups)
        finally:
            server.kill()
    least = wanted / 1000 / options.limit * 60
    print(f"bare loop:       {loop:10,.0f} bars/s")
    rate = wanted / unlimited["work"], wanted / unlimited["fetching"]
    print(f"without a limit: {rate[0]:10,.0f} bars/s of work, {rate[1]:,.0f} while fetching")
    print(unlimited)
    ratio = limited["work"] / least
    print(
        f"with {options.limit}/min: {limited['work']:.1f} s of work, "
        f"the limit dictates {least:.1f} s: ratio {ratio:.3f}"
    )
    print(limited)


if __name__ == "__main__":
    main()

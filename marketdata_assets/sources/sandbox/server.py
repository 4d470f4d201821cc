"""The sandbox exchange: a loopback server in Binance spot's wire format over the markets of
`sandbox_bars`.

Endpoints, errors, weights, 429 and 418 are Binance's; `base_url` points ccxt at it, so the demo and
the tests run the same code as production.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from decimal import Decimal
from typing import Any, NamedTuple

from aiohttp import web

from marketdata_assets.errors import BadInput
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.model.window import to_ms
from marketdata_assets.sources.sandbox.bars import LISTINGS, MINUTE_MS, Listing, Rows, klines

Tamper = Callable[[web.Request, Rows], Awaitable[Rows | web.StreamResponse | None]]

DEFAULT_LIMIT, MAX_LIMIT = 500, 1000
LOG_SIZE = 10_000


_ENDPOINTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "/api/v3/ping": (1, ()),
    "/api/v3/time": (1, ()),
    "/api/v3/exchangeInfo": (20, ("symbol", "symbols")),
    "/api/v3/klines": (2, ("symbol", "interval", "startTime", "endTime", "limit")),
}
"""Request weight and known parameters of each path."""
_PATIENCE, _BAN_MS = 10, 120_000


class Seen(NamedTuple):
    """One request that was answered; the path is without `/binance`."""

    path: str
    query: dict[str, str]
    status: int


def system_ms() -> int:
    """Milliseconds since 1970 UTC by this computer's clock."""
    return time.time_ns() // 1_000_000


def _json(
    body: object, status: int = 200, headers: Mapping[str, str] | None = None
) -> web.Response:
    text = json.dumps(body, separators=(",", ":"))
    return web.Response(text=text, status=status, headers=headers, content_type="application/json")


def _refuse(code: int, msg: str) -> web.HTTPBadRequest:
    return web.HTTPBadRequest(
        text=json.dumps({"code": code, "msg": msg}), content_type="application/json"
    )


def _come_back(status: int, wait: int, msg: str) -> web.Response:
    """The answer to a client that asks too much; `wait` in ms."""
    return _json({"code": -1003, "msg": msg}, status, {"Retry-After": str(-(-wait // 1000))})


def _given(query: Mapping[str, str], name: str) -> str:
    if not query.get(name):
        raise _refuse(
            -1102, f"Mandatory parameter '{name}' was not sent, was empty/null, or malformed."
        )
    return query[name]


def _whole(query: Mapping[str, str], name: str) -> int | None:
    if name not in query:
        return None
    if not re.fullmatch(r"[0-9]{1,20}", query[name]):
        raise _refuse(
            -1100,
            f"Illegal characters found in parameter '{name}'; legal range is '^[0-9]{{1,20}}$'.",
        )
    return int(query[name])


def _symbol_info(listing: Listing) -> dict[str, Any]:
    """The market's entry in exchangeInfo."""
    tick, step = (
        f"{Decimal(1).scaleb(-decimals):.8f}" for decimals in (listing.tick, listing.step)
    )
    return {
        "symbol": listing.symbol,
        "status": "TRADING",
        "baseAsset": listing.base,
        "baseAssetPrecision": 8,
        "quoteAsset": listing.quote,
        "quotePrecision": 8,
        "quoteAssetPrecision": 8,
        "baseCommissionPrecision": 8,
        "quoteCommissionPrecision": 8,
        "orderTypes": ["LIMIT", "LIMIT_MAKER", "MARKET"],
        "isSpotTradingAllowed": True,
        "isMarginTradingAllowed": False,
        "filters": [
            {
                "filterType": "PRICE_FILTER",
                "minPrice": tick,
                "maxPrice": "1000000.00000000",
                "tickSize": tick,
            },
            {
                "filterType": "LOT_SIZE",
                "minQty": step,
                "maxQty": "90000000000.00000000",
                "stepSize": step,
            },
            {
                "filterType": "NOTIONAL",
                "minNotional": "5.00000000",
                "maxNotional": "9000000.00000000",
            },
        ],
        "permissions": [],
        "permissionSets": [["SPOT"]],
    }


class SandboxExchange:
    """The server's state: its clocks, its request weights, and a log of the last 10,000 requests.

    `now` is the market's clock and `wall` the one that request weights are counted by, both in ms
    since 1970: a frozen market still forgets weight every real minute. `tamper` may replace the
    rows of a klines answer, or the whole answer; None leaves them as they are. All clients share
    one budget of weight.
    """

    def __init__(
        self,
        now: Callable[[], int] = system_ms,
        weight_limit: int = 6000,
        tamper: Tamper | None = None,
        wall: Callable[[], int] = system_ms,
    ) -> None:
        """See the class."""
        self.now, self.wall = now, wall
        self.weight_limit = weight_limit
        self.tamper = tamper
        self.requests: list[Seen] = []
        self._minute = self._used = self._over = self._banned_until = 0

    def app(self) -> web.Application:
        """The application that answers for this exchange."""
        app = web.Application()
        app.router.add_get("/{tail:.*}", self._handle, allow_head=False)
        return app

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        path = request.path.removeprefix("/binance")
        try:
            limited = self._limited(path)
            response = await self._answer(path, request) if limited is None else limited
        except web.HTTPException as refusal:
            response = web.Response(
                text=refusal.text, status=refusal.status, headers=refusal.headers
            )
        if not response.prepared:
            response.headers["X-MBX-USED-WEIGHT-1M"] = str(self._used)
        self.requests.append(Seen(path, dict(request.query), response.status))
        del self.requests[:-LOG_SIZE]
        return response

    def _limited(self, path: str) -> web.Response | None:
        """Counts the request: 429 over the limit, then 418 for two minutes after more than 10 further
        requests.
        """
        wall = self.wall()
        if wall >= self._banned_until:
            if wall // MINUTE_MS != self._minute:
                self._minute, self._used, self._over = wall // MINUTE_MS, 0, 0
            self._used += _ENDPOINTS.get(path, (1, ()))[0]
            if self._used <= self.weight_limit:
                return None
            self._over += 1
            if self._over <= 1 + _PATIENCE:
                why = f"Too much request weight used; current limit is {self.weight_limit} request weight per 1 MINUTE."
                return _come_back(429, (self._minute + 1) * MINUTE_MS - wall, why)
            self._banned_until = wall + _BAN_MS
        why = f"Way too much request weight used; IP banned until {self._banned_until}."
        return _come_back(418, self._banned_until - wall, why)

    async def _answer(self, path: str, request: web.Request) -> web.StreamResponse:
        if path not in _ENDPOINTS:
            return _json({"code": -1, "msg": f"the sandbox exchange has no {path}"}, 404)
        sent, read = len(request.query), len(request.query.keys() & set(_ENDPOINTS[path][1]))
        if read < sent:
            raise _refuse(
                -1104,
                f"Not all sent parameters were read; read '{read}' parameter(s) but was sent '{sent}'",
            )
        if path.endswith("klines"):
            return await self._klines(request)
        if path.endswith("exchangeInfo"):
            return _json(self._info(request.query))
        return _json({"serverTime": self.now()} if path.endswith("time") else {})

    def _listing(self, symbol: str) -> Listing:
        listing = LISTINGS.get(symbol)
        if listing is None or to_ms(listing.listed) > self.now():
            raise _refuse(-1121, "Invalid symbol.")
        return listing

    def _info(self, query: Mapping[str, str]) -> dict[str, Any]:
        now = self.now()
        limit = {"interval": "MINUTE", "intervalNum": 1, "limit": self.weight_limit}
        if "symbol" in query:
            symbols = [query["symbol"]]
        elif "symbols" in query:
            symbols = re.findall(r'"([^"]*)"', query["symbols"]) or [""]
        else:
            symbols = [
                symbol for symbol, listing in LISTINGS.items() if to_ms(listing.listed) <= now
            ]
        return {
            "timezone": "UTC",
            "serverTime": now,
            "rateLimits": [{"rateLimitType": "REQUEST_WEIGHT", **limit}],
            "exchangeFilters": [],
            "symbols": [_symbol_info(self._listing(symbol)) for symbol in symbols],
        }

    async def _klines(self, request: web.Request) -> web.StreamResponse:
        query, now = request.query, self.now()
        listing, interval = self._listing(_given(query, "symbol")), _given(query, "interval")
        if interval not in TIMEFRAMES:
            raise _refuse(-1120, "Invalid interval.")
        start, end, limit = (_whole(query, name) for name in ("startTime", "endTime", "limit"))
        if limit == 0:
            raise _refuse(-1130, "Data sent for parameter 'limit' is not valid.")
        limit, end = min(limit or DEFAULT_LIMIT, MAX_LIMIT), now if end is None else end
        rows = klines(listing.symbol, interval, start, end, limit, now)
        changed = await self.tamper(request, rows) if self.tamper else None
        return (
            changed
            if isinstance(changed, web.StreamResponse)
            else _json(rows if changed is None else changed)
        )


async def _start(exchange: SandboxExchange, port: int) -> tuple[web.AppRunner, str]:
    """Binds 127.0.0.1 (port 0: any free one) and gives the base URL; raises BadInput for a port that
    is taken.
    """
    runner = web.AppRunner(exchange.app(), access_log=None, shutdown_timeout=1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port).start()
    except (OSError, OverflowError) as error:
        await runner.cleanup()
        raise BadInput(f"port {port} cannot be used for the sandbox exchange: {error}") from error
    return runner, f"http://127.0.0.1:{runner.addresses[0][1]}/binance"


@contextmanager
def running(exchange: SandboxExchange, port: int = 0) -> Iterator[str]:
    """Runs the exchange in a thread of this process while the block lasts; gives
    `http://127.0.0.1:PORT/binance`.
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="sandbox-exchange", daemon=True)
    thread.start()
    try:
        runner, url = asyncio.run_coroutine_threadsafe(_start(exchange, port), loop).result()
        try:
            yield url
        finally:
            asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def serve(
    exchange: SandboxExchange, port: int, ready: Callable[[str], None] = lambda url: None
) -> None:
    """Runs the exchange until Ctrl-C; calls `ready` with the base URL once it listens. Port 0 picks a
    free one.
    """

    async def until_cancelled() -> None:
        runner, url = await _start(exchange, port)
        try:
            ready(url)
            await asyncio.Event().wait()
        finally:
            await runner.cleanup()

    with suppress(KeyboardInterrupt):
        asyncio.run(until_cancelled())

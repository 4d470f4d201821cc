"""The sandbox exchange: a loopback server with Binance spot's API over the sandbox's own markets.

Endpoints, errors, weights, 429 and 418 are Binance's. `base_url` points ccxt at it, so the demo and
the tests run the code that production runs.
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
from marketdata_assets.model.window import to_ms
from marketdata_assets.sources.sandbox.bars import INTERVALS, MINUTE_MS, Rows, generate_klines
from marketdata_assets.sources.sandbox.listings import LISTINGS, Listing

Tamper = Callable[[web.Request, Rows], Awaitable[Rows | web.StreamResponse | None]]
"""Called with a request for klines and its rows; see SandboxExchange."""

DEFAULT_LIMIT, MAX_LIMIT = 500, 1000
"""Bars that a request for klines returns without `limit`, and at most."""
LOG_SIZE = 10_000
"""So many of the last requests are kept."""


class _Endpoint(NamedTuple):
    weight: int
    parameters: tuple[str, ...] = ()


_ENDPOINTS = {
    "/api/v3/ping": _Endpoint(1),
    "/api/v3/time": _Endpoint(1),
    "/api/v3/exchangeInfo": _Endpoint(20, ("symbol", "symbols")),
    "/api/v3/klines": _Endpoint(2, ("symbol", "interval", "startTime", "endTime", "limit")),
}
_MAX_EXCESS, _BAN_MS = 10, 120_000
"""So many further requests over the limit get 429; one more gets a ban."""


class ReceivedRequest(NamedTuple):
    """One request that was answered; the path is without `/binance`."""

    path: str
    query: dict[str, str]
    status: int


def system_ms() -> int:
    """Return milliseconds since 1970 UTC by this computer's clock."""
    return time.time_ns() // 1_000_000


def _json_response(
    body: object, status: int = 200, headers: Mapping[str, str] | None = None
) -> web.Response:
    text = json.dumps(body, separators=(",", ":"))
    return web.Response(text=text, status=status, headers=headers, content_type="application/json")


def _bad_request(code: int, msg: str) -> web.HTTPBadRequest:
    return web.HTTPBadRequest(
        text=json.dumps({"code": code, "msg": msg}), content_type="application/json"
    )


def _too_many_requests(status: int, wait: int, msg: str) -> web.Response:
    """Return the answer to a client that sends too much; `wait` in ms."""
    return _json_response(
        {"code": -1003, "msg": msg}, status, {"Retry-After": str(-(-wait // 1000))}
    )


def _required(query: Mapping[str, str], name: str) -> str:
    if not query.get(name):
        raise _bad_request(
            -1102, f"Mandatory parameter '{name}' was not sent, was empty/null, or malformed."
        )
    return query[name]


def _integer(query: Mapping[str, str], name: str) -> int | None:
    if name not in query:
        return None
    if not re.fullmatch(r"[0-9]{1,20}", query[name]):
        raise _bad_request(
            -1100,
            f"Illegal characters found in parameter '{name}'; legal range is '^[0-9]{{1,20}}$'.",
        )
    return int(query[name])


def _symbol_info(listing: Listing) -> dict[str, Any]:
    """Return the market's entry in exchangeInfo."""
    tick, step = (f"{Decimal(1).scaleb(-places):.8f}" for places in (listing.tick, listing.step))
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
    """The server's state: its clocks, its request weights, and a log of the last requests.

    `now` is the market's clock and `wall` the one that request weights are counted by, both in ms
    since 1970: the weights of a frozen market still end with every real minute. `tamper` may
    replace the rows of a klines answer, or the whole answer; where it returns None the answer
    stays. All clients share one budget of weight.
    """

    def __init__(
        self,
        *,
        now: Callable[[], int] = system_ms,
        weight_limit: int = 6000,
        tamper: Tamper | None = None,
        wall: Callable[[], int] = system_ms,
    ) -> None:
        self.now, self.wall = now, wall
        self.weight_limit = weight_limit
        self.tamper = tamper
        self.requests: list[ReceivedRequest] = []
        self._minute = self._used = self._excess = self._banned_until = 0

    def app(self) -> web.Application:
        """Return the application that answers for this exchange."""
        app = web.Application()
        app.router.add_get("/{tail:.*}", self._handle, allow_head=False)
        return app

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        path = request.path.removeprefix("/binance")
        try:
            limited = self._limit(path)
            response = await self._answer(path, request) if limited is None else limited
        except web.HTTPException as refusal:
            response = web.Response(
                text=refusal.text, status=refusal.status, headers=refusal.headers
            )
        if not response.prepared:
            response.headers["X-MBX-USED-WEIGHT-1M"] = str(self._used)
        self.requests.append(ReceivedRequest(path, dict(request.query), response.status))
        del self.requests[:-LOG_SIZE]
        return response

    def _limit(self, path: str) -> web.Response | None:
        """Count a request; return 429 over the limit, and 418 for two minutes after many more."""
        wall = self.wall()
        if wall >= self._banned_until:
            if wall // MINUTE_MS != self._minute:
                self._minute, self._used, self._excess = wall // MINUTE_MS, 0, 0
            self._used += _ENDPOINTS.get(path, _Endpoint(1)).weight
            if self._used <= self.weight_limit:
                return None
            self._excess += 1
            if self._excess <= 1 + _MAX_EXCESS:
                return _too_many_requests(
                    429,
                    (self._minute + 1) * MINUTE_MS - wall,
                    f"Too much request weight used; current limit is {self.weight_limit} "
                    "request weight per 1 MINUTE.",
                )
            self._banned_until = wall + _BAN_MS
        msg = f"Way too much request weight used; IP banned until {self._banned_until}."
        return _too_many_requests(418, self._banned_until - wall, msg)

    async def _answer(self, path: str, request: web.Request) -> web.StreamResponse:
        if path not in _ENDPOINTS:
            return _json_response({"code": -1, "msg": f"the sandbox exchange has no {path}"}, 404)
        sent = len(request.query)
        read = len(request.query.keys() & set(_ENDPOINTS[path].parameters))
        if read < sent:
            raise _bad_request(
                -1104,
                f"Not all sent parameters were read; read '{read}' parameter(s) but was sent "
                f"'{sent}'",
            )
        if path.endswith("klines"):
            return await self._answer_klines(request)
        if path.endswith("exchangeInfo"):
            return _json_response(self._exchange_info(request.query))
        return _json_response({"serverTime": self.now()} if path.endswith("time") else {})

    def _listing(self, symbol: str) -> Listing:
        listing = LISTINGS.get(symbol)
        if listing is None or to_ms(listing.listed_at) > self.now():
            raise _bad_request(-1121, "Invalid symbol.")
        return listing

    def _exchange_info(self, query: Mapping[str, str]) -> dict[str, Any]:
        now = self.now()
        limit = {"interval": "MINUTE", "intervalNum": 1, "limit": self.weight_limit}
        if "symbol" in query:
            symbols = [query["symbol"]]
        elif "symbols" in query:
            symbols = re.findall(r'"([^"]*)"', query["symbols"]) or [""]
        else:
            symbols = [
                symbol for symbol, listing in LISTINGS.items() if to_ms(listing.listed_at) <= now
            ]
        return {
            "timezone": "UTC",
            "serverTime": now,
            "rateLimits": [{"rateLimitType": "REQUEST_WEIGHT", **limit}],
            "exchangeFilters": [],
            "symbols": [_symbol_info(self._listing(symbol)) for symbol in symbols],
        }

    async def _answer_klines(self, request: web.Request) -> web.StreamResponse:
        query, now = request.query, self.now()
        listing, interval = self._listing(_required(query, "symbol")), _required(query, "interval")
        if interval not in INTERVALS:
            raise _bad_request(-1120, "Invalid interval.")
        start, end, limit = (_integer(query, name) for name in ("startTime", "endTime", "limit"))
        if limit == 0:
            raise _bad_request(-1130, "Data sent for parameter 'limit' is not valid.")
        rows = generate_klines(
            listing.symbol,
            interval,
            start,
            end=now if end is None else end,
            limit=min(limit or DEFAULT_LIMIT, MAX_LIMIT),
            now=now,
        )
        changed = await self.tamper(request, rows) if self.tamper else None
        if isinstance(changed, web.StreamResponse):
            return changed
        return _json_response(rows if changed is None else changed)


async def _start(exchange: SandboxExchange, port: int) -> tuple[web.AppRunner, str]:
    """Listen on 127.0.0.1 (port 0: any free one); return the server and its base URL.

    Raises BadInput for a port that is taken.
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
def serve_in_thread(exchange: SandboxExchange, port: int = 0) -> Iterator[str]:
    """Run the exchange in a thread while the block lasts; yield `http://127.0.0.1:PORT/binance`."""
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


def serve_until_interrupted(
    exchange: SandboxExchange, port: int, on_ready: Callable[[str], None] = lambda url: None
) -> None:
    """Run the exchange until Ctrl-C; call `on_ready` with the base URL once it listens.

    Port 0 picks a free one. Raises BadInput for a port that is taken.
    """

    async def until_cancelled() -> None:
        runner, url = await _start(exchange, port)
        try:
            on_ready(url)
            await asyncio.Event().wait()
        finally:
            await runner.cleanup()

    with suppress(KeyboardInterrupt):
        asyncio.run(until_cancelled())

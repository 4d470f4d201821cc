"""Any ccxt venue through `fetch_ohlcv`, or through raw klines where the venue's facts name them.

ccxt signs, routes and maps errors. Raw klines keep all nine values of a bar, ccxt's bars five.
"""

from __future__ import annotations

import asyncio
import difflib
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import aiohttp
import polars as pl

from marketdata_assets.errors import BadInput, MarketDataError
from marketdata_assets.model.bar import COLUMN_NAMES
from marketdata_assets.model.market import Market
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import Window, from_ms, to_ms
from marketdata_assets.settings.parts import Venue
from marketdata_assets.sources.base import BarsPage, Request
from marketdata_assets.sources.ccxt_errors import translate_errors
from marketdata_assets.sources.ccxt_frames import OHLCV_COLUMNS, read_klines, read_ohlcv
from marketdata_assets.sources.ccxt_transport import (
    CURRENT_ANSWER,
    HttpAnswer,
    LimitedResponse,
    StrictAnswers,
    StrictAnswersAsText,
    replace_host,
)
from marketdata_assets.venues.facts import BarsEndpoint, MarketType, market_type
from marketdata_assets.venues.registry import facts_of

T = TypeVar("T")

DEADLINE = 15.0
"""Seconds within which the whole answer of one request must come."""


class CcxtSource:
    """One venue through ccxt's asynchronous client.

    It belongs to the event loop that first uses it. Errors are RequestFailed, VenueRefused or
    BadInput, each with its request.
    """

    def __init__(self, venue: Venue, deadline: float = DEADLINE) -> None:
        self._venue, self._deadline = venue, deadline
        self._exchange: Any = None
        self._session: aiohttp.ClientSession | None = None
        self._loading = asyncio.Lock()
        self._types = {market_type(symbol) for symbol in venue.symbols}
        self._endpoint = _endpoint_of(venue, self._types)
        self._page: int | None = self._endpoint.page_size if self._has_klines else None
        self._used_weight = 0

    @property
    def page_size(self) -> int:
        """The raw endpoint's number of bars a request, or what ccxt states for the venue."""
        return self._page or self._endpoint.page_size

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of a bar that are never null."""
        return COLUMN_NAMES if self._has_klines else OHLCV_COLUMNS

    @property
    def skips_gaps(self) -> bool:
        """Whether one request sees both sides of any gap: klines are counted from startTime on."""
        return self._has_klines

    @property
    def weight_limit(self) -> int | None:
        """The request weight that the venue allows in a minute; None: it counts no weights."""
        return self._endpoint.weight_per_minute if self._has_klines else None

    @property
    def used_weight(self) -> int:
        """The weight of this minute, by the venue's own count in its last answer."""
        return self._used_weight

    async def now(self) -> datetime:
        """Return the venue's server time; our clock less a minute where it has none."""

        async def request(exchange: Any) -> datetime:
            if not exchange.has["fetchTime"]:
                return datetime.now(UTC) - timedelta(minutes=1)
            return from_ms(int(await exchange.fetch_time()))

        return (await self._request("time", request))[0]

    async def first_open(self, market: Market, timeframe: Timeframe) -> datetime | None:
        """Return the open time of the first bar ever, where klines count rows; else None."""
        if not self._has_klines:
            return None
        rows, _ = await self._request_klines(market, timeframe, {"startTime": 0, "limit": 1})
        opens = rows["open_time"].to_list()
        return from_ms(opens[0]) if opens and opens[0] is not None else None

    async def fetch(self, market: Market, timeframe: Timeframe, window: Window) -> BarsPage:
        """Send one request for the bars that open inside `window` (end exclusive)."""
        start, end = to_ms(window.start), to_ms(window.end)
        if self._has_klines:
            params = {"startTime": start, "endTime": end - 1, "limit": self._endpoint.page_size}
            rows, sent = await self._request_klines(market, timeframe, params)
            return BarsPage(rows, window, requests=(sent,))
        limit = window.count(timeframe)

        async def request(exchange: Any) -> pl.DataFrame:
            self._symbol_id(exchange, market)
            return read_ohlcv(
                await exchange.fetch_ohlcv(market.symbol, timeframe.name, start, limit)
            )

        answer, sent = await self._request("bars", request)
        # fetch_ohlcv has no end and some venues no start: other pages hold what lies outside
        opens = pl.col("open_time")
        rows = answer.filter(opens.is_null() | opens.is_between(start, end, closed="left"))
        later = answer.filter(opens >= end)["open_time"].min() if rows.is_empty() else None
        first_available = from_ms(later) if isinstance(later, int) else None
        return BarsPage(rows, window, first_available=first_available, requests=(sent,))

    async def is_listed(self, market: Market) -> bool:
        """Return whether the venue's list has the market and does not call it inactive."""

        async def request(exchange: Any) -> bool:
            found = (await exchange.load_markets(True)).get(market.symbol)
            return found is not None and found.get("active") is not False

        return (await self._request("markets", request))[0]

    async def close(self) -> None:
        """Close the connections; the source can be used again afterwards."""
        session, exchange, self._session, self._exchange = self._session, self._exchange, None, None
        if exchange is not None:
            exchange.session = None
        if session is not None:
            await session.close()

    # --------------------------------------------------------------------------------- requests
    @property
    def _has_klines(self) -> bool:
        return self._endpoint.klines_method is not None

    async def _request_klines(
        self, market: Market, timeframe: Timeframe, params: dict[str, int]
    ) -> tuple[pl.DataFrame, Request]:
        async def request(exchange: Any) -> pl.DataFrame:
            symbol = self._symbol_id(exchange, market)
            method = getattr(exchange, str(self._endpoint.klines_method))
            rows = await method({"symbol": symbol, "interval": timeframe.name, **params})
            return read_klines(rows, timeframe)

        return await self._request("bars", request)

    async def _request(
        self, kind: str, operation: Callable[[Any], Awaitable[T]]
    ) -> tuple[T, Request]:
        exchange = await self._open_exchange()
        return await self._log_request(kind, lambda: operation(exchange))

    async def _log_request(
        self, kind: str, operation: Callable[[], Awaitable[T]]
    ) -> tuple[T, Request]:
        answer = HttpAnswer()
        token = CURRENT_ANSWER.set(answer)
        sent_at, begun = time.time(), time.perf_counter()

        def request(outcome: str, *, error: str | None = None, rows: int | None = None) -> Request:
            seconds = time.perf_counter() - begun
            return Request(
                kind,
                sent_at,
                seconds=seconds,
                outcome=outcome,
                status=answer.status,
                rows=rows,
                error=error,
            )

        try:
            with translate_errors(self._venue.name, answer):
                async with asyncio.timeout(self._deadline):
                    value = await operation()
        except MarketDataError as error:
            error.requests = (request(type(error).__name__.lower(), error=str(error)),)
            raise
        finally:
            CURRENT_ANSWER.reset(token)
            weight = answer.headers.get("x-mbx-used-weight-1m", "")
            self._used_weight = int(weight) if weight.isdecimal() else 0
        rows = value.height if isinstance(value, pl.DataFrame) else None
        return value, request("answered", rows=rows)

    # --------------------------------------------------------------------------------- ccxt
    async def _open_exchange(self) -> Any:
        async with self._loading:
            if self._exchange is None:
                exchange = self._create_exchange()
                try:
                    await self._log_request("markets", lambda: self._load_markets(exchange))
                except BaseException:
                    exchange.session = None  # it is ours: ccxt would warn that it is not closed
                    raise
                self._exchange = exchange
        return self._exchange

    async def _load_markets(self, exchange: Any) -> None:
        await exchange.load_markets()
        if self._page is None:
            features = (exchange.features or {}).get("spot") or {}
            limit = (features.get("fetchOHLCV") or {}).get("limit")
            self._page = int(limit or self._endpoint.page_size)

    def _create_exchange(self) -> Any:
        import ccxt.async_support as ccxt  # costs seconds: only a process that fetches pays

        base = getattr(ccxt, self._venue.name)
        strict = StrictAnswers if self._has_klines else StrictAnswersAsText
        exchange_class = type(f"Strict{self._venue.name}", (strict, base), {})
        if self._session is None:
            self._session = aiohttp.ClientSession(response_class=LimitedResponse)
        types = {MarketType.SPOT} if self._types <= {MarketType.SPOT} else set(MarketType)
        exchange = exchange_class(
            {
                "session": self._session,
                "enableRateLimit": False,  # the limiter is ours, shared by all processes
                "timeout": int(self._deadline * 1000),
                "number": str,
                "options": {
                    # plain texts in ccxt's order: it accepts no subclass of str
                    "fetchMarkets": {"types": [t.value for t in MarketType if t in types]},
                    "fetchCurrencies": False,
                },
            }
        )
        if self._venue.base_url:
            exchange.urls["api"] = replace_host(
                exchange.urls["api"], self._venue.base_url, exchange.urls.get("hostname", "")
            )
        return exchange

    def _symbol_id(self, exchange: Any, market: Market) -> str:
        """Return the venue's own id of a market; raises BadInput with the nearest symbol."""
        found = exchange.markets.get(market.symbol)
        if found is None:
            near = difflib.get_close_matches(market.symbol, exchange.symbols, n=1, cutoff=0.3)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise BadInput(f"{market.venue} has no symbol {market.symbol}{hint}")
        return str(found["id"])


def _endpoint_of(venue: Venue, types: set[MarketType]) -> BarsEndpoint:
    """Return the endpoint for symbols that are all of one type; `fetch_ohlcv` for a mixture."""
    return facts_of(venue.name).endpoint(venue.symbols[0]) if len(types) == 1 else BarsEndpoint()

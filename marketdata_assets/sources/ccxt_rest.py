"""Any ccxt venue through `fetch_ohlcv`, or through raw klines where the venue's facts name them.

ccxt signs, routes and maps errors. Raw klines keep all nine values of a bar, ccxt's bars five.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, TypeVar

import aiohttp
import polars as pl

from marketdata_assets.errors import BadInput, Garbled, MarketDataError
from marketdata_assets.model.bar import COLUMN_NAMES
from marketdata_assets.model.instrument import Instrument
from marketdata_assets.model.market import Market
from marketdata_assets.model.timeframe import EPOCH, Timeframe
from marketdata_assets.model.window import Window, format_time, from_ms, to_ms
from marketdata_assets.settings.fields import reveal_secret
from marketdata_assets.settings.parts import Venue
from marketdata_assets.sources.base import BarsPage, MarketTraits, Request
from marketdata_assets.sources.ccxt_errors import read_date, translate_errors
from marketdata_assets.sources.ccxt_exchange import (
    check_timeframe,
    contract_size,
    create_exchange,
    find_market,
    listed_at,
    read_instrument,
    read_volumes,
    stated_page_size,
)
from marketdata_assets.sources.ccxt_frames import (
    OHLCV_COLUMNS,
    check_distances,
    check_volume_unit,
    read_klines,
    read_ohlcv,
)
from marketdata_assets.sources.ccxt_transport import (
    CURRENT_ANSWER,
    HttpAnswer,
    open_session,
)
from marketdata_assets.venues.facts import DEFAULT_PAGE_SIZE, MarketType
from marketdata_assets.venues.registry import facts_of

T = TypeVar("T")

DEADLINE = 15.0
"""Seconds within which the whole answer of one request must come."""
DATE_MARGIN = timedelta(minutes=10)
"""How far a venue without a clock may lag behind the Date of its answers."""
FIRST_BLOCK = datetime(2009, 1, 3, tzinfo=UTC)
"""No venue's clock says less."""
CLOCK_AHEAD = timedelta(days=1)
"""How far a venue's clock may be ahead of the machine's."""
END_OF_TIME = to_ms(datetime.max.replace(tzinfo=UTC))
"""The last moment that can be one."""
NEWEST_BARS = 60
"""Bars that are requested for the newest one, which shows how late a venue without a clock is."""


class CcxtSource:
    """One venue through ccxt's asynchronous client.

    It belongs to the event loop that first uses it. Errors are RequestFailed, VenueRefused or
    BadInput, each with its request.
    """

    def __init__(self, venue: Venue, deadline: float = DEADLINE) -> None:
        self._venue, self._deadline = venue, deadline
        self._facts = facts_of(venue.name)
        self._exchange: Any = None
        self._session: aiohttp.ClientSession | None = None
        self._loading = asyncio.Lock()
        self._used_weight = 0
        self._answered_at: datetime | None = None

    def traits(self, market: Market) -> MarketTraits:
        """Return how the market's bars are served.

        The page is the facts' number, else ccxt's once its markets are loaded. Klines are counted
        from startTime on, so one request sees both sides of any gap.
        """
        endpoint = self._facts.endpoint(market.symbol)
        page = endpoint.page_size
        if page is None and self._exchange is not None:
            page = stated_page_size(self._exchange, market)
        has_klines = endpoint.klines_method is not None
        return MarketTraits(
            page_size=page or DEFAULT_PAGE_SIZE,
            columns=COLUMN_NAMES if has_klines else OHLCV_COLUMNS,
            skips_gaps=has_klines,
        )

    @property
    def weight_limit(self) -> int | None:
        """The request weight that the venue allows in a minute; None: it counts no weights."""
        limits = (self._facts.endpoint(s).weight_per_minute for s in self._venue.symbols)
        return min((limit for limit in limits if limit), default=None)

    @property
    def used_weight(self) -> int:
        """The weight of this minute, by the venue's own count in its last answer."""
        return self._used_weight

    async def now(self, market: Market) -> datetime:
        """Return the venue's server time.

        A venue that tells none is as late as its newest bar of the market, or as the Date of that
        answer less `DATE_MARGIN`: a Date may be that of a cache or a proxy in front of the venue.
        """
        if (await self._open_exchange()).has["fetchTime"] is True:

            async def request(exchange: Any) -> datetime:
                return _read_clock(await exchange.fetch_time())

            return (await self._request("time", request))[0]
        base = self._venue.base
        ours = base.floor(datetime.now(UTC))
        bars = min(self.traits(market).page_size, NEWEST_BARS)
        page = await self.fetch(market, base, Window(base.shift(ours, -bars), base.shift(ours, 1)))
        newest = page.rows["open_time"].max()
        if self._answered_at is None and not isinstance(newest, int):
            raise Garbled(f"{self._venue.name}: the answer has neither a bar nor a Date")
        by_date = self._answered_at - DATE_MARGIN if self._answered_at else EPOCH
        return max(by_date, from_ms(newest)) if isinstance(newest, int) else by_date

    async def first_open(self, market: Market, timeframe: Timeframe) -> datetime | None:
        """Return the open time of the first bar ever, as this answer has it.

        Where klines count rows, the first one; else the first bar around the moment at which the
        venue says that it listed the market. None where neither is known.
        """
        if self._has_klines(market):
            rows, _ = await self._request_klines(market, timeframe, {"startTime": 0, "limit": 1})
            opens = rows["open_time"].to_list()
            return from_ms(opens[0]) if opens and opens[0] is not None else None
        listed = listed_at(await self._open_exchange(), market)
        if listed is None:
            return None
        half = max(1, self.traits(market).page_size // 2 - 1)
        middle = timeframe.floor(listed)
        around = Window(timeframe.shift(middle, -half), timeframe.shift(middle, half))
        page = await self.fetch(market, timeframe, around)
        first = page.rows["open_time"].min()
        return from_ms(first) if isinstance(first, int) and from_ms(first) >= middle else None

    async def fetch(self, market: Market, timeframe: Timeframe, window: Window) -> BarsPage:
        """Send one request for the bars that open inside `window` (end exclusive)."""
        start, end = to_ms(window.start), to_ms(window.end)
        endpoint = self._facts.endpoint(market.symbol)
        if endpoint.klines_method:
            params = {"startTime": start, "endTime": end - 1, "limit": endpoint.page_size or 0}
            rows, sent = await self._request_klines(market, timeframe, params)
            return BarsPage(rows, window, requests=(sent,))
        until = {"until": end - 1} if endpoint.takes_until else {}

        async def request(exchange: Any) -> pl.DataFrame:
            find_market(exchange, market)
            check_timeframe(exchange, timeframe, self._facts)
            size = contract_size(exchange, market, endpoint)
            limit = endpoint.limit(window.count(timeframe), self.traits(market).page_size)
            found = await exchange.fetch_ohlcv(market.symbol, timeframe.name, start, limit, until)
            bars = read_ohlcv(found, endpoint.row_keys, size)
            check_distances(bars, timeframe)
            check_volume_unit(bars, market.symbol)
            return bars

        answer, sent = await self._request("bars", request)
        # fetch_ohlcv has no end and some venues no start: other pages hold what lies outside
        opens = pl.col("open_time")
        rows = answer.filter(opens.is_null() | opens.is_between(start, end, closed="left"))
        is_later = opens.is_between(end, END_OF_TIME)
        later = answer.filter(is_later)["open_time"].min() if rows.is_empty() else None
        first_available = from_ms(later) if isinstance(later, int) else None
        return BarsPage(rows, window, first_available=first_available, requests=(sent,))

    async def is_listed(self, market: Market) -> bool:
        """Return whether the venue's list has the market and does not call it inactive."""

        async def request(exchange: Any) -> bool:
            found = (await exchange.load_markets(True)).get(market.symbol)
            return found is not None and found.get("active") is not False

        return (await self._request("markets", request))[0]

    async def instruments(self, types: Collection[MarketType]) -> list[Instrument]:
        """Return the venue's whole list of markets of these types; others may be among them."""

        async def request(exchange: Any) -> list[Instrument]:
            found = (await exchange.load_markets(True)).values()
            return [read_instrument(each, exchange.precisionMode) for each in found]

        return await self._ask_of_types(types, request)

    async def traded_volumes(self, kind: MarketType) -> dict[str, Decimal]:
        """Return what was traded in the last 24 hours, in quote currency, by symbol."""

        async def request(exchange: Any) -> dict[str, Decimal]:
            if not exchange.has["fetchTickers"]:
                raise BadInput(
                    f"{self._venue.name} does not tell the volumes of all markets, which `top:` "
                    "needs; write the symbols"
                )
            is_spot = kind is MarketType.SPOT
            words = {"type": "spot"} if is_spot else {"type": "swap", "subType": kind.value}
            return read_volumes(await exchange.fetch_tickers(None, words))

        return await self._ask_of_types([kind], request)

    async def _ask_of_types(
        self, types: Collection[MarketType], operation: Callable[[Any], Awaitable[T]]
    ) -> T:
        """Request something of an exchange that lists the markets of these types."""
        async with open_session(reveal_secret(self._venue.proxy)) as session:
            exchange = create_exchange(self._venue, session, self._deadline, types)
            try:
                return (await self._log_request("markets", lambda: operation(exchange)))[0]
            finally:
                exchange.session = None  # it is ours: ccxt would warn that it is not closed

    async def close(self) -> None:
        """Close the connections; the source can be used again afterwards."""
        session, exchange, self._session, self._exchange = self._session, self._exchange, None, None
        if exchange is not None:
            exchange.session = None
        if session is not None:
            await session.close()

    # --------------------------------------------------------------------------------- requests
    def _has_klines(self, market: Market) -> bool:
        return self._facts.endpoint(market.symbol).klines_method is not None

    async def _request_klines(
        self, market: Market, timeframe: Timeframe, params: dict[str, int]
    ) -> tuple[pl.DataFrame, Request]:
        async def request(exchange: Any) -> pl.DataFrame:
            symbol = find_market(exchange, market)["id"]
            check_timeframe(exchange, timeframe, self._facts)
            method = getattr(exchange, str(self._facts.endpoint(market.symbol).klines_method))
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
            self._answered_at = read_date(answer.headers.get("date", ""))
        rows = value.height if isinstance(value, pl.DataFrame) else None
        return value, request("answered", rows=rows)

    # --------------------------------------------------------------------------------- ccxt
    async def _open_exchange(self) -> Any:
        async with self._loading:
            if self._exchange is None:
                if self._session is None:
                    self._session = open_session(reveal_secret(self._venue.proxy))
                exchange = create_exchange(self._venue, self._session, self._deadline)
                try:
                    await self._log_request("markets", exchange.load_markets)
                except BaseException:
                    exchange.session = None  # it is ours: ccxt would warn that it is not closed
                    raise
                self._exchange = exchange
        return self._exchange


def _read_clock(ms: Any) -> datetime:
    """Return a venue's server time. Raises Garbled for what no clock says."""
    try:
        now = from_ms(int(ms))
    except (TypeError, ValueError, OverflowError):
        raise Garbled("its clock tells no moment") from None
    if not FIRST_BLOCK <= now <= datetime.now(UTC) + CLOCK_AHEAD:
        raise Garbled(f"its clock says {format_time(now)}")
    return now

"""Any ccxt venue through `fetch_ohlcv`; Binance and Binance.US through ccxt's raw klines, which keep
all nine values.

ccxt signs, routes and maps errors. What it lets pass is refused here: answers that are not JSON,
answers with other columns or types than documented, answers that come too late or grow too large.
"""

from __future__ import annotations

import asyncio
import difflib
import json
import math
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
import polars as pl

from marketdata_assets.errors import (
    BadInput,
    Garbled,
    MarketDataError,
    RequestFailed,
    Retry,
    VenueRefused,
    Wait,
)
from marketdata_assets.model.bar import COLUMN_NAMES
from marketdata_assets.model.market import Market
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import Window, from_ms, to_ms
from marketdata_assets.settings.universe import Venue
from marketdata_assets.sources.base import Fetched, Request

T = TypeVar("T")

DEADLINE = 15.0
MAX_BYTES = 32 * 1024 * 1024
DEFAULT_PAUSE = 10.0
DEFAULT_PAGE = 300


@dataclass(frozen=True, slots=True)
class Klines:
    """A raw klines endpoint of Binance's family: ccxt method, bars a request, request weight allowed
    per minute.
    """

    method: str
    page: int
    weight_limit: int


KLINES: dict[tuple[str, str], Klines] = {
    ("binance", "spot"): Klines("publicGetKlines", 1000, 6000),
    ("binanceus", "spot"): Klines("publicGetKlines", 1000, 1200),
    ("binance", "linear"): Klines("fapiPublicGetKlines", 499, 2400),
    ("binanceusdm", "linear"): Klines("fapiPublicGetKlines", 499, 2400),
}
# position in a kline, and the JSON type Binance documents for it
_KLINE_COLUMNS: tuple[tuple[str, int, type], ...] = (
    ("open_time", 0, int),
    ("open", 1, str),
    ("high", 2, str),
    ("low", 3, str),
    ("close", 4, str),
    ("volume", 5, str),
    ("quote_volume", 7, str),
    ("trades", 8, int),
    ("taker_buy_volume", 9, str),
    ("taker_buy_quote_volume", 10, str),
)
_CLOSE_TIME, _KLINE_WIDTH = 6, 12
_OHLCV = ("open_time", "open", "high", "low", "close", "volume")
_DTYPES = {int: pl.Int64(), str: pl.String()}


@dataclass(slots=True)
class _Answer:
    """What the transport saw of the request that runs in this task."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)


_ANSWER: ContextVar[_Answer] = ContextVar("answer")
_BROKEN = object()


class _LimitedResponse(aiohttp.ClientResponse):
    """A response whose decoded body may not pass MAX_BYTES, so that no answer fills the memory."""

    async def read(self) -> bytes:
        if self._body is None:
            parts: list[bytes] = []
            size = 0
            async for part in self.content.iter_chunked(1 << 16):
                size += len(part)
                if size > MAX_BYTES:
                    self.close()
                    raise Garbled(f"the answer is larger than {MAX_BYTES >> 20} MiB")
                parts.append(part)
            self._body = b"".join(parts)
        return self._body


class _Strict:
    """Mixed in before a ccxt class: what ccxt would turn into an empty list becomes an error."""

    def on_rest_response(
        self,
        code: int,
        reason: str,
        url: str,
        method: str,
        headers: dict[str, str],
        body: str,
        *_: Any,
    ) -> str:
        answer = _ANSWER.get()
        answer.status, answer.headers = code, {k.lower(): v for k, v in headers.items()}
        if code < 400 and body[:1] not in ("{", "["):
            raise Garbled(
                "the answer is not JSON: " + ("it is empty" if not body.strip() else "it is text")
            )
        return body

    def parse_json(self, text: str) -> Any:
        try:
            value = self.on_json_response(text)  # type: ignore[attr-defined]
        except (ValueError, RecursionError):
            value = _BROKEN
        if (_ANSWER.get().status or 0) >= 400:
            return None if value is _BROKEN else value
        if value is _BROKEN:
            raise Garbled("the answer is not JSON: it is cut short or broken")
        if value in ({}, None):
            raise Garbled("the answer holds nothing")
        return value

    def parse_ohlcvs(self, ohlcvs: Any, market: Any = None, *_: Any) -> list[list[Any]]:
        if not isinstance(ohlcvs, list):
            raise Garbled("the answer holds no list of bars")
        return [self.parse_ohlcv(row, market) for row in ohlcvs]  # type: ignore[attr-defined]


class _StrictText(_Strict):
    """The same for venues that send numbers and not text: every digit is kept, no float in between."""

    @staticmethod
    def on_json_response(text: str) -> Any:
        return json.loads(text, parse_float=str)


class CcxtSource:
    """One venue through ccxt's asynchronous client. Lives in the event loop that first uses it."""

    def __init__(self, venue: Venue, deadline: float = DEADLINE) -> None:
        self._venue, self._deadline = venue, deadline
        self._exchange: Any = None
        self._session: aiohttp.ClientSession | None = None
        self._loading = asyncio.Lock()
        kinds = {_kind(symbol) for symbol in venue.symbols}
        rows = [KLINES[venue.name, kind] for kind in kinds if (venue.name, kind) in KLINES]
        self._klines = rows[0] if len(rows) == len(kinds) == 1 else None
        self.weight_limit = self._klines.weight_limit if self._klines else None
        self._page: int | None = self._klines.page if self._klines else None

    @property
    def page_size(self) -> int:
        """Bars a request: the raw endpoint's, or what ccxt states for the venue."""
        return self._page or DEFAULT_PAGE

    @property
    def columns(self) -> tuple[str, ...]:
        """Klines have all nine values, ccxt's bars the first five."""
        return COLUMN_NAMES if self._klines else _OHLCV

    @property
    def skips_gaps(self) -> bool:
        """Binance counts rows from startTime on, so one request sees both sides of any gap."""
        return self._klines is not None

    async def now(self) -> datetime:
        """The venue's server time; where it tells none, ours less a minute."""

        async def ask(exchange: Any) -> datetime:
            if not exchange.has["fetchTime"]:
                return datetime.now(UTC) - timedelta(minutes=1)
            return from_ms(int(await exchange.fetch_time()))

        return (await self._ask("time", ask))[0]

    async def first_open(self, market: Market, timeframe: Timeframe) -> datetime | None:
        """The first bar ever, where the venue's klines count rows; else None."""
        if self._klines is None:
            return None
        rows, _ = await self._ask_klines(market, timeframe, {"startTime": 0, "limit": 1})
        opens = rows["open_time"].to_list()
        return from_ms(opens[0]) if opens and opens[0] is not None else None

    async def fetch(self, market: Market, timeframe: Timeframe, window: Window) -> Fetched:
        """One request for the bars that open inside the window. Raises RequestFailed, VenueRefused or
        BadInput.
        """
        start, end = to_ms(window.start), to_ms(window.end)
        if self._klines:
            params = {"startTime": start, "endTime": end - 1, "limit": self._klines.page}
            rows, request = await self._ask_klines(market, timeframe, params)
            return Fetched(rows, window, requests=(request,))
        limit = window.count(timeframe)

        async def ask(exchange: Any) -> pl.DataFrame:
            self._known(exchange, market)
            return _ohlcv_frame(
                await exchange.fetch_ohlcv(market.symbol, timeframe.name, start, limit)
            )

        answer, request = await self._ask("bars", ask)
        # fetch_ohlcv has no end and some venues no start: what lies outside the page is another
        # page's
        rows = answer.filter(
            pl.col("open_time").is_null()
            | pl.col("open_time").is_between(start, end, closed="left")
        )
        later = (
            answer.filter(pl.col("open_time") >= end)["open_time"].min()
            if rows.is_empty()
            else None
        )
        return Fetched(rows, window, from_ms(later) if isinstance(later, int) else None, (request,))

    async def lists(self, market: Market) -> bool:
        """Whether the venue's list of markets has this one and does not call it inactive."""

        async def ask(exchange: Any) -> bool:
            found = (await exchange.load_markets(True)).get(market.symbol)
            return found is not None and found.get("active") is not False

        return (await self._ask("markets", ask))[0]

    async def close(self) -> None:
        """Give up the connections; the source can be used again afterwards."""
        session, exchange, self._session, self._exchange = self._session, self._exchange, None, None
        if exchange is not None:
            exchange.session = None
        if session is not None:
            await session.close()

    # ------------------------------------------------------------------------------------------ req
    async def _ask_klines(
        self, market: Market, timeframe: Timeframe, params: dict[str, int]
    ) -> tuple[pl.DataFrame, Request]:
        kind = self._klines
        assert kind is not None

        async def ask(exchange: Any) -> pl.DataFrame:
            request = {
                "symbol": self._known(exchange, market),
                "interval": timeframe.name,
                **params,
            }
            return _kline_frame(await getattr(exchange, kind.method)(request), timeframe)

        return await self._ask("bars", ask)

    async def _ask(self, kind: str, operation: Callable[[Any], Awaitable[T]]) -> tuple[T, Request]:
        exchange = await self._open()
        return await self._one(kind, lambda: operation(exchange))

    async def _one(self, kind: str, operation: Callable[[], Awaitable[T]]) -> tuple[T, Request]:
        answer = _Answer()
        token = _ANSWER.set(answer)
        asked_at, begun = time.time(), time.perf_counter()

        def request(outcome: str, error: str | None = None, rows: int | None = None) -> Request:
            return Request(
                kind, asked_at, time.perf_counter() - begun, outcome, answer.status, rows, error
            )

        try:
            with _translated(self._venue.name, answer):
                async with asyncio.timeout(self._deadline):
                    value = await operation()
        except MarketDataError as error:
            error.requests = (request(type(error).__name__.lower(), str(error)),)
            raise
        finally:
            _ANSWER.reset(token)
            self.used_weight = _used_weight(answer) or 0
        return value, request(
            "answered", rows=value.height if isinstance(value, pl.DataFrame) else None
        )

    async def _open(self) -> Any:
        async with self._loading:
            if self._exchange is None:
                exchange = self._create()
                try:
                    await self._one("markets", lambda: self._load(exchange))
                except BaseException:
                    exchange.session = None  # it is ours: ccxt would warn that nobody closed it
                    raise
                self._exchange = exchange
        return self._exchange

    async def _load(self, exchange: Any) -> None:
        await exchange.load_markets()
        if self._page is None:
            features = (exchange.features or {}).get("spot") or {}
            self._page = int((features.get("fetchOHLCV") or {}).get("limit") or DEFAULT_PAGE)

    def _create(self) -> Any:
        import ccxt.async_support as ccxt  # costs seconds: only a process that fetches pays

        base = getattr(ccxt, self._venue.name)
        strict = _Strict if self._klines else _StrictText
        kind = type(f"Strict{self._venue.name}", (strict, base), {})
        if self._session is None:
            self._session = aiohttp.ClientSession(response_class=_LimitedResponse)
        spot = all(_kind(symbol) == "spot" for symbol in self._venue.symbols)
        options = {
            "fetchMarkets": {"types": ["spot"] if spot else ["spot", "linear", "inverse"]},
            "fetchCurrencies": False,
        }
        exchange = kind(
            {
                "session": self._session,
                "enableRateLimit": False,  # the limiter is ours, shared by all processes
                "timeout": int(self._deadline * 1000),
                "number": str,
                "options": options,
            }
        )
        if self._venue.base_url:
            exchange.urls["api"] = _rebased(
                exchange.urls["api"], self._venue.base_url, exchange.urls.get("hostname", "")
            )
        return exchange

    def _known(self, exchange: Any, market: Market) -> str:
        found = exchange.markets.get(market.symbol)
        if found is None:
            near = difflib.get_close_matches(market.symbol, exchange.symbols, n=1, cutoff=0.3)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise BadInput(f"{market.venue} does not know the symbol {market.symbol}{hint}")
        return str(found["id"])


def _kind(symbol: str) -> str:
    quote = symbol.split("/")[1].split(":")
    return (
        "spot" if len(quote) == 1 else "linear" if quote[0] == quote[1].split("-")[0] else "inverse"
    )


def _rebased(urls: Any, base_url: str, hostname: str) -> Any:
    """Every URL with its scheme and host replaced; paths stay."""
    if isinstance(urls, dict):
        return {key: _rebased(value, base_url, hostname) for key, value in urls.items()}
    if isinstance(urls, str) and urls.startswith("http"):
        return base_url + urlsplit(urls.replace("{hostname}", hostname or "host")).path
    return urls


# --------------------------------------------------------------------------------- errors
@contextmanager
def _translated(venue: str, answer: _Answer) -> Iterator[None]:
    """Turn whatever ccxt, aiohttp or a strange answer raises into our tree: retry, wait or give up."""
    from ccxt.base.errors import BaseError

    try:
        yield
    except (RequestFailed, BadInput) as error:
        if not str(error).startswith(venue):
            error.args = (f"{venue}: {error}",)
        raise
    except TimeoutError:
        raise Retry(f"{venue}: no whole answer within the deadline") from None
    except BaseError as error:
        raise _verdict(venue, error, answer) from None
    except (aiohttp.ClientError, OSError) as error:
        raise Retry(f"{venue}: {_reason(error, answer)}") from None
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise Garbled(
            f"{venue}: the answer has not the documented shape ({type(error).__name__})"
        ) from None


def _verdict(venue: str, error: Exception, answer: _Answer) -> MarketDataError:
    """What a ccxt error means: wait, give up, or (all that may pass) try again."""
    from ccxt.base import errors as ccxt

    if isinstance(error, ccxt.DDoSProtection | ccxt.RateLimitExceeded):
        seconds = _retry_after(answer)
        return Wait(f"{venue}: HTTP {answer.status}, it asks to wait {seconds:g} s", seconds)
    if isinstance(error, ccxt.RequestTimeout):
        return Retry(f"{venue}: no whole answer within the deadline")
    if isinstance(error, ccxt.OperationFailed) and answer.status in (403, 404, 405):
        return VenueRefused(
            f"{venue}: HTTP {answer.status}, the address does not serve this API; check base_url"
        )
    if isinstance(
        error,
        ccxt.BadRequest | ccxt.AuthenticationError | ccxt.NotSupported | ccxt.ArgumentsRequired,
    ):
        return VenueRefused(f"{venue}: {_reason(error, answer)}")
    return Retry(f"{venue}: {_reason(error, answer)}")


def _reason(error: Exception, answer: _Answer) -> str:
    """What happened, in a few words and without the URL: a URL may carry a key."""
    if answer.status is None:
        return "it cannot be reached, or the connection broke"
    text = re.sub(r"https?://\S+", "", str(error))
    message = re.search(r'"(?:msg|message|error)"\s*:\s*\[?"([^"]{1,120})', text)
    return f"HTTP {answer.status}" + (
        f", {message.group(1)}" if message else f", {type(error).__name__}"
    )


def _retry_after(answer: _Answer) -> float:
    """Seconds to wait: the header's seconds or date; DEFAULT_PAUSE where it is missing or makes no
    sense.
    """
    header = answer.headers.get("retry-after", "")
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except ValueError:
            return DEFAULT_PAUSE
    return max(0.0, seconds) if math.isfinite(seconds) else DEFAULT_PAUSE


def _used_weight(answer: _Answer) -> int | None:
    value = answer.headers.get("x-mbx-used-weight-1m", "")
    return int(value) if value.isdecimal() else None


# --------------------------------------------------------------------------------- rows to frames
def _kline_frame(rows: Any, timeframe: Timeframe) -> pl.DataFrame:
    """Binance's klines, bound by name after each column's type was checked."""
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise Garbled("the answer is not a list of klines")
    if not rows:
        return pl.DataFrame(schema={name: _DTYPES[kind] for name, _, kind in _KLINE_COLUMNS})
    widths = {len(row) for row in rows}
    if widths != {_KLINE_WIDTH}:
        raise Garbled(
            f"a kline has {', '.join(map(str, sorted(widths)))} columns instead of {_KLINE_WIDTH}"
        )
    columns = list(zip(*rows, strict=True))
    series = [_series(name, columns[position], kind) for name, position, kind in _KLINE_COLUMNS]
    _check_interval(series[0], _series("close_time", columns[_CLOSE_TIME], int), timeframe)
    return pl.DataFrame(series)


def _series(name: str, values: Sequence[Any], kind: type) -> pl.Series:
    refusal = Garbled(
        f"column {name} holds something else than {'whole numbers' if kind is int else 'text'}"
    )
    if not set(map(type, values)) <= {kind, type(None)}:
        raise refusal
    try:
        return pl.Series(name, values, dtype=_DTYPES[kind], strict=True)
    except (TypeError, pl.exceptions.PolarsError, OverflowError):
        raise refusal from None


def _check_interval(opens: pl.Series, closes: pl.Series, timeframe: Timeframe) -> None:
    """A bar may be cut short by a halt, but no bar is longer than its timeframe, and not all are
    shorter.
    """
    width = timeframe.width // timedelta(milliseconds=1)
    lengths = closes - opens + 1
    on_grid = lengths.filter(((opens - to_ms(timeframe.origin)) % width == 0) & (opens > 10**11))
    if (lengths > width).any() or (len(on_grid) > 2 and not (on_grid == width).any()):
        raise Garbled(f"the bars are not {timeframe.name} bars: their close times say so")


def _ohlcv_frame(rows: list[list[Any]]) -> pl.DataFrame:
    """ccxt's six columns as text; what a venue does not give is null."""
    if any(len(row) < 6 for row in rows):
        raise Garbled("a bar has fewer than six columns")
    columns = list(zip(*(row[:6] for row in rows), strict=True)) or [()] * 6
    series = {"open_time": _series("open_time", columns[0], int)}
    for name, values in zip(_OHLCV[1:], columns[1:], strict=True):
        series[name] = pl.Series(
            name, [None if v is None else str(v) for v in values], dtype=pl.String
        )
    missing = {
        name: pl.lit(None, pl.Int64() if name == "trades" else pl.String())
        for name in COLUMN_NAMES
        if name not in series
    }
    return pl.DataFrame(series).with_columns(**missing).select(COLUMN_NAMES)

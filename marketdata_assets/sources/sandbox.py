"""The sandbox exchange: a loopback server in Binance spot's wire format over synthetic, reproducible markets.

A minute is a pure function of (symbol, minute): whole numbers only, hashed and never walked to, so that a page costs
its own rows wherever it lies. All markets share these habits:

- A minute opens at exactly the price at which the minute before it closed, served or not.
- Quiet stretches: up to 12 minutes without a trade, served flat at the last price with volume 0 and 0 trades.
- Holes: up to 4 minutes that the exchange does not have, on some days of one symbol.
- Halts: 02:00 to 03:20 UTC on the 8th of every month no symbol has a bar.
- The bar that is still open is served as it stands at the exchange's clock, as on the real venue.

Coarser bars are the exact aggregates of the minutes; weeks open on Monday. Inside this file a minute counts minutes and
a moment milliseconds since 1970 UTC; prices are in ticks, amounts in steps, quote amounts in ticks x steps.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
import zlib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, NamedTuple

import polars as pl
from aiohttp import web

from marketdata_assets.errors import BadInput
from marketdata_assets.model.bar import PRICES, SCHEMA, empty_bars
from marketdata_assets.model.window import EPOCH, MINUTE, TIMEFRAMES, Timeframe, Window, timeframe, to_ms

Rows = list[list[Any]]
Tamper = Callable[[web.Request, Rows], Awaitable[Rows | web.StreamResponse | None]]

MINUTE_MS = 60_000
DAY = 1440
HALT_DAY, HALT_START, HALT_END = 8, 120, 200
"""Day of the month, first minute of that day without bars, first minute with bars again."""
LONGEST_QUIET = 12
DEFAULT_LIMIT, MAX_LIMIT = 500, 1000
LOG_SIZE = 10_000


@dataclass(frozen=True, slots=True)
class Listing:
    """One market: its middle price in ticks of 10^-`tick` quote, its mean volume a minute in steps of 10^-`step` base.

    `tick + step` is at most 8, so that price times amount is exact in Binance's 8 decimals. `quiet_percent` and
    `hole_percent` of all days have one such stretch. No minute before `listed`, a whole one, exists.
    """

    base: str
    quote: str
    tick: int
    step: int
    price: int
    volume: int
    trades: int
    quiet_percent: int
    hole_percent: int
    listed: datetime

    @property
    def symbol(self) -> str:
        """`BTCUSDT`"""
        return self.base + self.quote

    @property
    def first(self) -> int:
        """The first minute that can have a bar."""
        return (self.listed - EPOCH) // MINUTE


LISTINGS: dict[str, Listing] = {
    row.symbol: row
    for row in (
        Listing("BTC", "USDT", 2, 5, 4_200_000, 1_200_000, 900, 4, 3, datetime(2020, 1, 1, tzinfo=UTC)),
        Listing("ETH", "USDT", 2, 4, 230_000, 1_500_000, 600, 4, 3, datetime(2020, 1, 1, tzinfo=UTC)),
        Listing("SOL", "USDT", 2, 3, 9_500, 2_000_000, 300, 10, 5, datetime(2020, 8, 11, 6, tzinfo=UTC)),
        Listing("DOGE", "USDT", 5, 0, 8_150, 600_000, 120, 15, 5, datetime(2020, 1, 1, tzinfo=UTC)),
        Listing("ADA", "USDT", 4, 1, 4_800, 800_000, 100, 20, 5, datetime(2020, 1, 1, tzinfo=UTC)),
        Listing("SHIB", "USDT", 8, 0, 812, 50_000_000, 60, 40, 8, datetime(2021, 5, 10, 11, 30, tzinfo=UTC)),
    )
}

# ---------------------------------------------------------------------------------------------- the synthetic minutes

_OCTAVES = tuple((16**i, 4**i) for i in range(6))
"""Length in minutes and weight of each layer of the price: weight is the root of length, as in a random walk."""


def _span(first: int, end: int) -> pl.Series:
    return pl.int_range(first, end, dtype=pl.Int64, eager=True)


def _hash(value: pl.Series, key: str) -> pl.Series:
    """32 well mixed bits for each non-negative value; another key, another series."""
    value = value ^ zlib.crc32(key.encode())
    for _ in range(2):
        value = ((value ^ (value // 65536)) * 0x45D9F3B) & 0xFFFFFFFF
    return value ^ (value // 65536)


def _levels(listing: Listing, first: int, end: int) -> pl.Series:
    """The price in ticks at the start of every minute in `[first, end)`: between 1/3 and 5/3 of the listing's."""
    minute = _span(first, end)
    total = minute * 0
    for length, weight in _OCTAVES:
        start = first // length
        knots = _hash(_span(start, end // length + 2), f"{listing.symbol} level {length}") % 2**24 - 2**23
        place, rest = minute // length - start, minute % length
        total += weight * (knots.gather(place) * (length - rest) + knots.gather(place + 1) * rest) // length
    return listing.price + total * listing.price // 2**34


def _stretch(minute: pl.Series, key: str, percent: int, longest: int) -> tuple[pl.Series, pl.Series]:
    """`[first, end)` in minutes of the one stretch each minute's day may have; empty on days without.

    It never crosses midnight.
    """
    day = minute // DAY
    dice = _hash(day, key)
    first = day * DAY + dice % 1400
    chosen = (dice // 2**12 % 100 < percent).cast(pl.Int64)
    return first, first + chosen * (1 + dice // 2**20 % longest)


def _opens(listing: Listing, minute: pl.Series) -> tuple[pl.Series, pl.Series]:
    """The opening price in ticks of each of the consecutive minutes, and whether it is quiet."""
    start, end = _stretch(minute, f"{listing.symbol} quiet", listing.quiet_percent, LONGEST_QUIET)
    held = ((minute >= start) & (minute <= end)).cast(pl.Int64) * (minute - start)
    back = minute[0] - LONGEST_QUIET
    return _levels(listing, back, minute[-1] + 1).gather(minute - held - back), (minute >= start) & (minute < end)


def _absent(listing: Listing, minute: pl.Series) -> pl.Series:
    """Whether the exchange has no bar for the minute: a hole of this symbol, or a halt of all."""
    start, end = _stretch(minute, f"{listing.symbol} hole", listing.hole_percent, 4)
    halt_day = (minute * MINUTE_MS).cast(pl.Datetime("ms")).dt.day() == HALT_DAY
    halted = halt_day & (minute % DAY >= HALT_START) & (minute % DAY < HALT_END)
    return halted | ((minute >= start) & (minute < end))


def _path(listing: Listing, first: int, end: int, now: int) -> pl.DataFrame:
    """Open and close in ticks of the minutes in `[first, end)` that exist, and the dice of the rest."""
    minute = _span(first, end + 1)
    price, quiet = _opens(listing, minute)
    columns = {
        "minute": minute,
        "open": price,
        "close": price.shift(-1),
        "awake": (~quiet).cast(pl.Int64),
        "elapsed": (now - minute * MINUTE_MS).clip(0, MINUTE_MS),
        "dice": _hash(minute, f"{listing.symbol} range"),
        "coin": _hash(minute, f"{listing.symbol} trade"),
    }
    return pl.DataFrame(columns).filter(~_absent(listing, minute)).filter(pl.col("minute") < end)


def _bits(column: str, unit: int = 1) -> pl.Expr:
    """Ten bits of a hash, those from `unit` upwards (1, 2**10 or 2**20): three independent dice in one column."""
    return pl.col(column) // unit % 1024


def _so_far(whole: pl.Expr) -> pl.Expr:
    """What the clock has reached of a minute's amount, rounded up: all of it in a closed minute."""
    return (whole * pl.col("elapsed") + MINUTE_MS - 1) // MINUTE_MS


def _wick(listing: Listing, unit: int) -> pl.Expr:
    """How far in ticks a price went beyond open and close: under 0.1 %, nothing while quiet."""
    return _so_far(pl.col("awake") * (_bits("dice", unit) * listing.price // 2**20 + _bits("dice", unit) % 2))


def _quote(amount: str) -> pl.Expr:
    """The amount times the minute's mean price, which lies within its low and high."""
    room = (pl.col("high") - pl.col("low")) * _bits("coin", 2**20)
    return pl.col(amount) * pl.col("low") + pl.col(amount) * room // 1024


def _minutes(listing: Listing, first: int, end: int, now: int) -> pl.DataFrame:
    """The 1m bars in `[first, end)` at the moment `now`, in whole numbers."""
    busy = (1 + _bits("dice", 2**20)) * (1 + _bits("coin"))
    frame = _path(listing, first, end, now).with_columns(
        close=pl.col("open") + _so_far(pl.col("close") - pl.col("open")),
        volume=_so_far(pl.col("awake") * (1 + busy * listing.volume // 2**18)),
        trades=_so_far(1 + busy * listing.trades // 2**18),
    )
    frame = frame.with_columns(
        high=pl.max_horizontal("open", "close") + _wick(listing, 1),
        low=pl.min_horizontal("open", "close") - _wick(listing, 2**10),
        trades=pl.min_horizontal("volume", "trades"),
        taker_buy_volume=pl.col("volume") * (256 + _bits("coin", 2**10) // 2) // 1024,
    )
    return frame.select(
        *("minute", *PRICES, "volume", "trades", "taker_buy_volume"),
        quote_volume=_quote("volume"),
        taker_buy_quote_volume=_quote("taker_buy_volume"),
    )


# ------------------------------------------------------------------------------------------------- bars and their text

_CHUNK = 2**17
"""Minutes made at once when coarse bars are asked for: memory stays small whatever the page."""


def _floor(tf: Timeframe, minute: int) -> int:
    """The first minute of the bar that holds the minute; it may lie before the listing."""
    origin = (tf.origin - EPOCH) // MINUTE
    return (minute - origin) // tf.minutes * tf.minutes + origin


def _ceil(tf: Timeframe, moment: int) -> int:
    """The first minute of the first bar that opens at or after the moment."""
    return _floor(tf, -(-moment // MINUTE_MS) + tf.minutes - 1)


def _bars(listing: Listing, tf: Timeframe, first: int, end: int, now: int) -> pl.DataFrame:
    """Bars of any timeframe in `[first, end)`, both of them bar openings, in the whole numbers of `_minutes`."""
    start = max(first, listing.first)
    frame = _minutes(listing, start, max(start, min(end, now // MINUTE_MS + 1)), now)
    if tf.minutes == 1:
        return frame
    label = pl.col("minute") - (pl.col("minute") - first) % tf.minutes
    return frame.group_by(label, maintain_order=True).agg(
        pl.col("open").first(),
        pl.col("high").max(),
        pl.col("low").min(),
        pl.col("close").last(),
        pl.exclude("minute", *PRICES).sum(),
    )


def _text(column: str, decimals: int) -> pl.Expr:
    """A whole number of 10^-decimals as text with 8 decimals: 812 at 8 is `0.00000812`."""
    whole, rest = pl.col(column) // 10**decimals, pl.col(column) % 10**decimals * 10 ** (8 - decimals)
    return pl.concat_str(whole.cast(pl.String), pl.lit("."), rest.cast(pl.String).str.zfill(8)).alias(column)


def _wire(bars: pl.DataFrame, listing: Listing, tf: Timeframe) -> pl.DataFrame:
    """Binance's twelve columns, in its order and its text."""
    open_time = pl.col("minute") * MINUTE_MS
    return bars.select(
        open_time.alias("open_time"),
        *(_text(name, listing.tick) for name in PRICES),
        _text("volume", listing.step),
        (open_time + tf.minutes * MINUTE_MS - 1).alias("close_time"),
        _text("quote_volume", listing.tick + listing.step),
        "trades",
        _text("taker_buy_volume", listing.step),
        _text("taker_buy_quote_volume", listing.tick + listing.step),
        pl.lit("0").alias("ignore"),
    )


def _cuts(tf: Timeframe, first: int, end: int, bars: int) -> range:
    """Where to cut `[first, end)` into runs of `bars` bars at most, fewer where those are many minutes."""
    return range(first, end, min(bars, max(1, _CHUNK // tf.minutes)) * tf.minutes)


def truth(symbol: str, interval: str, window: Window) -> pl.DataFrame:
    """The finished bars that open inside the window, whatever any clock says; the model's columns, oldest first.

    Raises BadInput for a symbol or interval the sandbox does not have.
    """
    if symbol not in LISTINGS:
        raise BadInput(f"symbol {symbol!r} is not one of {' '.join(LISTINGS)}")
    listing, tf = LISTINGS[symbol], timeframe(interval)
    first, end = max(_ceil(tf, to_ms(window.start)), _floor(tf, listing.first)), _ceil(tf, to_ms(window.end))
    cuts = _cuts(tf, first, end, _CHUNK)
    bars = [_bars(listing, tf, cut, min(cut + cuts.step, end), end * MINUTE_MS) for cut in cuts]
    if not bars:
        return empty_bars()
    return _wire(pl.concat(bars), listing, tf).select(
        (pl.col("open_time") * 1000).cast(SCHEMA["open_time"]),
        *(pl.col(name).cast(dtype) for name, dtype in SCHEMA.items() if name != "open_time"),
    )


def klines(symbol: str, interval: str, start: int | None, end: int, limit: int, now: int) -> Rows:
    """What Binance answers: bars opening in `[start, end]` (ms, inclusive) that have opened at `now`, oldest first.

    The first `limit` of them; the last `limit` without a start.
    """
    listing, tf = LISTINGS[symbol], TIMEFRAMES[interval]
    first = max(_floor(tf, listing.first), _ceil(tf, start or 0))
    stop = _floor(tf, min(end, now) // MINUTE_MS) + tf.minutes
    cuts = _cuts(tf, first, stop, limit + 1 + 100 // tf.minutes)
    found: list[pl.DataFrame] = []
    for cut in reversed(cuts) if start is None else cuts:
        found.append(_bars(listing, tf, cut, min(cut + cuts.step, stop), now))
        if sum(map(len, found)) >= limit:
            break
    if not found:
        return []
    bars = pl.concat(found[::-1]).tail(limit) if start is None else pl.concat(found).head(limit)
    return [list(row) for row in _wire(bars, listing, tf).rows()]


# ------------------------------------------------------------------------------------------------- the HTTP server

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


def _json(body: object, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    text = json.dumps(body, separators=(",", ":"))
    return web.Response(text=text, status=status, headers=headers, content_type="application/json")


def _refuse(code: int, msg: str) -> web.HTTPBadRequest:
    return web.HTTPBadRequest(text=json.dumps({"code": code, "msg": msg}), content_type="application/json")


def _come_back(status: int, wait: int, msg: str) -> web.Response:
    """The answer to a client that asks too much; `wait` in ms."""
    return _json({"code": -1003, "msg": msg}, status, {"Retry-After": str(-(-wait // 1000))})


def _given(query: Mapping[str, str], name: str) -> str:
    if not query.get(name):
        raise _refuse(-1102, f"Mandatory parameter '{name}' was not sent, was empty/null, or malformed.")
    return query[name]


def _whole(query: Mapping[str, str], name: str) -> int | None:
    if name not in query:
        return None
    if not re.fullmatch(r"[0-9]{1,20}", query[name]):
        raise _refuse(-1100, f"Illegal characters found in parameter '{name}'; legal range is '^[0-9]{{1,20}}$'.")
    return int(query[name])


def _symbol_info(listing: Listing) -> dict[str, Any]:
    """The market's entry in exchangeInfo."""
    tick, step = (f"{Decimal(1).scaleb(-decimals):.8f}" for decimals in (listing.tick, listing.step))
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
            {"filterType": "PRICE_FILTER", "minPrice": tick, "maxPrice": "1000000.00000000", "tickSize": tick},
            {"filterType": "LOT_SIZE", "minQty": step, "maxQty": "90000000000.00000000", "stepSize": step},
            {"filterType": "NOTIONAL", "minNotional": "5.00000000", "maxNotional": "9000000.00000000"},
        ],
        "permissions": [],
        "permissionSets": [["SPOT"]],
    }


class SandboxExchange:
    """The server's state: its clocks, its request weights, and a log of the last 10,000 requests.

    `now` is the market's clock and `wall` the one that request weights are counted by, both in ms since 1970: a
    frozen market still forgets weight every real minute. `tamper` may replace the rows of a klines answer, or the
    whole answer; None leaves them as they are. All clients share one budget of weight.
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
            response = web.Response(text=refusal.text, status=refusal.status, headers=refusal.headers)
        if not response.prepared:
            response.headers["X-MBX-USED-WEIGHT-1M"] = str(self._used)
        self.requests.append(Seen(path, dict(request.query), response.status))
        del self.requests[:-LOG_SIZE]
        return response

    def _limited(self, path: str) -> web.Response | None:
        """Counts the request: 429 over the limit, then 418 for two minutes after more than 10 further requests."""
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
            raise _refuse(-1104, f"Not all sent parameters were read; read '{read}' parameter(s) but was sent '{sent}'")
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
            symbols = [symbol for symbol, listing in LISTINGS.items() if to_ms(listing.listed) <= now]
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
        return changed if isinstance(changed, web.StreamResponse) else _json(rows if changed is None else changed)


async def _start(exchange: SandboxExchange, port: int) -> tuple[web.AppRunner, str]:
    """Binds 127.0.0.1 (port 0: any free one) and gives the base URL; raises BadInput for a port that is taken."""
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
    """Runs the exchange in a thread of this process while the block lasts; gives `http://127.0.0.1:PORT/binance`."""
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


def serve(exchange: SandboxExchange, port: int, ready: Callable[[str], None] = lambda url: None) -> None:
    """Runs the exchange until Ctrl-C; calls `ready` with the base URL once it listens. Port 0 picks a free one."""

    async def until_cancelled() -> None:
        runner, url = await _start(exchange, port)
        try:
            ready(url)
            await asyncio.Event().wait()
        finally:
            await runner.cleanup()

    with suppress(KeyboardInterrupt):
        asyncio.run(until_cancelled())

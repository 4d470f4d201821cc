"""Synthetic markets for the sandbox exchange: reproducible bars, and their text in Binance spot's wire
format.


A minute is a pure function of (symbol, minute): whole numbers only, hashed and never walked to, so
that a page costs its own rows wherever it lies. All markets share these habits:

- A minute opens at exactly the price at which the minute before it closed, served or not.
- Quiet stretches: up to 12 minutes without a trade, served flat at the last price with volume 0 and 0 trades.
- Holes: up to 4 minutes that the exchange does not have, on some days of one symbol.
- Halts: 02:00 to 03:20 UTC on the 8th of every month no symbol has a bar.
- The bar that is still open is served as it stands at the exchange's clock, as on the real venue.

Coarser bars are the exact aggregates of the minutes; weeks open on Monday. In the sandbox's two
files a minute counts minutes and a moment milliseconds since 1970 UTC; prices are in ticks, amounts
in steps, quote amounts in ticks x steps.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import polars as pl

from marketdata_assets.errors import BadInput
from marketdata_assets.model.bar import BAR_SCHEMA, PRICES, empty_bars
from marketdata_assets.model.timeframe import EPOCH, MINUTE, TIMEFRAMES, Timeframe, parse_timeframe
from marketdata_assets.model.window import Window, to_ms

Rows = list[list[Any]]

MINUTE_MS = 60_000
DAY = 1440
HALT_DAY, HALT_START, HALT_END = 8, 120, 200
"""Day of the month, first minute of that day without bars, first minute with bars again."""
LONGEST_QUIET = 12


@dataclass(frozen=True, slots=True)
class Listing:
    """One market: its middle price in ticks of 10^-`tick` quote, its mean volume a minute in steps of
    10^-`step` base.

    `tick + step` is at most 8, so that price times amount is exact in Binance's 8 decimals.
    `quiet_percent` and `hole_percent` of all days have one such stretch. No minute before `listed`,
    a whole one, exists.
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
        Listing(
            "BTC", "USDT", 2, 5, 4_200_000, 1_200_000, 900, 4, 3, datetime(2020, 1, 1, tzinfo=UTC)
        ),
        Listing(
            "ETH", "USDT", 2, 4, 230_000, 1_500_000, 600, 4, 3, datetime(2020, 1, 1, tzinfo=UTC)
        ),
        Listing(
            "SOL", "USDT", 2, 3, 9_500, 2_000_000, 300, 10, 5, datetime(2020, 8, 11, 6, tzinfo=UTC)
        ),
        Listing("DOGE", "USDT", 5, 0, 8_150, 600_000, 120, 15, 5, datetime(2020, 1, 1, tzinfo=UTC)),
        Listing("ADA", "USDT", 4, 1, 4_800, 800_000, 100, 20, 5, datetime(2020, 1, 1, tzinfo=UTC)),
        Listing(
            "SHIB",
            "USDT",
            8,
            0,
            812,
            50_000_000,
            60,
            40,
            8,
            datetime(2021, 5, 10, 11, 30, tzinfo=UTC),
        ),
    )
}

# ---------------------------------------------------------------------------------------------- the

_OCTAVES = tuple((16**i, 4**i) for i in range(6))
"""Length in minutes and weight of each layer of the price: weight is the root of length, as in a
random walk.
"""


def _span(first: int, end: int) -> pl.Series:
    return pl.int_range(first, end, dtype=pl.Int64, eager=True)


def _hash(value: pl.Series, key: str) -> pl.Series:
    """32 well mixed bits for each non-negative value; another key, another series."""
    value = value ^ zlib.crc32(key.encode())
    for _ in range(2):
        value = ((value ^ (value // 65536)) * 0x45D9F3B) & 0xFFFFFFFF
    return value ^ (value // 65536)


def _levels(listing: Listing, first: int, end: int) -> pl.Series:
    """The price in ticks at the start of every minute in `[first, end)`: between 1/3 and 5/3 of the
    listing's.
    """
    minute = _span(first, end)
    total = minute * 0
    for length, weight in _OCTAVES:
        start = first // length
        knots = (
            _hash(_span(start, end // length + 2), f"{listing.symbol} level {length}") % 2**24
            - 2**23
        )
        place, rest = minute // length - start, minute % length
        total += (
            weight
            * (knots.gather(place) * (length - rest) + knots.gather(place + 1) * rest)
            // length
        )
    return listing.price + total * listing.price // 2**34


def _stretch(
    minute: pl.Series, key: str, percent: int, longest: int
) -> tuple[pl.Series, pl.Series]:
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
    return _levels(listing, back, minute[-1] + 1).gather(minute - held - back), (
        minute >= start
    ) & (minute < end)


def _absent(listing: Listing, minute: pl.Series) -> pl.Series:
    """Whether the exchange has no bar for the minute: a hole of this symbol, or a halt of all."""
    start, end = _stretch(minute, f"{listing.symbol} hole", listing.hole_percent, 4)
    halt_day = (minute * MINUTE_MS).cast(pl.Datetime("ms")).dt.day() == HALT_DAY
    halted = halt_day & (minute % DAY >= HALT_START) & (minute % DAY < HALT_END)
    return halted | ((minute >= start) & (minute < end))


def _path(listing: Listing, first: int, end: int, now: int) -> pl.DataFrame:
    """Open and close in ticks of the minutes in `[first, end)` that exist, and the dice of the
    rest.
    """
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
    """Ten bits of a hash, those from `unit` upwards (1, 2**10 or 2**20): three independent dice in one
    column.
    """
    return pl.col(column) // unit % 1024


def _so_far(whole: pl.Expr) -> pl.Expr:
    """What the clock has reached of a minute's amount, rounded up: all of it in a closed minute."""
    return (whole * pl.col("elapsed") + MINUTE_MS - 1) // MINUTE_MS


def _wick(listing: Listing, unit: int) -> pl.Expr:
    """How far in ticks a price went beyond open and close: under 0.1 %, nothing while quiet."""
    return _so_far(
        pl.col("awake") * (_bits("dice", unit) * listing.price // 2**20 + _bits("dice", unit) % 2)
    )


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


# -------------------------------------------------------------------------------------------------

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
    """Bars of any timeframe in `[first, end)`, both of them bar openings, in the whole numbers of
    `_minutes`.
    """
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
    whole, rest = (
        pl.col(column) // 10**decimals,
        pl.col(column) % 10**decimals * 10 ** (8 - decimals),
    )
    return pl.concat_str(
        whole.cast(pl.String), pl.lit("."), rest.cast(pl.String).str.zfill(8)
    ).alias(column)


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
    """Where to cut `[first, end)` into runs of `bars` bars at most, fewer where those are many
    minutes.
    """
    return range(first, end, min(bars, max(1, _CHUNK // tf.minutes)) * tf.minutes)


def truth(symbol: str, interval: str, window: Window) -> pl.DataFrame:
    """The finished bars that open inside the window, whatever any clock says; the model's columns,
    oldest first.

    Raises BadInput for a symbol or interval the sandbox does not have.
    """
    if symbol not in LISTINGS:
        raise BadInput(f"symbol {symbol!r} is not one of {' '.join(LISTINGS)}")
    listing, tf = LISTINGS[symbol], parse_timeframe(interval)
    first, end = (
        max(_ceil(tf, to_ms(window.start)), _floor(tf, listing.first)),
        _ceil(tf, to_ms(window.end)),
    )
    cuts = _cuts(tf, first, end, _CHUNK)
    bars = [_bars(listing, tf, cut, min(cut + cuts.step, end), end * MINUTE_MS) for cut in cuts]
    if not bars:
        return empty_bars()
    return _wire(pl.concat(bars), listing, tf).select(
        (pl.col("open_time") * 1000).cast(BAR_SCHEMA["open_time"]),
        *(pl.col(name).cast(dtype) for name, dtype in BAR_SCHEMA.items() if name != "open_time"),
    )


def klines(symbol: str, interval: str, start: int | None, end: int, limit: int, now: int) -> Rows:
    """What Binance answers: bars opening in `[start, end]` (ms, inclusive) that have opened at `now`,
    oldest first.

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

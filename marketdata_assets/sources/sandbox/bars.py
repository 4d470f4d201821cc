"""Synthetic bars for the sandbox exchange, always the same, and their text in Binance's format.

A minute is a pure function of (symbol, minute): whole numbers only, hashed and never accumulated,
so that a page costs its own rows wherever it lies. All markets have these habits:

- A minute opens at exactly the price at which the minute before it closed, served or not.
- Quiet stretches: up to 12 minutes without a trade are served flat at the last price with volume 0
  and 0 trades.
- Gaps: up to 4 minutes that the exchange does not have, on some days of one symbol.
- Halts: from 02:00 to 03:20 UTC on the 8th of every month no symbol has a bar.
- The bar that is still open is served as it stands at the exchange's clock, as on the real venue.

Coarser bars are the exact aggregates of the minutes; weeks open on Monday. In the sandbox's two
files a minute counts minutes and a moment milliseconds since 1970 UTC; prices are in ticks, amounts
in steps, quote amounts in ticks x steps.
"""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import polars as pl

from marketdata_assets.errors import BadInput
from marketdata_assets.model.bar import BAR_SCHEMA, PRICES, empty_bars
from marketdata_assets.model.timeframe import EPOCH, MINUTE, TIMEFRAMES, Timeframe
from marketdata_assets.model.window import Window, to_ms
from marketdata_assets.sources.sandbox.listings import LISTINGS, Listing

Rows = list[list[Any]]
"""Klines as Binance sends them."""

MINUTE_MS = 60_000
DAY = 1440
HALT_DAY, HALT_START, HALT_END = 8, 120, 200
"""Day of the month, first minute of that day without bars, first minute with bars again."""
LONGEST_NO_TRADE, LONGEST_GAP = 12, 4


# --------------------------------------------------------------------------------- prices
_OCTAVES = tuple((16**i, 4**i) for i in range(6))
"""Length in minutes and weight of each layer of the price. The weight is the root of the length, as
in a random walk."""


def _range(first: int, end: int) -> pl.Series:
    return pl.int_range(first, end, dtype=pl.Int64, eager=True)


def _hash(value: pl.Series, key: str) -> pl.Series:
    """Return 32 well mixed bits for each non-negative value; another series for another key."""
    value = value ^ zlib.crc32(key.encode())
    for _ in range(2):
        value = ((value ^ (value // 65536)) * 0x45D9F3B) & 0xFFFFFFFF
    return value ^ (value // 65536)


def _price_levels(listing: Listing, first: int, end: int) -> pl.Series:
    """Return the price in ticks at the start of every minute in `[first, end)`.

    It stays between 1/3 and 5/3 of the listing's.
    """
    minute = _range(first, end)
    total = minute * 0
    for length, weight in _OCTAVES:
        start = first // length
        dice = _hash(_range(start, end // length + 2), f"{listing.symbol} level {length}")
        knots = dice % 2**24 - 2**23
        place, rest = minute // length - start, minute % length
        mixed = knots.gather(place) * (length - rest) + knots.gather(place + 1) * rest
        total += weight * mixed // length
    return listing.price + total * listing.price // 2**34


class _Stretch(NamedTuple):
    """For each of many minutes: `[first, end)` in minutes of the one stretch of its day."""

    first: pl.Series
    end: pl.Series

    def holds(self, minute: pl.Series) -> pl.Series:
        """Return whether each minute lies in the stretch of its day."""
        return (minute >= self.first) & (minute < self.end)


def _find_stretch(minute: pl.Series, key: str, *, percent: int, longest: int) -> _Stretch:
    """Return the stretch that `percent` of all days have; it is empty on the others.

    It never crosses midnight.
    """
    day = minute // DAY
    dice = _hash(day, key)
    first = day * DAY + dice % 1400
    is_chosen = (dice // 2**12 % 100 < percent).cast(pl.Int64)
    return _Stretch(first, first + is_chosen * (1 + dice // 2**20 % longest))


def _open_prices(listing: Listing, minute: pl.Series) -> tuple[pl.Series, pl.Series]:
    """Return the opening price in ticks of each consecutive minute, and if it has no trade."""
    no_trade = _find_stretch(
        minute,
        f"{listing.symbol} quiet",
        percent=listing.no_trade_percent,
        longest=LONGEST_NO_TRADE,
    )
    is_held = ((minute >= no_trade.first) & (minute <= no_trade.end)).cast(pl.Int64)
    back = minute[0] - LONGEST_NO_TRADE
    levels = _price_levels(listing, back, minute[-1] + 1)
    return levels.gather(minute - is_held * (minute - no_trade.first) - back), no_trade.holds(
        minute
    )


def _is_absent(listing: Listing, minute: pl.Series) -> pl.Series:
    """Return if the exchange has no bar for a minute: a gap of this symbol, or a halt of all."""
    gap = _find_stretch(
        minute, f"{listing.symbol} hole", percent=listing.gap_percent, longest=LONGEST_GAP
    )
    is_halt_day = (minute * MINUTE_MS).cast(pl.Datetime("ms")).dt.day() == HALT_DAY
    is_halted = is_halt_day & (minute % DAY >= HALT_START) & (minute % DAY < HALT_END)
    return is_halted | gap.holds(minute)


# --------------------------------------------------------------------------------- minutes
def _price_path(listing: Listing, first: int, end: int, *, now: int) -> pl.DataFrame:
    """Return open and close in ticks of the minutes in `[first, end)` that exist, with dice."""
    minute = _range(first, end + 1)
    price, is_no_trade = _open_prices(listing, minute)
    columns = {
        "minute": minute,
        "open": price,
        "close": price.shift(-1),
        "awake": (~is_no_trade).cast(pl.Int64),
        "elapsed": (now - minute * MINUTE_MS).clip(0, MINUTE_MS),
        "dice": _hash(minute, f"{listing.symbol} range"),
        "coin": _hash(minute, f"{listing.symbol} trade"),
    }
    existing = pl.DataFrame(columns).filter(~_is_absent(listing, minute))
    return existing.filter(pl.col("minute") < end)


def _bits(column: str, unit: int = 1) -> pl.Expr:
    """Ten bits of a hash, from `unit` on (1, 2**10 or 2**20): three independent dice a column."""
    return pl.col(column) // unit % 1024


def _so_far(whole: pl.Expr) -> pl.Expr:
    """What the clock has reached of a minute's amount, rounded up: all of it in a closed minute."""
    return (whole * pl.col("elapsed") + MINUTE_MS - 1) // MINUTE_MS


def _wick(listing: Listing, unit: int) -> pl.Expr:
    """How far in ticks a price went beyond open and close: under 0.1 %, nothing without trades."""
    ticks = _bits("dice", unit) * listing.price // 2**20 + _bits("dice", unit) % 2
    return _so_far(pl.col("awake") * ticks)


def _quote(amount: str) -> pl.Expr:
    """The amount times the minute's mean price, which lies within its low and high."""
    room = (pl.col("high") - pl.col("low")) * _bits("coin", 2**20)
    return pl.col(amount) * pl.col("low") + pl.col(amount) * room // 1024


def _generate_minutes(listing: Listing, first: int, end: int, *, now: int) -> pl.DataFrame:
    """Return the 1m bars in `[first, end)` at the moment `now`, in whole numbers."""
    busy = (1 + _bits("dice", 2**20)) * (1 + _bits("coin"))
    frame = _price_path(listing, first, end, now=now).with_columns(
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


# --------------------------------------------------------------------------------- bars
INTERVALS = {
    name: tf.width // MINUTE
    for name, tf in TIMEFRAMES.items()
    if tf.width >= MINUTE and not tf.months
}
"""The intervals that it serves, with their minutes."""
_CHUNK = 2**17
"""Minutes that are made at once for coarse bars: memory stays small whatever the page."""


def _floor(tf: Timeframe, minute: int) -> int:
    """Return the first minute of the bar that holds the minute; it may lie before the listing."""
    origin = (tf.origin - EPOCH) // MINUTE
    return (minute - origin) // INTERVALS[tf.name] * INTERVALS[tf.name] + origin


def _ceil(tf: Timeframe, moment: int) -> int:
    """Return the first minute of the first bar that opens at or after the moment."""
    return _floor(tf, -(-moment // MINUTE_MS) + INTERVALS[tf.name] - 1)


def _aggregate(listing: Listing, tf: Timeframe, chunk: range, *, now: int) -> pl.DataFrame:
    """Return bars in the minutes of `chunk`, whose ends are open times, in whole numbers."""
    start = max(chunk.start, listing.first)
    end = max(start, min(chunk.stop, now // MINUTE_MS + 1))
    frame = _generate_minutes(listing, start, end, now=now)
    if INTERVALS[tf.name] == 1:
        return frame
    label = pl.col("minute") - (pl.col("minute") - chunk.start) % INTERVALS[tf.name]
    return frame.group_by(label, maintain_order=True).agg(
        pl.col("open").first(),
        pl.col("high").max(),
        pl.col("low").min(),
        pl.col("close").last(),
        pl.exclude("minute", *PRICES).sum(),
    )


def _cut(tf: Timeframe, first: int, end: int, *, bars: int) -> list[range]:
    """Cut `[first, end)` into chunks of `bars` bars at most, fewer where those are many minutes."""
    step = min(bars, max(1, _CHUNK // INTERVALS[tf.name])) * INTERVALS[tf.name]
    return [range(start, min(start + step, end)) for start in range(first, end, step)]


def _text(column: str, decimals: int) -> pl.Expr:
    """A whole number of 10^-decimals as text with 8 decimals: 812 at 8 is `0.00000812`."""
    whole = pl.col(column) // 10**decimals
    rest = pl.col(column) % 10**decimals * 10 ** (8 - decimals)
    return pl.concat_str(
        whole.cast(pl.String), pl.lit("."), rest.cast(pl.String).str.zfill(8)
    ).alias(column)


def _to_klines(bars: pl.DataFrame, listing: Listing, tf: Timeframe) -> pl.DataFrame:
    """Return Binance's twelve columns, in its order and as its text."""
    open_time = pl.col("minute") * MINUTE_MS
    return bars.select(
        open_time.alias("open_time"),
        *(_text(name, listing.tick) for name in PRICES),
        _text("volume", listing.step),
        (open_time + INTERVALS[tf.name] * MINUTE_MS - 1).alias("close_time"),
        _text("quote_volume", listing.tick + listing.step),
        "trades",
        _text("taker_buy_volume", listing.step),
        _text("taker_buy_quote_volume", listing.tick + listing.step),
        pl.lit("0").alias("ignore"),
    )


def generate_bars(symbol: str, interval: str, window: Window) -> pl.DataFrame:
    """Return the finished bars that open inside the window (model.bar.BAR_SCHEMA), oldest first.

    They are those that the exchange serves once they are closed, whatever any clock says now.
    Raises BadInput for a symbol or interval that the sandbox does not have.
    """
    if symbol not in LISTINGS:
        raise BadInput(f"symbol {symbol!r} is not one of {' '.join(LISTINGS)}")
    if interval not in INTERVALS:
        raise BadInput(f"interval {interval!r} is not one of {' '.join(INTERVALS)}")
    listing, tf = LISTINGS[symbol], TIMEFRAMES[interval]
    first = max(_ceil(tf, to_ms(window.start)), _floor(tf, listing.first))
    end = _ceil(tf, to_ms(window.end))
    chunks = _cut(tf, first, end, bars=_CHUNK)
    bars = [_aggregate(listing, tf, chunk, now=end * MINUTE_MS) for chunk in chunks]
    if not bars:
        return empty_bars()
    return _to_klines(pl.concat(bars), listing, tf).select(
        (pl.col("open_time") * 1000).cast(BAR_SCHEMA["open_time"]),
        *(pl.col(name).cast(dtype) for name, dtype in BAR_SCHEMA.items() if name != "open_time"),
    )


def generate_klines(
    symbol: str, interval: str, start: int | None, *, end: int, limit: int, now: int
) -> Rows:
    """Return what Binance answers: bars that open in `[start, end]` and have opened at `now`.

    All moments are in milliseconds, and both ends are inclusive. They are the first `limit` bars,
    oldest first; the last `limit` without a start.
    """
    listing, tf = LISTINGS[symbol], TIMEFRAMES[interval]
    first = max(_floor(tf, listing.first), _ceil(tf, start or 0))
    stop = _floor(tf, min(end, now) // MINUTE_MS) + INTERVALS[tf.name]
    chunks = _cut(tf, first, stop, bars=limit + 1 + 100 // INTERVALS[tf.name])
    from_end = start is None
    found: list[pl.DataFrame] = []
    for chunk in reversed(chunks) if from_end else chunks:
        found.append(_aggregate(listing, tf, chunk, now=now))
        if sum(map(len, found)) >= limit:
            break
    if not found:
        return []
    bars = pl.concat(found[::-1]).tail(limit) if from_end else pl.concat(found).head(limit)
    return [list(row) for row in _to_klines(bars, listing, tf).rows()]

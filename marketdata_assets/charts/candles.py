"""A candlestick picture of one partition, with volumes, axes and shaded gaps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from math import ceil, floor, gcd

import polars as pl

from marketdata_assets.charts.svg import (
    GREEN,
    RED,
    draw_path,
    embed_image,
    estimate_width,
    format_px,
)
from marketdata_assets.model.bar import PRICES, format_number
from marketdata_assets.model.timeframe import EPOCH, MINUTE

MAX_CANDLES = 124
"""The most candles of a picture: a month of 31 days in candles of 6h."""
DAY = 1440
CANDLE_MINUTES = {
    "1m": 1,
    "3m": 3,
    "5m": 5,
    "15m": 15,
    "30m": 30,
    "1h": 60,
    "2h": 120,
    "4h": 240,
    "6h": 360,
    "8h": 480,
    "12h": 720,
    "1d": DAY,
    "3d": 3 * DAY,
    "1w": 7 * DAY,
}
"""What a candle may span: the names are polars' truncations, and 1w is for bars of 1w only."""
_INTRADAY_STEPS = (1, 5, 15, 30, 60, 120, 240, 360, 720)
_DAY_STEPS = (1, 2, 5, 7, 14, 28, 91, 364)
LABEL_STEPS = (*_INTRADAY_STEPS, *(DAY * days for days in _DAY_STEPS))
"""Minutes between two labels of the time axis."""
MAX_TIME_LABELS = 8

WIDTH, HEIGHT, LEFT = 720, 300, 10
TOP, BOTTOM = 30, 214
"""Where the highest and the lowest price of the axis are drawn, in px."""
VOLUME_TOP, VOLUME_BOTTOM = 228, 272
UP, DOWN = GREEN, RED
SHADE, VOLUME, GRID, INK, PAPER = "#f2d7a0", "#9aa7b8", "#dde1e6", "#4a5260", "#f6f7f9"


@dataclass(frozen=True, slots=True)
class Axes:
    """Where a moment (in minutes since 1970) and a price are drawn, in px.

    `first` and `end` are the minutes at the edges, `low` and `high` the prices, and `right` is the
    right edge in px.
    """

    first: int
    end: int
    low: Decimal
    high: Decimal
    right: float

    def x(self, minute: float) -> float:
        """Return the horizontal place of a minute."""
        return LEFT + (minute - self.first) / (self.end - self.first) * (self.right - LEFT)

    def y(self, price: Decimal) -> float:
        """Return the vertical place of a price."""
        return TOP + float((self.high - price) / (self.high - self.low)) * (BOTTOM - TOP)


def draw_candles(bars: pl.DataFrame) -> str:
    """Draw the bars of one partition as a Markdown image of 720 x 300 px and under 25,000
    characters. Needs the columns open_time, the prices and volume.

    The picture has at most 124 candles of the finest round width, in UTC, with their volume. Where
    bars are missing for longer than half a pixel, the ground is shaded. The prices in the title are
    exact.
    """
    if bars.is_empty():
        return "no bars"
    bars = bars.sort("open_time").with_columns(minute=pl.col("open_time").dt.epoch("s") // 60)
    bar_minutes, width = _choose_width(bars["minute"])
    candles = _aggregate(bars, width)
    low, high = candles["low"].min(), candles["high"].max()
    assert isinstance(low, Decimal)
    assert isinstance(high, Decimal)
    prices = _price_labels(low, high)
    labels = [Decimal(text) for text in prices]
    axes = Axes(
        first=candles["minute"][0],
        end=candles["minute"][-1] + CANDLE_MINUTES[width],
        low=min(low, labels[0]),
        high=max(high, labels[-1]),
        right=WIDTH - 12 - max(34.0, *map(estimate_width, prices)),
    )
    gaps = _gap_path(bars["minute"], bar_minutes, axes)
    title = _title(bars, width) + ("; shaded: no bars" if gaps else "")
    return embed_image(
        "candles",
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {HEIGHT}'"
        f" width='{WIDTH}' height='{HEIGHT}'"
        f" font-family='sans-serif' font-size='11' fill='{INK}'>"
        f"<rect width='{WIDTH}' height='{HEIGHT}' rx='6' fill='{PAPER}'/>"
        f"{draw_path(gaps, SHADE, VOLUME_BOTTOM - TOP)}"
        f"{_draw_grid(prices, CANDLE_MINUTES[width], axes)}"
        f"{_draw_candles(candles, CANDLE_MINUTES[width], axes)}"
        f"{_draw_title(title)}</svg>",
    )


def _choose_width(minutes: pl.Series) -> tuple[int, str]:
    """Return the minutes that a bar spans, as far as the open times show, and the name of the
    candles' width.
    """
    step = gcd(*minutes.diff().drop_nulls().unique().to_list()) or 1
    bar_minutes = max(width for width in CANDLE_MINUTES.values() if step % width == 0)
    fitting = (
        name
        for name, width in CANDLE_MINUTES.items()
        if width % bar_minutes == 0 and minutes[-1] // width - minutes[0] // width < MAX_CANDLES
    )
    return bar_minutes, next(fitting, "1w")


def _aggregate(bars: pl.DataFrame, width: str) -> pl.DataFrame:
    """Return one row for each candle that has a bar, with the minute it opens; volume as a float,
    which is exact enough for drawing.
    """
    return (
        bars.group_by(pl.col("open_time").dt.truncate(width), maintain_order=True)
        .agg(
            pl.col("open").first(),
            pl.col("high").max(),
            pl.col("low").min(),
            pl.col("close").last(),
            pl.col("volume").cast(pl.Float64).sum(),
        )
        .select((pl.col("open_time").dt.epoch("s") // 60).alias("minute"), *PRICES, "volume")
    )


def _price_labels(low: Decimal, high: Decimal) -> list[str]:
    """Return 4 or 5 round prices, lowest first: all between low and high, except for at most one
    beyond them.

    A price that never moved lies amid labels that are about a hundredth of it apart.
    """
    bottom, top = Fraction(low), Fraction(high)
    if top == bottom:
        margin = abs(top) / 100 or Fraction(1)
        bottom, top = bottom - margin, top + margin
    for step, digits in _round_steps(top - bottom):
        first, last = ceil(bottom / step), floor(top / step)
        if last - first > 4:
            continue
        if last - first < 3:  # then it is 2, because half the step gave six or more
            above = (last + 1) * step - top < bottom - (first - 1) * step
            first, last = (first, last + 1) if above else (first - 1, last)
        return [_format_price(number * step, digits) for number in range(first, last + 1)]
    raise AssertionError("the widest step fits at most twice")


def _round_steps(span: Fraction) -> Iterator[tuple[Fraction, int]]:
    """Yield round steps from about a tenth of the span to over half of it, each with the number of
    decimals it needs.
    """
    magnitude = Decimal(f"{float(span):e}").adjusted()
    for power in (magnitude - 1, magnitude):
        for tenths in (10, 20, 25, 50):
            yield Fraction(10) ** (power - 1) * tenths, max(0, (tenths == 25) - power)


def _format_price(value: Fraction, digits: int) -> str:
    return f"{Decimal(f'{value * 10**digits}e-{digits}'):f}"


def _gap_path(minutes: pl.Series, bar_minutes: int, axes: Axes) -> str:
    """Return the path of the spans without any bar, in whole pixels. A span of less than half a
    pixel is left out, because nobody would see it.
    """
    least = (axes.end - axes.first) / (axes.right - LEFT) / 2
    spans = pl.DataFrame({"start": minutes.shift(1) + bar_minutes, "end": minutes})
    visible = spans.filter(pl.col("end") - pl.col("start") >= max(1, least))
    path, reached = "", 0
    for start, end in visible.iter_rows():
        left, right = max(reached, floor(axes.x(start))), ceil(axes.x(end))
        path += f"M{left},{(TOP + VOLUME_BOTTOM) // 2}h{right - left}" if right > left else ""
        reached = right
    return path


def _draw_candles(candles: pl.DataFrame, minutes: int, axes: Axes) -> str:
    """Draw wicks, bodies and volumes of all candles: one path for each color and width."""
    slot = axes.x(axes.first + minutes) - LEFT
    body = min(24.0, max(1.0, slot * 0.7))
    largest = candles["volume"].max()
    paths = dict.fromkeys(("volume", "up", "up wick", "down", "down wick"), "")
    for minute, opened, high, low, closed, volume in candles.iter_rows():
        x, direction = format_px(axes.x(minute) + slot / 2), "up" if closed >= opened else "down"
        upper, lower = axes.y(max(opened, closed)), axes.y(min(opened, closed))
        padding = max(0.0, 1 - (lower - upper)) / 2  # a body is at least 1 px high
        paths[direction] += f"M{x},{format_px(upper - padding)}V{format_px(lower + padding)}"
        paths[f"{direction} wick"] += f"M{x},{format_px(axes.y(high))}V{format_px(axes.y(low))}"
        if volume:
            tip = VOLUME_BOTTOM - volume / largest * (VOLUME_BOTTOM - VOLUME_TOP)
            paths["volume"] += f"M{x},{VOLUME_BOTTOM}V{format_px(tip)}"
    colors = (VOLUME, UP, UP, DOWN, DOWN)
    return "".join(
        draw_path(path, color, 1 if "wick" in name else body)
        for (name, path), color in zip(paths.items(), colors, strict=True)
    )


def _draw_grid(prices: Sequence[str], minutes: int, axes: Axes) -> str:
    """Draw lines and labels of both axes."""
    lines, texts, right = "", "", format_px(axes.right)
    for text in prices:
        y = format_px(axes.y(Decimal(text)))
        lines += f"M{LEFT},{y}H{right}"
        texts += (
            f"<text x='{format_px(axes.right + 6)}' y='{format_px(float(y) + 4)}'>{text}</text>"
        )
    for minute, text in _time_labels(axes.first, axes.end, minutes):
        x = format_px(axes.x(minute))
        lines += f"M{x},{TOP}V{VOLUME_BOTTOM + 5}"
        texts += f"<text x='{x}' y='{VOLUME_BOTTOM + 18}'>{text}</text>"
    return draw_path(lines, GRID, 1) + texts


def _time_labels(first: int, end: int, candle_minutes: int) -> list[tuple[int, str]]:
    """Return at most eight candles of `[first, end)`, in minutes since 1970, at round distances,
    each with its label: `03-16` at midnight, else `08:30`.
    """
    fitting = (
        step
        for step in LABEL_STEPS
        if step % candle_minutes == 0 and end - first <= MAX_TIME_LABELS * step
    )
    step = next(fitting, LABEL_STEPS[-1])
    unit = min(step, DAY)
    minutes = range(-(-first // unit) * unit, end, step)
    return [(m, (EPOCH + m * MINUTE).strftime("%H:%M" if m % DAY else "%m-%d")) for m in minutes]


def _title(bars: pl.DataFrame, width: str) -> str:
    days = dict.fromkeys(
        moment.date().isoformat() for moment in (bars["open_time"][0], bars["open_time"][-1])
    )
    prices = {
        "first": bars["open"][0],
        "last": bars["close"][-1],
        "high": bars["high"].max(),
        "low": bars["low"].min(),
    }
    texts = (f"{name} {format_number(price)}" for name, price in prices.items())
    return f"{width}, {' to '.join(days)} UTC: {', '.join(texts)}"


def _draw_title(text: str) -> str:
    width = WIDTH - 2 * LEFT
    is_long = estimate_width(text) > width
    squeeze = f" textLength='{width}' lengthAdjust='spacingAndGlyphs'" if is_long else ""
    return f"<text x='{LEFT}' y='18'{squeeze}>{text}</text>"

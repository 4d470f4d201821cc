"""Small pictures for metadata: SVG in a data URI, which Dagster's Markdown shows inline. Imports no
Dagster.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Decimal
from fractions import Fraction
from itertools import groupby
from math import ceil, floor, fsum, gcd
from urllib.parse import quote
from xml.sax.saxutils import escape

import polars as pl

from marketdata_assets.model.bar import PRICES
from marketdata_assets.model.timeframe import EPOCH, MINUTE
from marketdata_assets.model.window import Window

POINTS = 48


def sparkline(closes: pl.Series, width: int = 120, height: int = 24) -> str:
    """The closes of a partition as a Markdown image of under 1,000 characters (longer ones Dagster
    hides).
    """
    values = _thinned(closes)
    if len(values) < 2:
        return "no bars"
    low, high = min(values), max(values)
    scale = (high - low) or 1.0
    xs = [round(i * width / (len(values) - 1)) for i in range(len(values))]
    ys = [round((high - v) / scale * (height - 2)) + 1 for v in values]
    points = ",".join(f"{x},{y}" for x, y in zip(xs, ys, strict=True))
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">'
        f'<polyline points="{points}" fill="none" stroke="#2a78d0"/></svg>'
    )
    return _image("closes", svg)


STEPS = 62
"""How many parts of a month a picture of differences shows: about twelve hours each."""


def differences(pairs: pl.DataFrame, month: Window, *limits: int) -> str:
    """How far the venues' closes lie apart (`open_time`, `close_bp`) as a Markdown image of under
    1,000 characters.

    The largest difference of any pair in each part of the month, in basis points from 0; a line for
    each limit.
    """
    if pairs.is_empty():
        return "no two venues"
    width, height = 2 * STEPS, 32
    part = (
        (pl.col("open_time") - month.start).dt.total_seconds()
        * STEPS
        // int((month.end - month.start).total_seconds())
    )
    most = dict(
        pairs.group_by(part).agg(pl.col("close_bp").abs().max().cast(pl.Float64)).iter_rows()
    )
    top = max(1.1 * max(limits), *most.values())
    heights = {part: _number(height - value / top * height) for part, value in most.items()}
    area = "".join(f"V{heights.get(part, height)}h2" for part in range(STEPS))
    lines = "".join(f"M0,{_number(height - limit / top * height)}h{width}" for limit in limits)
    svg = (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}'>"
        f"<path d='M0,{height}{area}V{height}z' fill='#2a78d0'/><path d='{lines}' stroke='{DOWN}'/></svg>"
    )
    return _image("differences", svg)


def _thinned(closes: pl.Series) -> Sequence[float]:
    step = max(1, -(-len(closes) // POINTS))
    return closes.gather_every(step).cast(pl.Float64).to_list()


def _image(name: str, svg: str) -> str:
    """The SVG as a Markdown image, percent-encoded or in base64, whichever is shorter."""
    plain, packed = quote(svg, safe="/:;,=<>"), b64encode(svg.encode()).decode()
    return f"![{name}](data:image/svg+xml" + min(f",{plain}", f";base64,{packed}", key=len) + ")"


def _room(text: str) -> float:
    """What the text needs at 11 px in any common font, in px."""
    return sum(7.8 if letter.isupper() else 6.2 if letter.isalnum() else 3.8 for letter in text)


def _number(value: float) -> str:
    """A coordinate in px, to a tenth."""
    return f"{value:.1f}".removesuffix(".0")


# --------------------------------------------------------------------------------------------------

CANDLES = 124
"""The most candles of a picture: a month of 31 days in candles of 6h."""
DAY = 1440
WIDTHS = {
    "1m": 1,
    "5m": 5,
    "15m": 15,
    "30m": 30,
    "1h": 60,
    "2h": 120,
    "4h": 240,
    "6h": 360,
    "12h": 720,
    "1d": DAY,
    "1w": 7 * DAY,
}
"""What a candle may span, in minutes: the names are polars' truncations, and 1w is for bars as coarse
themselves.
"""
TIME_STEPS = (
    1,
    5,
    15,
    30,
    60,
    120,
    240,
    360,
    720,
    DAY,
    2 * DAY,
    5 * DAY,
    7 * DAY,
    14 * DAY,
    28 * DAY,
    91 * DAY,
    364 * DAY,
)
TIME_LABELS = 8

WIDTH, HEIGHT, LEFT = 720, 300, 10
TOP, BOTTOM = 30, 214
"""Where the highest and the lowest price of the axis are drawn, in px."""
VOLUME_TOP, VOLUME_BOTTOM = 228, 272
UP, DOWN, SHADE, VOLUME, GRID, INK, PAPER = (
    "#1a9c6b",
    "#d8434e",
    "#f2d7a0",
    "#9aa7b8",
    "#dde1e6",
    "#4a5260",
    "#f6f7f9",
)


@dataclass(frozen=True, slots=True)
class _Axes:
    """Where a moment (in minutes since 1970) and a price are drawn, in px."""

    first: int
    end: int
    low: Fraction
    high: Fraction
    right: float

    def x(self, minute: float) -> float:
        return LEFT + (minute - self.first) / (self.end - self.first) * (self.right - LEFT)

    def y(self, price: Decimal | Fraction) -> float:
        return TOP + float((self.high - Fraction(price)) / (self.high - self.low)) * (BOTTOM - TOP)


def candles(bars: pl.DataFrame) -> str:
    """The bars of one partition as a Markdown image of 720 x 300 px and under 25,000 characters.

    At most 124 candles of the finest round width, in UTC, with their volume; where bars are missing
    for longer than half a pixel the ground is shaded. Needs open_time, the prices and volume; the
    prices in the title are exact.
    """
    if bars.is_empty():
        return "no bars"
    bars = bars.sort("open_time").with_columns(minute=pl.col("open_time").dt.epoch("s") // 60)
    base, name = _widths(bars["minute"])
    made = _aggregated(bars, name)
    low, high = made["low"].min(), made["high"].max()
    assert isinstance(low, Decimal)
    assert isinstance(high, Decimal)
    prices = _price_ticks(low, high)
    right = WIDTH - 12 - max(34.0, *map(_room, prices))
    marks = [Fraction(text) for text in prices]
    first, last = made["minute"][0], made["minute"][-1]
    axes = _Axes(
        first,
        last + WIDTHS[name],
        min(Fraction(low), marks[0]),
        max(Fraction(high), marks[-1]),
        right,
    )
    holes = _holes(bars["minute"], base, axes)
    svg = (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {HEIGHT}' width='{WIDTH}' height='{HEIGHT}'"
        f" font-family='sans-serif' font-size='11' fill='{INK}'>"
        f"<rect width='{WIDTH}' height='{HEIGHT}' rx='6' fill='{PAPER}'/>"
        f"{_stroke(holes, SHADE, VOLUME_BOTTOM - TOP)}"
        f"{_grid(prices, WIDTHS[name], axes)}{_bodies(made, WIDTHS[name], axes)}"
        f"{_title(bars, name, low, high, bool(holes))}</svg>"
    )
    return _image("candles", svg)


def _widths(minutes: pl.Series) -> tuple[int, str]:
    """How many minutes a bar spans, as far as the open times tell, and the name of the candles'
    width.
    """
    step = gcd(*minutes.diff().drop_nulls().unique().to_list()) or 1
    base = max(width for width in WIDTHS.values() if step % width == 0)
    fits = (
        n
        for n, w in WIDTHS.items()
        if w % base == 0 and minutes[-1] // w - minutes[0] // w < CANDLES
    )
    return base, next(fits, "1w")


def _aggregated(bars: pl.DataFrame, name: str) -> pl.DataFrame:
    """One row for each candle that has a bar, under the minute it opens; volume as a float, for
    drawing only.
    """
    return (
        bars.group_by(pl.col("open_time").dt.truncate(name), maintain_order=True)
        .agg(
            pl.col("open").first(),
            pl.col("high").max(),
            pl.col("low").min(),
            pl.col("close").last(),
            pl.col("volume").cast(pl.Float64).sum(),
        )
        .select((pl.col("open_time").dt.epoch("s") // 60).alias("minute"), *PRICES, "volume")
    )


def _price_ticks(low: Decimal, high: Decimal) -> list[str]:
    """4 or 5 round prices, lowest first: all from low to high but for at most one beside them.

    A price that never moved lies amid ticks of about a hundredth of it.
    """
    bottom, top = Fraction(low), Fraction(high)
    if top == bottom:
        pad = abs(top) / 100 or Fraction(1)
        bottom, top = bottom - pad, top + pad
    for step, digits in _steps(top - bottom):
        first, last = ceil(bottom / step), floor(top / step)
        if last - first > 4:
            continue
        if last - first < 3:  # then it is 2, as half the step gave six or more
            above = (last + 1) * step - top < bottom - (first - 1) * step
            first, last = (first, last + 1) if above else (first - 1, last)
        return [_fixed(k * step, digits) for k in range(first, last + 1)]
    raise AssertionError("the widest step fits at most twice")


def _steps(span: Fraction) -> Iterator[tuple[Fraction, int]]:
    """Round steps from about a tenth of the span to over half of it, each with the decimals it
    needs.
    """
    power = Decimal(f"{float(span):e}").adjusted()
    for p in (power - 1, power):
        for tenths in (10, 20, 25, 50):
            yield Fraction(10) ** (p - 1) * tenths, max(0, (tenths == 25) - p)


def _fixed(value: Fraction, digits: int) -> str:
    return f"{Decimal(f'{value * 10**digits}e-{digits}'):f}"


def _exact(value: Decimal) -> str:
    text = f"{value:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _holes(minutes: pl.Series, base: int, axes: _Axes) -> str:
    """Path of the spans without any bar, in whole pixels: what lies within half a pixel would not be
    seen.
    """
    least = (axes.end - axes.first) / (axes.right - LEFT) / 2
    spans = pl.DataFrame({"start": minutes.shift(1) + base, "end": minutes})
    path, reached = "", 0
    for start, end in spans.filter(pl.col("end") - pl.col("start") >= max(1, least)).iter_rows():
        left, right = max(reached, floor(axes.x(start))), ceil(axes.x(end))
        path += f"M{left},{(TOP + VOLUME_BOTTOM) // 2}h{right - left}" if right > left else ""
        reached = right
    return path


def _bodies(made: pl.DataFrame, width: int, axes: _Axes) -> str:
    """Wicks, bodies and volumes of all candles: one path for each colour."""
    room = axes.x(axes.first + width) - LEFT
    body = min(24.0, max(1.0, room * 0.7))
    most = made["volume"].max()
    paths = dict.fromkeys(("volume", "up", "up wick", "down", "down wick"), "")
    for minute, opened, high, low, closed, volume in made.iter_rows():
        x, way = _number(axes.x(minute) + room / 2), "up" if closed >= opened else "down"
        upper, lower = axes.y(max(opened, closed)), axes.y(min(opened, closed))
        flat = max(0.0, 1 - (lower - upper)) / 2
        paths[way] += f"M{x},{_number(upper - flat)}V{_number(lower + flat)}"
        paths[f"{way} wick"] += f"M{x},{_number(axes.y(high))}V{_number(axes.y(low))}"
        if volume:
            paths["volume"] += (
                f"M{x},{VOLUME_BOTTOM}V{_number(VOLUME_BOTTOM - volume / most * (VOLUME_BOTTOM - VOLUME_TOP))}"
            )
    colours = (VOLUME, UP, UP, DOWN, DOWN)
    return "".join(
        _stroke(path, colour, 1 if "wick" in name else body)
        for (name, path), colour in zip(paths.items(), colours, strict=True)
    )


def _stroke(path: str, colour: str, width: float) -> str:
    return f"<path stroke='{colour}' stroke-width='{_number(width)}' d='{path}'/>" if path else ""


def _grid(prices: Sequence[str], width: int, axes: _Axes) -> str:
    """Both axes: lines and labels."""
    lines, texts, right = "", "", _number(axes.right)
    for text in prices:
        y = _number(axes.y(Fraction(text)))
        lines += f"M{LEFT},{y}H{right}"
        texts += f"<text x='{_number(axes.right + 6)}' y='{_number(float(y) + 4)}'>{text}</text>"
    for minute, text in _time_ticks(axes.first, axes.end, width):
        x = _number(axes.x(minute))
        lines += f"M{x},{TOP}V{VOLUME_BOTTOM + 5}"
        texts += f"<text x='{x}' y='{VOLUME_BOTTOM + 18}'>{text}</text>"
    return _stroke(lines, GRID, 1) + texts


def _time_ticks(first: int, end: int, width: int) -> list[tuple[int, str]]:
    """At most eight candles of `[first, end)`, in minutes since 1970, a round time apart: `03-16` at
    midnight, else `08:30`.
    """
    step = next(
        (s for s in TIME_STEPS if s % width == 0 and end - first <= TIME_LABELS * s), TIME_STEPS[-1]
    )
    unit = min(step, DAY)
    minutes = range(-(-first // unit) * unit, end, step)
    return [(m, (EPOCH + m * MINUTE).strftime("%H:%M" if m % DAY else "%m-%d")) for m in minutes]


def _title(bars: pl.DataFrame, name: str, low: Decimal, high: Decimal, holes: bool) -> str:
    days = dict.fromkeys(
        moment.date().isoformat() for moment in (bars["open_time"][0], bars["open_time"][-1])
    )
    facts = {"first": bars["open"][0], "last": bars["close"][-1], "high": high, "low": low}
    text = f"{name}, {' to '.join(days)} UTC: " + ", ".join(
        f"{fact} {_exact(value)}" for fact, value in facts.items()
    )
    text += "; shaded: no bars" if holes else ""
    width = WIDTH - 2 * LEFT
    fit = f" textLength='{width}' lengthAdjust='spacingAndGlyphs'" if _room(text) > width else ""
    return f"<text x='{LEFT}' y='18'{fit}>{text}</text>"


# --------------------------------------------------------------------------------------------------

MARKETS, CELLS = 40, 180
"""The most rows and columns of a heat map."""
ROW, HEAD = 14, 18
"""How high a row and the line of months are, in px."""
ACROSS = 450
"""What the cells may need, in px: Dagster cuts off what is wider than its table."""
MONTH_ROOM = 56
"""What the label of a month needs, in px."""
MONTH_STEPS = (1, 2, 3, 6, 12, 24, 60, 120)
FULL, EMPTY, UNWANTED = "#2a9d5c", "#d62839", "#8884"
PARTS = ((0.9, "#ffd23f"), (0.5, "#ff9f1c"), (0.0, "#f3722c"))
"""Colours of what is neither full nor empty, each from above that share."""


def heat_map(rows: Mapping[str, Sequence[float | None]], first_day: date) -> str:
    """Coverage of markets by days as a Markdown image: a row for each key, a cell for each day from
    `first_day`.

    A share of 1 is green, 0 red, between them three ambers; None, a day not wanted, is a faint
    grey. Above 180 days a cell is the worst of several; above 40 markets the worst 40 are shown, in
    the given order. Runs of equal cells are one rectangle: two markets, 90 green days, take under
    1,000 characters.
    """
    if not rows:
        return "no markets"
    days = max(map(len, rows.values()))
    if not days:
        return "no days"
    size = -(-days // CELLS)
    columns = -(-days // size)
    cell = max(2, min(14, ACROSS // columns))
    shown, rest = _worst(rows)
    left = ceil(max(map(_room, shown))) + 8
    names = [*shown, *([rest] if rest else [])]
    labels = "".join(
        f"<text y='{HEAD + i * ROW + 11}'>{escape(name)}</text>" for i, name in enumerate(names)
    )
    width, height = (
        max(left + columns * cell + MONTH_ROOM, ceil(_room(names[-1]))),
        HEAD + ROW * len(names),
    )
    svg = (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}'"
        f" font-family='sans-serif' font-size='11' fill='gray'>{labels}{_months(first_day, days, left, cell / size)}"
        f"<g transform='translate({left},{HEAD + ROW // 2})scale({cell},{ROW})' stroke-width='.8'>"
        f"{_cells(shown.values(), size)}</g></svg>"
    )
    return _image("coverage", svg)


def _worst(
    rows: Mapping[str, Sequence[float | None]],
) -> tuple[dict[str, Sequence[float | None]], str]:
    """The rows to show, in the given order, and what is to be said about the others."""
    lacks = {
        name: fsum(1 - share for share in row if share is not None) for name, row in rows.items()
    }
    order = sorted(rows, key=lambda name: -lacks[name])
    rest = order[MARKETS:]
    chosen = set(order[:MARKETS])
    amiss = sum(lacks[name] > 0 for name in rest)
    text = (
        f"and {len(rest)} more, {f'{amiss} of them not all green' if amiss else 'all green'}"
        if rest
        else ""
    )
    return {name: row for name, row in rows.items() if name in chosen}, text


def _cells(rows: Iterable[Sequence[float | None]], size: int) -> str:
    """All cells in units of a cell, one path for each colour; a run is a stroke as thick as a row."""
    paths: dict[str, str] = {}
    for y, row in enumerate(rows):
        x, reached = 0, dict[str, int]()
        for colour, run in groupby(_colour(row[i : i + size]) for i in range(0, len(row), size)):
            length = len(list(run))
            move = f"m{x - reached[colour]},0" if colour in reached else f"M{x},{y}"
            paths[colour] = paths.get(colour, "") + f"{move}h{length}"
            x += length
            reached[colour] = x
    return "".join(
        f"<path stroke='{colour}' d='{path}'/>" for colour, path in sorted(paths.items())
    )


def _colour(shares: Sequence[float | None]) -> str:
    """The colour of the worst of the days that were wanted."""
    wanted = [share for share in shares if share is not None]
    if not wanted:
        return UNWANTED
    share = min(wanted)
    return FULL if share >= 1 else next((colour for above, colour in PARTS if share > above), EMPTY)


def _months(first_day: date, days: int, left: int, day_width: float) -> str:
    """Labels and ticks where months begin, as many as there is room for; the first day where none
    does.
    """
    step = next((s for s in MONTH_STEPS if s * 30 * day_width >= MONTH_ROOM), MONTH_STEPS[-1])
    every = (first_day + timedelta(days=i) for i in range(days))
    firsts = [day for day in every if day.day == 1 and (day.year * 12 + day.month - 1) % step == 0]
    at = {_number(left + (day - first_day).days * day_width): f"{day:%Y-%m}" for day in firsts} or {
        str(left): f"{first_day}"
    }
    texts = "".join(f"<text x='{x}' y='10'>{text}</text>" for x, text in at.items())
    return f"{texts}<path stroke='gray' d='{''.join(f'M{x},13v5' for x in at)}'/>"

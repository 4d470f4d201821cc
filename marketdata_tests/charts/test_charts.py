"""Pictures are parsed again: every candle, gap and cell lies where its numbers demand, in SVG that
Markdown does not change.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from datetime import date, datetime, timedelta
from decimal import Decimal
from itertools import groupby, pairwise
from random import Random
from urllib.parse import unquote
from xml.etree import ElementTree

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marketdata_assets.charts import candles, heat_map
from marketdata_assets.charts.candles import draw_candles
from marketdata_assets.charts.heat_map import draw_heat_map
from marketdata_assets.charts.svg import embed_image
from marketdata_assets.model.bar import empty_bars
from marketdata_assets.model.window import month_of
from marketdata_assets.sources.sandbox.bars import generate_bars
from marketdata_tests.samples import START, Row, at, frame, row

MINUTE, DAY = timedelta(minutes=1), timedelta(days=1)
MARCH = month_of(at("2024-03-01"))
NS = "{http://www.w3.org/2000/svg}"
Stroke = tuple[float, float, float, float]


# ---------------------------------------------------------------- reading a picture back
def svg_of(markdown: str, name: str) -> ElementTree.Element:
    """Parse the picture, and check that the Markdown is one image and nothing ends its address."""
    found = re.fullmatch(
        rf"!\[{name}\]\(data:image/svg\+xml(;base64)?,([^\s()#\"'&\\]+)\)", markdown
    )
    assert found, markdown[:100]
    packed, text = found.groups()
    assert packed or not re.search(r"%(?![0-9A-F]{2})", text)
    return ElementTree.fromstring(
        base64.b64decode(text, validate=True).decode() if packed else unquote(text, errors="strict")
    )


def strokes(root: ElementTree.Element, color: str) -> list[list[Stroke]]:
    """Return the lines of each path of that color, from and to, in the units of the path."""
    return [
        path_lines(path.attrib["d"])
        for path in root.iter(f"{NS}path")
        if path.get("stroke") == color
    ]


def path_lines(path: str) -> list[Stroke]:
    """Return the lines that a path of M, m, V, v, H and h draws."""
    lines, x, y = [], 0.0, 0.0
    parts = re.findall(r"([MmVvHh])([-\d.,]+)", path)
    assert "".join(a + b for a, b in parts) == path
    for letter, numbers in parts:
        values = [float(n) for n in numbers.split(",")]
        old = x, y
        if letter in "Mm":
            x, y = (values[0], values[1]) if letter == "M" else (x + values[0], y + values[1])
            continue
        (value,) = values
        x, y = (
            (x, value if letter == "V" else y + value)
            if letter in "Vv"
            else (value if letter == "H" else x + value, y)
        )
        lines.append((*old, x, y))
    return lines


def texts(root: ElementTree.Element) -> list[tuple[float, float, str]]:
    return [
        (float(t.get("x", 0)), float(t.get("y", 0)), t.text or "") for t in root.iter(f"{NS}text")
    ]


def title(root: ElementTree.Element) -> str:
    (text,) = [text for _, y, text in texts(root) if y == 18]
    return text


def price_labels(root: ElementTree.Element) -> list[tuple[float, str]]:
    """Return height in px and text of each label of the price axis, lowest price first."""
    height = candles.VOLUME_BOTTOM
    return [(y - 4, text) for x, y, text in texts(root) if 18 < y < height and x > 400]


def y_of(root: ElementTree.Element, price: Decimal) -> float:
    """Return the height of a price by the labels of its axis."""
    (y0, low), *_, (y1, high) = price_labels(root)
    return y0 + float((price - Decimal(low)) / (Decimal(high) - Decimal(low))) * (y1 - y0)


def x_of(root: ElementTree.Element, moment: datetime, year: int = 2024) -> float:
    """Return the place of a moment by the first and the last date of its axis."""
    days = [
        (x, at(f"{year}-{t}"))
        for x, y, t in texts(root)
        if y > candles.VOLUME_BOTTOM and re.fullmatch(r"\d\d-\d\d", t)
    ]
    (x0, first), *_, (x1, last) = days
    return x0 + (moment - first) / (last - first) * (x1 - x0)


def bodies_and_wicks(root: ElementTree.Element, color: str) -> list[tuple[Stroke, Stroke]]:
    paths = strokes(root, color)
    return list(zip(*paths, strict=True)) if paths else []


# ---------------------------------------------------------------- candles
def minutes(
    count: int, step: timedelta = MINUTE, start: datetime = START, **changes: Decimal | None
) -> pl.DataFrame:
    return frame(row(start + i * step, **changes) for i in range(count))


def flat(price: str, count: int = 3) -> pl.DataFrame:
    value = Decimal(price)
    return minutes(count, open=value, high=value, low=value, close=value)


@pytest.fixture(scope="module")
def month() -> pl.DataFrame:
    """Return a month of the sandbox venue, with a halt of 80 minutes on the 8th."""
    return generate_bars("BTCUSDT", "1m", MARCH)


def remove_bars(bars: pl.DataFrame, start: str, end: str) -> pl.DataFrame:
    return bars.filter(~pl.col("open_time").is_between(at(start), at(end), closed="left"))


def expected_candles(bars: pl.DataFrame, width: timedelta) -> list[Row]:
    """Make the candles with Python's own sums."""
    found = []
    for opened, group in groupby(
        bars.iter_rows(named=True), key=lambda r: START + (r["open_time"] - START) // width * width
    ):
        rows = list(group)
        ends = {"open": rows[0]["open"], "close": rows[-1]["close"]}
        span = {"high": max(r["high"] for r in rows), "low": min(r["low"] for r in rows)}
        found.append({"at": opened, **ends, **span, "volume": sum(r["volume"] for r in rows)})
    return found


def test_every_candle_of_a_month_lies_at_its_prices_and_its_time(
    month: pl.DataFrame,
) -> None:
    bars = remove_bars(month, "2024-03-15T03:00", "2024-03-18T03:00")
    root = svg_of(draw_candles(bars), "candles")
    wanted = expected_candles(bars, timedelta(hours=6))
    assert len(wanted) == 124 - 11
    drawn = {color: bodies_and_wicks(root, color) for color in (candles.UP, candles.DOWN)}
    assert sum(map(len, drawn.values())) == len(wanted)
    for candle in wanted:
        body, wick = drawn[candles.UP if candle["close"] >= candle["open"] else candles.DOWN].pop(0)
        assert (
            body[0]
            == body[2]
            == wick[0]
            == wick[2]
            == pytest.approx(x_of(root, candle["at"] + timedelta(hours=3)), abs=0.2)
        )
        assert [wick[1], wick[3]] == pytest.approx(
            [y_of(root, candle["high"]), y_of(root, candle["low"])], abs=0.2
        )
        ends = sorted([y_of(root, candle["open"]), y_of(root, candle["close"])])
        slack = max(0.2, (1 - (ends[1] - ends[0])) / 2 + 0.1)  # a body is never thinner than 1 px
        assert [body[1], body[3]] == pytest.approx(ends, abs=slack)
        assert body[3] - body[1] >= 0.9


def test_volumes_are_drawn_to_scale(month: pl.DataFrame) -> None:
    (bars,) = strokes(svg_of(draw_candles(month), "candles"), candles.VOLUME)
    volumes = [float(candle["volume"]) for candle in expected_candles(month, timedelta(hours=6))]
    full = candles.VOLUME_BOTTOM - candles.VOLUME_TOP
    assert [down - up for _, down, _, up in bars] == pytest.approx(
        [v / max(volumes) * full for v in volumes], abs=0.06
    )


def test_the_title_shows_the_exact_prices(month: pl.DataFrame) -> None:
    prices = {name: month[name].to_list() for name in ("open", "high", "low", "close")}
    facts = {
        "first": prices["open"][0],
        "last": prices["close"][-1],
        "high": max(prices["high"]),
        "low": min(prices["low"]),
    }
    prices_text = ", ".join(f"{name} {value.normalize():f}" for name, value in facts.items())
    assert (
        title(svg_of(draw_candles(month), "candles"))
        == f"6h, 2024-03-01 to 2024-03-31 UTC: {prices_text}; shaded: no bars"
    )


@pytest.mark.parametrize(
    ("count", "step", "name", "drawn"),
    [
        (1, 1, "1m", 1),
        (124, 1, "1m", 124),
        (125, 1, "3m", 42),
        (373, 1, "5m", 75),
        (620, 1, "5m", 124),
        (621, 1, "15m", 42),
        (1440, 1, "15m", 96),
        (2 * 1440, 1, "30m", 96),
        (5 * 1440, 1, "1h", 120),
        (10 * 1440, 1, "2h", 120),
        (20 * 1440, 1, "4h", 120),
        (29 * 1440, 1, "6h", 116),
        (31 * 1440, 1, "6h", 124),
        (744, 60, "6h", 124),
        (186, 240, "8h", 93),  # 6h would split them unevenly
        (31, 1440, "1d", 31),
        (5, 7 * 1440, "1w", 5),
    ],
)
def test_the_width_is_the_finest_round_one_that_gives_no_more_than_124(
    count: int, step: int, name: str, drawn: int
) -> None:
    root = svg_of(draw_candles(minutes(count, step * MINUTE)), "candles")
    assert title(root).startswith(f"{name}, 2024-01-01")
    assert len(bodies_and_wicks(root, candles.UP)) == drawn
    assert not strokes(root, candles.SHADE)
    assert "shaded" not in title(root)


def test_a_gap_is_shaded_from_its_first_minute_to_its_last(month: pl.DataFrame) -> None:
    root = svg_of(
        draw_candles(remove_bars(month, "2024-03-15T03:00", "2024-03-18T03:00")), "candles"
    )
    (spans,) = strokes(root, candles.SHADE)
    wanted = [("2024-03-08T02:00", "2024-03-08T03:20"), ("2024-03-15T03:00", "2024-03-18T03:00")]
    assert len(spans) == len(wanted)
    for (left, _, right, _), (start, end) in zip(spans, wanted, strict=True):
        assert left == pytest.approx(x_of(root, at(start)), abs=1.1)
        assert right == pytest.approx(x_of(root, at(end)), abs=1.1)
        assert left <= x_of(root, at(start)) + 0.1
        assert right >= x_of(root, at(end)) - 0.1
    assert "shaded: no bars" in title(root)


def test_the_shade_of_a_gap_is_as_high_as_the_plot() -> None:
    root = svg_of(
        draw_candles(remove_bars(minutes(100), "2024-01-01T00:40", "2024-01-01T00:44")), "candles"
    )
    (path,) = [p for p in root.iter(f"{NS}path") if p.get("stroke") == candles.SHADE]
    ((_, y, _, _),) = path_lines(path.attrib["d"])
    half = float(path.attrib["stroke-width"]) / 2
    assert (y - half, y + half) == (candles.TOP, candles.VOLUME_BOTTOM)
    assert len(bodies_and_wicks(root, candles.UP)) == 96


def test_a_gap_of_less_than_half_a_pixel_is_not_shaded(month: pl.DataFrame) -> None:
    still = remove_bars(month, "2024-03-20T12:00", "2024-03-20T12:04")
    assert draw_candles(still) != draw_candles(month)  # its volume is less
    assert strokes(svg_of(draw_candles(still), "candles"), candles.SHADE) == strokes(
        svg_of(draw_candles(month), "candles"), candles.SHADE
    )


def test_missing_hours_of_coarse_bars_are_shaded_too() -> None:
    bars = remove_bars(minutes(48, timedelta(hours=1)), "2024-01-01T10:00", "2024-01-01T13:00")
    root = svg_of(draw_candles(bars), "candles")
    assert title(root).startswith("1h,")
    assert len(strokes(root, candles.SHADE)[0]) == 1
    assert len(bodies_and_wicks(root, candles.UP)) == 45


def test_rising_candles_are_green_and_falling_ones_red() -> None:
    up, same, down = (
        row(START + i * MINUTE, close=Decimal(100 + d)) for i, d in enumerate((5, 0, -5))
    )
    root = svg_of(draw_candles(frame([up, same, down])), "candles")
    assert len(bodies_and_wicks(root, candles.UP)) == 2
    ((body, wick),) = bodies_and_wicks(root, candles.DOWN)
    assert [body[1], body[3], wick[1], wick[3]] == pytest.approx(
        [y_of(root, Decimal(p)) for p in (100, 95, 110, 90)], abs=0.2
    )


def test_no_bars_make_no_picture() -> None:
    assert draw_candles(empty_bars()) == "no bars"


def test_one_bar_fills_its_picture() -> None:
    root = svg_of(draw_candles(minutes(1)), "candles")
    ((body, wick),) = bodies_and_wicks(root, candles.UP)
    assert body[0] == wick[0] == pytest.approx((candles.LEFT + x_end(root)) / 2, abs=0.1)
    assert [text for _, y, text in texts(root) if y > candles.VOLUME_BOTTOM] == ["01-01"]


def x_end(root: ElementTree.Element) -> float:
    """Where the lines of the prices end."""
    (lines,) = strokes(root, candles.GRID)
    return max(x for _, _, x, _ in lines)


@pytest.mark.parametrize("volume", [None, Decimal(0)])
def test_without_volume_only_the_volumes_are_missing(volume: Decimal | None) -> None:
    root = svg_of(draw_candles(minutes(5, volume=volume)), "candles")
    assert not strokes(root, candles.VOLUME)
    assert len(bodies_and_wicks(root, candles.UP)) == 5


def test_a_null_volume_does_not_hide_the_others() -> None:
    bars = frame(
        row(START + i * MINUTE, volume=None if i == 1 else Decimal(i + 1)) for i in range(4)
    )
    (found,) = strokes(svg_of(draw_candles(bars), "candles"), candles.VOLUME)
    assert [round(down - up) for _, down, _, up in found] == [11, 33, 44]


@pytest.mark.parametrize(
    ("price", "labels"),
    [
        ("100", ["99.0", "99.5", "100.0", "100.5", "101.0"]),
        (
            "0.000000001",
            [
                "0.000000000990",
                "0.000000000995",
                "0.000000001000",
                "0.000000001005",
                "0.000000001010",
            ],
        ),
        (
            "1000000000000",
            ["990000000000", "995000000000", "1000000000000", "1005000000000", "1010000000000"],
        ),
        ("0", ["-1.0", "-0.5", "0.0", "0.5", "1.0"]),
    ],
)
def test_a_price_that_never_moves_lies_in_the_middle_of_its_axis(
    price: str, labels: list[str]
) -> None:
    root = svg_of(draw_candles(flat(price)), "candles")
    assert [text for _, text in price_labels(root)] == labels
    found = bodies_and_wicks(root, candles.UP)
    assert [(body[1] + body[3]) / 2 for body, _ in found] == pytest.approx(
        [(candles.TOP + candles.BOTTOM) / 2] * 3, abs=0.11
    )
    assert f"first {price}, last {price}, high {price}, low {price}" in title(root)


def test_small_moves_of_a_huge_price_are_drawn_exactly() -> None:
    """As floats these prices would be equal."""
    base, tiny = Decimal(10**12), Decimal("0.000000000001")
    bars = frame([row(START, open=base, high=base + 4 * tiny, low=base, close=base + 2 * tiny)])
    root = svg_of(draw_candles(bars), "candles")
    ((body, wick),) = bodies_and_wicks(root, candles.UP)
    assert (body[1] - wick[1]) == pytest.approx((wick[3] - wick[1]) / 2, abs=0.11)
    assert [text[-5:] for _, text in price_labels(root)] == [
        "00000",
        "00001",
        "00002",
        "00003",
        "00004",
    ]
    assert title(root).endswith("high 1000000000000.000000000004, low 1000000000000")


@given(low=st.integers(1, 10**16), span=st.integers(0, 10**16), exponent=st.integers(-12, 0))
@settings(max_examples=150)
def test_price_axes_have_four_or_five_round_evenly_spaced_labels(
    low: int, span: int, exponent: int
) -> None:
    bottom, top = Decimal(low).scaleb(exponent), Decimal(low + span).scaleb(exponent)
    root = svg_of(
        draw_candles(frame([row(START, open=bottom, low=bottom, high=top, close=top)])), "candles"
    )
    labels = price_labels(root)
    prices = [Decimal(text) for _, text in labels]
    assert len(prices) in (4, 5)
    (step,) = {b - a for a, b in pairwise(prices)}
    assert step.normalize().as_tuple().digits in {(1,), (2,), (2, 5), (5,)}
    assert all(price % step == 0 for price in prices)
    assert len({len(text.partition(".")[2]) for _, text in labels}) == 1
    if span:
        assert sum(bottom <= price <= top for price in prices) >= len(prices) - 1
    ((_, wick),) = bodies_and_wicks(root, candles.UP)
    for y in (wick[1], wick[3], *(y for y, _ in labels)):
        assert candles.TOP <= round(y, 1) <= candles.BOTTOM
    assert [wick[1], wick[3]] == pytest.approx([y_of(root, top), y_of(root, bottom)], abs=0.2)


def test_labels_stay_inside_the_picture(month: pl.DataFrame) -> None:
    for bars in (
        month,
        flat("0.000000000001"),
        flat("99999999999999999999999999"),
        minutes(90),
        minutes(5, 7 * DAY),
    ):
        root = svg_of(draw_candles(bars), "candles")
        assert all(x + 5.5 * len(text) <= candles.WIDTH for x, y, text in texts(root) if y != 18)


@pytest.mark.parametrize(
    ("price", "is_compressed"),
    [("100", False), ("55688.73", False), ("10000000000000.123456789012", True)],
)
def test_only_a_title_that_is_too_long_is_compressed(price: str, is_compressed: bool) -> None:
    (line,) = [
        t
        for t in svg_of(draw_candles(flat(price)), "candles").iter(f"{NS}text")
        if t.get("y") == "18"
    ]
    assert line.get("textLength") == ("700" if is_compressed else None)


@pytest.mark.parametrize(
    ("bars", "labels"),
    [
        (
            minutes(31 * 24, timedelta(hours=1)),
            ["01-01", "01-06", "01-11", "01-16", "01-21", "01-26", "01-31"],
        ),
        (
            minutes(24, timedelta(hours=1), at("2024-01-31T15:00")),
            ["16:00", "20:00", "02-01", "04:00", "08:00", "12:00"],
        ),
        (minutes(10, DAY, at("2024-01-30")), ["01-30", "02-01", "02-03", "02-05", "02-07"]),
        (minutes(4, 7 * DAY), ["01-01", "01-08", "01-15", "01-22"]),
        (
            minutes(600, timedelta(hours=1), at("2024-01-05T11:00")),
            ["01-06", "01-11", "01-16", "01-21", "01-26"],
        ),
    ],
)
def test_time_labels_are_dates_at_midnight_and_times_between(
    bars: pl.DataFrame, labels: list[str]
) -> None:
    root = svg_of(draw_candles(bars), "candles")
    assert [text for _, y, text in texts(root) if y > candles.VOLUME_BOTTOM] == labels


def test_pictures_are_reproducible_in_any_order_of_the_bars(
    month: pl.DataFrame,
) -> None:
    first = draw_candles(month)
    assert draw_candles(month) == first
    assert draw_candles(month.sample(fraction=1, shuffle=True, seed=5)) == first


def test_candles_stay_below_25000_characters(month: pl.DataFrame) -> None:
    assert len(draw_candles(month)) < 9_000
    for share in (0.5, 0.1, 0.03, 0.01, 0.004):
        assert len(draw_candles(month.sample(fraction=share, seed=7))) < 25_000
    pairs = month.filter(pl.int_range(pl.len()) % 100 < 3)  # a gap of 1.5 px next to every bar
    wide = pairs.with_columns(high=pl.col("high") + Decimal(10**20))
    assert len(draw_candles(wide)) < 25_000


# ---------------------------------------------------------------- heat maps
FIRST = date(2024, 1, 1)
COLORS = (
    heat_map.FULL,
    heat_map.EMPTY,
    heat_map.UNWANTED,
    *(color for _, color in heat_map.PARTIAL),
)
SHARES = (1.0, 0.0, None, 0.95, 0.6, 0.3)
"""One for each of the colors, in order."""


def cells(markdown: str) -> list[dict[int, str]]:
    """Return the color of every cell of every row, after a check that none is drawn twice."""
    root = svg_of(markdown, "coverage")
    found: dict[tuple[int, int], str] = {}
    for color in COLORS:
        for x0, y, x1, _ in (line for path in strokes(root, color) for line in path):
            for x in range(int(x0), int(x1)):
                assert (int(y), x) not in found
                found[int(y), x] = color
    rows: list[dict[int, str]] = [{} for _ in range(max(y for y, _ in found) + 1)]
    for (y, x), color in sorted(found.items()):
        rows[y][x] = color
    return rows


def left_and_cell(root: ElementTree.Element) -> tuple[int, int]:
    """Return where the cells begin and how wide one is, in px."""
    (group,) = root.iter(f"{NS}g")
    left, cell = re.findall(r"(\d+),", group.attrib["transform"])
    return int(left), int(cell)


def names(markdown: str) -> list[str]:
    return [
        text
        for x, y, text in texts(svg_of(markdown, "coverage"))
        if x == 0 and y > heat_map.HEADER_HEIGHT
    ]


def months(markdown: str) -> list[str]:
    return [
        text for _, y, text in texts(svg_of(markdown, "coverage")) if y < heat_map.HEADER_HEIGHT
    ]


def random_shares(seed: int, days: int, odd: float) -> list[float | None]:
    dice = Random(seed)
    return [dice.choice(SHARES) if dice.random() < odd else 1.0 for _ in range(days)]


def test_every_cell_has_the_color_of_its_share() -> None:
    rows = {f"venue:M{i}": random_shares(i, 60, 0.5) for i in range(7)}
    color_of = dict(zip(SHARES, COLORS, strict=True))
    wanted = [{x: color_of[share] for x, share in enumerate(row)} for row in rows.values()]
    assert cells(draw_heat_map(rows, FIRST)) == wanted
    assert names(draw_heat_map(rows, FIRST)) == list(rows)


def test_colors_are_all_different_and_only_full_is_green() -> None:
    assert len(set(COLORS)) == len(COLORS) >= 6
    shares = [1.0, 1 - 1e-12, 0.9999, 0.91, 0.9, 0.51, 0.5, 0.01, 1e-12, 0.0]
    (row,) = cells(draw_heat_map({"a": shares}, FIRST))
    assert row[0] == heat_map.FULL
    ambers = [row[x] for x in range(1, 9)]
    assert not {heat_map.FULL, heat_map.EMPTY, heat_map.UNWANTED} & set(ambers)
    assert [color for color, _ in groupby(ambers)] == [color for _, color in heat_map.PARTIAL]
    assert row[9] == heat_map.EMPTY


@pytest.mark.parametrize(("days", "size"), [(180, 1), (181, 2), (360, 2), (361, 3), (3650, 21)])
def test_a_cell_of_many_days_is_the_worst_of_them(days: int, size: int) -> None:
    dice = Random(days)
    shares: list[float | None] = [
        dice.choice([0.3, 0.95]) if dice.random() < 1 / days * 20 else 1.0 for _ in range(days)
    ]
    shares[: 2 * size] = [None] * (2 * size)
    shares[3 * size - 1] = 0.0
    (row,) = cells(draw_heat_map({"a": shares}, FIRST))
    assert len(row) == -(-days // size) <= 180
    order = [None, 1.0, 0.95, 0.3, 0.0]
    color_of = dict(zip(SHARES, COLORS, strict=True))
    for x, color in row.items():
        assert color == color_of[max(shares[x * size : (x + 1) * size], key=order.index)]
    assert (row[0], row[2]) == (heat_map.UNWANTED, heat_map.EMPTY)


def test_days_not_wanted_do_not_hide_the_wanted_ones_of_a_cell() -> None:
    shares: list[float | None] = [None, 1.0] * 100 + [0.6, None]
    (row,) = cells(draw_heat_map({"a": shares}, FIRST))
    assert row == {
        **dict.fromkeys(range(100), heat_map.FULL),
        100: heat_map.PARTIAL[1][1],
    }


def test_of_many_markets_the_forty_worst_are_shown_in_the_given_order() -> None:
    rows: dict[str, Sequence[float | None]] = {f"v:M{i}": [1.0] * 30 for i in range(60)}
    bad = {f"v:M{i}": [1.0] * 29 + [0.999] for i in range(1, 60, 2)}
    rows |= bad
    shown = names(draw_heat_map(rows, FIRST))
    assert len(shown) == 41
    assert set(bad) < set(shown)
    assert shown[:-1] == [name for name in rows if name in shown]
    assert shown[-1] == "and 20 more, all green"
    assert len(cells(draw_heat_map(rows, FIRST))) == 40


def test_the_last_line_counts_hidden_markets_that_are_not_green() -> None:
    rows: dict[str, Sequence[float | None]] = {f"v:M{i}": [0.0, 1.0] for i in range(40)}
    rows |= {"v:fine": [1.0, 1.0], "v:nearly": [0.99, 1.0], "v:later": [None, None]}
    shown = names(draw_heat_map(rows, FIRST))
    assert shown[-1] == "and 3 more, 1 of them not all green"
    assert not {"v:fine", "v:nearly", "v:later"} & set(shown)


def test_forty_markets_need_no_last_line() -> None:
    assert len(names(draw_heat_map({f"v:M{i}": [0.5] for i in range(40)}, FIRST))) == 40


def test_two_green_markets_of_ninety_days_fit_inline() -> None:
    picture = draw_heat_map(
        {"binance:BTC-USDT": [1.0] * 90, "binance:ETH-USDT": [1.0] * 90}, date(2024, 3, 1)
    )
    assert len(picture) < 1_000
    assert [len(path) for path in strokes(svg_of(picture, "coverage"), heat_map.FULL)] == [
        2
    ]  # one rectangle a row


def test_large_maps_stay_small() -> None:
    gaps = {f"binance:M{i}-USDT": random_shares(i, 180, 0.1) for i in range(40)}
    assert len(draw_heat_map(gaps, FIRST)) < 20_000
    noise = {f"binance:M{i}-USDT": random_shares(i, 180, 1.0) for i in range(40)}
    assert len(draw_heat_map(noise, FIRST)) < 60_000
    stripes = {f"binance:M{i}-USDT": SHARES * 30 for i in range(40)}
    assert len(draw_heat_map(stripes, FIRST)) < 60_000


@pytest.mark.parametrize("count", [1, 31, 90, 180, 3650])
def test_a_map_is_at_most_as_wide_as_dagsters_table(count: int) -> None:
    root = svg_of(draw_heat_map({"binance:BTC-USDT": [1.0] * count}, FIRST), "coverage")
    left, cell = left_and_cell(root)
    assert left > 16 * 5.5
    assert left + cell * -(-count // -(-count // 180)) <= 590


@pytest.mark.parametrize(
    ("first", "days", "labels"),
    [
        (date(2024, 3, 1), 90, ["2024-03", "2024-04", "2024-05"]),
        (date(2024, 1, 15), 60, ["2024-02", "2024-03"]),
        (date(2024, 1, 3), 10, ["2024-01-03"]),
        (
            date(2023, 11, 30),
            1000,
            ["2024-01", "2024-07", "2025-01", "2025-07", "2026-01", "2026-07"],
        ),
        (date(2015, 1, 1), 3650, ["2016-01", "2018-01", "2020-01", "2022-01", "2024-01"]),
    ],
)
def test_months_are_ticked_along_the_top(first: date, days: int, labels: list[str]) -> None:
    picture = draw_heat_map({"a": [1.0] * days}, first)
    assert months(picture) == labels
    root = svg_of(picture, "coverage")
    ticks = [x for x, _, _, _ in strokes(root, "gray")[0]]
    assert ticks == [x for x, y, _ in texts(root) if y < heat_map.HEADER_HEIGHT]
    assert all(b - a >= 50 for a, b in pairwise(ticks))


def test_a_month_is_ticked_at_its_first_day() -> None:
    root = svg_of(draw_heat_map({"a": [1.0] * 60}, date(2024, 1, 15)), "coverage")
    left, cell = left_and_cell(root)
    assert [x for x, y, _ in texts(root) if y < heat_map.HEADER_HEIGHT] == [
        left + 17 * cell,
        left + 46 * cell,
    ]


def test_names_may_hold_what_xml_and_markdown_use() -> None:
    odd = ["a & <b>", "(c)] [d](e)", "100%#'\"", "venüe:日本", "f\\g"]
    assert names(draw_heat_map({name: [1.0] for name in odd}, FIRST)) == odd


def test_rows_of_unequal_length_are_drawn_to_their_own_end() -> None:
    first, second = cells(draw_heat_map({"a": [1.0] * 3, "b": [0.0] * 5}, FIRST))
    assert (len(first), len(second)) == (3, 5)


def test_no_markets_or_no_days_make_no_picture() -> None:
    assert draw_heat_map({}, FIRST) == "no markets"
    assert draw_heat_map({"a": [], "b": []}, FIRST) == "no days"


def test_maps_are_reproducible() -> None:
    rows = {f"v:M{i}": random_shares(i, 200, 0.3) for i in range(50)}
    assert draw_heat_map(rows, FIRST) == draw_heat_map(dict(rows), FIRST)


def test_the_shorter_encoding_is_used() -> None:
    plain, odd = "<svg d='" + "M1,2v3" * 50 + "'/>", "<svg a='" + "' '" * 100 + "'/>"
    assert embed_image("x", plain).startswith("![x](data:image/svg+xml,<svg%20d=%27M1,2v3")
    assert (
        embed_image("x", odd)
        == f"![x](data:image/svg+xml;base64,{base64.b64encode(odd.encode()).decode()})"
    )

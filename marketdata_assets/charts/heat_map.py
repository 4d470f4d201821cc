"""A heat map of coverage: markets by days."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import date, timedelta
from itertools import groupby
from math import ceil, fsum
from typing import NamedTuple
from xml.sax.saxutils import escape

from marketdata_assets.charts.svg import embed_image, estimate_width, format_px

MAX_ROWS, MAX_COLUMNS = 40, 180
ROW_HEIGHT, HEADER_HEIGHT = 14, 18
CELLS_WIDTH = 450
"""The px that the cells may take: Dagster cuts off what is wider than its table."""
MONTH_LABEL_WIDTH = 56
MONTH_STEPS = (1, 2, 3, 6, 12, 24, 60, 120)
"""Months between two labels."""
FULL, EMPTY, UNWANTED = "#2a9d5c", "#d62839", "#8884"
PARTIAL = ((0.9, "#ffd23f"), (0.5, "#ff9f1c"), (0.0, "#f3722c"))
"""Colors of shares between 0 and 1, each for what exceeds its share."""

Row = Sequence[float | None]


class _Selection(NamedTuple):
    """The rows that are shown, in the given order, and a line about the others."""

    rows: dict[str, Row]
    note: str


def draw_heat_map(rows: Mapping[str, Row], first_day: date) -> str:
    """Draw the coverage of markets by days as a Markdown image: a row for each key, a cell for each
    day from `first_day`.

    A share of 1 is green, 0 red, and there are three ambers between them; None, a day not wanted,
    is a faint gray. Of more than 180 days a cell shows the worst of several, and of more than 40
    markets the worst 40 are shown, in the given order. Consecutive equal cells are one rectangle,
    so that two markets of 90 green days take under 1,000 characters.
    """
    if not rows:
        return "no markets"
    days = max(map(len, rows.values()))
    if not days:
        return "no days"
    days_per_cell = -(-days // MAX_COLUMNS)
    columns = -(-days // days_per_cell)
    cell = max(2, min(14, CELLS_WIDTH // columns))
    shown, note = _select_worst(rows)
    left = ceil(max(map(estimate_width, shown))) + 8
    names = [*shown, *([note] if note else [])]
    labels = "".join(
        f"<text y='{HEADER_HEIGHT + i * ROW_HEIGHT + 11}'>{escape(name)}</text>"
        for i, name in enumerate(names)
    )
    width = max(left + columns * cell + MONTH_LABEL_WIDTH, ceil(estimate_width(names[-1])))
    height = HEADER_HEIGHT + ROW_HEIGHT * len(names)
    months = _draw_months(first_day, days, left=left, day_width=cell / days_per_cell)
    return embed_image(
        "coverage",
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}'"
        f" font-family='sans-serif' font-size='11' fill='gray'>{labels}{months}"
        f"<g transform='translate({left},{HEADER_HEIGHT + ROW_HEIGHT // 2})"
        f"scale({cell},{ROW_HEIGHT})' stroke-width='.8'>"
        f"{_draw_cells(shown.values(), days_per_cell)}</g></svg>",
    )


def _select_worst(rows: Mapping[str, Row]) -> _Selection:
    missing = {
        name: fsum(1 - share for share in row if share is not None) for name, row in rows.items()
    }
    worst_first = sorted(rows, key=lambda name: -missing[name])
    chosen, others = set(worst_first[:MAX_ROWS]), worst_first[MAX_ROWS:]
    incomplete = sum(missing[name] > 0 for name in others)
    verdict = f"{incomplete} of them not all green" if incomplete else "all green"
    note = f"and {len(others)} more, {verdict}" if others else ""
    return _Selection({name: row for name, row in rows.items() if name in chosen}, note)


def _draw_cells(rows: Iterable[Row], days_per_cell: int) -> str:
    """Draw all cells in units of a cell, one path for each color; consecutive equal cells are a
    stroke as thick as a row.
    """
    paths: dict[str, str] = {}
    for y, row in enumerate(rows):
        x, reached = 0, dict[str, int]()
        colors = (_color(row[i : i + days_per_cell]) for i in range(0, len(row), days_per_cell))
        for color, group in groupby(colors):
            length = len(list(group))
            move = f"m{x - reached[color]},0" if color in reached else f"M{x},{y}"
            paths[color] = paths.get(color, "") + f"{move}h{length}"
            x += length
            reached[color] = x
    return "".join(f"<path stroke='{color}' d='{path}'/>" for color, path in sorted(paths.items()))


def _color(shares: Row) -> str:
    """Return the color of the worst of the days that were wanted."""
    wanted = [share for share in shares if share is not None]
    if not wanted:
        return UNWANTED
    share = min(wanted)
    return FULL if share >= 1 else next((color for above, color in PARTIAL if share > above), EMPTY)


def _draw_months(first_day: date, days: int, *, left: int, day_width: float) -> str:
    """Draw labels and ticks where months begin, as many as fit; the first day where no month
    begins.
    """
    fitting = (step for step in MONTH_STEPS if step * 30 * day_width >= MONTH_LABEL_WIDTH)
    step = next(fitting, MONTH_STEPS[-1])
    every_day = (first_day + timedelta(days=i) for i in range(days))
    labeled = [
        day for day in every_day if day.day == 1 and (day.year * 12 + day.month - 1) % step == 0
    ]
    labels = {
        format_px(left + (day - first_day).days * day_width): f"{day:%Y-%m}" for day in labeled
    } or {str(left): f"{first_day}"}
    texts = "".join(f"<text x='{x}' y='10'>{text}</text>" for x, text in labels.items())
    return f"{texts}<path stroke='gray' d='{''.join(f'M{x},13v5' for x in labels)}'/>"

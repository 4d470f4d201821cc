"""Pictures of one line each, short enough for Dagster to show them in a table of metadata."""

from __future__ import annotations

import polars as pl

from marketdata_assets.charts.svg import BLUE, RED, embed_image, format_px
from marketdata_assets.model.window import Window

POINTS = 48
"""The most points of a sparkline."""
STEPS = 62
"""Parts of a month in a picture of differences: about twelve hours each."""


def draw_sparkline(closes: pl.Series, width: int = 120, height: int = 24) -> str:
    """Draw the closes of a partition as a Markdown image of under 1,000 characters, because Dagster
    hides longer texts.
    """
    step = max(1, -(-len(closes) // POINTS))
    values: list[float] = closes.gather_every(step).cast(pl.Float64).to_list()
    if len(values) < 2:
        return "no bars"
    low, high = min(values), max(values)
    scale = (high - low) or 1.0
    xs = [round(i * width / (len(values) - 1)) for i in range(len(values))]
    ys = [round((high - value) / scale * (height - 2)) + 1 for value in values]
    points = ",".join(f"{x},{y}" for x, y in zip(xs, ys, strict=True))
    return embed_image(
        "closes",
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">'
        f'<polyline points="{points}" fill="none" stroke="{BLUE}"/></svg>',
    )


def draw_differences(pairs: pl.DataFrame, month: Window, *limits: int) -> str:
    """Draw the differences between the venues' closes (`open_time`, `close_bp`) as a Markdown image
    of under 1,000 characters.

    It shows the largest difference of any pair in each part of the month, in basis points from 0,
    and a line for each limit.
    """
    if pairs.is_empty():
        return "no two venues"
    width, height = 2 * STEPS, 32
    seconds = (pl.col("open_time") - month.start).dt.total_seconds()
    part = seconds * STEPS // int((month.end - month.start).total_seconds())
    largest = pl.col("close_bp").abs().max().cast(pl.Float64)
    by_part = dict(pairs.group_by(part).agg(largest).iter_rows())
    top = max(1.1 * max(limits), *by_part.values())
    heights = {part: format_px(height - value / top * height) for part, value in by_part.items()}
    area = "".join(f"V{heights.get(part, height)}h2" for part in range(STEPS))
    lines = "".join(f"M0,{format_px(height - limit / top * height)}h{width}" for limit in limits)
    return embed_image(
        "differences",
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}'>"
        f"<path d='M0,{height}{area}V{height}z' fill='{BLUE}'/>"
        f"<path d='{lines}' stroke='{RED}'/></svg>",
    )

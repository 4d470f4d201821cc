"""Small pictures for metadata: SVG in a data URI, which Dagster's Markdown shows inline. Imports no Dagster."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence

import polars as pl

POINTS = 48


def sparkline(closes: pl.Series, width: int = 120, height: int = 24) -> str:
    """The closes of a partition as a Markdown image of under 1,000 characters (longer ones Dagster hides)."""
    values = _thinned(closes)
    if len(values) < 2:
        return "no bars"
    low, high = min(values), max(values)
    scale = (high - low) or 1.0
    xs = [round(i * width / (len(values) - 1)) for i in range(len(values))]
    ys = [round((high - v) / scale * (height - 2)) + 1 for v in values]
    points = " ".join(f"{x},{y}" for x, y in zip(xs, ys, strict=True))
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">'
        f'<polyline points="{points}" fill="none" stroke="#2a78d0"/></svg>'
    )
    return f"![closes](data:image/svg+xml;base64,{b64encode(svg.encode()).decode()})"


def _thinned(closes: pl.Series) -> Sequence[float]:
    step = max(1, -(-len(closes) // POINTS))
    return closes.gather_every(step).cast(pl.Float64).to_list()

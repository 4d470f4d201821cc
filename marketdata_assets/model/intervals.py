"""Arithmetic on half-open windows of open times. No other module has its own."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import TypeVar

import polars as pl

from marketdata_assets.model.bar import TIME
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import Window

T = TypeVar("T")

LAST_MS = 10**14
"""Milliseconds of the year 5138: later moments are none."""


# --------------------------------------------------------------------------------- windows
def subtract_window(window: Window, cuts: Iterable[Window]) -> list[Window]:
    """Return what remains of a window without the `cuts`, which may overlap; in order."""
    rest, start = [], window.start
    for cut in sorted(filter(None, cuts)):
        if cut.end <= start or cut.start >= window.end:
            continue
        if cut.start > start:
            rest.append(Window(start, cut.start))
        start = max(start, cut.end)
    if start < window.end:
        rest.append(Window(start, window.end))
    return rest


def subtract_windows(windows: Iterable[Window], cuts: Iterable[Window]) -> list[Window]:
    """Return what remains of each window without the `cuts`, which must not overlap each other.

    The parts are in the order of the windows. Cost: one binary search a window, not one pass over
    all cuts.
    """
    ordered = sorted(filter(None, cuts))
    starts, ends = [cut.start for cut in ordered], [cut.end for cut in ordered]
    return [
        rest
        for w in windows
        for rest in subtract_window(
            w, ordered[bisect_right(ends, w.start) : bisect_left(starts, w.end)]
        )
    ]


def coalesce_windows(windows: Iterable[Window]) -> list[Window]:
    """Return the fewest windows that hold the same moments: sorted, disjoint, not adjacent."""
    return fold_neighbors(
        sorted(filter(None, windows)),
        lambda a, b: Window(a.start, max(a.end, b.end)) if b.start <= a.end else None,
    )


def pack_windows(windows: Iterable[Window], timeframe: Timeframe, *, max_bars: int) -> list[Window]:
    """Join neighbors, gaps between them included, into windows of at most `max_bars` bars.

    A window that holds more bars than that stays as it is.
    """

    def join(a: Window, b: Window) -> Window | None:
        fits = Window(a.start, b.end).count(timeframe) <= max_bars
        return Window(a.start, max(a.end, b.end)) if fits else None

    return fold_neighbors(sorted(windows), join)


def count_covers(window: Window, covers: Iterable[Window]) -> int:
    """Return how many of the `covers` hold each moment of a window, at the least."""
    inside = [part for cover in covers if (part := cover & window)]
    edges = sorted({window.start, *(part.start for part in inside), *(part.end for part in inside)})
    moments = [edge for edge in edges if edge < window.end]
    return min(sum(part.start <= moment < part.end for part in inside) for moment in moments)


def enclosing_window(windows: Iterable[Window]) -> Window:
    """Return the smallest window that holds all of these. Raises ValueError for none."""
    found = list(windows)
    return Window(min(w.start for w in found), max(w.end for w in found))


def align_inside(window: Window, timeframe: Timeframe) -> Window:
    """Return the open times of the bars that lie wholly inside the window; empty for none."""
    return Window(timeframe.ceil(window.start), timeframe.floor(window.end))


def count_bars(windows: Iterable[Window], timeframe: Timeframe) -> int:
    """Count the open times inside all of these windows, once for each window that holds them."""
    return sum(window.count(timeframe) for window in windows)


def fold_neighbors(items: Iterable[T], join: Callable[[T, T], T | None]) -> list[T]:
    """Join each item with the one before it wherever `join` returns the joined item.

    `join` is called with what the previous items became and the next item; None keeps both apart.
    """
    folded: list[T] = []
    for item in items:
        joined = join(folded[-1], item) if folded else None
        if joined is None:
            folded.append(item)
        else:
            folded[-1] = joined
    return folded


# --------------------------------------------------------------------------------- open times
def opens_inside(window: Window) -> pl.Expr:
    """Return an expression that is true where the column `open_time` lies in the window."""
    return pl.col("open_time").is_between(window.start, window.end, closed="left")


def slice_inside(bars: pl.DataFrame, window: Window) -> pl.DataFrame:
    """Return the bars that open inside the window. `bars` is sorted by `open_time`."""
    opens = bars["open_time"]
    if opens.is_empty() or (opens[0] >= window.start and opens[-1] < window.end):
        return bars
    first, end = opens.search_sorted(pl.Series([window.start, window.end], dtype=TIME))
    return bars[first:end]


def find_gaps(opens: pl.Series, timeframe: Timeframe, window: Window) -> list[Window]:
    """Return the windows inside `window` that hold no bar; their ends lie on the timeframe's grid.

    `opens` holds the bars' open times: sorted, unique and on the grid.
    """
    if not window:
        return []
    first, last = timeframe.ceil(window.start), timeframe.ceil(window.end)
    inside = opens.filter((opens >= first) & (opens < last))
    before = pl.Series([timeframe.shift(first, -1)], dtype=opens.dtype)
    closes = timeframe.closes(pl.concat([before, inside]))
    nexts = pl.concat([inside, pl.Series([last], dtype=opens.dtype)])
    return [Window(closes[i], nexts[i]) for i in (closes < nexts).arg_true().to_list()]


def close_lengths(opens: pl.Series, timeframe: Timeframe) -> pl.Series:
    """Return the milliseconds that whole bars last which open at these milliseconds since 1970."""
    moments = opens.clip(0, LAST_MS).cast(pl.Datetime("ms"))
    return (timeframe.closes(moments) - moments).dt.total_milliseconds()


def group_consecutive(opens: Iterable[datetime], timeframe: Timeframe) -> list[Window]:
    """Return the fewest windows that hold just these open times."""
    return coalesce_windows(Window(moment, timeframe.shift(moment, 1)) for moment in opens)

"""Where bars are not: holes between what is there, as half-open windows of open times."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from datetime import datetime

import polars as pl

from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import Window


def holes(opens: pl.Series, timeframe: Timeframe, window: Window) -> list[Window]:
    """The windows inside `window` that hold no bar. `opens` is sorted, unique and on the grid."""
    if not window:
        return []
    first, last = timeframe.ceil(window.start), timeframe.ceil(window.end)
    inside = opens.filter((opens >= first) & (opens < last))
    edges = pl.concat(
        [
            pl.Series([first - timeframe.width], dtype=opens.dtype),
            inside,
            pl.Series([last], dtype=opens.dtype),
        ]
    )
    wide = edges.diff() > timeframe.width
    return [
        Window(edges[i - 1] + timeframe.width, edges[i])
        for i in wide.fill_null(False).arg_true().to_list()
    ]


def without(window: Window, cuts: Iterable[Window]) -> list[Window]:
    """What remains of a window when others are cut out of it, in order."""
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


def left_of(windows: Iterable[Window], cuts: Iterable[Window]) -> list[Window]:
    """What remains of many windows when many others, which do not overlap, are cut out of them; in the
    order of the windows.
    """
    ordered = sorted(filter(None, cuts))
    starts, ends = [cut.start for cut in ordered], [cut.end for cut in ordered]
    return [
        rest
        for w in windows
        for rest in without(w, ordered[bisect_right(ends, w.start) : bisect_left(starts, w.end)])
    ]


def merged(windows: Iterable[Window], reach: int, timeframe: Timeframe) -> list[Window]:
    """Neighbouring windows joined as long as the joined one holds at most `reach` bars."""
    joined: list[Window] = []
    for window in sorted(windows):
        if joined and Window(joined[-1].start, window.end).count(timeframe) <= reach:
            joined[-1] = Window(joined[-1].start, max(joined[-1].end, window.end))
        else:
            joined.append(window)
    return joined


def runs(opens: Iterable[datetime], timeframe: Timeframe) -> list[Window]:
    """Single open times as the fewest windows that hold just them."""
    found: list[Window] = []
    for moment in sorted(set(opens)):
        if found and found[-1].end == moment:
            found[-1] = Window(found[-1].start, moment + timeframe.width)
        else:
            found.append(Window(moment, moment + timeframe.width))
    return found

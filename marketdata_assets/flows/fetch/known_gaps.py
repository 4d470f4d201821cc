"""What is left of known gaps: without bars that came, and of a window without gaps that wait."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime

import polars as pl

from marketdata_assets.model.gap import Gap
from marketdata_assets.model.intervals import find_gaps, subtract_windows
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import Window


def remaining_gaps(gaps: Iterable[Gap], opens: pl.Series, timeframe: Timeframe) -> list[Gap]:
    """Return the gaps without the bars that exist now; `opens` are their open times, sorted."""
    known, remaining = list(gaps), []
    moments = opens.to_list() if known else []
    for gap in known:
        first, end = (bisect_left(moments, t) for t in (gap.window.start, gap.window.end))
        if first == end:
            remaining.append(gap)
            continue
        for window in find_gaps(opens, timeframe, gap.window):
            remaining.append(replace(gap, window=window, bars=window.count(timeframe)))
    return remaining


def clip_gaps(gaps: Iterable[Gap], start: datetime, timeframe: Timeframe) -> list[Gap]:
    """Return the gaps without what opens before `start`."""
    kept = ((gap, gap.window & Window(start, gap.window.end)) for gap in gaps)
    return [replace(gap, window=w, bars=w.count(timeframe)) for gap, w in kept if w]


def missing_windows(
    opens: pl.Series, timeframe: Timeframe, window: Window, *, gaps: Iterable[Gap], now: datetime
) -> list[Window]:
    """Return the windows without a bar among `opens` that no gap keeps waiting at `now` (our
    clock).
    """
    waiting = [gap.window for gap in gaps if not gap.is_due(now)]
    return subtract_windows(find_gaps(opens, timeframe, window), waiting)

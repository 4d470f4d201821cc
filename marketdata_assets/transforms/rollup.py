"""Rollups: coarser bars from finer ones, each timeframe from the coarsest that divides it.

All sums are sums of whole numbers, so 1m -> 5m -> ... -> 1w gives digit for digit what 1m -> 1w
would. No bar is made up where there is none: a bucket without bars gives no bar.

A month of bars is small: what costs is the number of calls. So numpy works on whole columns and on
all timeframes at once. There a decimal of 128 bits is two columns of 64; a sum is the difference of
two running sums of halves of 32.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from marketdata_assets.model.bar import DECIMAL, ROLLUP_SCHEMA, SCALE, TIME
from marketdata_assets.model.timeframe import EPOCH, Timeframe
from marketdata_assets.model.window import Window

_DIGITS = 10**38
_HALF, _LOW = np.uint64(32), np.uint64(2**32 - 1)

Array = Any


class _Level(NamedTuple):
    """The buckets of one timeframe: their labels, and where each begins among the rows of `parent` and
    among the bars.
    """

    parent: int
    labels: Array
    starts: Array
    first: Array


class _Buckets(NamedTuple):
    """All buckets that are wanted, one timeframe after the other: label, first and last bar; the slice
    of each level; where each timeframe ends here; and of how many bars the largest is made.
    """

    labels: Array
    first: Array
    last: Array
    cuts: tuple[slice, ...]
    ends: tuple[int, ...]
    most: int


class _Wide(NamedTuple):
    """Whole numbers of 128 bits: high * 2**64 + low. `high` is None where it is zero throughout."""

    low: Array
    high: Array | None = None


def roll_up(
    bars: pl.DataFrame, base: Timeframe, timeframes: Sequence[Timeframe], whole: Window
) -> dict[Timeframe, pl.DataFrame]:
    """Bars of `base` (model.bar.BAR_SCHEMA, sorted, one market) to every timeframe
    (model.bar.ROLLUP_SCHEMA).

    Only buckets that lie wholly inside `whole`, the window that has been asked for, are returned:
    an open bar, or one that reaches before the first day, is not a bar yet. `vwap` is rounded to 12
    decimals, half to even.
    """
    if bars.is_empty() or not timeframes:
        return {tf: pl.DataFrame(schema=ROLLUP_SCHEMA) for tf in timeframes}
    ordered = sorted(timeframes, key=lambda tf: tf.width)
    levels = _levels(bars["open_time"], [base, *ordered])
    buckets = _wanted(levels, ordered, whole, bars.height)
    columns = {
        name: _rolled(bars[name], levels, buckets) for name in bars.columns if name != "open_time"
    }
    columns["open_time"] = pl.Series(buckets.labels).cast(TIME)
    columns["vwap"] = _vwap(columns["quote_volume"], columns["volume"])
    columns["bars_expected"] = pl.Series(
        np.repeat([tf.width // base.width for tf in ordered], np.diff(buckets.ends))
    )
    columns["bars_present"] = pl.Series(buckets.last - buckets.first + 1)
    together = pl.DataFrame([columns[name].alias(name) for name in ROLLUP_SCHEMA])
    frames = {
        tf: together.slice(a, b - a)
        for tf, (a, b) in zip(ordered, pairwise(buckets.ends), strict=True)
    }
    return {tf: frames[tf] for tf in timeframes}


def _vwap(quote_volume: pl.Series, volume: pl.Series) -> pl.Series:
    some = pl.when(pl.lit(volume) != 0).then(pl.lit(volume))
    return pl.select((pl.lit(quote_volume) / some).cast(DECIMAL)).to_series()


# --------------------------------------------------------------------------------- buckets
def _levels(opens: pl.Series, timeframes: Sequence[Timeframe]) -> list[_Level]:
    """One level per timeframe; the first is the bars themselves."""
    bars = _Level(0, opens.to_physical().to_numpy(), None, None)
    levels = [bars]
    for i, tf in enumerate(timeframes[1:], 1):
        parent = max(j for j in range(i) if not tf.width % timeframes[j].width)
        width, origin = _us(tf.width), _us(tf.origin - EPOCH)
        number = (levels[parent].labels - origin) // width
        starts = np.flatnonzero(number[1:] != number[:-1]) + 1
        starts = np.concatenate([[0], starts])
        levels.append(
            _Level(
                parent,
                number[starts] * width + origin,
                starts,
                levels[parent].first[starts] if parent else starts,
            )
        )
    return levels


def _wanted(
    levels: list[_Level], timeframes: Sequence[Timeframe], whole: Window, bars: int
) -> _Buckets:
    """The buckets that lie wholly inside the window."""
    cuts, lasts = [], []
    for level, tf in zip(levels[1:], timeframes, strict=True):
        begin, end = _us(tf.ceil(whole.start) - EPOCH), _us(whole.end - tf.width - EPOCH) + 1
        cuts.append(slice(*np.searchsorted(level.labels, [begin, max(begin, end)])))
        lasts.append(np.append(level.first[1:], bars)[cuts[-1]] - 1)
    labels = np.concatenate(
        [level.labels[cut] for level, cut in zip(levels[1:], cuts, strict=True)]
    )
    first = np.concatenate([level.first[cut] for level, cut in zip(levels[1:], cuts, strict=True)])
    last = np.concatenate(lasts)
    ends = (0, *accumulate(cut.stop - cut.start for cut in cuts))
    return _Buckets(labels, first, last, tuple(cuts), ends, int((last - first).max(initial=0)) + 1)


def _us(span: timedelta) -> int:
    return span // timedelta(microseconds=1)


# --------------------------------------------------------------------------------- columns
def _rolled(column: pl.Series, levels: list[_Level], buckets: _Buckets) -> pl.Series:
    """One column of all buckets."""
    lacking = column.is_null().cast(pl.UInt64).to_numpy() if column.null_count() else None
    numbers = _wide(column if lacking is None else column.fill_null(0))
    if column.name in ("open", "close"):
        made = _picked(numbers, buckets.first if column.name == "open" else buckets.last)
    elif column.name in ("high", "low"):
        made = _extremes(numbers, column.name == "high", levels, buckets)
    else:
        made = _sums(numbers, buckets)
    found = _decimals(made) if column.dtype == DECIMAL else pl.Series(made.low.view(np.int64))
    if lacking is None:
        return found
    # null as soon as one bar lacks it: a sum of the others would be a number no venue ever said
    return pl.select(pl.when(pl.Series(_between(lacking, buckets) == 0)).then(found)).to_series()


def _picked(numbers: _Wide, rows: Array) -> _Wide:
    return _Wide(numbers.low[rows], None if numbers.high is None else numbers.high[rows])


def _between(values: Array, buckets: _Buckets) -> Array:
    """The sum of each bucket, modulo 2**64: the running sum at its end less the one before its
    beginning.
    """
    running = np.zeros(values.size + 1, np.uint64)
    np.cumsum(values, out=running[1:])
    return running[buckets.last + 1] - running[buckets.first]


def _sums(numbers: _Wide, buckets: _Buckets) -> _Wide:
    """The sum of each bucket; where 64 bits might not hold it, from halves of 32 bits, which do not
    overflow.
    """
    if numbers.high is None and int(numbers.low.max()) * buckets.most < 2**64:
        return _Wide(_between(numbers.low, buckets))
    right, left = _between(numbers.low & _LOW, buckets), _between(numbers.low >> _HALF, buckets)
    low = (left << _HALF) + right
    high = (left >> _HALF) + (low < right)
    return _Wide(low, high if numbers.high is None else high + _between(numbers.high, buckets))


def _extremes(numbers: _Wide, highest: bool, levels: list[_Level], buckets: _Buckets) -> _Wide:
    reduce, neutral = (np.maximum, 0) if highest else (np.minimum, 2**64 - 1)
    made = [numbers]
    for level in levels[1:]:
        made.append(_extreme(made[level.parent], level.starts, reduce, np.uint64(neutral)))
    kept = [_picked(numbers, cut) for numbers, cut in zip(made[1:], buckets.cuts, strict=True)]
    high = None if numbers.high is None else np.concatenate([k.high for k in kept])
    return _Wide(np.concatenate([k.low for k in kept]), high)


def _extreme(numbers: _Wide, starts: Array, reduce: np.ufunc, neutral: np.uint64) -> _Wide:
    """The highest or lowest of each bucket: by the high halves, then by the low halves of those that
    have it.
    """
    if numbers.high is None:
        return _Wide(reduce.reduceat(numbers.low, starts))
    signed = numbers.high.view(np.int64)
    high = reduce.reduceat(signed, starts)
    has_it = signed == np.repeat(high, np.diff(starts, append=signed.size))
    return _Wide(
        reduce.reduceat(np.where(has_it, numbers.low, neutral), starts), high.view(np.uint64)
    )


# --------------------------------------------------------------------------------- 64 and 128 bits
def _wide(column: pl.Series) -> _Wide:
    if column.dtype != DECIMAL:
        return _Wide(column.to_numpy().view(np.uint64))
    array = column.rechunk().to_arrow()
    halves = np.frombuffer(array.buffers()[1], np.uint64).reshape(-1, 2)[
        array.offset : array.offset + len(array)
    ]
    high = halves[:, 1]
    return _Wide(
        np.ascontiguousarray(halves[:, 0]), np.ascontiguousarray(high) if high.any() else None
    )


def _decimals(numbers: _Wide) -> pl.Series:
    import pyarrow as pa

    halves = np.zeros((numbers.low.size, 2), np.uint64)
    halves[:, 0] = numbers.low
    if numbers.high is not None:
        halves[:, 1] = numbers.high
        if numbers.high.size and int(np.abs(numbers.high.view(np.int64)).max()) >= _DIGITS >> 64:
            raise OverflowError("a sum has more than 38 digits")
    return pl.Series(
        pa.Decimal128Array.from_buffers(
            pa.decimal128(38, SCALE), numbers.low.size, [None, pa.py_buffer(halves)]
        )
    )

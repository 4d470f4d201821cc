"""Rollups: coarser bars from finer ones, each timeframe from the coarsest that divides it.

All sums are sums of whole numbers, so 1m -> 5m -> ... -> 1M gives digit for digit what 1m -> 1w
would. No bar is invented: a time bucket without bars gives no bar.

A month of bars is small, so the number of calls decides the cost: numpy works on whole columns and
on all timeframes at once. A decimal of 128 bits is two columns of 64 there; a sum is the difference
of two running sums of halves of 32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import polars as pl

from marketdata_assets.model.bar import DECIMAL, ROLLUP_SCHEMA, TIME
from marketdata_assets.model.int128 import Array, Int128, read_int128, to_decimals
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import Window, to_us

_RESOLUTION = timedelta(microseconds=1)
_HALF, _LOW = np.uint64(32), np.uint64(2**32 - 1)


class _Level(NamedTuple):
    """The time buckets of one timeframe."""

    parent: int
    """The level that they are made from."""
    labels: Array
    """Their open times in microseconds since 1970."""
    starts: Array
    """Where each begins among the rows of `parent`."""
    first: Array
    """Where each begins among the bars."""


class _Buckets(NamedTuple):
    """All wanted time buckets, one timeframe after the other."""

    labels: Array
    first: Array
    """The first bar of each."""
    last: Array
    """The last bar of each."""
    cuts: tuple[slice, ...]
    """The wanted slice of each level."""
    ends: tuple[int, ...]
    """Where each timeframe ends among the wanted buckets; begins with 0."""
    most: int
    """The number of bars of the largest bucket."""


def roll_up(
    bars: pl.DataFrame,
    base: Timeframe,
    timeframes: Sequence[Timeframe],
    *,
    whole: Window,
    owned: Mapping[Timeframe, Window] | None = None,
) -> dict[Timeframe, pl.DataFrame]:
    """Return the bars of every timeframe (model.bar.ROLLUP_SCHEMA), made from those of `base`.

    `bars` has model.bar.BAR_SCHEMA, sorted, of one market. `whole` is the window that was fetched:
    a bar that reaches beyond it is not complete, and is left out, as are bars that open outside the
    `owned` window of their timeframe. `vwap` is rounded to 12 decimals,
    half to even. Raises OverflowError for a sum of more than 38 digits.
    """
    if bars.is_empty() or not timeframes:
        return {tf: pl.DataFrame(schema=ROLLUP_SCHEMA) for tf in timeframes}
    ordered = sorted(timeframes, key=lambda tf: tf.width)
    levels = _build_levels(bars["open_time"], [base, *ordered])
    wanted = {tf: _wanted_opens(tf, whole, owned[tf] if owned else whole) for tf in ordered}
    buckets = _select_buckets(levels, wanted, bars=bars.height)
    columns = {
        name: _roll_up_column(bars[name], levels, buckets)
        for name in bars.columns
        if name != "open_time"
    }
    columns["open_time"] = pl.Series(buckets.labels).cast(TIME)
    columns["vwap"] = _compute_vwap(columns["quote_volume"], columns["volume"])
    columns["bars_expected"] = pl.Series(
        np.concatenate(
            [
                _count_expected(buckets.labels[a:b], tf, base)
                for tf, (a, b) in zip(ordered, pairwise(buckets.ends), strict=True)
            ]
        )
    )
    columns["bars_present"] = pl.Series(buckets.last - buckets.first + 1)
    every = pl.DataFrame([columns[name].alias(name) for name in ROLLUP_SCHEMA])
    frames = {
        tf: every.slice(a, b - a)
        for tf, (a, b) in zip(ordered, pairwise(buckets.ends), strict=True)
    }
    return {tf: frames[tf] for tf in timeframes}


def _compute_vwap(quote_volume: pl.Series, volume: pl.Series) -> pl.Series:
    not_zero = pl.when(pl.lit(volume) != 0).then(pl.lit(volume))
    return pl.select((pl.lit(quote_volume) / not_zero).cast(DECIMAL)).to_series()


# --------------------------------------------------------------------------------- buckets
def _build_levels(opens: pl.Series, timeframes: Sequence[Timeframe]) -> list[_Level]:
    """Return one level per timeframe; the first is the bars themselves."""
    levels = [_Level(0, opens.to_physical().to_numpy(), starts=None, first=None)]
    for i, tf in enumerate(timeframes[1:], 1):
        parent = max(j for j in range(i) if tf.is_made_of(timeframes[j]))
        number = _number_buckets(levels[parent].labels, tf)
        starts = np.flatnonzero(number[1:] != number[:-1]) + 1
        starts = np.concatenate([[0], starts])
        labels = _open_buckets(number[starts], tf)
        first = levels[parent].first[starts] if parent else starts
        levels.append(_Level(parent, labels, starts=starts, first=first))
    return levels


def _number_buckets(opens: Array, timeframe: Timeframe) -> Array:
    """Return the numbers of the buckets that hold these microseconds since 1970."""
    if timeframe.months:
        return opens.astype("datetime64[us]").astype("datetime64[M]").astype(np.int64)
    return (opens - to_us(timeframe.origin)) // (timeframe.width // _RESOLUTION)


def _open_buckets(numbers: Array, timeframe: Timeframe) -> Array:
    """Return when buckets of these numbers open, in microseconds since 1970."""
    if timeframe.months:
        return numbers.astype("datetime64[M]").astype("datetime64[us]").astype(np.int64)
    return numbers * (timeframe.width // _RESOLUTION) + to_us(timeframe.origin)


def _count_expected(opens: Array, timeframe: Timeframe, base: Timeframe) -> Array:
    """Return how many bars of `base` each bucket holds where none is missing."""
    closes = _open_buckets(_number_buckets(opens, timeframe) + 1, timeframe)
    return (closes - opens) // (base.width // _RESOLUTION)


def _wanted_opens(timeframe: Timeframe, whole: Window, owned: Window) -> Window:
    """Return the open times of the bars that lie wholly inside `whole` and open inside `owned`."""
    begin = max(timeframe.ceil(whole.start), owned.start)
    return Window(begin, max(begin, min(timeframe.floor(whole.end), owned.end)))


def _select_buckets(
    levels: list[_Level], wanted: Mapping[Timeframe, Window], *, bars: int
) -> _Buckets:
    """Return the buckets that open inside the windows. `bars`: the number of bars."""
    cuts, lasts = [], []
    for level, opens in zip(levels[1:], wanted.values(), strict=True):
        bounds = [to_us(opens.start), to_us(opens.end)]
        cuts.append(slice(*np.searchsorted(level.labels, bounds)))
        lasts.append(np.append(level.first[1:], bars)[cuts[-1]] - 1)
    chosen = list(zip(levels[1:], cuts, strict=True))
    first = np.concatenate([level.first[cut] for level, cut in chosen])
    last = np.concatenate(lasts)
    return _Buckets(
        np.concatenate([level.labels[cut] for level, cut in chosen]),
        first,
        last=last,
        cuts=tuple(cuts),
        ends=(0, *accumulate(cut.stop - cut.start for cut in cuts)),
        most=int((last - first).max(initial=0)) + 1,
    )


# --------------------------------------------------------------------------------- columns
def _roll_up_column(column: pl.Series, levels: list[_Level], buckets: _Buckets) -> pl.Series:
    """Return one column of all buckets."""
    nulls = column.is_null().cast(pl.UInt64).to_numpy() if column.null_count() else None
    numbers = read_int128(column if nulls is None else column.fill_null(0))
    if column.name in ("open", "close"):
        values = _take(numbers, buckets.first if column.name == "open" else buckets.last)
    elif column.name in ("high", "low"):
        values = _find_extremes(numbers, levels, buckets, highest=column.name == "high")
    else:
        values = _sum_buckets(numbers, buckets)
    is_decimal = column.dtype == DECIMAL
    found = to_decimals(values) if is_decimal else pl.Series(values.low.view(np.int64))
    if nulls is None:
        return found
    # null as soon as one bar's value is: no venue ever gave the sum of the others
    is_given = pl.Series(_sum_between(nulls, buckets) == 0)
    return pl.select(pl.when(is_given).then(found)).to_series()


def _take(numbers: Int128, rows: Array) -> Int128:
    return Int128(numbers.low[rows], None if numbers.high is None else numbers.high[rows])


def _sum_between(values: Array, buckets: _Buckets) -> Array:
    """Return the sum of each bucket, modulo 2**64.

    It is the running sum at the bucket's end less the one before its beginning.
    """
    running = np.zeros(values.size + 1, np.uint64)
    np.cumsum(values, out=running[1:])
    return running[buckets.last + 1] - running[buckets.first]


def _sum_buckets(numbers: Int128, buckets: _Buckets) -> Int128:
    """Return the sum of each bucket.

    Where 64 bits might not hold it, it is made from halves of 32 bits, which do not overflow.
    """
    if numbers.high is None and int(numbers.low.max()) * buckets.most < 2**64:
        return Int128(_sum_between(numbers.low, buckets))
    right, left = (
        _sum_between(numbers.low & _LOW, buckets),
        _sum_between(numbers.low >> _HALF, buckets),
    )
    low = (left << _HALF) + right
    high = (left >> _HALF) + (low < right)
    return Int128(low, high if numbers.high is None else high + _sum_between(numbers.high, buckets))


def _find_extremes(
    numbers: Int128, levels: list[_Level], buckets: _Buckets, *, highest: bool
) -> Int128:
    """Return the highest or lowest number of each bucket."""
    reduce, neutral = (np.maximum, 0) if highest else (np.minimum, 2**64 - 1)
    by_level = [numbers]
    for level in levels[1:]:
        finer = by_level[level.parent]
        by_level.append(_reduce(finer, level.starts, reduce=reduce, neutral=np.uint64(neutral)))
    wanted = [_take(found, cut) for found, cut in zip(by_level[1:], buckets.cuts, strict=True)]
    high = None if numbers.high is None else np.concatenate([part.high for part in wanted])
    return Int128(np.concatenate([part.low for part in wanted]), high)


def _reduce(numbers: Int128, starts: Array, *, reduce: np.ufunc, neutral: np.uint64) -> Int128:
    """Return the extreme of each stretch that begins at `starts`.

    The high halves decide, then the low halves of those that share the extreme high half.
    """
    if numbers.high is None:
        return Int128(reduce.reduceat(numbers.low, starts))
    signed = numbers.high.view(np.int64)
    high = reduce.reduceat(signed, starts)
    is_extreme = signed == np.repeat(high, np.diff(starts, append=signed.size))
    low = reduce.reduceat(np.where(is_extreme, numbers.low, neutral), starts)
    return Int128(low, high.view(np.uint64))

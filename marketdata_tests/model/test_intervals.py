"""Interval arithmetic beside sets of whole numbers, which need none of it."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from itertools import pairwise

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from marketdata_assets.model.bar import BAR_SCHEMA
from marketdata_assets.model.intervals import (
    align_inside,
    coalesce_windows,
    count_bars,
    enclosing_window,
    find_gaps,
    fold_neighbors,
    group_consecutive,
    opens_inside,
    pack_windows,
    subtract_window,
    subtract_windows,
)
from marketdata_assets.model.timeframe import TIMEFRAMES, Timeframe
from marketdata_assets.model.window import Window
from marketdata_tests.samples import START

GRIDS = st.sampled_from([TIMEFRAMES[name] for name in ("1m", "1h", "1w")])
PLACES = st.sets(st.integers(-12, 40), max_size=30)
SPANS = st.tuples(st.integers(-15, 45), st.integers(-2, 30)).map(
    lambda span: (span[0], span[0] + span[1])
)
Span = tuple[int, int]


def window_of(tf: Timeframe, first: int, last: int) -> Window:
    """The window of the places `first` to `last`, exclusive."""
    return Window(tf.origin + first * tf.width, tf.origin + last * tf.width)


def windows_of(tf: Timeframe, spans: Iterable[Span]) -> list[Window]:
    return [window_of(tf, *span) for span in spans]


def opens_of(tf: Timeframe, there: Iterable[int]) -> pl.Series:
    return pl.Series(
        [tf.origin + i * tf.width for i in sorted(there)], dtype=BAR_SCHEMA["open_time"]
    )


def places(windows: Iterable[Window], tf: Timeframe) -> list[int]:
    """Every place of the windows, in order, as often as it is there."""
    return [
        i
        for w in windows
        for i in range((w.start - tf.origin) // tf.width, (w.end - tf.origin) // tf.width)
    ]


def blocks(found: set[int]) -> list[Span]:
    """A set of places as the fewest half-open ranges."""
    first = sorted(i for i in found if i - 1 not in found)
    last = sorted(i + 1 for i in found if i + 1 not in found)
    return list(zip(first, last, strict=True))


def united(spans: Iterable[Span]) -> set[int]:
    return {i for span in spans for i in range(*span)}


@given(GRIDS, PLACES, SPANS, st.floats(0, 0.99), st.floats(0, 0.99))
def test_gaps_are_what_no_bar_fills(
    tf: Timeframe, there: set[int], span: Span, before: float, after: float
):
    """The window's ends need not lie on the grid: a bar counts when it opens inside."""
    whole = window_of(tf, *span)
    window = Window(whole.start - before * tf.width, whole.end - after * tf.width)
    found = find_gaps(opens_of(tf, there), tf, window)
    assert found == windows_of(tf, blocks(set(range(*span)) - there))


@given(GRIDS, SPANS, st.lists(SPANS, max_size=8))
def test_what_is_cut_out_is_gone_and_the_rest_is_there_once(
    tf: Timeframe, span: Span, cuts: list[Span]
):
    rest = subtract_window(window_of(tf, *span), windows_of(tf, cuts))
    assert places(rest, tf) == sorted(set(range(*span)) - united(cuts))
    assert all(rest)


@given(GRIDS, st.lists(SPANS, max_size=8), PLACES)
def test_many_windows_are_cut_like_each_alone(tf: Timeframe, spans: list[Span], cut: set[int]):
    cuts = windows_of(tf, blocks(cut))
    found = subtract_windows(windows_of(tf, spans), reversed(cuts))
    assert found == [rest for w in windows_of(tf, spans) for rest in subtract_window(w, cuts)]
    assert sorted(places(found, tf)) == sorted(
        i for span in spans for i in range(*span) if i not in cut
    )


@given(GRIDS, st.lists(SPANS, max_size=10))
def test_coalesced_windows_are_the_fewest_with_the_same_places(tf: Timeframe, spans: list[Span]):
    assert coalesce_windows(windows_of(tf, spans)) == windows_of(tf, blocks(united(spans)))


@given(
    GRIDS, st.lists(SPANS.filter(lambda span: span[0] < span[1]), max_size=10), st.integers(1, 40)
)
def test_packed_windows_cover_the_same_and_hold_at_most_so_many_bars(
    tf: Timeframe, spans: list[Span], most: int
):
    windows = windows_of(tf, spans)
    packed = pack_windows(windows, tf, max_bars=most)
    assert all(any(p.start <= w.start and w.end <= p.end for p in packed) for w in windows)
    assert all(p in windows or len(places([p], tf)) <= most for p in packed)
    assert {p.start for p in packed} <= {w.start for w in windows}
    assert {p.end for p in packed} <= {w.end for w in windows}
    assert packed == sorted(packed)
    assert all(len(places([Window(a.start, b.end)], tf)) > most for a, b in pairwise(packed))


@given(GRIDS, st.lists(st.integers(-12, 40), max_size=30))
def test_consecutive_open_times_are_one_window(tf: Timeframe, there: list[int]):
    moments = [tf.origin + i * tf.width for i in there]
    assert group_consecutive(moments, tf) == windows_of(tf, blocks(set(there)))


@given(GRIDS, SPANS, st.floats(0, 0.99), st.floats(0, 0.99))
def test_bars_that_lie_wholly_inside(tf: Timeframe, span: Span, before: float, after: float):
    whole = window_of(tf, *span)
    window = Window(whole.start - before * tf.width, whole.end + after * tf.width)
    assert places([align_inside(window, tf)], tf) == list(range(*span))


def test_the_enclosing_window():
    tf = TIMEFRAMES["1h"]
    assert enclosing_window(windows_of(tf, [(3, 5), (0, 1), (4, 9)])) == window_of(tf, 0, 9)
    with pytest.raises(ValueError, match="empty"):
        enclosing_window([])


def test_bars_are_counted_window_by_window():
    tf = TIMEFRAMES["1h"]
    assert count_bars(windows_of(tf, [(0, 2), (1, 4), (9, 8)]), tf) == 5


def test_a_bar_at_the_end_of_a_window_is_outside_it():
    opens = pl.Series([START + i * timedelta(minutes=1) for i in range(4)])
    bars = pl.DataFrame({"open_time": opens})
    inside = bars.filter(opens_inside(Window(opens[1], opens[3])))
    assert inside["open_time"].to_list() == opens[1:3].to_list()


def test_neighbors_are_folded_from_left_to_right():
    def join(a: str, b: str) -> str | None:
        return a + b if len(a + b) <= 3 else None

    assert fold_neighbors(["a", "b", "cc", "d", "e", "ffff"], join) == ["ab", "ccd", "e", "ffff"]
    assert fold_neighbors([], join) == []

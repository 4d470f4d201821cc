"""Bars that keep every rule and are hard to believe: spikes, jumps, wicks, moves, frozen prices.

What is usual is measured around each bar: medians of the bars before it and of those after it, the
larger of the two. Prices are logarithms here, so that sizes are shares of the price; none of this
is stored except as evidence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import polars as pl

from marketdata_assets.model.anomaly import Anomaly
from marketdata_assets.model.bar import COLUMN_NAMES, PRICES, format_number
from marketdata_assets.model.intervals import fold_neighbors
from marketdata_assets.model.timeframe import MINUTE, Timeframe
from marketdata_assets.model.window import Window
from marketdata_assets.quality.anomaly_rules import RULES
from marketdata_assets.quality.traded_bars import (
    AROUND,
    LONG_AROUND,
    TradedBars,
    add_usual,
    measure,
)

REACH = 10
"""Prices may be away for so many bars and still count as come back. The verdict on a bar can depend
on so many bars after it."""
CONTEXT = 1440
"""Bars before and after a span that make its verdicts those of the middle of a longer one."""
MIN_IDENTICAL = 4
"""So many bars that are equal in every column are frozen: of real minutes at most two are."""
LISTING = 60
"""So many bars after its first one a market is still finding its price."""
GAP_TIMES = 5
"""An open may lie so many times as far from the close before it as the large gaps here."""


def find_anomalies(
    bars: pl.DataFrame, timeframe: Timeframe, span: Window, *, listed: datetime | None = None
) -> list[Anomaly]:
    """Return the anomalies that begin in `span`, by start.

    `bars` (model.bar.BAR_SCHEMA, sorted) may reach CONTEXT bars beyond it on both sides. The last
    bar of all is only judged by rules that do not need the next one. A price belongs to one
    anomaly: the first of the rules about prices that finds a bar has it. In the first LISTING bars
    after `listed`, the market's first bar ever, prices are still being found: they are no anomaly.
    """
    begin = timeframe.shift(timeframe.floor(listed), LISTING) if listed else span.start
    traded = TradedBars(measure(bars.filter(pl.col("volume") > 0), timeframe), timeframe)

    def find(finder: Callable[[TradedBars], Iterator[Anomaly]]) -> list[Anomaly]:
        return _join_near(finder(traded), timeframe)

    frozen = find(_find_frozen)
    prices = _without_overlap(find(_find_swapped), frozen)  # repeated bars look swapped, too
    for finder in (_find_gaps, _find_wicks, _find_moves):
        prices += _without_overlap(find(finder), prices)
    untraded = _join_near(_find_untraded(bars, timeframe), timeframe)
    return sorted(
        (
            one
            for one in (*frozen, *prices, *find(_find_volumes), *untraded)
            if max(span.start, begin) <= one.start < span.end
        ),
        key=lambda one: (one.start, one.kind),
    )


def _without_overlap(found: Sequence[Anomaly], others: Sequence[Anomaly]) -> list[Anomaly]:
    """Return those that share no bar with one of the others."""
    return [
        one
        for one in found
        if not any(one.start < other.end and other.start < one.end for other in others)
    ]


def _join_near(found: Iterable[Anomaly], timeframe: Timeframe) -> list[Anomaly]:
    """Join anomalies of one kind at most REACH bars apart, with the evidence of the worst."""

    def join(last: Anomaly, one: Anomaly) -> Anomaly | None:
        if one.kind != last.kind or one.start - last.end > REACH * timeframe.width:
            return None
        worst = max(last, one, key=lambda a: (a.severity, float(a.evidence["size"])))
        return worst._replace(
            start=last.start,
            end=max(last.end, one.end),
            bars=last.bars + (one.bars if one.start >= last.end else 0),
        )

    return fold_neighbors(sorted(found, key=lambda one: (one.kind, one.start)), join)


_IF_USUAL_IS_KNOWN = pl.when(pl.col("ranges").is_not_null())


# --------------------------------------------------------------------------------- the rules
def _find_swapped(traded: TradedBars) -> Iterator[Anomaly]:
    before, body, after = pl.col("gap"), pl.col("body"), pl.col("gap").shift(-1)
    is_undone = (before * after > 0) & (before * body < 0)
    smallest = pl.min_horizontal(before.abs(), body.abs(), after.abs())
    size = _IF_USUAL_IS_KNOWN.then(pl.when(is_undone).then(smallest))
    limit = pl.max_horizontal(pl.lit(RULES["swapped"].floor), GAP_TIMES * pl.col("gaps"))
    for row in traded.rows_beyond(size, limit):
        yield traded.anomaly(
            "swapped",
            row["i"],
            row["i"],
            size=abs(row["body"]),
            limit=row["limit"],
            message=traded.describe(row["i"], row["i"]),
        )


class _Excursion(NamedTuple):
    """Rows `first` to `last`, whose prices went `size` away; row `until` brought them back."""

    first: int
    last: int
    size: float
    until: int


def _find_gaps(traded: TradedBars) -> Iterator[Anomaly]:
    """`spike` and `jump`: both begin with a gap between two bars."""
    rule = RULES["spike"]
    limit = pl.max_horizontal(
        pl.lit(rule.floor), GAP_TIMES * pl.col("gaps"), rule.times * pl.col("ranges")
    )
    with_body = traded.frame.with_columns(body_before=pl.col("body").shift(1))
    rows = traded._replace(frame=with_body).rows_beyond(
        _IF_USUAL_IS_KNOWN.then(pl.col("away")), limit
    )
    done = -1
    for k, row in enumerate(rows):
        i = row["i"]
        if i <= done or i == traded.frame.height - 1:
            continue
        excursion = _find_excursion(row, rows[k + 1 : k + 1 + REACH])
        if excursion is None:
            closed, opened = traded.at(i - 1, "close"), format_number(row["open"])
            message = f"closed at {closed}, then opened at {opened}"
            yield traded.anomaly(
                "jump", i - 1, i, size=abs(row["gap"]), limit=row["limit"], message=message
            )
            continue
        done = excursion.until
        yield traded.anomaly(
            "spike",
            excursion.first,
            excursion.last,
            size=excursion.size,
            limit=row["limit"],
            message=traded.describe(excursion.first, excursion.last),
        )


def _find_excursion(row: dict[str, Any], later: Sequence[dict[str, Any]]) -> _Excursion | None:
    """Return which prices around a gap left and came back; None where they stayed away."""
    i, gap = row["i"], row["gap"]
    near = (other for other in later if other["i"] <= i + REACH)
    back = next((other for other in near if _is_undone(gap, other["gap"])), None)
    if back:  # all prices of some bars
        return _Excursion(i, back["i"] - 1, size=min(abs(gap), abs(back["gap"])), until=back["i"])
    if _is_undone(row["body_before"], gap):  # the close before it
        return _Excursion(i - 1, i - 1, size=min(abs(row["body_before"]), abs(gap)), until=i)
    if _is_undone(gap, row["body"]):  # its open
        return _Excursion(i, i, size=min(abs(gap), abs(row["body"])), until=i)
    return None


def _is_undone(there: float, back: float) -> bool:
    """Whether the second move undoes the first, more or less."""
    return there * back < 0 and abs(there + back) <= max(abs(there), abs(back)) / 2


def _find_wicks(traded: TradedBars) -> Iterator[Anomaly]:
    rule = RULES["wick"]
    neighbors = [pl.col(name).shift(n) for name in ("h", "l") for n in (1, -1)]
    up = pl.col("h") - pl.max_horizontal("o", "c", *neighbors)
    down = pl.min_horizontal("o", "c", *neighbors) - pl.col("l")
    busy = (pl.col("v") / pl.col("middle")).clip(1, None).sqrt()
    ranges = pl.max_horizontal("usual", pl.col("range").shift(1) / 2, pl.col("range").shift(-1) / 2)
    floor = pl.lit(rule.floor * math.sqrt(traded.timeframe.width / MINUTE))
    limit = pl.max_horizontal(floor, rule.times * busy * ranges)
    has_neighbors = pl.col("i").is_between(1, traded.frame.height - 2)
    size = _IF_USUAL_IS_KNOWN.then(pl.when(has_neighbors).then(pl.max_horizontal(up, down)))
    for row in traded.rows_beyond(size, limit):
        i = row["i"]
        before = f"{traded.at(i - 1, 'low')} to {traded.at(i - 1, 'high')} before"
        after = f"{traded.at(i + 1, 'low')} to {traded.at(i + 1, 'high')} after"
        message = f"{format_number(row['low'])} to {format_number(row['high'])}; {before}, {after}"
        yield traded.anomaly("wick", i, i, size=row["size"], limit=row["limit"], message=message)


def _find_moves(traded: TradedBars) -> Iterator[Anomaly]:
    before = pl.when(pl.col("step") <= AROUND).then(pl.col("c").shift(1))
    moved = pl.max_horizontal("h", before) - pl.min_horizontal("l", before)
    minutes = traded.timeframe.width / MINUTE * pl.col("step").fill_null(1).clip(1, AROUND)
    for row in traded.rows_beyond(moved, RULES["move"].floor * minutes.sqrt()):
        i = row["i"]
        message = (
            f"low {format_number(row['low'])}, high {format_number(row['high'])}, "
            f"close before {traded.at(i - 1, 'close')}"
        )
        yield traded.anomaly("move", i, i, size=row["size"], limit=row["limit"], message=message)


def _find_frozen(traded: TradedBars) -> Iterator[Anomaly]:
    """Stretches of bars with equal prices, or equal in every column, of which fewer are enough."""
    rule = RULES["frozen"]
    prices = _find_repeats(traded.frame, PRICES)
    lengths = prices["bars"].sort(descending=True)
    rank = (traded.frame.height - int((lengths - 1).sum())) // 100
    longest = max(rule.floor, rule.times * (lengths[rank] if rank < len(lengths) else 1))
    identical = _find_repeats(traded.frame, COLUMN_NAMES[1:])
    for stretches, limit in ((prices, longest), (identical, MIN_IDENTICAL)):
        for bars, end in stretches.filter(pl.col("bars") >= limit).iter_rows():
            message = f"{bars} bars, all with close {traded.at(end - 1, 'close')}"
            yield traded.anomaly(
                "frozen", end - bars, end - 1, size=bars, limit=limit, message=message
            )


def _find_repeats(frame: pl.DataFrame, names: Sequence[str]) -> pl.DataFrame:
    """Return stretches of two or more bars that are equal in these columns.

    `bars`: how many; `end`: the row after the last.
    """
    is_same = frame.select(
        pl.all_horizontal(pl.col(name).eq_missing(pl.col(name).shift(1)) for name in names)
    ).to_series()
    stretches = is_same.rle().struct.unnest().with_columns(pl.col("len").cast(pl.Int64))
    ends = stretches.with_columns(bars=pl.col("len") + 1, end=pl.col("len").cum_sum())
    return ends.filter("value").select("bars", "end")


def _find_volumes(traded: TradedBars) -> Iterator[Anomaly]:
    measured = {"volume": pl.col("v")}
    if traded.frame["trades"].null_count() == 0:
        measured["volume per trade"] = pl.col("v") / pl.col("trades").clip(1, None)
    noticed = (pl.col("range") / pl.col("usual")).clip(1, None)
    tail = (pl.col("large") / pl.col("middle")).sqrt()
    limit = RULES["volume"].times * tail * pl.col("large") * noticed
    for what, values in measured.items():
        frame = traded.frame.lazy().with_columns(x=values)
        frame = add_usual(frame, LONG_AROUND, large=("x", 0.9), middle=("x", 0.5))
        for row in traded._replace(frame=frame.collect()).rows_beyond(pl.col("x"), limit):
            size, most = row["size"], row["limit"]
            message = f"{what} {size:.6g}, plausible up to {most:.6g} here"
            yield traded.anomaly(
                "volume", row["i"], row["i"], size=size / most, limit=1, message=message
            )


def _find_untraded(bars: pl.DataFrame, timeframe: Timeframe) -> Iterator[Anomaly]:
    still, opens = pl.col("volume") == 0, pl.col("open_time")
    is_next = opens == timeframe.closes(opens.shift(1))
    closed_elsewhere = is_next & (pl.col("close") != pl.col("close").shift(1))
    moved = still & ((pl.col("high") != pl.col("low")) | closed_elsewhere)
    miscounted = still != (pl.col("trades") == 0)
    every = TradedBars(bars.with_row_index("i"), timeframe)
    for row in every.frame.filter((moved | miscounted).fill_null(False)).to_dicts():
        message = (
            f"volume {format_number(row['volume'])}, trades {row['trades']}, "
            f"close {format_number(row['close'])}"
        )
        yield every.anomaly("untraded", row["i"], row["i"], size=0, limit=0, message=message)

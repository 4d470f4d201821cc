"""Bars that keep every rule and are hard to believe: spikes, jumps, wicks, moves, frozen prices,
impossible volume.

What is usual is measured beside each bar: medians of the bars before it and of those after it, the
larger of the two. Prices are logarithms here, so that sizes are shares of the price; nothing of it
is stored but as evidence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from marketdata_assets.model.anomaly import Anomaly, AnomalySeverity
from marketdata_assets.model.bar import COLUMN_NAMES, PRICES, format_number
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import Window

AROUND, LONG = 60, 240
"""How many traded bars before and after tell what prices and what volume usually do."""
REACH = 10
"""How many bars prices may be away and still count as come back. A bar's verdict can hang on so many
bars after it.
"""
CONTEXT = 1440
"""How many bars before and after a span make its verdicts the same as in the middle of a longer
one.
"""
SAME = 4
"""So many bars that are equal in every column are frozen: of real minutes there are never more than
two.
"""
GAPS = 5
"""An open may lie so many times as far from the close before it as such gaps, the large ones, go
here.
"""


@dataclass(frozen=True, slots=True)
class Rule:
    """One kind of anomaly. `size` is what was measured; `severities` names each from the least size
    that has it.

    A bar is found when its size is at least `floor` and at least `times` what is usual there.
    """

    name: str
    means: str
    why: str
    floor: float
    times: float
    severities: dict[AnomalySeverity, float] = field(default_factory=dict)

    def severity(self, size: float) -> AnomalySeverity:
        """The worst severity that a size reaches."""
        return max(
            (s for s, least in self.severities.items() if size >= least),
            default=AnomalySeverity.LOW,
        )


_GAP = (0.0025, 3)
"""Floor and times of both rules that begin with a gap between two bars: which it is, the bars after it
tell.
"""
_OF_PRICE = {
    AnomalySeverity.MEDIUM: 0.005,
    AnomalySeverity.HIGH: 0.02,
    AnomalySeverity.CRITICAL: 0.2,
}
RULES: dict[str, Rule] = {
    row.name: row
    for row in (
        Rule(
            "spike",
            "prices leave between two bars, or within one, and come back at once",
            "A market's next bar opens where the last one closed: of 600,000 real minutes none goes more than 0.53 % in between.",
            *_GAP,
            _OF_PRICE,
        ),
        Rule(
            "jump",
            "a bar opens far from where the bar before it closed, and prices stay there",
            "As spike; real ones come after halts, false ones where another market or unit begins.",
            *_GAP,
            _OF_PRICE,
        ),
        Rule(
            "swapped",
            "open and close have changed places: only so do both fit the bars beside it",
            "It takes a gap on both sides that the body undoes: real bars never reach 4 times the gaps that are usual.",
            0.0005,
            0,
            _OF_PRICE,
        ),
        Rule(
            "wick",
            "a high or low far beyond the bar's own open and close and both neighbours, with too little volume to get there",
            "Volume goes with the square of how far prices go.",
            0.003,
            4,
            _OF_PRICE,
        ),
        Rule(
            "move",
            "more than 10 % in one minute (in a bar of n minutes: root n as much in logarithms)",
            "Real crashes do this, too: somebody should have looked.",
            math.log(1.1),
            0,
            {AnomalySeverity.HIGH: 0, AnomalySeverity.CRITICAL: math.log(2)},
        ),
        Rule(
            "frozen",
            "bars with volume, all with the same four prices, far longer than this market's prices ever stand",
            "The longest real run is 11 bars, in a market that trades every other minute.",
            10,
            8,
            {AnomalySeverity.MEDIUM: 0, AnomalySeverity.HIGH: 60, AnomalySeverity.CRITICAL: 1440},
        ),
        Rule(
            "volume",
            "a volume, or a volume per trade, far above the large ones here, with prices that hardly took notice",
            "Volume has heavy tails: its limit grows with how far the large ones lie above the usual ones.",
            0,
            30,
            {AnomalySeverity.MEDIUM: 1, AnomalySeverity.HIGH: 10},
        ),
        Rule(
            "untraded",
            "prices moved, or trades were counted, without volume; or volume without a trade",
            "A bar without trades stands at the last close.",
            0,
            0,
            {AnomalySeverity.MEDIUM: 0},
        ),
    )
}


Finder = Callable[[pl.DataFrame, Timeframe], Iterator[Anomaly]]


def find_anomalies(bars: pl.DataFrame, timeframe: Timeframe, judged: Window) -> list[Anomaly]:
    """The anomalies that begin in `judged`, by start.

    `bars` (model.bar.BAR_SCHEMA, sorted) may reach CONTEXT bars beyond it on both sides. The last bar
    of all is only judged where the next one is not needed for it. A price is told once: of the
    rules about prices the first that finds a bar has it.
    """
    traded = _measured(bars.filter(pl.col("volume") > 0), timeframe)

    def found(finder: Finder) -> list[Anomaly]:
        return _joined(list(finder(traded, timeframe)), timeframe)

    stands = found(_frozen)
    prices = _apart(stands, found(_swapped))  # bars that repeat themselves look swapped, too
    for finder in (_gaps, _wicks, _moves):
        prices += _apart(prices, found(finder))
    everything = [
        *stands,
        *prices,
        *found(_volumes),
        *_joined(list(_untraded(bars, timeframe)), timeframe),
    ]
    return sorted(
        (one for one in everything if judged.start <= one.start < judged.end),
        key=lambda one: (one.start, one.kind),
    )


def _apart(found: Sequence[Anomaly], more: Sequence[Anomaly]) -> list[Anomaly]:
    """Those of `more` that share no bar with what is found."""
    return [
        one
        for one in more
        if not any(one.start < other.end and other.start < one.end for other in found)
    ]


def _joined(found: list[Anomaly], timeframe: Timeframe) -> list[Anomaly]:
    """Anomalies of one kind that are at most REACH bars apart are one, with the evidence of the
    worst.
    """
    joined: list[Anomaly] = []
    for one in sorted(found, key=lambda one: (one.kind, one.start)):
        last = joined[-1] if joined else one
        if not joined or one.kind != last.kind or one.start - last.end > REACH * timeframe.width:
            joined.append(one)
            continue
        worst = max(last, one, key=lambda a: (a.severity, float(a.evidence["size"])))
        bars = last.bars + (one.bars if one.start >= last.end else 0)
        joined[-1] = Anomaly(
            one.kind, worst.severity, last.start, max(last.end, one.end), bars, worst.evidence
        )
    return joined


# --------------------------------------------------------------------------------- what is usual
def _measured(traded: pl.DataFrame, timeframe: Timeframe) -> pl.DataFrame:
    """Bars with volume, with what the rules compare; prices are logarithms.

    `step`: bars since the one before. `gap`: from its close to this open; `away`: how far in one
    bar. What is usual here: `gaps` (the large ones, at least a tick), `ranges` from low to high,
    `usual` the larger of the two, `middle` volume.
    """
    logs = {name[0]: pl.col(name).cast(pl.Float64).log() for name in PRICES}
    step = pl.col("open_time").diff() / timeframe.width
    frame = traded.lazy().with_columns(**logs, v=pl.col("volume").cast(pl.Float64), step=step)
    frame = frame.with_columns(
        range=pl.col("h") - pl.col("l"),
        body=pl.col("c") - pl.col("o"),
        gap=pl.when(pl.col("step") <= AROUND).then(pl.col("o") - pl.col("c").shift(1)),
    )
    tick = pl.col("range").filter(pl.col("range") > 0).min().fill_null(0.0)
    frame = frame.with_columns(away=(pl.col("gap").abs() / pl.col("step").sqrt()).fill_null(0.0))
    frame = _around(frame, gaps=("away", 0.9), ranges=("range", 0.5), middle=("v", 0.5))
    frame = frame.with_columns(gaps=pl.max_horizontal("gaps", tick)).with_columns(
        usual=pl.max_horizontal("gaps", "ranges")
    )
    return frame.with_row_index("i").collect()


def _around(frame: pl.LazyFrame, bars: int = AROUND, **wanted: tuple[str, float]) -> pl.LazyFrame:
    """Quantiles of columns in the bars before each, or in those after where they are larger; null
    where there are hardly any.
    """
    before = {
        new: pl.col(name).rolling_quantile(
            share, "nearest", window_size=bars, min_samples=bars // 6
        )
        for new, (name, share) in wanted.items()
    }
    return frame.with_columns(**before).with_columns(
        pl.max_horizontal(pl.col(new).shift(1), pl.col(new).shift(-bars)) for new in wanted
    )


_KNOWN = pl.when(pl.col("ranges").is_not_null())
"""Where there are enough bars to know what is usual."""


def _beyond(frame: pl.DataFrame, size: pl.Expr, limit: pl.Expr) -> list[dict[str, Any]]:
    """The bars whose `size` is above their `limit`."""
    return (
        frame.lazy()
        .with_columns(size=size, limit=limit)
        .filter(pl.col("size") > pl.col("limit"))
        .collect()
        .to_dicts()
    )


# --------------------------------------------------------------------------------- the rules
def _swapped(traded: pl.DataFrame, timeframe: Timeframe) -> Iterator[Anomaly]:
    before, body, after = pl.col("gap"), pl.col("body"), pl.col("gap").shift(-1)
    undone = _KNOWN.then(
        pl.when((before * after > 0) & (before * body < 0)).then(
            pl.min_horizontal(before.abs(), body.abs(), after.abs())
        )
    )
    limit = pl.max_horizontal(pl.lit(RULES["swapped"].floor), GAPS * pl.col("gaps"))
    for row in _beyond(traded, undone, limit):
        says = _beside(traded, row["i"], row["i"])
        yield _anomaly(
            traded, timeframe, "swapped", row["i"], row["i"], abs(row["body"]), row["limit"], says
        )


def _gaps(traded: pl.DataFrame, timeframe: Timeframe) -> Iterator[Anomaly]:
    """`spike` and `jump`: both begin with a gap between two bars."""
    rule = RULES["spike"]
    limit = pl.max_horizontal(
        pl.lit(rule.floor), GAPS * pl.col("gaps"), rule.times * pl.col("ranges")
    )
    rows = _beyond(
        traded.with_columns(body_before=pl.col("body").shift(1)), _KNOWN.then(pl.col("away")), limit
    )
    done = -1
    for k, row in enumerate(rows):
        if row["i"] <= done or row["i"] == traded.height - 1:
            continue
        near = (later for later in rows[k + 1 : k + 1 + REACH] if later["i"] <= row["i"] + REACH)
        back = next((later for later in near if _returns(row["gap"], later["gap"])), None)
        if back:  # all prices of some bars
            first, last, away = row["i"], back["i"] - 1, min(abs(row["gap"]), abs(back["gap"]))
            done = back["i"]
        elif _returns(row["body_before"], row["gap"]):  # the close before it
            first, last, away = (
                row["i"] - 1,
                row["i"] - 1,
                min(abs(row["body_before"]), abs(row["gap"])),
            )
        elif _returns(row["gap"], row["body"]):  # its open
            first, last, away = row["i"], row["i"], min(abs(row["gap"]), abs(row["body"]))
        else:
            says = f"closed at {_at(traded, row['i'] - 1, 'close')}, then opened at {format_number(row['open'])}"
            yield _anomaly(
                traded,
                timeframe,
                "jump",
                row["i"] - 1,
                row["i"],
                abs(row["gap"]),
                row["limit"],
                says,
            )
            continue
        yield _anomaly(
            traded,
            timeframe,
            "spike",
            first,
            last,
            away,
            row["limit"],
            _beside(traded, first, last),
        )


def _returns(there: float, back: float) -> bool:
    """Whether the second move undoes the first, more or less."""
    return there * back < 0 and abs(there + back) <= max(abs(there), abs(back)) / 2


def _wicks(traded: pl.DataFrame, timeframe: Timeframe) -> Iterator[Anomaly]:
    rule = RULES["wick"]
    beside = [pl.col(name).shift(n) for name in ("h", "l") for n in (1, -1)]
    up = pl.col("h") - pl.max_horizontal("o", "c", *beside)
    down = pl.min_horizontal("o", "c", *beside) - pl.col("l")
    busy = (pl.col("v") / pl.col("middle")).clip(1, None).sqrt()
    ranges = pl.max_horizontal("usual", pl.col("range").shift(1) / 2, pl.col("range").shift(-1) / 2)
    limit = pl.max_horizontal(
        pl.lit(rule.floor * math.sqrt(timeframe.minutes)), rule.times * busy * ranges
    )
    inner = pl.col("i").is_between(1, traded.height - 2)
    for row in _beyond(
        traded, _KNOWN.then(pl.when(inner).then(pl.max_horizontal(up, down))), limit
    ):
        top = _at(traded, row["i"] - 1, "high"), _at(traded, row["i"] + 1, "high")
        bottom = _at(traded, row["i"] - 1, "low"), _at(traded, row["i"] + 1, "low")
        says = f"{format_number(row['low'])} to {format_number(row['high'])}; {bottom[0]} to {top[0]} before, {bottom[1]} to {top[1]} after"
        yield _anomaly(
            traded, timeframe, "wick", row["i"], row["i"], row["size"], row["limit"], says
        )


def _moves(traded: pl.DataFrame, timeframe: Timeframe) -> Iterator[Anomaly]:
    before = pl.when(pl.col("step") <= AROUND).then(pl.col("c").shift(1))
    moved = pl.max_horizontal("h", before) - pl.min_horizontal("l", before)
    limit = (
        RULES["move"].floor
        * (timeframe.minutes * pl.col("step").fill_null(1).clip(1, AROUND)).sqrt()
    )
    for row in _beyond(traded, moved, limit):
        says = f"low {format_number(row['low'])}, high {format_number(row['high'])}, close before {_at(traded, row['i'] - 1, 'close')}"
        yield _anomaly(
            traded, timeframe, "move", row["i"], row["i"], row["size"], row["limit"], says
        )


def _frozen(traded: pl.DataFrame, timeframe: Timeframe) -> Iterator[Anomaly]:
    """Runs of bars with the same prices, or with the same of everything, of which fewer are enough."""
    rule = RULES["frozen"]
    prices = _repeats(traded, PRICES)
    lengths = prices["bars"].sort(descending=True)
    rank = (traded.height - int((lengths - 1).sum())) // 100
    longest = max(rule.floor, rule.times * (lengths[rank] if rank < len(lengths) else 1))
    for runs, limit in ((prices, longest), (_repeats(traded, COLUMN_NAMES[1:]), SAME)):
        for bars, end in runs.filter(pl.col("bars") >= limit).iter_rows():
            says = f"{bars} bars, all with close {_at(traded, end - 1, 'close')}"
            yield _anomaly(traded, timeframe, "frozen", end - bars, end - 1, bars, limit, says)


def _repeats(traded: pl.DataFrame, names: Sequence[str]) -> pl.DataFrame:
    """Runs of two or more bars that are equal in these columns: how many `bars`, and the row after the
    last (`end`).
    """
    same = traded.select(
        pl.all_horizontal(pl.col(name).eq_missing(pl.col(name).shift(1)) for name in names)
    ).to_series()
    runs = same.rle().struct.unnest().with_columns(pl.col("len").cast(pl.Int64))
    ends = runs.with_columns(bars=pl.col("len") + 1, end=pl.col("len").cum_sum())
    return ends.filter("value").select("bars", "end")


def _volumes(traded: pl.DataFrame, timeframe: Timeframe) -> Iterator[Anomaly]:
    measured = {"volume": pl.col("v")}
    if traded["trades"].null_count() == 0:
        measured["volume per trade"] = pl.col("v") / pl.col("trades").clip(1, None)
    noticed = (pl.col("range") / pl.col("usual")).clip(1, None)
    limit = (
        RULES["volume"].times
        * (pl.col("large") / pl.col("middle")).sqrt()
        * pl.col("large")
        * noticed
    )
    for what, values in measured.items():
        frame = _around(
            traded.lazy().with_columns(x=values), LONG, large=("x", 0.9), middle=("x", 0.5)
        ).collect()
        for row in _beyond(frame, pl.col("x"), limit):
            says = f"{what} {row['size']:.6g}, believed up to {row['limit']:.6g} here"
            yield _anomaly(
                frame, timeframe, "volume", row["i"], row["i"], row["size"] / row["limit"], 1, says
            )


def _untraded(bars: pl.DataFrame, timeframe: Timeframe) -> Iterator[Anomaly]:
    still, next_to = pl.col("volume") == 0, pl.col("open_time").diff() == timeframe.width
    moved = still & (
        (pl.col("high") != pl.col("low"))
        | (next_to & (pl.col("close") != pl.col("close").shift(1)))
    )
    miscounted = still != (pl.col("trades") == 0)
    frame = bars.with_row_index("i")
    for row in frame.filter((moved | miscounted).fill_null(False)).to_dicts():
        says = f"volume {format_number(row['volume'])}, trades {row['trades']}, close {format_number(row['close'])}"
        yield _anomaly(frame, timeframe, "untraded", row["i"], row["i"], 0, 0, says)


# --------------------------------------------------------------------------------- as an anomaly
def _anomaly(
    frame: pl.DataFrame,
    timeframe: Timeframe,
    kind: str,
    first: int,
    last: int,
    size: float,
    limit: float,
    says: str,
) -> Anomaly:
    first, opens = max(0, first), frame["open_time"]
    evidence = {"says": says, "size": f"{size:.6g}", "limit": f"{limit:.6g}"}
    return Anomaly(
        kind,
        RULES[kind].severity(size),
        opens[first],
        opens[last] + timeframe.width,
        last - first + 1,
        evidence,
    )


def _beside(frame: pl.DataFrame, first: int, last: int) -> str:
    inside = f"{_at(frame, first, 'open')} to {_at(frame, last, 'close')} in it"
    return (
        f"{_at(frame, first - 1, 'close')} before, {inside}, {_at(frame, last + 1, 'open')} after"
    )


def _at(frame: pl.DataFrame, i: int, column: str) -> str:
    return format_number(frame[column][i]) if 0 <= i < frame.height else "nothing"

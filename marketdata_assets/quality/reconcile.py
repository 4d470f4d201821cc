"""Second opinions: how far the closes and returns of one symbol lie apart at several venues, bar by
bar, in basis points.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import NamedTuple

import polars as pl

from marketdata_assets.model.bar import DECIMAL, RECONCILED_SCHEMA
from marketdata_assets.model.timeframe import Timeframe

WARN, FAIL = 25, 100
"""Basis points between two closes. In March 2023, when a stablecoin broke, three venues' BTC/USDT
closes lay at most 66 apart.
"""
BASIS_POINTS = 10_000


def reconcile(bars: Mapping[str, pl.DataFrame], timeframe: Timeframe) -> pl.DataFrame:
    """Every pair of venues at every open time where both traded: model.bar.RECONCILED_SCHEMA, sorted
    by open time.

    `bars` (model.bar.BAR_SCHEMA, sorted) by venue, the preferred one first; each is held against all
    that come after it.
    """
    pairs = [
        differences(bars[venue], bars[other], timeframe).with_columns(
            pl.lit(venue).alias("venue"), pl.lit(other).alias("other")
        )
        for venue, other in combinations(bars, 2)
    ]
    empty = pl.DataFrame(schema=RECONCILED_SCHEMA)
    return pl.concat([empty, *(pair.select(empty.columns) for pair in pairs)]).sort(
        "open_time", maintain_order=True
    )


def differences(venue: pl.DataFrame, other: pl.DataFrame, timeframe: Timeframe) -> pl.DataFrame:
    """`open_time`, `close_bp`, `return_bp` of one pair: positive where the first is higher, or rose
    more since the bar before.

    Bars without volume are left out: their price is an older one. Computed in floats, whose error
    is below a millionth of a basis point, and rounded to 0.0001. The first open time of the frames,
    and any after a hole, has no return.
    """
    sides = [
        frame.filter(pl.col("volume") > 0).select("open_time", pl.col("close").cast(pl.Float64))
        for frame in (venue, other)
    ]
    both = sides[0].join(sides[1], on="open_time", suffix="_other").sort("open_time")
    ours, theirs = pl.col("close"), pl.col("close_other")
    returns = ours / ours.shift(1) - theirs / theirs.shift(1)
    consecutive = pl.col("open_time").diff() == timeframe.width
    return both.select(
        "open_time",
        _exact((ours / theirs - 1) * BASIS_POINTS).alias("close_bp"),
        _exact(pl.when(consecutive).then(returns) * BASIS_POINTS).alias("return_bp"),
    )


def _exact(basis_points: pl.Expr) -> pl.Expr:
    return basis_points.round(4).cast(pl.Decimal(38, 4)).cast(DECIMAL)


class Spread(NamedTuple):
    """How large differences are, whatever their sign, in basis points; None where there is none."""

    p50: float | None
    p99: float | None
    most: float | None


class Opinion(NamedTuple):
    """One pair of venues: how many bars both have, how far apart they lie, how many closes reach WARN
    and FAIL.
    """

    venue: str
    other: str
    bars: int
    close: Spread
    returns: Spread
    warned: int
    failed: int


def opinions(reconciled: pl.DataFrame) -> Iterator[Opinion]:
    """Each pair of venues that `reconcile` compared."""
    for (venue, other), rows in reconciled.group_by("venue", "other", maintain_order=True):
        apart = rows["close_bp"].cast(pl.Float64).abs()
        yield Opinion(
            str(venue),
            str(other),
            rows.height,
            _spread(apart),
            _spread(rows["return_bp"].cast(pl.Float64).abs().drop_nulls()),
            int((apart >= WARN).sum()),
            int((apart >= FAIL).sum()),
        )


def _spread(values: pl.Series) -> Spread:
    if values.is_empty():
        return Spread(None, None, None)
    p50, p99 = (values.quantile(share, "linear") for share in (0.5, 0.99))
    return Spread(p50, p99, float(str(values.max())))


def worst(reconciled: pl.DataFrame, count: int) -> pl.DataFrame:
    """The rows whose closes lie farthest apart, those first."""
    return reconciled.sort(pl.col("close_bp").abs(), descending=True, maintain_order=True).head(
        count
    )

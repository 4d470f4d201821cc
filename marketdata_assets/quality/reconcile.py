"""How far the closes and returns of one symbol lie apart at several venues, in basis points."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import NamedTuple

import polars as pl

from marketdata_assets.model.bar import DECIMAL, RECONCILED_SCHEMA
from marketdata_assets.model.timeframe import Timeframe

WARN_BASIS_POINTS, FAIL_BASIS_POINTS = 25, 100
"""Between two closes. In March 2023, when a stablecoin broke, three venues' BTC/USDT closes lay at
most 66 apart."""
BASIS_POINTS = 10_000


def compare_venues(bars: Mapping[str, pl.DataFrame], timeframe: Timeframe) -> pl.DataFrame:
    """Compare every pair of venues at every open time where both traded.

    `bars` (model.bar.BAR_SCHEMA, sorted) by venue, the preferred one first; each is compared with
    all that come after it. Returns model.bar.RECONCILED_SCHEMA, sorted by open time.
    """
    pairs = [
        compare_pair(bars[venue], bars[other], timeframe).with_columns(
            pl.lit(venue).alias("venue"), pl.lit(other).alias("other")
        )
        for venue, other in combinations(bars, 2)
    ]
    empty = pl.DataFrame(schema=RECONCILED_SCHEMA)
    return pl.concat([empty, *(pair.select(empty.columns) for pair in pairs)]).sort(
        "open_time", maintain_order=True
    )


def compare_pair(venue: pl.DataFrame, other: pl.DataFrame, timeframe: Timeframe) -> pl.DataFrame:
    """Return `open_time`, `close_bp` and `return_bp` of one pair of venues.

    They are positive where the first venue is higher, or rose more since the bar before. Bars
    without volume are left out: their price is an older one. The first open time, and any after a
    gap, has no return. Computed in floats, whose error is below a millionth of a basis point, and
    rounded to 0.0001.
    """
    first, second = (
        frame.filter(pl.col("volume") > 0).select("open_time", pl.col("close").cast(pl.Float64))
        for frame in (venue, other)
    )
    both = first.join(second, on="open_time", suffix="_other").sort("open_time")
    ours, theirs = pl.col("close"), pl.col("close_other")
    returns = ours / ours.shift(1) - theirs / theirs.shift(1)
    is_next = pl.col("open_time") == timeframe.closes(pl.col("open_time").shift(1))
    return both.select(
        "open_time",
        _round((ours / theirs - 1) * BASIS_POINTS).alias("close_bp"),
        _round(pl.when(is_next).then(returns) * BASIS_POINTS).alias("return_bp"),
    )


def _round(basis_points: pl.Expr) -> pl.Expr:
    return basis_points.round(4).cast(pl.Decimal(38, 4)).cast(DECIMAL)


class Spread(NamedTuple):
    """How large differences are, whatever their sign, in basis points; None where there is none."""

    p50: float | None
    p99: float | None
    largest: float | None


class VenueComparison(NamedTuple):
    """One pair of venues: how far they lie apart in the `bars` that both have.

    `warned` and `failed` count the closes that lie at least WARN_BASIS_POINTS and FAIL_BASIS_POINTS
    apart.
    """

    venue: str
    other: str
    bars: int
    close: Spread
    returns: Spread
    warned: int
    failed: int


def summarize_pairs(reconciled: pl.DataFrame) -> Iterator[VenueComparison]:
    """Yield each pair of venues of `compare_venues`."""
    for (venue, other), rows in reconciled.group_by("venue", "other", maintain_order=True):
        apart = rows["close_bp"].cast(pl.Float64).abs()
        yield VenueComparison(
            str(venue),
            str(other),
            bars=rows.height,
            close=_spread(apart),
            returns=_spread(rows["return_bp"].cast(pl.Float64).abs().drop_nulls()),
            warned=int((apart >= WARN_BASIS_POINTS).sum()),
            failed=int((apart >= FAIL_BASIS_POINTS).sum()),
        )


def _spread(values: pl.Series) -> Spread:
    if values.is_empty():
        return Spread(None, None, None)
    p50, p99 = (values.quantile(share, "linear") for share in (0.5, 0.99))
    return Spread(p50, p99, largest=float(str(values.max())))


def largest_differences(reconciled: pl.DataFrame, count: int) -> pl.DataFrame:
    """Return the rows whose closes lie farthest apart, the farthest first."""
    return reconciled.sort(pl.col("close_bp").abs(), descending=True, maintain_order=True).head(
        count
    )

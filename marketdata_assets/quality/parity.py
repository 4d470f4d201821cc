"""Parity: our rolled-up bars beside the venue's own, column by column, with the tolerance that a venue
needs.
"""

from __future__ import annotations

from decimal import Decimal
from typing import NamedTuple

import polars as pl

from marketdata_assets.model.bar import COLUMN_NAMES, DIFFERENCE_SUFFIX, PARITY_COLUMNS
from marketdata_assets.model.window import Window

EQUAL, WITHIN, DIFFERS, ONLY_OURS, ONLY_NATIVE = (
    "equal",
    "within_tolerance",
    "differs",
    "only_ours",
    "only_native",
)
"""The outcomes of a bar. The last three are differences; the last two where only one side has a bar
that both should have.
"""
UNEQUAL = (DIFFERS, ONLY_OURS, ONLY_NATIVE)
VALUES = COLUMN_NAMES[1:]


class Tolerance(NamedTuple):
    """How far a venue's own bar may lie from its finer bars: by `absolute`, or by the share `relative`
    of its own value.
    """

    absolute: Decimal
    relative: Decimal
    why: str
    measured: str


_DOUBLES = Tolerance(
    Decimal("1e-8"),
    Decimal("2.7e-16"),
    "the venue added quote volumes up in binary floating point: the last digit of 53 bits, printed with 8 decimals",
    "4h beside 1h of BTC/USDT, 2020-02 and 03: 197 values of 359 bars, at most 5e-8 and, above 1e-8, 2.61e-16; none in 2023 and 2024",
)
TOLERANCE: dict[tuple[str, str], Tolerance] = {
    ("binance", "quote_volume"): _DOUBLES,
    ("binance", "taker_buy_quote_volume"): _DOUBLES,
    ("kraken", "trades"): Tolerance(
        Decimal(1),
        Decimal(0),
        "a trade at the edge of a bar is counted on either side of it",
        "archives, 5m to 1d beside 1m of BTC/USD and BTC/USDT, 2023-03-01 to 20: never more than 1, in 826 of 16,281 bars",
    ),
    ("kraken", "volume"): Tolerance(
        Decimal(0),
        Decimal("0.015"),
        "its archives give other volumes for the same trades and prices; more would hide a minute, which is 1.7 % of an hour",
        "the same: all 40 of 1d (at most 1.47 %), 79 of 80 of 12h, 945 of 960 of 1h, 98 % of 5m lie within; the worst hour is 15 % off",
    ),
}
"""By venue and column. What is not here is compared digit for digit; nothing here is wider than what
was measured.
"""


def judge(venue: str, ours: pl.DataFrame, native: pl.DataFrame, span: Window) -> pl.DataFrame:
    """Every bar that opens inside the span, on either side (model.bar.BAR_SCHEMA, sorted), with its
    outcome.

    `open_time`, `outcome`, `columns` (those that make it so, with spaces between), and for each
    value our own as `volume`, the venue's as `volume_native` and ours less the venue's as
    `volume_apart`. A value that is null on one side was not given, and is not compared.
    """
    inside = pl.col("open_time").is_between(span.start, span.end, closed="left")
    mine, theirs = (
        ours.select(COLUMN_NAMES).filter(inside),
        native.select(COLUMN_NAMES).filter(inside),
    )
    both = mine.join(theirs, on="open_time", how="full", coalesce=True, suffix="_native").sort(
        "open_time"
    )
    both = both.with_columns(
        (pl.col(name) - pl.col(name + "_native")).alias(name + DIFFERENCE_SUFFIX) for name in VALUES
    )
    unequal = {name: (pl.col(name + DIFFERENCE_SUFFIX) != 0).fill_null(False) for name in VALUES}
    beyond = {name: unequal[name] & ~_within(venue, name) for name in VALUES}
    outcome = (
        pl.when(pl.col("close").is_null())
        .then(pl.lit(ONLY_NATIVE))
        .when(pl.col("close_native").is_null())
        .then(pl.lit(ONLY_OURS))
        .when(pl.any_horizontal(beyond.values()))
        .then(pl.lit(DIFFERS))
        .when(pl.any_horizontal(unequal.values()))
        .then(pl.lit(WITHIN))
        .otherwise(pl.lit(EQUAL))
    )
    columns = (
        pl.when(pl.any_horizontal(beyond.values()))
        .then(_listed(beyond))
        .otherwise(_listed(unequal))
    )
    return both.select(
        "open_time", outcome.alias("outcome"), columns.alias("columns"), pl.exclude("open_time")
    )


def _within(venue: str, name: str) -> pl.Expr:
    allowed = TOLERANCE.get((venue, name))
    if allowed is None:
        return pl.lit(False)
    distance = pl.col(name + DIFFERENCE_SUFFIX).abs().cast(pl.Float64)
    share = pl.col(name + "_native").abs().cast(pl.Float64) * float(allowed.relative)
    return (distance <= float(allowed.absolute)) | (distance <= share)


def _listed(flags: dict[str, pl.Expr]) -> pl.Expr:
    return pl.concat_str(
        [pl.when(flag).then(pl.lit(name)) for name, flag in flags.items()],
        separator=" ",
        ignore_nulls=True,
    )


def outcomes(judged: pl.DataFrame) -> pl.DataFrame:
    """What is kept of judged bars that were traced (`cause`, `minutes`): model.bar.PARITY_COLUMNS."""
    return judged.select(pl.col(column.name).cast(column.dtype) for column in PARITY_COLUMNS)

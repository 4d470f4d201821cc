"""Parity: rolled-up bars compared with the venue's own, column by column."""

from __future__ import annotations

from enum import StrEnum

import polars as pl

from marketdata_assets.model.bar import COLUMN_NAMES, DIFFERENCE_SUFFIX, PARITY_COLUMNS
from marketdata_assets.model.intervals import opens_inside
from marketdata_assets.model.window import Window
from marketdata_assets.venues.facts import Tolerance
from marketdata_assets.venues.registry import facts_of

NATIVE = "_native"
"""After a column's name: the venue's own value."""
VALUE_COLUMNS = COLUMN_NAMES[1:]


class ParityOutcome(StrEnum):
    """How a rolled-up bar and the venue's own bar of one open time compare."""

    EQUAL = "equal"
    """Every value that both give is equal."""
    WITHIN_TOLERANCE = "within_tolerance"
    """Values differ, each by no more than the venue's tolerance of that column."""
    DIFFERS = "differs"
    ONLY_OURS = "only_ours"
    """The venue has no bar of its own where it should have one."""
    ONLY_NATIVE = "only_native"
    """We have no bar where we should have one."""


DIFFERENCES = (ParityOutcome.DIFFERS, ParityOutcome.ONLY_OURS, ParityOutcome.ONLY_NATIVE)
"""The outcomes that fail the check."""


def compare_bars(
    venue: str, ours: pl.DataFrame, native: pl.DataFrame, *, span: Window
) -> pl.DataFrame:
    """Return every bar that opens inside the span, on either side, with its outcome.

    Both frames have model.bar.BAR_SCHEMA, sorted. The result has `open_time`, `outcome`, `columns`
    (those that decide the outcome, with spaces between), and for each value our own as `volume`,
    the venue's as `volume_native` and ours less the venue's as `volume_apart`. A value that is null
    on one side was not given, and is not compared.
    """
    mine, theirs = (
        frame.select(COLUMN_NAMES).filter(opens_inside(span)) for frame in (ours, native)
    )
    both = mine.join(theirs, on="open_time", how="full", coalesce=True, suffix=NATIVE).sort(
        "open_time"
    )
    both = both.with_columns(
        (pl.col(name) - pl.col(name + NATIVE)).alias(name + DIFFERENCE_SUFFIX)
        for name in VALUE_COLUMNS
    )
    tolerances = facts_of(venue).tolerances
    unequal = {
        name: (pl.col(name + DIFFERENCE_SUFFIX) != 0).fill_null(False) for name in VALUE_COLUMNS
    }
    beyond = {
        name: flag & ~_is_within(name, tolerances.get(name)) for name, flag in unequal.items()
    }
    differs = pl.any_horizontal(beyond.values())
    outcome = (
        pl.when(pl.col("close").is_null())
        .then(pl.lit(ParityOutcome.ONLY_NATIVE.value))
        .when(pl.col("close" + NATIVE).is_null())
        .then(pl.lit(ParityOutcome.ONLY_OURS.value))
        .when(differs)
        .then(pl.lit(ParityOutcome.DIFFERS.value))
        .when(pl.any_horizontal(unequal.values()))
        .then(pl.lit(ParityOutcome.WITHIN_TOLERANCE.value))
        .otherwise(pl.lit(ParityOutcome.EQUAL.value))
    )
    columns = pl.when(differs).then(_names_of(beyond)).otherwise(_names_of(unequal))
    return both.select(
        "open_time", outcome.alias("outcome"), columns.alias("columns"), pl.exclude("open_time")
    )


def select_stored(compared: pl.DataFrame) -> pl.DataFrame:
    """Return the stored columns (model.bar.PARITY_COLUMNS) of compared bars with their causes."""
    return compared.select(pl.col(column.name).cast(column.dtype) for column in PARITY_COLUMNS)


def _is_within(name: str, tolerance: Tolerance | None) -> pl.Expr:
    if tolerance is None:
        return pl.lit(False)
    distance = pl.col(name + DIFFERENCE_SUFFIX).abs().cast(pl.Float64)
    share = pl.col(name + NATIVE).abs().cast(pl.Float64) * float(tolerance.relative)
    return (distance <= float(tolerance.absolute)) | (distance <= share)


def _names_of(flags: dict[str, pl.Expr]) -> pl.Expr:
    """The names of the flags that are true, with spaces between."""
    return pl.concat_str(
        [pl.when(flag).then(pl.lit(name)) for name, flag in flags.items()],
        separator=" ",
        ignore_nulls=True,
    )

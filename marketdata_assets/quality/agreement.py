"""Several answers about identical open times: which bar is used, and which rows contradict it."""

from __future__ import annotations

from typing import NamedTuple

import polars as pl

from marketdata_assets.model.bar import BAR_COLUMNS, COLUMN_NAMES

_VALUES = COLUMN_NAMES[1:]
_OPTIONAL = frozenset(column.name for column in BAR_COLUMNS if column.optional)


class ResolvedAnswers(NamedTuple):
    """What `resolve_answers` made of the rows of all answers.

    `bars`: one bar per open_time, sorted. `outvoted`: rows (with `answer`) that lost against two or
    more equal answers. `unresolved`: rows (with `answer`) of open_times for which no variant has
    won; none of those open_times is in `bars`. All other rows repeat one of `bars`.
    """

    bars: pl.DataFrame
    outvoted: pl.DataFrame
    unresolved: pl.DataFrame


def resolve_answers(rows: pl.DataFrame) -> ResolvedAnswers:
    """Choose one bar per open_time among the rows of all answers.

    `rows` has the columns `answer` and `model.bar.BAR_SCHEMA`. The only variant of an open_time is
    chosen. Of several, the one that most answers gave is chosen when at least two gave it and no
    other has as many votes; an answer has one vote for a variant.
    """
    repeated = rows["open_time"].is_duplicated()
    if not repeated.any():
        return ResolvedAnswers(
            rows.select(COLUMN_NAMES).sort("open_time"), rows.clear(), rows.clear()
        )
    single, several = rows.filter(~repeated), rows.filter(repeated)
    variants = several.group_by(COLUMN_NAMES).agg(pl.col("answer").n_unique().alias("votes"))
    counted = variants.with_columns(
        pl.col("votes").max().over("open_time").alias("most"),
        pl.len().over("open_time").alias("rivals"),
    )
    leads = pl.col("votes") == pl.col("most")
    leads_alone = leads.sum().over("open_time") == 1
    won = leads & ((pl.col("rivals") == 1) | ((pl.col("most") > 1) & leads_alone))
    judged = counted.with_columns(won.alias("won"), won.any().over("open_time").alias("resolved"))
    winners = judged.filter("won").select(COLUMN_NAMES)
    decided = several.join(
        judged.select(*COLUMN_NAMES, "won", "resolved"),
        on=COLUMN_NAMES,
        how="left",
        nulls_equal=True,
    )
    return ResolvedAnswers(
        pl.concat([single.select(COLUMN_NAMES), winners]).sort("open_time"),
        outvoted=decided.filter(~pl.col("won") & pl.col("resolved")).select(rows.columns),
        unresolved=decided.filter(~pl.col("resolved")).select(rows.columns),
    )


def coalesce_optional(rows: pl.DataFrame, by: pl.DataFrame) -> pl.DataFrame:
    """Fill nulls in the optional columns of `rows` from the row of `by` with that open_time.

    `by` holds an open_time at most once. A value that is not given contradicts nothing: a file may
    have more columns than the venue's API.
    """
    with_nulls = [name for name in COLUMN_NAMES if name in _OPTIONAL and rows[name].null_count()]
    if not with_nulls or by.is_empty():
        return rows
    others = by.select("open_time", *(pl.col(name).alias(name + "_by") for name in with_nulls))
    joined = rows.join(others, on="open_time", how="left", maintain_order="left")
    return joined.with_columns(
        pl.coalesce(name, name + "_by").alias(name) for name in with_nulls
    ).select(rows.columns)


class ResolvedFiles(NamedTuple):
    """What `resolve_files` made of the rows of several files; each row is in exactly one frame.

    `bars`: one bar per open_time. `repeats`: rows that do not contradict the bar of their
    open_time. `conflicts`: all rows of open_times about which files contradict each other.
    """

    bars: pl.DataFrame
    repeats: pl.DataFrame
    conflicts: pl.DataFrame


def resolve_files(rows: pl.DataFrame) -> ResolvedFiles:
    """Choose one bar per open_time among the rows of several files.

    `rows` has the columns `answer` and `model.bar.COLUMN_NAMES`. Files do not outvote each other:
    where two differ, neither is used; a value that one of them does not give is no difference. Of
    rows that agree, the one with the lowest `answer` is chosen.
    """
    repeated = rows["open_time"].is_duplicated()
    if not repeated.any():
        return ResolvedFiles(rows, rows.clear(), rows.clear())
    differs = pl.any_horizontal(pl.col(name).min() != pl.col(name).max() for name in _VALUES)
    differing = (
        rows.filter(repeated)
        .group_by("open_time")
        .agg(differs.fill_null(False).alias("differs"))
        .filter("differs")
    )
    conflicts = rows.join(differing, on="open_time", how="semi")
    agreed = rows.join(differing, on="open_time", how="anti").sort(
        "open_time", "answer", maintain_order=True
    )
    is_first = agreed["open_time"].is_first_distinct()
    return ResolvedFiles(
        agreed.filter(is_first), repeats=agreed.filter(~is_first), conflicts=conflicts
    )


class StoredComparison(NamedTuple):
    """Bars compared with the stored ones of their open_times; each bar is in exactly one frame.

    `new`: no bar is stored. `identical`: the stored bar has equal values. `different`: it has
    others, which are in the columns `<column>_stored`.
    """

    new: pl.DataFrame
    identical: pl.DataFrame
    different: pl.DataFrame


def compare_with_stored(bars: pl.DataFrame, stored: pl.DataFrame) -> StoredComparison:
    """Compare bars (one per open_time) with those that are stored of the partition.

    A value that one of the two does not give contradicts nothing.
    """
    both = bars.join(stored.select(COLUMN_NAMES), on="open_time", suffix="_stored")
    equal = {name: pl.col(name) == pl.col(name + "_stored") for name in _VALUES}
    agrees = both.select(
        pl.all_horizontal(
            expr.fill_null(True) if name in _OPTIONAL else expr for name, expr in equal.items()
        ).alias("agrees")
    )["agrees"]
    return StoredComparison(
        bars.join(stored.select("open_time"), on="open_time", how="anti"),
        identical=both.filter(agrees).select(bars.columns),
        different=both.filter(~agrees),
    )

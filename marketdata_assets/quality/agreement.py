"""Several answers about the same minutes: what they agree on, what they repeat, what they
contradict.
"""

from __future__ import annotations

from typing import NamedTuple

import polars as pl

from marketdata_assets.model.bar import BAR_COLUMNS, COLUMN_NAMES


class Agreement(NamedTuple):
    """`bars`: one bar per open_time that is believed, sorted. `identical`: how many rows only repeated
    one of them.

    `outvoted`: rows (with `answer`) that lost against two or more equal answers. `open`: rows of
    open_times for which no variant has won; none of those open_times is in `bars`.
    """

    bars: pl.DataFrame
    identical: int
    outvoted: pl.DataFrame
    open: pl.DataFrame


def agree(kept: pl.DataFrame) -> Agreement:
    """Settle the kept rows of all answers about one span (columns `answer` and model.bar.BAR_SCHEMA).

    One variant of an open_time is believed. Of several, the one that most answers gave is believed
    when at least two gave it and no other has as many. `len(kept) == len(bars) + identical +
    len(outvoted) + len(open)` always.
    """
    repeated = kept["open_time"].is_duplicated()
    if not repeated.any():
        return Agreement(kept.select(COLUMN_NAMES).sort("open_time"), 0, kept.clear(), kept.clear())
    single, several = kept.filter(~repeated), kept.filter(repeated)
    variants = several.group_by(COLUMN_NAMES).agg(pl.col("answer").n_unique().alias("votes"))
    ranked = variants.with_columns(
        pl.col("votes").max().over("open_time").alias("most"),
        pl.len().over("open_time").alias("rivals"),
    )
    leading = pl.col("votes") == pl.col("most")
    alone = leading.sum().over("open_time") == 1
    won = leading & ((pl.col("rivals") == 1) | ((pl.col("most") > 1) & alone))
    judged = ranked.with_columns(won.alias("won"), won.any().over("open_time").alias("settled"))
    winners = judged.filter("won").select(COLUMN_NAMES)
    rows = several.join(
        judged.select(*COLUMN_NAMES, "won", "settled"),
        on=COLUMN_NAMES,
        how="left",
        nulls_equal=True,
    )
    return Agreement(
        pl.concat([single.select(COLUMN_NAMES), winners]).sort("open_time"),
        int(rows["won"].sum()) - winners.height,
        rows.filter(~pl.col("won") & pl.col("settled")).select(kept.columns),
        rows.filter(~pl.col("settled")).select(kept.columns),
    )


def filled(rows: pl.DataFrame, by: pl.DataFrame) -> pl.DataFrame:
    """The same rows; a value that one of them does not give is that of the row of the same open_time
    in `by`, if it has one.

    `by` has an open_time once. What a row does not give contradicts nothing: a file may tell more
    than the venue's API.
    """
    lacking = [
        column.name for column in BAR_COLUMNS if column.optional and rows[column.name].null_count()
    ]
    if not lacking or by.is_empty():
        return rows
    beside = by.select("open_time", *(pl.col(name).alias(name + "_by") for name in lacking))
    joined = rows.join(beside, on="open_time", how="left", maintain_order="left")
    return joined.with_columns(
        pl.coalesce(name, name + "_by").alias(name) for name in lacking
    ).select(rows.columns)


class Unanimous(NamedTuple):
    """What several files say: `bars` once each, `repeated` rows that say the same again, `disputed`
    rows that contradict others.
    """

    bars: pl.DataFrame
    repeated: pl.DataFrame
    disputed: pl.DataFrame


def unanimous(kept: pl.DataFrame) -> Unanimous:
    """Rows of several files (columns `answer` and model.bar.COLUMN_NAMES): an open_time that is told twice
    must be told alike.

    Files are no witnesses that outvote each other: where two differ, neither is believed; a value
    that one does not give is no difference. Of bars that are told alike the one with the lowest
    `answer` is taken. `len(kept) == len(bars) + len(repeated) + len(disputed)` always.
    """
    again = kept["open_time"].is_duplicated()
    if not again.any():
        return Unanimous(kept, kept.clear(), kept.clear())
    differs = pl.any_horizontal(
        pl.col(name).min() != pl.col(name).max() for name in COLUMN_NAMES if name != "open_time"
    )
    opens = (
        kept.filter(again)
        .group_by("open_time")
        .agg(differs.fill_null(False).alias("differs"))
        .filter("differs")
    )
    disputed = kept.join(opens, on="open_time", how="semi")
    told = kept.join(opens, on="open_time", how="anti").sort(
        "open_time", "answer", maintain_order=True
    )
    first = told["open_time"].is_first_distinct()
    return Unanimous(told.filter(first), told.filter(~first), disputed)


class Beside(NamedTuple):
    """Bars beside stored ones: `new` open_times, `identical` and `denied` bars; these with the stored
    values as `<column>_stored`.
    """

    new: pl.DataFrame
    identical: pl.DataFrame
    denied: pl.DataFrame


def beside(bars: pl.DataFrame, stored: pl.DataFrame) -> Beside:
    """Bars of one partition beside those that are stored. A value that one of the two does not give
    contradicts nothing.
    """
    both = bars.join(stored.select(COLUMN_NAMES), on="open_time", suffix="_stored")
    optional = {column.name for column in BAR_COLUMNS if column.optional}
    same = {
        name: pl.col(name) == pl.col(name + "_stored")
        for name in COLUMN_NAMES
        if name != "open_time"
    }
    agrees = both.select(
        pl.all_horizontal(e.fill_null(True) if n in optional else e for n, e in same.items()).alias(
            "agrees"
        )
    )["agrees"]
    new = bars.join(stored.select("open_time"), on="open_time", how="anti")
    return Beside(new, both.filter(agrees).select(bars.columns), both.filter(~agrees))

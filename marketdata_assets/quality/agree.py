"""Several answers about the same minutes: what they agree on, what they repeat, what they contradict."""

from __future__ import annotations

from typing import NamedTuple

import polars as pl

from marketdata_assets.model.bar import NAMES


class Agreement(NamedTuple):
    """`bars`: one bar per open_time that is believed, sorted. `identical`: how many rows only repeated one of them.

    `outvoted`: rows (with `answer`) that lost against two or more equal answers. `open`: rows of open_times for which
    no variant has won; none of those open_times is in `bars`.
    """

    bars: pl.DataFrame
    identical: int
    outvoted: pl.DataFrame
    open: pl.DataFrame


def agree(kept: pl.DataFrame) -> Agreement:
    """Settle the kept rows of all answers about one span (columns `answer` and model.bar.SCHEMA).

    One variant of an open_time is believed. Of several, the one that most answers gave is believed when at least two
    gave it and no other has as many. `len(kept) == len(bars) + identical + len(outvoted) + len(open)` always.
    """
    repeated = kept["open_time"].is_duplicated()
    if not repeated.any():
        return Agreement(kept.select(NAMES).sort("open_time"), 0, kept.clear(), kept.clear())
    single, several = kept.filter(~repeated), kept.filter(repeated)
    variants = several.group_by(NAMES).agg(pl.col("answer").n_unique().alias("votes"))
    ranked = variants.with_columns(pl.col("votes").max().over("open_time").alias("most"), pl.len().over("open_time").alias("rivals"))
    leading = pl.col("votes") == pl.col("most")
    alone = leading.sum().over("open_time") == 1
    won = leading & ((pl.col("rivals") == 1) | ((pl.col("most") > 1) & alone))
    judged = ranked.with_columns(won.alias("won"), won.any().over("open_time").alias("settled"))
    winners = judged.filter("won").select(NAMES)
    rows = several.join(judged.select(*NAMES, "won", "settled"), on=NAMES, how="left", nulls_equal=True)
    return Agreement(
        pl.concat([single.select(NAMES), winners]).sort("open_time"),
        int(rows["won"].sum()) - winners.height,
        rows.filter(~pl.col("won") & pl.col("settled")).select(kept.columns),
        rows.filter(~pl.col("settled")).select(kept.columns),
    )

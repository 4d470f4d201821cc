"""One series of several venues' bars: at each open time the bar of the first venue that was up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl

from marketdata_assets.model.bar import COLUMN_NAMES, CONSOLIDATED_COLUMNS, TIME
from marketdata_assets.model.window import Window


def consolidate(
    bars: Mapping[str, pl.DataFrame], no_trade_windows: Mapping[str, Sequence[Window]]
) -> pl.DataFrame:
    """Return the bars of all venues as one series, with a column `venue`.

    `bars` by venue, the preferred one first (model.bar.BAR_SCHEMA, sorted). `no_trade_windows`
    holds the open times at which a venue was up and nobody traded there: where that venue would
    have been chosen, there is no bar. Any other missing bar means that the venue was down, and the
    next one is chosen.
    """
    found = pl.DataFrame(schema={column.name: column.dtype for column in CONSOLIDATED_COLUMNS})
    decided = list[Sequence[Window]]()
    for venue, frame in bars.items():
        left = frame.select(COLUMN_NAMES).join(
            found.select("open_time"), on="open_time", how="anti"
        )
        for windows in decided:
            left = _drop_inside(left, windows)
        found = pl.concat([found, left.with_columns(pl.lit(venue).alias("venue"))])
        decided.append(no_trade_windows.get(venue, ()))
    return found.sort("open_time")


def _drop_inside(frame: pl.DataFrame, windows: Sequence[Window]) -> pl.DataFrame:
    """Return the bars that open in none of these windows, which do not overlap."""
    if not windows:
        return frame
    spans = pl.DataFrame(
        [(w.start, w.end) for w in sorted(windows)],
        schema={"start": TIME, "until": TIME},
        orient="row",
    )
    joined = frame.sort("open_time").join_asof(spans, left_on="open_time", right_on="start")
    is_outside = pl.col("until").is_null() | (pl.col("open_time") >= pl.col("until"))
    return joined.filter(is_outside).select(COLUMN_NAMES)


def find_venue_switches(series: pl.DataFrame) -> pl.DataFrame:
    """Return where a consolidated series continues with another venue.

    `open_time` of the first bar of that venue, the venue `before`, and `venue`.
    """
    is_switch = pl.col("venue") != pl.col("before")
    before = pl.col("venue").shift(1).alias("before")
    return series.select("open_time", before, "venue").filter(is_switch)

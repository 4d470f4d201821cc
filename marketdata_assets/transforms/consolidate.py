"""One series of several venues' bars: of each minute the bar of the first venue, in order of
preference, that was up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl

from marketdata_assets.model.bar import COLUMN_NAMES, CONSOLIDATED_COLUMNS, TIME
from marketdata_assets.model.window import Window


def consolidate(
    bars: Mapping[str, pl.DataFrame], quiet: Mapping[str, Sequence[Window]]
) -> pl.DataFrame:
    """The bars of all venues (by name, the preferred one first; model.bar.BAR_SCHEMA, sorted) as one
    series with a column `venue`.

    `quiet` holds windows of open times in which a venue was up and nobody traded there: where it
    would have been chosen, there is no bar. Any other lack of a bar means that the venue was down,
    and the next one is asked.
    """
    empty = pl.DataFrame(schema={column.name: column.dtype for column in CONSOLIDATED_COLUMNS})
    found, settled = empty, list[Sequence[Window]]()
    for venue, frame in bars.items():
        left = frame.select(COLUMN_NAMES).join(
            found.select("open_time"), on="open_time", how="anti"
        )
        for windows in settled:
            left = _outside(left, windows)
        found = pl.concat([found, left.with_columns(pl.lit(venue).alias("venue"))])
        settled.append(quiet.get(venue, ()))
    return found.sort("open_time")


def _outside(frame: pl.DataFrame, windows: Sequence[Window]) -> pl.DataFrame:
    """The bars that open in none of these windows, which do not overlap."""
    if not windows:
        return frame
    spans = pl.DataFrame(
        [(w.start, w.end) for w in sorted(windows)],
        schema={"start": TIME, "until": TIME},
        orient="row",
    )
    beside = frame.sort("open_time").join_asof(spans, left_on="open_time", right_on="start")
    return beside.filter(
        pl.col("until").is_null() | (pl.col("open_time") >= pl.col("until"))
    ).select(COLUMN_NAMES)


def switches(series: pl.DataFrame) -> pl.DataFrame:
    """Where a consolidated series goes over to another venue: `open_time` of its first bar, `before`,
    `venue`.
    """
    changed = pl.col("venue") != pl.col("before")
    return series.select("open_time", pl.col("venue").shift(1).alias("before"), "venue").filter(
        changed
    )

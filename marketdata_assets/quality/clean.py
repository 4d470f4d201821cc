"""Stored rows that must not be there: twice, in the wrong place, or against a rule. Pure functions on
frames.
"""

from __future__ import annotations

from typing import NamedTuple

import polars as pl

from marketdata_assets.model.bar import COLUMN_NAMES
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import Window
from marketdata_assets.quality.split import REJECTED_SCHEMA, asked_columns, reject, split


class Cleaned(NamedTuple):
    """`bars`: what may stay, one an open_time, sorted. `repeated`: how many rows only repeated one of
    them.

    `rejected` (quality.split.REJECTED_SCHEMA): rows with an open_time outside of `owned`
    (`overlap`), different rows of one open_time (`conflict`, all of them), and rows that break a
    rule.
    """

    bars: pl.DataFrame
    repeated: int
    rejected: pl.DataFrame

    @property
    def says(self) -> str:
        """What is wrong, in words; empty when nothing is."""
        reasons = self.rejected.group_by("reasons").len().sort("reasons").rows()
        parts = [f"{count} rows: {reason}" for reason, count in reasons]
        return ", ".join(
            [*([f"{self.repeated} rows stored twice"] if self.repeated else []), *parts]
        )


def clean(rows: pl.DataFrame, timeframe: Timeframe, owned: Window) -> Cleaned:
    """Judge stored rows (model.bar.BAR_SCHEMA and more) of one partition, which owns these open times."""
    numbered = rows.with_columns(pl.lit(-1, pl.Int64).alias("answer"))
    mine = pl.col("open_time").is_between(owned.start, owned.end, closed="left")
    single = numbered.filter(mine).unique(COLUMN_NAMES, keep="first", maintain_order=True)
    disputed = single["open_time"].is_duplicated()
    held = single.filter(~disputed)
    sent = held.with_columns(
        pl.col("open_time").dt.epoch("ms"),
        *(pl.col(n).cast(pl.String) for n in COLUMN_NAMES if n not in _AS_THEY_ARE),
    )
    broken = split(
        asked_columns(sent.select(COLUMN_NAMES), -1, owned), timeframe, owned.end + timeframe.width
    ).rejected
    rejected = [
        reject(numbered.filter(~mine), "overlap"),
        reject(single.filter(disputed), "conflict"),
        broken,
    ]
    bars = held.join(broken, on="open_time", how="anti").drop("answer").sort("open_time")
    outside = numbered.filter(~mine).height
    return Cleaned(
        bars,
        rows.height - outside - single.height,
        pl.concat([frame.select(*REJECTED_SCHEMA) for frame in rejected]),
    )


_AS_THEY_ARE = ("open_time", "trades")

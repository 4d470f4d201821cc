"""Stored rows that must not be there: stored twice, in the wrong place, or against a rule."""

from __future__ import annotations

from typing import NamedTuple

import polars as pl

from marketdata_assets.model.bar import COLUMN_NAMES
from marketdata_assets.model.intervals import opens_inside
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import Window
from marketdata_assets.quality.split import (
    REJECTED_SCHEMA,
    add_request_columns,
    reject_bars,
    split_rows,
)

_SENT_AS_NUMBERS = ("open_time", "trades")


class CleanedBars(NamedTuple):
    """What `clean_bars` made of stored rows.

    `bars`: what may stay, one bar per open_time, sorted. `duplicates`: how many rows only repeated
    one of them. `rejected` (quality.split.REJECTED_SCHEMA): rows outside of the partition
    (`overlap`), different rows of one open_time (`conflict`, all of them), and rows that break a
    rule.
    """

    bars: pl.DataFrame
    duplicates: int
    rejected: pl.DataFrame

    @property
    def message(self) -> str:
        """What is wrong with the rows; empty when nothing is."""
        counts = self.rejected.group_by("reasons").len().sort("reasons").rows()
        parts = [f"{self.duplicates} rows stored twice"] if self.duplicates else []
        return ", ".join([*parts, *(f"{count} rows: {reason}" for reason, count in counts)])


def clean_bars(rows: pl.DataFrame, timeframe: Timeframe, owned: Window) -> CleanedBars:
    """Judge the stored rows of one partition, which owns the open times in `owned`.

    `rows` has the columns of model.bar.BAR_SCHEMA and may have more, which are kept.
    """
    numbered = rows.with_columns(pl.lit(-1, pl.Int64).alias("answer"))
    mine, outside = numbered.filter(opens_inside(owned)), numbered.filter(~opens_inside(owned))
    single = mine.unique(COLUMN_NAMES, keep="first", maintain_order=True)
    disputed = single["open_time"].is_duplicated()
    held = single.filter(~disputed)
    sent = held.with_columns(
        pl.col("open_time").dt.epoch("ms"),
        *(pl.col(name).cast(pl.String) for name in COLUMN_NAMES if name not in _SENT_AS_NUMBERS),
    )
    broken = split_rows(
        add_request_columns(sent.select(COLUMN_NAMES), -1, owned),
        timeframe,
        closed_before=timeframe.shift(owned.end, 1),
    ).rejected
    rejected = [
        reject_bars(outside, "overlap"),
        reject_bars(single.filter(disputed), "conflict"),
        broken,
    ]
    return CleanedBars(
        held.join(broken, on="open_time", how="anti").drop("answer").sort("open_time"),
        duplicates=rows.height - outside.height - single.height,
        rejected=pl.concat([frame.select(*REJECTED_SCHEMA) for frame in rejected]),
    )

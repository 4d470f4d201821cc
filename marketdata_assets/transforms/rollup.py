"""Rollups: coarser bars from finer ones, each timeframe from the coarsest that divides it.

All sums are sums of decimals, so 1m -> 5m -> ... -> 1w gives digit for digit what 1m -> 1w would. No bar is made up
where there is none: a bucket without bars gives no bar.
"""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from marketdata_assets.model.bar import ROLLUP_SCHEMA, SCALE
from marketdata_assets.model.window import Timeframe, Window

_AGGREGATES = (
    pl.col("open").first(),
    pl.col("high").max(),
    pl.col("low").min(),
    pl.col("close").last(),
    *(
        # null as soon as one bar lacks it: a sum of the others would be a number no venue ever said
        pl.when(pl.col(name).null_count() == 0).then(pl.col(name).sum()).alias(name)
        for name in ("volume", "quote_volume", "trades", "taker_buy_volume", "taker_buy_quote_volume")
    ),
    pl.col("bars_present").sum(),
)


def roll_up(bars: pl.DataFrame, base: Timeframe, timeframes: Sequence[Timeframe], whole: Window) -> dict[Timeframe, pl.DataFrame]:
    """Bars of `base` (model.bar.SCHEMA, sorted, one market) to every timeframe (model.bar.ROLLUP_SCHEMA).

    Only buckets that lie wholly inside `whole`, the window that has been asked for, are returned: an open bar, or one
    that reaches before the first day, is not a bar yet. `vwap` is rounded to 12 decimals, half to even.
    """
    finest = bars.with_columns(pl.lit(1, pl.Int64).alias("bars_present"), pl.col("open_time").set_sorted())
    made: dict[Timeframe, pl.DataFrame] = {base: finest}
    for timeframe in sorted(timeframes, key=lambda tf: tf.width):
        parent = max((tf for tf in made if timeframe.width % tf.width == timeframe.width * 0), key=lambda tf: tf.width)
        made[timeframe] = _grouped(made[parent], timeframe)
    return {tf: _finished(made[tf], tf, base, whole) for tf in timeframes}


def _grouped(finer: pl.DataFrame, timeframe: Timeframe) -> pl.DataFrame:
    buckets = finer.lazy().group_by_dynamic("open_time", every=timeframe.every).agg(_AGGREGATES)
    made = buckets.collect(engine="streaming")  # over three times as fast here as the engine of eager frames
    return made.with_columns(pl.col("open_time").set_sorted())


def _finished(frame: pl.DataFrame, timeframe: Timeframe, base: Timeframe, whole: Window) -> pl.DataFrame:
    inside = pl.col("open_time").is_between(timeframe.ceil(whole.start), whole.end - timeframe.width, closed="both")
    volume = pl.when(pl.col("volume") != 0).then(pl.col("volume"))
    return (
        frame.filter(inside)
        .with_columns(
            (pl.col("quote_volume") / volume).cast(pl.Decimal(38, SCALE)).alias("vwap"),
            pl.lit(timeframe.width // base.width, pl.Int64).alias("bars_expected"),
        )
        .select(pl.col(name).cast(dtype) for name, dtype in ROLLUP_SCHEMA.items())
    )

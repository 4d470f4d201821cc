"""Measures the rollup of one market-year of 1m bars to eight timeframes: ours, DuckDB, pandas.

    python bench/rollup.py [--rounds 7]

Each contender computes open, high, low, close and the five sums of every timeframe from the same
bars in memory in one run, in the fastest way that was measured: DuckDB from a native table with
`time_bucket`, once with each timeframe from 1m and once from the timeframe before; pandas with
`resample` on floats in both ways. Ours computes exact decimals and counts bars as well.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from datetime import UTC, datetime

import duckdb
import pandas as pd
import polars as pl

from marketdata_assets.model.timeframe import DEFAULT_ROLLUPS, MINUTE, TIMEFRAMES
from marketdata_assets.model.window import Window
from marketdata_assets.sources.sandbox.bars import generate_bars
from marketdata_assets.transforms.rollup import roll_up

YEAR = Window(datetime(2022, 1, 1, tzinfo=UTC), datetime(2023, 1, 1, tzinfo=UTC))
TARGETS = [tf for tf in DEFAULT_ROLLUPS if tf.name != "1m"]
SUMS = ["volume", "quote_volume", "trades", "taker_buy_volume", "taker_buy_quote_volume"]
RULES = {
    "5m": "5min",
    "15m": "15min",
    "30m": "30min",
    "1h": "1h",
    "4h": "4h",
    "12h": "12h",
    "1d": "1D",
    "1w": "W-MON",
}


def ours(bars: pl.DataFrame) -> Callable[[], object]:
    return lambda: roll_up(bars, TIMEFRAMES["1m"], TARGETS, whole=YEAR)


def by_duckdb(bars: pl.DataFrame, hierarchical: bool) -> Callable[[], object]:
    connection = duckdb.connect()
    connection.register("incoming", bars.to_arrow())
    connection.execute("CREATE TABLE ohlcv_1m AS SELECT * FROM incoming")
    sums = ", ".join(f"sum({name}) AS {name}" for name in SUMS)

    def run() -> None:
        for tf, finer in zip(TARGETS, DEFAULT_ROLLUPS, strict=False):
            source = f"ohlcv_{finer.name if hierarchical else '1m'}"
            connection.execute(
                f"CREATE OR REPLACE TEMP TABLE ohlcv_{tf.name} AS"
                f" SELECT time_bucket(INTERVAL '{tf.width // MINUTE} minutes', open_time,"
                " TIMESTAMPTZ '1970-01-05 00:00:00+00') AS open_time,"
                " arg_min(open, open_time) AS open, max(high) AS high, min(low) AS low,"
                f" arg_max(close, open_time) AS close, {sums} FROM {source} GROUP BY 1 ORDER BY 1"
            )

    return run


def by_pandas(bars: pl.DataFrame, hierarchical: bool) -> Callable[[], object]:
    frame = pd.DataFrame(
        {c: bars[c].cast(pl.Float64).to_numpy() for c in bars.columns if c != "open_time"},
        index=bars["open_time"].to_numpy(),
    )
    how = {
        "open": "first",
        "high": "max",
        "low": "min",
        "close": "last",
        **dict.fromkeys(SUMS, "sum"),
    }

    def run() -> None:
        bars_before = frame
        for tf in TARGETS:
            source = bars_before if hierarchical else frame
            bars_before = source.resample(RULES[tf.name], label="left", closed="left").agg(how)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    bars = generate_bars("BTCUSDT", "1m", YEAR)
    contenders = {
        "ours": ours(bars),
        "duckdb, each from 1m": by_duckdb(bars, False),
        "duckdb, each from the one before": by_duckdb(bars, True),
        "pandas, each from 1m": by_pandas(bars, False),
        "pandas, each from the one before": by_pandas(bars, True),
    }
    best: dict[str, tuple[float, float]] = {}
    for _ in range(rounds):
        for name, run in contenders.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            seconds = (time.perf_counter() - wall, time.process_time() - cpu)
            best[name] = min(best.get(name, seconds), seconds)
    for name, (wall, cpu) in best.items():
        ratio = wall / best["ours"][0]
        print(
            f"{name:34} {bars.height / wall:12,.0f} bars/s  {wall * 1000:8.1f} ms wall  "
            f"{cpu * 1000:8.1f} ms cpu  {ratio:5.2f} x ours"
        )


if __name__ == "__main__":
    main()

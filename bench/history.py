"""Measures the cost of history and provenance in bytes per bar and CPU seconds per million bars.

    python bench/history.py [--rounds 7]     (needs ../shared)

Every month of real 1m bars is stored four times: as bars alone; with the `known_at` and `source` of
a backfill (one moment per month); with those of a live market (another moment every 5 bars); and as
a live market of which 500 bars were replaced, so that the earlier bars are in a history object. The
CPU seconds are those of this process, the median over the rounds, in which the cases take turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import polars as pl

from marketdata_assets.model.bar import BAR_SCHEMA, TIME
from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import Table, history_table, raw_table
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.model.window import month_of
from marketdata_assets.storage.lake import Lake
from marketdata_assets.storage.parquet import decode, encode, to_arrow

SHARED = Path(__file__).resolve().parents[2] / "shared" / "marketdata" / "binance_spot"
M1 = TIMEFRAMES["1m"]
REPLACED = 500

Month = tuple[Partition, pl.DataFrame]


class Case(NamedTuple):
    """A way to store a month: the frame of each table, and whether provenance is read."""

    name: str
    frames: Callable[[pl.DataFrame], dict[Table, pl.DataFrame]]
    provenance: bool


def real_months(symbol: str) -> list[Month]:
    """Read the real bars of Binance, by month, in the model's types."""
    market = Market("binance", symbol.replace("USDT", "/USDT"))
    files = sorted((SHARED / symbol / "1m").glob("*.parquet"))
    opens = pl.from_epoch("open_time", time_unit="ms").dt.replace_time_zone("UTC").cast(TIME)
    found = pl.concat(pl.read_parquet(file).rename({"count": "trades"}) for file in files)
    bars = found.select(
        opens,
        *(pl.col(name).cast(dtype) for name, dtype in BAR_SCHEMA.items() if name != "open_time"),
    )
    months = bars.group_by(pl.col("open_time").dt.truncate("1mo"), maintain_order=True)
    return [(Partition(market, month_of(part["open_time"][0])), part) for _, part in months]


def add_provenance(bars: pl.DataFrame, known_at: pl.Expr) -> pl.DataFrame:
    return bars.with_columns(known_at.alias("known_at"), pl.lit("rest").alias("source"))


def add_backfill_provenance(bars: pl.DataFrame) -> pl.DataFrame:
    """Add the provenance of one fetch, long after the bars."""
    return add_provenance(
        bars, pl.lit(bars["open_time"][-1] + timedelta(days=400, microseconds=123456)).cast(TIME)
    )


def add_live_provenance(bars: pl.DataFrame) -> pl.DataFrame:
    """Add the provenance of a run every 5 minutes that stores the last 5 bars seconds later."""
    last = pl.col("open_time").last().over(pl.int_range(pl.len()) // 5)
    return add_provenance(
        bars,
        (last + timedelta(minutes=1) + pl.duration(microseconds=last.hash(1) % 30_000_000)).cast(
            TIME
        ),
    )


def replace_bars(bars: pl.DataFrame) -> dict[Table, pl.DataFrame]:
    """Restate REPLACED random bars a day later: raw holds the new bars, history the old ones."""
    known = add_live_provenance(bars)
    late = pl.int_range(pl.len()).is_in(
        pl.int_range(pl.len(), eager=False).sample(REPLACED, seed=1).implode()
    )
    after = (pl.col("open_time") + timedelta(days=1, seconds=7)).cast(TIME)
    before = known.filter(late).with_columns(after.alias("replaced_at"))
    return {
        raw_table(M1): known.with_columns(
            pl.when(late).then(after).otherwise("known_at").alias("known_at")
        ),
        history_table(M1): before,
    }


CASES = (
    Case("bars alone", lambda bars: {raw_table(M1): bars}, False),
    Case("backfilled", lambda bars: {raw_table(M1): add_backfill_provenance(bars)}, True),
    Case("live", lambda bars: {raw_table(M1): add_live_provenance(bars)}, True),
    Case("live, read as bars", lambda bars: {raw_table(M1): add_live_provenance(bars)}, False),
    Case(f"live, {REPLACED} replaced", replace_bars, True),
)


def measure_cpu(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def measure(case: Case, month: Month, lake: Lake) -> dict[str, float]:
    """Return bytes and CPU seconds of one month."""
    partition, bars = month
    frames = case.frames(bars)
    objects = {table: encode(to_arrow(frame, {})) for table, frame in frames.items()}
    for table, content in objects.items():
        columns = frames[table].columns if case.provenance else list(table.schema)
        provenance = case.provenance and table.layer == "raw"
        assert decode(content, table, name="bench", with_provenance=provenance).equals(
            frames[table].select(columns)
        )
    return {
        "bars": bars.height,
        "bytes": sum(map(len, objects.values())),
        "encode": measure_cpu(lambda: [encode(to_arrow(frame, {})) for frame in frames.values()]),
        "write": measure_cpu(
            lambda: [lake.write(table, partition, frame) for table, frame in frames.items()]
        ),
        "read": measure_cpu(
            lambda: [
                lake.read(t, partition, with_provenance=case.provenance and t.layer == "raw")
                for t in frames
            ]
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    symbols = {symbol: real_months(symbol) for symbol in ("BTCUSDT", "ETHUSDT", "SOLUSDT")}
    found: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        lake = Lake(folder)
        for turn in range(rounds + 1):  # the first round warms up
            for symbol, months in symbols.items():
                for case in CASES:
                    sums = (
                        pl.DataFrame([measure(case, month, lake) for month in months])
                        .sum()
                        .row(0, named=True)
                    )
                    found[symbol, case.name] += [sums] if turn else []
    head = f"{'':8} {'':22} {'bars':>8} {'bytes/bar':>10} {'more':>7}"
    print(f"{head} | CPU seconds per million bars: encode   write    read")
    for (symbol, name), turns in found.items():
        bars, size = turns[0]["bars"], turns[0]["bytes"] / turns[0]["bars"]
        bars_alone = found[symbol, CASES[0].name][0]["bytes"] / bars
        seconds = "".join(
            f"{statistics.median(turn[verb] for turn in turns) / bars * 1e6:8.2f}"
            for verb in ("encode", "write", "read")
        )
        row = f"{symbol:8} {name:22} {bars:8,.0f} {size:10.3f} {size - bars_alone:+7.3f}"
        print(f"{row} | {'':28}{seconds}")


if __name__ == "__main__":
    main()

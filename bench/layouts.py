"""Three layouts of rollups: one object per table and month, one per month, coarse ones by year.

    python bench/layouts.py [--rounds 5]

Writes the rollups of one synthetic market-year month by month, as a backfill does, and reads it
again. `CPU` and `wall` are milliseconds a month (median over the rounds); a day of 5m and a year of
1h are read by Polars without our code.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import polars as pl

os.environ.setdefault("MARKETDATA_BENCH", "unused")

from peers_data import END, START, TARGETS, market_year

from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import Partition, partitions_of
from marketdata_assets.model.table import rollup_table
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.model.window import Window
from marketdata_assets.storage.objects import open_object_store
from marketdata_assets.storage.parquet import encode, to_arrow
from marketdata_assets.transforms.rollup import roll_up

Month = dict[str, pl.DataFrame]
Layout = Callable[[Path, Partition, Month], None]
COARSE = ("4h", "12h", "1d", "1w")
MARKET = Market("binance", "BTC/USDT")


def months() -> Iterator[tuple[Partition, Month]]:
    """Yield each month's rollups, by timeframe."""
    year, timeframes = market_year(0), [TIMEFRAMES[name] for name in TARGETS]
    for partition in partitions_of(MARKET, Window(START, END)):
        owned = {timeframe: partition.open_times(timeframe) for timeframe in timeframes}
        whole = Window(START, END)
        frames = roll_up(year, TIMEFRAMES["1m"], timeframes, whole=whole, owned=owned)
        yield partition, {timeframe.name: frame for timeframe, frame in frames.items()}


def by_table(place: Path, partition: Partition, month: Month) -> None:
    """One object per table and month."""
    store = open_object_store(str(place))
    for name, frame in month.items():
        store.write(rollup_table(TIMEFRAMES[name]).path(partition), encode(to_arrow(frame, {})))


def by_month(place: Path, partition: Partition, month: Month) -> None:
    """One object per month, sorted by timeframe and open time."""
    parts = [
        frame.select(pl.lit(name).alias("timeframe"), pl.all()) for name, frame in month.items()
    ]
    path = f"rollup/{rollup_table(TIMEFRAMES['1h']).path(partition).split('/', 2)[2]}"
    open_object_store(str(place)).write(path, encode(to_arrow(pl.concat(parts), {})))


def by_year(place: Path, partition: Partition, month: Month) -> None:
    """Fine timeframes as in `by_table`, coarse ones with all months of the year so far."""
    by_table(place, partition, {name: f for name, f in month.items() if name not in COARSE})
    store = open_object_store(str(place))
    for name in COARSE:
        folder = rollup_table(TIMEFRAMES[name]).path(partition).split("/month=")[0]
        path = f"{folder}/year={partition.month.start.year}/data.parquet"
        stored = store.read(path)
        earlier = [] if stored is None else [pl.read_parquet(stored).cast(month[name].schema)]
        store.write(path, encode(to_arrow(pl.concat([*earlier, month[name]]), {})))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    every = [*months()]
    print("| layout | CPU | wall | objects | kB | day of 5m, ms | year of 1h, ms |")
    print("|---|---|---|---|---|---|---|")
    for layout in (by_table, by_month, by_year):
        turns = [measure(layout, every) for _ in range(rounds)]
        figures = [statistics.median(figure) for figure in zip(*turns, strict=True)]
        print(f"| {layout.__name__} | " + " | ".join(f"{figure:.1f}" for figure in figures) + " |")


def measure(layout: Layout, every: list[tuple[Partition, Month]]) -> list[float]:
    """Return one row of the table."""
    with tempfile.TemporaryDirectory() as name:
        folder, cpu, wall = Path(name), time.process_time(), time.perf_counter()
        for partition, month in every:
            layout(folder, partition, month)
        times = [time.process_time() - cpu, time.perf_counter() - wall]
        sizes = [file.stat().st_size for file in folder.rglob("*.parquet")]
        reads = []
        for timeframe in ("5m", "1h"):
            read(folder, layout, timeframe)
            wall = time.perf_counter()
            read(folder, layout, timeframe)
            reads.append((time.perf_counter() - wall) * 1e3)
    return [*(t / len(every) * 1e3 for t in times), len(sizes), sum(sizes) / 1e3, *reads]


def read(folder: Path, layout: Layout, timeframe: str) -> pl.DataFrame:
    """Read three columns of the day or of the year."""
    if layout is by_month:
        frame = pl.scan_parquet(folder / "rollup").filter(pl.col("timeframe") == timeframe)
    else:
        frame = pl.scan_parquet(folder / "rollup" / f"ohlcv_{timeframe}")
    if timeframe == "5m":
        day = pl.datetime(2023, 6, 14, time_zone="UTC")
        frame = frame.filter(pl.col("open_time") >= day)
        frame = frame.filter(pl.col("open_time") < day + pl.duration(days=1))
    return frame.select("open_time", "close", "volume").collect()


if __name__ == "__main__":
    main()

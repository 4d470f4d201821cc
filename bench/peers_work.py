"""Runs one measurement of bench/peers.py in a separate process.

    python peers_work.py SECTION CONTENDER FOLDER ROUNDS QUICK

A contender prepares itself and returns operations by name. Each operation is executed once to warm
up and then ROUNDS times. The output is JSON: wall and CPU seconds of every round, the peak of
resident memory beyond the memory before, and what the operation returned. Heavy imports are inside
the contenders, because each process imports only its own engine.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
from peers_data import (
    CORRECTED,
    DAY,
    END,
    HOW,
    MARKET,
    MONTH,
    NAME,
    PRICES,
    REAL,
    SHARED,
    START,
    SUMS,
    TARGETS,
    aggregates,
    as_floats,
    bucket_sql,
    build_once,
    floats_of,
    market_years,
    open_arctic,
    open_delta,
    open_duckdb,
    own_copy,
    parents,
    real_bars,
    scratch,
    settings,
    write_universe,
)

MAIN, OTHER = "main", "other"
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
Operations = dict[str, Callable[[], Any]]


class Contender(NamedTuple):
    """A contender: `make(folder, quick)` prepares it and returns its operations."""

    section: str
    name: str
    venv: str
    make: Callable[[Path, bool], Operations]


CONTENDERS: list[Contender] = []


def contender(
    section: str, name: str, venv: str = MAIN
) -> Callable[[Callable[..., Operations]], Callable[..., Operations]]:
    """Add a function to the table; the first contender of a section is ours."""

    def register(make: Callable[..., Operations]) -> Callable[..., Operations]:
        CONTENDERS.append(Contender(section, name, venv, make))
        return make

    return register


# --------------------------------------------------------------------------------- measuring
def memory(field: str) -> float:
    """Return VmRSS or VmHWM of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def measure(run: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """Measure memory in the first round and times in the later ones."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = memory("VmRSS")
    value = run()
    found = {"value": value, "rss": memory("VmHWM") - before, "wall": [], "cpu": []}
    for _ in range(rounds):
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        found["wall"].append(time.perf_counter() - wall)
        found["cpu"].append(time.process_time() - cpu)
    return found


def all_floats(folder: Path) -> pl.DataFrame:
    return pl.concat(
        frame.select(pl.lit(name).alias("market"), pl.all()) for name, frame in floats_of(folder)
    )


# --------------------------------------------------------------------------------- 1 rollup
def exact_days(days: pl.DataFrame, bars: pl.DataFrame | None = None) -> str:
    """Compare the daily sums of one market with plain Python, digit for digit."""
    bars = next(market_years(True))[1] if bars is None else bars
    right = wrong = 0
    for day in (
        days.sort("open_time").filter(pl.col("open_time").dt.day() == 1).iter_rows(named=True)
    ):
        start = day["open_time"].replace(tzinfo=UTC)
        part = bars.filter(pl.col("open_time").is_between(start, start + DAY, closed="left"))
        for name in SUMS:
            same = Decimal(str(day[name])) == sum(part[name].to_list())
            right, wrong = right + same, wrong + (not same)
    return "every digit" if right and not wrong else f"{wrong} of {right + wrong} sums lose digits"


@contender("rollup", "ours, by month as in the flows")
def rollup_ours(folder: Path, quick: bool) -> Operations:
    from marketdata_assets.model.market import Market
    from marketdata_assets.model.partition import partitions_of
    from marketdata_assets.model.timeframe import TIMEFRAMES
    from marketdata_assets.model.window import Window
    from marketdata_assets.transforms.rollup import roll_up

    targets, jobs, first = [TIMEFRAMES[name] for name in TARGETS], [], None
    for key, bars in market_years(quick):
        first = bars if first is None else first
        for partition in partitions_of(Market.parse(key), Window(START, END)):
            start = max(START, min(partition.open_times(tf).start for tf in targets))
            inside = pl.col("open_time").is_between(start, partition.month.end, closed="left")
            jobs.append((bars.filter(inside), Window(start, partition.month.end)))

    def run() -> None:
        for bars, window in jobs:
            roll_up(bars, TIMEFRAMES["1m"], targets, whole=window)

    year = roll_up(first, TIMEFRAMES["1m"], targets, whole=Window(START, END))
    return {"run": run, "exact": lambda: exact_days(year[TIMEFRAMES["1d"]], first)}


def rollup_polars(bars: pl.DataFrame) -> Operations:
    rollups_by_timeframe: dict[str, pl.DataFrame] = {}

    def run() -> None:
        for name in TARGETS:
            rollups_by_timeframe[name] = (
                bars.lazy()
                .group_by_dynamic("open_time", every=name, group_by="market")
                .agg(aggregates())
                .collect()
            )

    return {
        "run": run,
        "exact": lambda: exact_days(rollups_by_timeframe["1d"].filter(pl.col("market") == NAME)),
    }


contender("rollup", "Polars group_by_dynamic, each from 1m, floats")(
    lambda folder, quick: rollup_polars(all_floats(folder))
)


@contender("rollup", "Polars group_by_dynamic, each from 1m, decimals")
def rollup_polars_exact(folder: Path, quick: bool) -> Operations:
    markets = market_years(quick)
    return rollup_polars(
        pl.concat(
            bars.select(pl.lit(key.partition(":")[2]).alias("market"), pl.all())
            for key, bars in markets
        )
    )


def rollup_duckdb(frames: Iterator[tuple[str, pl.DataFrame]], hierarchical: bool) -> Operations:
    import duckdb

    connection = duckdb.connect()
    for i, (key, bars) in enumerate(frames):
        incoming = bars.select(pl.lit(key.rpartition(":")[2]).alias("market"), pl.all()).to_arrow()
        connection.register("incoming", incoming)
        connection.execute(
            "INSERT INTO ohlcv_1m FROM incoming" if i else "CREATE TABLE ohlcv_1m AS FROM incoming"
        )
        connection.unregister("incoming")

    def run() -> None:
        for name, parent in parents(hierarchical).items():
            connection.execute(
                f"CREATE OR REPLACE TEMP TABLE ohlcv_{name} AS"
                f" {bucket_sql(name, f'ohlcv_{parent}')}"
            )

    days = f"SELECT * EXCLUDE market FROM ohlcv_1d WHERE market = '{NAME}'"
    return {
        "run": run,
        "exact": lambda: exact_days(pl.DataFrame(connection.sql(days).to_arrow_table())),
    }


contender("rollup", "DuckDB time_bucket, each from 1m, floats")(
    lambda folder, quick: rollup_duckdb(floats_of(folder), False)
)
contender("rollup", "DuckDB time_bucket, hierarchical, floats")(
    lambda folder, quick: rollup_duckdb(floats_of(folder), True)
)
contender("rollup", "DuckDB time_bucket, hierarchical, decimals")(
    lambda folder, quick: rollup_duckdb(market_years(quick), True)
)


def rollup_pandas(folder: Path, hierarchical: bool) -> Operations:
    frames = {name: frame.to_pandas().set_index("open_time") for name, frame in floats_of(folder)}

    def roll(frame: Any) -> Any:
        rollups_by_timeframe = {"1m": frame}
        for name, parent in parents(hierarchical).items():
            rollups_by_timeframe[name] = (
                rollups_by_timeframe[parent]
                .resample(RULES[name], label="left", closed="left")
                .agg(HOW)
            )
        return rollups_by_timeframe["1d"]

    days = pl.from_pandas(roll(frames[NAME]).reset_index())
    return {
        "run": lambda: [len(roll(frame)) for frame in frames.values()],
        "exact": lambda: exact_days(days),
    }


contender("rollup", "pandas resample, each from 1m, floats")(
    lambda folder, quick: rollup_pandas(folder, False)
)
contender("rollup", "pandas resample, hierarchical, floats")(
    lambda folder, quick: rollup_pandas(folder, True)
)


@contender("rollup", "ArcticDB resample, each from 1m, floats", OTHER)
def rollup_arctic(folder: Path, quick: bool) -> Operations:
    import arcticdb
    import pandas as pd

    library = open_arctic(folder)
    rules = {name: "7D" if name == "1w" else rule for name, rule in RULES.items()}

    def read(name: str, timeframe: str) -> Any:
        query = (
            arcticdb.QueryBuilder()
            .resample(rules[timeframe], origin=pd.Timestamp("1970-01-05"))
            .agg(HOW)
        )
        return library.read(name, query_builder=query).data

    names = [file.stem for file in (folder / "markets").glob("*.parquet")]
    days = pl.from_pandas(read(NAME, "1d").reset_index())
    return {
        "run": lambda: [read(n, tf) is None for n in names for tf in TARGETS] and None,
        "exact": lambda: exact_days(days),
    }


# --------------------------------------------------------------------------------- 2 bytes
def count_lost_digits(exact: pl.DataFrame, found: pl.DataFrame) -> int:
    """Count the values that cannot be read back with the digits that were sent."""
    texts = pl.col(pl.Decimal).cast(pl.String).str.strip_chars_end("0").str.strip_chars_end(".")
    stored = found.select(
        _text(found[name])
        for name in exact.columns
        if name in found.columns and name != "open_time"
    )
    wanted = exact.select(texts, pl.col("trades").cast(pl.String))
    return sum(int((stored[name] != wanted[name]).sum()) for name in stored.columns)


def _text(column: pl.Series) -> pl.Series:
    """Return floats as their shortest text and decimals without trailing zeros."""
    if column.dtype == pl.Float64:
        return pl.Series(
            column.name, [format(Decimal(repr(v)), "f").removesuffix(".0") for v in column]
        )
    text = column.cast(pl.String)
    return (
        text.str.strip_chars_end("0").str.strip_chars_end(".")
        if isinstance(column.dtype, pl.Decimal)
        else text
    )


def sizes(
    store: Callable[[pl.DataFrame, Path], tuple[int, pl.DataFrame]], folder: Path
) -> Operations:
    """Return an operation per set of real bars: bytes per bar, and values that lost digits."""

    def one(name: str) -> dict[str, Any]:
        bars = real_bars(name)
        place = scratch(folder)
        try:
            size, found = store(bars, place)
        finally:
            shutil.rmtree(place)
        return {
            "bytes": size / bars.height,
            "lost": count_lost_digits(bars, found),
            "values": found.width - 1,
            "of": bars.height * (found.width - 1),
        }

    return {name: lambda name=name: one(name) for name in REAL}


def months(bars: pl.DataFrame) -> list[pl.DataFrame]:
    return [part for _, part in bars.group_by(pl.col("open_time").dt.month(), maintain_order=True)]


@contender("bytes", "ours, one object per month")
def bytes_ours(folder: Path, quick: bool) -> Operations:
    from marketdata_assets.model.market import Market
    from marketdata_assets.model.partition import Partition
    from marketdata_assets.model.table import raw_table
    from marketdata_assets.model.timeframe import TIMEFRAMES
    from marketdata_assets.model.window import month_of
    from marketdata_assets.storage.lake import Lake

    def store(bars: pl.DataFrame, place: Path) -> tuple[int, pl.DataFrame]:
        lake, table, size, found = Lake(str(place)), raw_table(TIMEFRAMES["1m"]), 0, []
        for part in months(bars):
            partition = Partition(Market.parse(MARKET), month_of(part["open_time"][0]))
            size += lake.write(table, partition, part).bytes
            found.append(lake.read(table, partition))
        return size, pl.concat(found)

    return sizes(store, folder)


@contender("bytes", "Parquet, zstd, floats (Polars)")
def bytes_polars(folder: Path, quick: bool) -> Operations:
    def store(bars: pl.DataFrame, place: Path) -> tuple[int, pl.DataFrame]:
        as_floats(bars).write_parquet(place / "a", compression="zstd")
        return (place / "a").stat().st_size, pl.read_parquet(place / "a")

    return sizes(store, folder)


def bytes_pyarrow(folder: Path, floats: bool) -> Operations:
    import pyarrow.parquet as pq

    def store(bars: pl.DataFrame, place: Path) -> tuple[int, pl.DataFrame]:
        pq.write_table((as_floats(bars) if floats else bars).to_arrow(), place / "a")
        return (place / "a").stat().st_size, pl.DataFrame(pq.ParquetFile(place / "a").read())

    return sizes(store, folder)


contender("bytes", "plain Parquet, snappy, floats (pyarrow, pandas)")(
    lambda folder, quick: bytes_pyarrow(folder, True)
)
contender("bytes", "plain Parquet, snappy, DECIMAL(38, 12)")(
    lambda folder, quick: bytes_pyarrow(folder, False)
)


def tree(place: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in place.rglob("*") if file.is_file())


def bytes_delta(folder: Path, floats: bool) -> Operations:
    from deltalake import DeltaTable, write_deltalake

    def store(bars: pl.DataFrame, place: Path) -> tuple[int, pl.DataFrame]:
        write_deltalake(place / "t", (as_floats(bars) if floats else bars).to_arrow())
        size = sum(file.stat().st_size for file in (place / "t").glob("*.parquet"))
        return size, pl.DataFrame(DeltaTable(place / "t").to_pyarrow_table()).sort("open_time")

    return sizes(store, folder)


contender("bytes", "Delta Lake, floats")(lambda folder, quick: bytes_delta(folder, True))
contender("bytes", "Delta Lake, DECIMAL(38, 12)")(lambda folder, quick: bytes_delta(folder, False))


def bytes_duckdb(folder: Path, floats: bool) -> Operations:
    import duckdb

    def store(bars: pl.DataFrame, place: Path) -> tuple[int, pl.DataFrame]:
        # DuckDB finds the variable by its name
        incoming = (as_floats(bars) if floats else bars).to_arrow()  # noqa: F841
        with duckdb.connect(str(place / "a.duckdb")) as connection:
            connection.execute("CREATE TABLE t AS FROM incoming")
            connection.execute("CHECKPOINT")
            found = pl.DataFrame(connection.sql("FROM t ORDER BY open_time").to_arrow_table())
        return (place / "a.duckdb").stat().st_size, found

    return sizes(store, folder)


contender("bytes", "DuckDB's own file, floats")(lambda folder, quick: bytes_duckdb(folder, True))
contender("bytes", "DuckDB's own file, DECIMAL(38, 12)")(
    lambda folder, quick: bytes_duckdb(folder, False)
)


@contender("bytes", "ArcticDB (LMDB), floats", OTHER)
def bytes_arctic(folder: Path, quick: bool) -> Operations:
    import arcticdb

    def store(bars: pl.DataFrame, place: Path) -> tuple[int, pl.DataFrame]:
        library = arcticdb.Arctic(f"lmdb://{place}/a?map_size=1GB").create_library("bars")
        before = tree(place)
        library.write(
            "a",
            as_floats(bars)
            .with_columns(pl.col("open_time").dt.replace_time_zone(None))
            .to_pandas()
            .set_index("open_time"),
        )
        return tree(place) - before, pl.from_pandas(library.read("a").data.reset_index())

    return sizes(store, folder)


@contender("bytes", "freqtrade feather (5 of the 9 values), floats", OTHER)
def bytes_freqtrade(folder: Path, quick: bool) -> Operations:
    from freqtrade.data.history.datahandlers.featherdatahandler import FeatherDataHandler
    from freqtrade.enums import CandleType

    def store(bars: pl.DataFrame, place: Path) -> tuple[int, pl.DataFrame]:
        frame = (
            as_floats(bars)
            .select(
                pl.col("open_time").cast(pl.Datetime("ms", "UTC")).alias("date"), *PRICES, "volume"
            )
            .to_pandas()
        )
        FeatherDataHandler(place).ohlcv_store("A/B", "1m", frame, CandleType.SPOT)
        file = next(place.glob("*.feather"))
        return file.stat().st_size, pl.read_ipc(file)

    return sizes(store, folder)


# --------------------------------------------------------------------------------- 3 pipeline
@contender("pipeline", "ours: lake.read, check_bars, roll_up, lake.write")
def pipeline_ours(folder: Path, quick: bool) -> Operations:
    from marketdata_assets.model.bar import empty_bars
    from marketdata_assets.model.partition import partitions_of
    from marketdata_assets.model.table import raw_table, rollup_table
    from marketdata_assets.model.timeframe import TIMEFRAMES
    from marketdata_assets.model.window import Window
    from marketdata_assets.quality.contract import check_bars
    from marketdata_assets.storage.lake import Lake
    from marketdata_assets.transforms.rollup import roll_up

    universe, place = settings("parquet", folder), scratch(folder)
    source, sink, targets = (
        Lake(universe.lake),
        Lake(str(place)),
        [TIMEFRAMES[name] for name in TARGETS],
    )

    def run() -> None:
        for market in universe.markets:
            before = empty_bars()
            for partition in partitions_of(market, Window(START, END)):
                bars = check_bars(source.read(raw_table(TIMEFRAMES["1m"]), partition))
                first = max(START, min(partition.open_times(tf).start for tf in targets))
                joined = pl.concat([before.filter(pl.col("open_time") >= first), bars])
                for tf, frame in roll_up(
                    joined, TIMEFRAMES["1m"], targets, whole=Window(first, partition.month.end)
                ).items():
                    owned = partition.open_times(tf)
                    sink.write(
                        rollup_table(tf),
                        partition,
                        frame.filter(
                            pl.col("open_time").is_between(owned.start, owned.end, closed="left")
                        ),
                    )
                before = bars

    return {"run": run, "size": lambda: tree(place), "end": lambda: shutil.rmtree(place)}


@contender("pipeline", "ours, `derive` as the flow, with ledger")
def pipeline_derive(folder: Path, quick: bool) -> Operations:
    from marketdata_assets.context import open_context
    from marketdata_assets.flows.derive.rollup import RollupBuilder
    from marketdata_assets.model.window import Window

    place = own_copy(folder, "parquet")
    universe = settings("parquet", place)

    def run() -> None:
        shutil.rmtree(place / "lake" / "rollup", ignore_errors=True)
        with open_context(universe) as context:
            context.ledger.partitions.clear_rollup_sources()
            for _ in context.bind(RollupBuilder).build(
                universe.partitions(universe.markets, Window(START, END))
            ):
                pass

    return {
        "run": run,
        "size": lambda: tree(place / "lake" / "rollup"),
        "end": lambda: shutil.rmtree(place),
    }


@contender("pipeline", "pandas style: read_parquet, asserts, resample, to_parquet")
def pipeline_pandas(folder: Path, quick: bool) -> Operations:
    import pandas as pd

    place = scratch(folder)

    def valid(frame: Any) -> Any:
        assert frame.index.is_monotonic_increasing
        assert frame.index.is_unique
        assert not frame[[*PRICES, "volume"]].isna().any().any()
        assert (frame[PRICES] > 0).all().all()
        assert (frame["high"] >= frame[["open", "close", "low"]].max(axis=1)).all()
        assert (frame["low"] <= frame[["open", "close", "high"]].min(axis=1)).all()
        assert (frame[SUMS] >= 0).all().all()
        return frame

    def run() -> None:
        for file in sorted((folder / "markets").glob("*.parquet")):
            parts = sorted((folder / "months" / f"market={file.stem}").glob("*/data.parquet"))
            bars = valid(
                pd.concat([pd.read_parquet(part, partitioning=None) for part in parts]).set_index(
                    "open_time"
                )
            )
            for name in TARGETS:
                bars = bars.resample(RULES[name], label="left", closed="left").agg(HOW)
                for month, part in bars.groupby(bars.index.month):
                    part.to_parquet(
                        place / f"{file.stem}-{name}-{month}.parquet", compression="zstd"
                    )

    return {"run": run, "size": lambda: tree(place), "end": lambda: shutil.rmtree(place)}


@contender("pipeline", "DuckDB: read_parquet, checks, time_bucket, COPY")
def pipeline_duckdb(folder: Path, quick: bool) -> Operations:
    import duckdb

    place = scratch(folder)
    broken = (
        "open <= 0 OR low <= 0 OR volume < 0 OR quote_volume < 0 OR trades < 0"
        " OR taker_buy_volume < 0 OR taker_buy_quote_volume < 0"
        " OR high < greatest(open, close, low) OR low > least(open, close, high)"
        " OR open IS NULL OR close IS NULL OR volume IS NULL"
    )

    def run() -> None:
        with duckdb.connect() as connection:
            source = f"read_parquet('{folder}/months/*/*/data.parquet', hive_partitioning=true)"
            connection.execute(
                f"CREATE TEMP TABLE ohlcv_1m AS SELECT * EXCLUDE month FROM {source}"
            )
            doubled = "SELECT count(*) - count(DISTINCT (market, open_time)) FROM ohlcv_1m"
            assert connection.sql(f"SELECT count(*) FROM ohlcv_1m WHERE {broken}").fetchall() == [
                (0,)
            ]
            assert connection.sql(doubled).fetchall() == [(0,)]
            for name, parent in parents().items():
                connection.execute(
                    f"CREATE TEMP TABLE ohlcv_{name} AS {bucket_sql(name, f'ohlcv_{parent}')}"
                )
                connection.execute(
                    f"COPY (SELECT *, {MONTH} AS month FROM ohlcv_{name}"
                    " ORDER BY market, open_time)"
                    f" TO '{place}/{name}' (FORMAT parquet, COMPRESSION zstd,"
                    " PARTITION_BY (market, month), OVERWRITE_OR_IGNORE)"
                )

    return {"run": run, "size": lambda: tree(place), "end": lambda: shutil.rmtree(place)}


# --------------------------------------------------------------------------------- 4 replace
def replace_ours(folder: Path, rollups: str) -> Operations:
    """Store corrected bars as an ingest does, then derive: nine tables, the ledger, the week."""
    from marketdata_assets.context import open_context
    from marketdata_assets.flows.derive.rollup import RollupBuilder
    from marketdata_assets.flows.fetch.answers import FetchResult
    from marketdata_assets.flows.fetch.partition_store import PartitionStore
    from marketdata_assets.ledger.records import RowAccount
    from marketdata_assets.model.market import Market
    from marketdata_assets.model.partition import Partition
    from marketdata_assets.model.table import raw_table, rollup_table
    from marketdata_assets.model.timeframe import TIMEFRAMES
    from marketdata_assets.model.window import Window, month_of

    place = own_copy(folder, rollups, only=NAME)
    universe, market = settings(rollups, place), Market.parse(MARKET)
    partition, table = Partition(market, month_of(CORRECTED)), raw_table(TIMEFRAMES["1m"])
    context_manager = open_context(universe)
    context = context_manager.__enter__()
    store = context.bind(PartitionStore)
    day = context.storage.lake.read(table, partition).filter(
        pl.col("open_time").is_between(CORRECTED, CORRECTED + DAY, closed="left")
    )
    turns = [day, day.with_columns((pl.col("volume") + 1).cast(day["volume"].dtype))]
    for _ in context.bind(RollupBuilder).build(universe.partitions([market], Window(START, END))):
        pass

    def run() -> None:
        turns.reverse()
        before = store.open(table, partition)
        account = RowAccount(received=day.height, stored=day.height)
        gaps, through = tuple(before.gaps), before.wanted.end
        store.save(before, FetchResult(turns[0], gaps=gaps, account=account, through=through))
        for _ in context.bind(RollupBuilder).build([partition]):
            pass

    def exact() -> str:
        run()
        tf, where = TIMEFRAMES["1d"], Window(CORRECTED, CORRECTED + DAY)
        read = (
            context.storage.warehouse.read(rollup_table(tf), market, where)
            if rollups == "duckdb"
            else context.storage.lake.read(rollup_table(tf), partition)
        )
        found = read.filter(pl.col("open_time") == CORRECTED)["volume"].to_list()
        return "every digit" if found == [sum(turns[0]["volume"].to_list())] else f"wrong: {found}"

    return {"run": run, "exact": exact, "end": lambda: shutil.rmtree(place)}


contender("replace", "ours, nine tables, rollups: parquet")(
    lambda folder, quick: replace_ours(folder, "parquet")
)
contender("replace", "ours, nine tables, rollups: duckdb")(
    lambda folder, quick: replace_ours(folder, "duckdb")
)


def corrected_day(folder: Path) -> pl.DataFrame:
    bars = pl.read_parquet(folder / "markets" / f"{NAME}.parquet")
    day = bars.filter(pl.col("open_time").is_between(CORRECTED, CORRECTED + DAY, closed="left"))
    return day.select(pl.lit(NAME).alias("market"), pl.all(), pl.lit("2023-06").alias("month"))


@contender("replace", "Delta, one table, overwrite by predicate")
def replace_delta(folder: Path, quick: bool) -> Operations:
    from deltalake import DeltaTable, write_deltalake

    place = scratch(folder)
    shutil.copytree(open_delta(folder), place / "t", copy_function=os.link)
    day = corrected_day(folder).to_arrow()
    span = (
        f"open_time >= '{CORRECTED.isoformat()}' AND open_time < '{(CORRECTED + DAY).isoformat()}'"
    )

    def run() -> None:
        where = f"market = '{NAME}' AND month = '2023-06' AND {span}"
        write_deltalake(DeltaTable(place / "t"), day, mode="overwrite", predicate=where)

    return {"run": run, "end": lambda: shutil.rmtree(place)}


@contender("replace", "Iceberg, one table of 5 markets, overwrite(filter)")
def replace_iceberg(folder: Path, quick: bool) -> Operations:
    from pyiceberg.catalog.sql import SqlCatalog
    from pyiceberg.expressions import And, EqualTo, GreaterThanOrEqual, LessThan

    place = scratch(folder)
    catalog = SqlCatalog(
        "bench", uri=f"sqlite:///{place}/catalog.db", warehouse=f"file://{place}/warehouse"
    )
    catalog.create_namespace("bars")
    day = corrected_day(folder).to_arrow()
    table = catalog.create_table("bars.ohlcv_1m", schema=day.schema)
    with table.update_spec() as spec:
        spec.add_identity("market")
        spec.add_identity("month")
    month = pl.col("open_time").dt.strftime("%Y-%m").alias("month")
    for name, frame in list(floats_of(folder))[: 2 if quick else 5]:
        table.append(
            frame.select(pl.lit(name).alias("market"), pl.all(), month).to_arrow().cast(day.schema)
        )
    span = And(
        GreaterThanOrEqual("open_time", CORRECTED.isoformat()),
        LessThan("open_time", (CORRECTED + DAY).isoformat()),
    )

    def run() -> None:
        now = catalog.load_table("bars.ohlcv_1m")
        now.overwrite(
            day,
            overwrite_filter=And(And(EqualTo("market", NAME), EqualTo("month", "2023-06")), span),
        )

    return {"run": run, "end": lambda: shutil.rmtree(place)}


def replace_duckdb(folder: Path, timeframes: list[str]) -> Operations:
    import duckdb

    place = scratch(folder)
    shutil.copy(open_duckdb(folder), place / "t.duckdb")
    connection = duckdb.connect(str(place / "t.duckdb"))
    incoming = corrected_day(folder).drop("month").to_arrow()
    connection.register("incoming", incoming)
    inside = "WHERE market = $m AND open_time >= $a AND open_time < $b"

    def run() -> None:
        connection.execute("BEGIN")
        bound = {"m": NAME, "a": CORRECTED, "b": CORRECTED + DAY}
        connection.execute(f"DELETE FROM ohlcv_1m {inside}", bound)
        connection.execute("INSERT INTO ohlcv_1m BY NAME FROM incoming")
        for name in timeframes:
            if name == "1w":
                monday = CORRECTED - timedelta(days=CORRECTED.weekday())
                bound = {"m": NAME, "a": monday, "b": monday + timedelta(days=7)}
            connection.execute(f"DELETE FROM ohlcv_{name} {inside}", bound)
            connection.execute(
                f"INSERT INTO ohlcv_{name} BY NAME "
                f"{bucket_sql(name, f'ohlcv_{parents()[name]}', inside)}",
                bound,
            )
        connection.execute("COMMIT")

    return {"run": run, "end": lambda: shutil.rmtree(place)}


contender("replace", "DuckDB, one table, delete and insert, floats")(
    lambda folder, quick: replace_duckdb(folder, [])
)
contender("replace", "DuckDB, nine tables, delete and insert, floats")(
    lambda folder, quick: replace_duckdb(folder, TARGETS)
)
# --------------------------------------------------------------------------------- 5 queries
SPANS = {
    "day": (CORRECTED, CORRECTED + DAY),
    "year": (START, END),
    "hour": (CORRECTED, CORRECTED + timedelta(hours=1)),
}


def heights(run: Callable[[], pl.DataFrame]) -> Callable[[], int]:
    """Return an operation that counts its rows, so that the table can show equal counts."""
    return lambda: run().height


def queries_ours(folder: Path, rollups: str) -> Operations:
    from marketdata_assets import open_reader

    context_manager = open_reader(folder / f"universe-{rollups}.yaml")
    reader = context_manager.__enter__()
    return {
        "market-day 1m": heights(lambda: reader.bars(MARKET, "1m", *SPANS["day"]).collect()),
        "market-year 1m": heights(lambda: reader.bars(MARKET, "1m", *SPANS["year"]).collect()),
        "market-year stored 1h": heights(
            lambda: reader.bars(MARKET, "1h", *SPANS["year"]).collect()
        ),
        "an hour of all markets": heights(
            lambda: reader.bars(reader.markets, "1m", *SPANS["hour"]).collect()
        ),
        "newest bar of all": heights(lambda: reader.newest("1m")),
    }


contender("queries", "ours, the Python reader, rollups: parquet")(
    lambda folder, quick: queries_ours(folder, "parquet")
)
contender("queries", "ours, the Python reader, rollups: duckdb")(
    lambda folder, quick: queries_ours(folder, "duckdb")
)


@contender("queries", "Delta (Polars scan_delta)")
def queries_delta(folder: Path, quick: bool) -> Operations:
    fine, coarse = str(open_delta(folder)), str(open_delta(folder, "1h"))

    def find(place: str, span: str, *also: pl.Expr) -> Callable[[], int]:
        start, end = SPANS[span]
        months = [
            f"2023-{m:02}" for m in range(start.month, 13 if span == "year" else start.month + 1)
        ]
        wanted = [
            pl.col("month").is_in(months),
            pl.col("open_time").is_between(start, end, closed="left"),
            *also,
        ]
        return heights(lambda: pl.scan_delta(place).filter(*wanted).drop("month").collect())

    mine = pl.col("market") == NAME
    return {
        "market-day 1m": find(fine, "day", mine),
        "market-year 1m": find(fine, "year", mine),
        "market-year stored 1h": find(coarse, "year", mine),
        "an hour of all markets": find(fine, "hour"),
        "newest bar of all": heights(
            lambda: pl.scan_delta(fine).group_by("market").agg(pl.col("open_time").max()).collect()
        ),
    }


def duckdb_queries(
    connection: Any, fine: str, coarse: str, month: Callable[[str], str]
) -> Operations:
    def find(source: str, span: str, also: str = "") -> Callable[[], int]:
        start, end = SPANS[span]
        where = f"open_time >= TIMESTAMPTZ '{start.isoformat()}'"
        where += f" AND open_time < TIMESTAMPTZ '{end.isoformat()}'{also}"
        return lambda: (
            connection.sql(f"SELECT * FROM {source} WHERE {where}").to_arrow_table().num_rows
        )

    mine = f" AND market = '{NAME}'"
    return {
        "market-day 1m": find(fine, "day", mine + month("day")),
        "market-year 1m": find(fine, "year", mine),
        "market-year stored 1h": find(coarse, "year", mine),
        "an hour of all markets": find(fine, "hour", month("hour")),
        "newest bar of all": lambda: (
            connection.sql(f"SELECT market, max(open_time) FROM {fine} GROUP BY 1")
            .to_arrow_table()
            .num_rows
        ),
    }


@contender("queries", "DuckDB, its own file")
def queries_duckdb(folder: Path, quick: bool) -> Operations:
    import duckdb

    connection = duckdb.connect(str(open_duckdb(folder)), read_only=True)
    return duckdb_queries(connection, "ohlcv_1m", "ohlcv_1h", lambda span: "")


@contender("queries", "DuckDB over Hive Parquet, floats")
def queries_duckdb_hive(folder: Path, quick: bool) -> Operations:
    import duckdb

    connection = duckdb.connect()

    def build(place: Path) -> None:
        with duckdb.connect(str(open_duckdb(folder)), read_only=True) as source:
            hours = f"SELECT *, {MONTH} AS month FROM ohlcv_1h ORDER BY market, open_time"
            source.execute(
                f"COPY ({hours}) TO '{place}'"
                " (FORMAT parquet, COMPRESSION zstd, PARTITION_BY (market, month))"
            )

    coarse = build_once(folder / "months-1h", build)
    places = [
        f"read_parquet('{place}/*/*/*.parquet', hive_partitioning=true)"
        for place in (folder / "months", coarse)
    ]
    return duckdb_queries(connection, *places, lambda span: " AND month = '2023-06'")


@contender("queries", "ArcticDB (LMDB)", OTHER)
def queries_arctic(folder: Path, quick: bool) -> Operations:
    library = open_arctic(folder)
    names = [file.stem for file in (folder / "markets").glob("*.parquet")]
    naive = {
        span: tuple(t.replace(tzinfo=None) for t in moments) for span, moments in SPANS.items()
    }
    last = timedelta(microseconds=1)

    def find(symbols: list[str], span: str) -> Callable[[], int]:
        from arcticdb import ReadRequest

        between = (naive[span][0], naive[span][1] - last)
        if len(symbols) == 1:
            return lambda: len(library.read(symbols[0], date_range=between).data)
        return lambda: sum(
            len(found.data)
            for found in library.read_batch([ReadRequest(s, date_range=between) for s in symbols])
        )

    return {
        "market-day 1m": find([NAME], "day"),
        "market-year 1m": find([NAME], "year"),
        "market-year stored 1h": find([f"{NAME} 1h"], "year"),
        "an hour of all markets": find(names, "hour"),
        "newest bar of all": lambda: len(
            [library.get_description(name).date_range[1] for name in names]
        ),
    }


# --------------------------------------------------------------------------------- 6 fetch
FETCH_SPAN = (datetime(2023, 2, 1, tzinfo=UTC), datetime(2023, 5, 1, tzinfo=UTC))
LIMIT = 6000 // 2 * 1000 / 60
"""Binance's limit in bars per second: 6,000 weight per minute, 2 per request of 1,000 bars."""
SYMBOLS = ["BTC/USDT", "ETH/USDT"]


@contextmanager
def exchange(latency_ms: int) -> Iterator[str]:
    """Run the exchange of ../shared on real bars of two markets and yield its URL."""
    server = SHARED / "bench" / "exchange_server.py"
    if not server.exists():
        raise SystemExit(f"there is no {server}, so there is nothing to fetch from")
    with tempfile.TemporaryDirectory() as temp:
        port = Path(temp) / "port"
        command = [
            sys.executable,
            str(server),
            "--data",
            str(SHARED / "marketdata"),
            "--port",
            "0",
            "--port-file",
            str(port),
        ]
        command += [
            "--now",
            "2023-05-02T00:00:00Z",
            "--set",
            f"latency_ms={latency_ms}",
            "--set",
            "weight_limit=1000000",
        ]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while not port.exists() or not port.read_text().strip():
                time.sleep(0.05)
            yield f"http://127.0.0.1:{port.read_text().strip()}"
        finally:
            process.kill()
            process.wait()


def measure_fetch(run: Callable[[str], int]) -> Operations:
    """Return operations that measure bars per second, and CPU of this process and its children.

    The rate is counted from the first request for bars to the last one.
    """

    def at(latency_ms: int) -> dict[str, float]:
        with exchange(latency_ms) as url:
            before, own, begun = (
                resource.getrusage(resource.RUSAGE_CHILDREN),
                time.process_time(),
                time.perf_counter(),
            )
            bars = run(url)
            wall, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = (
                time.process_time()
                - own
                + after.ru_utime
                + after.ru_stime
                - before.ru_utime
                - before.ru_stime
            )
            with urllib.request.urlopen(f"{url}/_log") as answer:
                request_times = [
                    entry["wall"] for entry in json.load(answer) if entry["path"].endswith("klines")
                ]
        rate = bars / (request_times[-1] - request_times[0] + latency_ms / 1000)
        return {
            "bars": bars,
            "rate": rate,
            "limit": rate / LIMIT,
            "cpu": cpu / wall,
            "cpu_per_million": cpu / bars * 1e6,
        }

    return {"50 ms": lambda: at(50), "0 ms": lambda: at(0)}


def fetch_ours(folder: Path, requests_per_minute: int | None) -> Operations:
    from marketdata_assets.context import open_context
    from marketdata_assets.flows.fetch.ingest import Ingester
    from marketdata_assets.model.timeframe import TIMEFRAMES
    from marketdata_assets.model.window import Window
    from marketdata_assets.quality.contract import check_bars

    __import__("ccxt.async_support")
    __import__("pyarrow.parquet")
    assert check_bars

    def run(url: str) -> int:
        place = scratch(folder)
        limit = {"requests_per_minute": requests_per_minute} if requests_per_minute else {}
        span = {"since": FETCH_SPAN[0].date(), "until": FETCH_SPAN[1].date()}
        write_universe(place, ["BTC", "ETH"], "parquet", **span, base_url=f"{url}/binance", **limit)
        universe = settings("parquet", place)
        with open_context(universe) as context:
            done = list(
                context.bind(Ingester).ingest(
                    TIMEFRAMES["1m"], universe.partitions(universe.markets, Window(*FETCH_SPAN))
                )
            )
        shutil.rmtree(place)
        assert all(d.error is None for d in done), [str(d.error) for d in done if d.error]
        return sum(d.bars.height for d in done)

    return measure_fetch(run)


contender(
    "fetch", "ours, limited to 3,000 requests per minute: fetch, judge, compare answers, store"
)(lambda folder, quick: fetch_ours(folder, 3000))
contender("fetch", "ours, without a limit")(lambda folder, quick: fetch_ours(folder, 600_000))


def replace_hosts(urls: Any, url: str) -> Any:
    """Replace scheme and host of every URL of a ccxt exchange."""
    if isinstance(urls, dict):
        return {key: replace_hosts(value, url) for key, value in urls.items()}
    return url + "/" + urls.split("://", 1)[1].partition("/")[2] if isinstance(urls, str) else urls


@contender("fetch", "ccxt fetch_ohlcv in a loop, its own limiter, 5 of the 9 values")
def fetch_ccxt(folder: Path, quick: bool) -> Operations:
    import ccxt

    def run(url: str) -> int:
        venue = ccxt.binance(
            {
                "enableRateLimit": True,
                "options": {"fetchMarkets": {"types": ["spot"]}, "fetchCurrencies": False},
            }
        )
        venue.urls["api"] = replace_hosts(venue.urls["api"], f"{url}/binance")
        rows: list[list[float]] = []
        end = int(FETCH_SPAN[1].timestamp() * 1000)
        for symbol in SYMBOLS:
            since = int(FETCH_SPAN[0].timestamp() * 1000)
            while since < end:
                page = venue.fetch_ohlcv(symbol, "1m", since=since, limit=1000)
                rows += [row for row in page if row[0] < end]
                since = page[-1][0] + 60_000 if page else end
        return pl.DataFrame(rows, orient="row", schema=["open_time", *PRICES, "volume"]).height

    return measure_fetch(run)


@contender("fetch", "freqtrade download-data, 5 of the 9 values", OTHER)
def fetch_freqtrade(folder: Path, quick: bool) -> Operations:
    def run(url: str) -> int:
        place = scratch(folder)
        api = dict.fromkeys(("public", "private", "v1"), f"{url}/binance/api/v3")
        ccxt_config = {
            "urls": {"api": api},
            "options": {"fetchMarkets": {"types": ["spot"]}, "fetchCurrencies": False},
        }
        config = {
            "exchange": {
                "name": "binance",
                "pair_whitelist": SYMBOLS,
                "only_from_ccxt": True,
                "ccxt_config": ccxt_config,
            },
            "stake_currency": "USDT",
            "dry_run": True,
            "datadir": str(place / "data"),
            "entry_pricing": {"price_side": "same"},
            "exit_pricing": {"price_side": "same"},
        }
        (place / "config.json").write_text(json.dumps(config))
        span = "-".join(moment.strftime("%Y%m%d") for moment in FETCH_SPAN)
        command = [
            sys.executable,
            "-m",
            "freqtrade",
            "download-data",
            "-t",
            "1m",
            "--timerange",
            span,
        ]
        command += ["-c", str(place / "config.json"), "--userdir", str(place)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        files = list(place.rglob("*.feather"))
        if done.returncode or not files:
            raise SystemExit(
                f"freqtrade: {(done.stderr or done.stdout).strip().splitlines()[-1][:200]}"
            )
        bars = sum(pl.read_ipc(file).height for file in files)
        shutil.rmtree(place)
        return bars

    return measure_fetch(run)


# --------------------------------------------------------------------------------- 7 dagster
def dagster_home(place: Path, universe: Any) -> None:
    from marketdata_assets.cli.dagster_home import dagster_environment

    os.environ |= {
        key: value for key, value in dagster_environment(universe).items() if key == "DAGSTER_HOME"
    }
    os.environ["MARKETDATA_UNIVERSE"] = str(place / "universe-parquet.yaml")


def dagster_ours(folder: Path, months_a_run: int) -> Operations:
    """Run the job `ingest` over one market-year without rollups, and its flows without Dagster."""
    from marketdata_assets.context import open_context
    from marketdata_assets.dagster_ext.runs import open_instance
    from marketdata_assets.defs.jobs import INGEST, build_definitions
    from marketdata_assets.defs.partitions import RANGE_END, RANGE_START
    from marketdata_assets.flows.derive.rollup import RollupBuilder
    from marketdata_assets.flows.fetch.ingest import Ingester
    from marketdata_assets.flows.prove.raw_checks import RawAuditor
    from marketdata_assets.flows.prove.rollup_checks import RollupAuditor
    from marketdata_assets.model.market import Market
    from marketdata_assets.model.partition import partitions_of
    from marketdata_assets.model.timeframe import TIMEFRAMES
    from marketdata_assets.model.window import Window

    place = own_copy(folder, "parquet", only=NAME)
    universe = settings("parquet", place)
    dagster_home(place, universe)
    partitions = partitions_of(Market.parse(MARKET), Window(START, END))
    job = build_definitions(universe).resolve_job_def(INGEST)
    instance = open_instance()

    def run() -> None:
        for i in range(0, len(partitions), months_a_run):
            part = partitions[i : i + months_a_run]
            tags = {RANGE_START: part[0].key, RANGE_END: part[-1].key}
            assert job.execute_in_process(instance=instance, tags=tags).success

    def flows() -> None:
        for i in range(0, len(partitions), months_a_run):
            part = partitions[i : i + months_a_run]
            with open_context(universe) as context:
                for done in context.bind(Ingester).ingest(TIMEFRAMES["1m"], part):
                    context.bind(RawAuditor).audit(done)
            with open_context(universe) as context:
                for derived in context.bind(RollupBuilder).build(part):
                    context.bind(RollupAuditor).audit(derived)

    return {
        "job": run,
        "flows": flows,
        "partitions": lambda: len(partitions),
        "end": lambda: shutil.rmtree(place),
    }


contender("dagster", "ours, runs of 12 months, nine assets and their checks")(
    lambda folder, quick: dagster_ours(folder, 12)
)
contender("dagster", "ours, runs of two months as `marketdata backfill` starts them")(
    lambda folder, quick: dagster_ours(folder, 2)
)


def trivial_assets(folder: Path, assets: int) -> Operations:
    """Run Dagster by default: assets that do nothing, one run per partition, SQLite."""
    import dagster as dg

    place = scratch(folder)
    (place / "dagster.yaml").write_text("telemetry:\n  enabled: false\n")
    keys = [f"2023-{month:02}" for month in range(1, 13)]
    grid = dg.StaticPartitionsDefinition(keys)

    def build_asset(number: int) -> dg.AssetsDefinition:
        @dg.asset(
            name=f"ohlcv_{number}",
            partitions_def=grid,
            deps=[f"ohlcv_{number - 1}"] if number else [],
        )
        def nothing() -> None:
            return None

        return nothing

    definitions, instance = (
        [build_asset(i) for i in range(assets)],
        dg.DagsterInstance.from_config(str(place)),
    )

    def run() -> None:
        for key in keys:
            assert dg.materialize(definitions, partition_key=key, instance=instance).success

    return {
        "job": run,
        "flows": lambda: None,
        "partitions": lambda: len(keys),
        "end": lambda: shutil.rmtree(place),
    }


contender("dagster", "default Dagster, one run per partition, one trivial asset")(
    lambda folder, quick: trivial_assets(folder, 1)
)
contender("dagster", "default Dagster, one run per partition, nine trivial assets")(
    lambda folder, quick: trivial_assets(folder, 9)
)
# --------------------------------------------------------------------------------- process
VALUES_ONLY = ("exact", "size", "partitions")
"""Operations that return a value and are not timed."""


def main() -> None:
    section, name, folder, rounds, quick = sys.argv[1:]
    chosen = next(c for c in CONTENDERS if (c.section, c.name) == (section, name))
    operations = chosen.make(Path(folder), quick == "1")
    end = operations.pop("end", lambda: None)
    is_timed_once = section in ("bytes", "fetch")
    # a reader keeps what it reads a second time, so one more reading says little
    number = int(rounds) + 4 * (section == "queries")
    try:
        found = {
            op: measure(run, 0 if is_timed_once or op in VALUES_ONLY else number)
            for op, run in operations.items()
        }
    finally:
        end()
    print("\n" + json.dumps(found), flush=True)
    os._exit(0)  # a regular exit waits for the engines


if __name__ == "__main__":
    main()

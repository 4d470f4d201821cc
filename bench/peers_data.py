"""Creates the bars of bench/peers.py: 20 synthetic market-years of 1m, and real bars of ../shared.

Everything is created once in CACHE and reused: our lake (with ledger, rollups and a warehouse) and,
for the peers, equal bars as floats in plain Parquet, one file per market and one per market and
month.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

if TYPE_CHECKING:
    from marketdata_assets.settings.universe import Settings

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
CACHE = Path(os.environ["MARKETDATA_BENCH"])  # peers.py sets it
START, END = datetime(2023, 1, 1, tzinfo=UTC), datetime(2024, 1, 1, tzinfo=UTC)
COINS = ["BTC", "ETH", "SOL", "BNB", "XRP", "ADA", "DOGE", "TRX", "AVAX", "LINK"]
COINS += ["DOT", "LTC", "UNI", "ATOM", "ETC", "XLM", "FIL", "APT", "ARB", "NEAR"]
REAL = {
    "BTC/USDT 1m 2024-01 to 02": ("BTCUSDT", "2024-01-01_2024-02-29"),
    "SOL/USDT 1m 2023-02": ("SOLUSDT", "2023-02-01_2023-02-28"),
}
DAY = timedelta(days=1)
MARKET, NAME = "binance:BTC-USDT", "BTC-USDT"
CORRECTED = datetime(2023, 6, 14, tzinfo=UTC)
PRICES = ["open", "high", "low", "close"]
SUMS = ["volume", "quote_volume", "trades", "taker_buy_volume", "taker_buy_quote_volume"]
VALUES = [*PRICES, *SUMS]
TARGETS = ["5m", "15m", "30m", "1h", "4h", "12h", "1d", "1w"]
MINUTES = {"5m": 5, "15m": 15, "30m": 30, "1h": 60, "4h": 240, "12h": 720, "1d": 1440, "1w": 10080}
HOW = {"open": "first", "high": "max", "low": "min", "close": "last", **dict.fromkeys(SUMS, "sum")}
MONTH = "strftime(make_timestamp(epoch_us(open_time)), '%Y-%m')"
"""DuckDB formats moments with a time zone only with an extension that it downloads."""
DECIMAL = pl.Decimal(38, 12)


def market_years(quick: bool = False) -> Iterator[tuple[str, pl.DataFrame]]:
    """Yield key and exact bars of each market; `quick`: of two markets.

    The prices are a random walk in ticks, and 0.1 % of the minutes have no bar.
    """
    for i, coin in enumerate(COINS[:2] if quick else COINS):
        yield f"binance:{coin}-USDT", market_year(i)


def market_year(seed: int) -> pl.DataFrame:
    """Return the bars of one market-year.

    Quote volumes are volume times a price between low and high, so that every rule holds.
    """
    dice = np.random.default_rng(seed)
    price_scale, volume_scale = 2 + seed % 4, 5 - seed % 4
    minutes = np.arange(525_600)[dice.random(525_600) >= 0.001]
    n = minutes.size
    close = 10 ** (4 + seed % 3) * 3 + np.cumsum(np.rint(dice.normal(0, 4, n))).astype(np.int64)
    close = np.abs(close) + 100
    opened = np.concatenate([close[:1], close[:-1]])
    high = np.maximum(opened, close) + dice.integers(0, 6, n)
    low = np.minimum(opened, close) - dice.integers(0, 6, n)
    volume = np.rint(np.exp(dice.normal(1, 1.5, n)) * 10**volume_scale).astype(np.int64)
    quote = np.rint(volume * (low + (high - low) * dice.uniform(0.2, 0.8, n)) * 10).astype(np.int64)
    share = dice.uniform(0.3, 0.7, n)
    taker, taker_quote = (np.floor(v * share).astype(np.int64) for v in (volume, quote))
    opens = np.datetime64("2023-01-01", "us") + minutes * np.timedelta64(60_000_000, "us")
    prices = {
        name: as_decimals(v, price_scale)
        for name, v in zip(PRICES, (opened, high, low, close), strict=True)
    }
    sums = {
        "volume": as_decimals(volume, volume_scale),
        "quote_volume": as_decimals(quote, 8),
        "trades": pl.Series(dice.integers(1, 3000, n)),
        "taker_buy_volume": as_decimals(taker, volume_scale),
        "taker_buy_quote_volume": as_decimals(taker_quote, 8),
    }
    return pl.DataFrame(
        {"open_time": pl.Series(opens).dt.replace_time_zone("UTC"), **prices, **sums}
    )


def as_decimals(units: np.ndarray[Any, Any], scale: int) -> pl.Series:
    """Convert integers at a scale to Decimal(38, 12)."""
    import pyarrow as pa

    halves = np.zeros((units.size, 2), np.int64)
    halves[:, 0] = units
    array = pa.Decimal128Array.from_buffers(
        pa.decimal128(38, scale), units.size, [None, pa.py_buffer(halves)]
    )
    return pl.Series(array).cast(DECIMAL)


def real_bars(name: str) -> pl.DataFrame:
    """Return bars of REAL as the venue sent them, or synthetic ones where ../shared is absent."""
    symbol, span = REAL[name]
    file = SHARED / "marketdata" / "binance_spot" / symbol / "1m" / f"{span}.parquet"
    if not file.exists():
        return market_year(0)[:86_400]
    rows = pl.read_parquet(file).rename({"count": "trades"})
    opens = (
        pl.from_epoch("open_time", time_unit="ms")
        .dt.replace_time_zone("UTC")
        .cast(pl.Datetime("us", "UTC"))
    )
    return rows.select(
        opens, *(pl.col(v).cast(pl.Int64 if v == "trades" else DECIMAL) for v in VALUES)
    )


def as_floats(bars: pl.DataFrame) -> pl.DataFrame:
    """Convert prices and volumes to the nearest 64-bit floats, as every peer keeps them."""
    # polars' own cast from decimals rounds twice; a cast by way of text rounds once
    return bars.with_columns(
        pl.col(v).cast(pl.String).cast(pl.Float64) for v in VALUES if v != "trades"
    )


def settings(rollups: str, place: Path) -> Settings:
    """Load our universe over the synthetic bars."""
    os.environ["MARKETDATA_UNIVERSE"] = str(place / f"universe-{rollups}.yaml")
    from marketdata_assets.settings.load import load_settings

    return load_settings()


def write_universe(place: Path, coins: list[str], rollups: str, **venue: Any) -> None:
    """Write the universe file for `settings`."""
    lines = ["venues:", "  binance:", f"    symbols: [{', '.join(c + '/USDT' for c in coins)}]"]
    lines += [
        f"    {key}: {value}"
        for key, value in {"since": START.date(), "until": END.date(), **venue}.items()
    ]
    lines += [
        f"lake: {place}/lake",
        f"rollups: {rollups}",
        f"duckdb: {place}/market.duckdb",
        f"state: {place}/state-{rollups}",
    ]
    (place / f"universe-{rollups}.yaml").write_text("\n".join(lines) + "\n")


def prepare(quick: bool) -> Path:
    """Create the data set if it is missing and return its folder."""
    place = CACHE / ("quick" if quick else "data")
    if (place / "ready").exists():
        return place
    shutil.rmtree(place, ignore_errors=True)
    (place / "markets").mkdir(parents=True)
    coins = COINS[:2] if quick else COINS
    for key, bars in market_years(quick):
        print(f"creating {key}", flush=True)
        name = key.partition(":")[2]
        floats = as_floats(bars)
        floats.write_parquet(place / "markets" / f"{name}.parquet")
        _write_months(place / "months", name, floats)
    for rollups in ("parquet", "duckdb"):
        write_universe(place, coins, rollups)
        _write_ours(place, rollups, quick)
    (place / "ready").touch()
    return place


def _write_months(place: Path, name: str, floats: pl.DataFrame) -> None:
    """Write what a user of pandas or DuckDB keeps: Hive folders of plain Parquet with zstd."""
    for (month,), frame in floats.group_by(
        pl.col("open_time").dt.strftime("%Y-%m"), maintain_order=True
    ):
        folder = place / f"market={name}" / f"month={month}"
        folder.mkdir(parents=True)
        frame.write_parquet(folder / "data.parquet", compression="zstd")


def _write_ours(place: Path, rollups: str, quick: bool) -> None:
    """Write raw bars with the ledger entries that an ingest leaves, and build the rollups."""
    from marketdata_assets.context import open_context
    from marketdata_assets.flows.derive.rollup import RollupBuilder
    from marketdata_assets.ledger.records import IngestRecord, PartitionState, RowAccount
    from marketdata_assets.model.gap import Gap, GapReason
    from marketdata_assets.model.intervals import find_gaps
    from marketdata_assets.model.market import Market
    from marketdata_assets.model.partition import partitions_of
    from marketdata_assets.model.table import raw_table
    from marketdata_assets.model.timeframe import TIMEFRAMES
    from marketdata_assets.model.window import Window
    from marketdata_assets.quality.split import REJECTED_SCHEMA

    table, nothing = raw_table(TIMEFRAMES["1m"]), pl.DataFrame(schema=REJECTED_SCHEMA)
    with open_context(settings(rollups, place)) as context:
        for key, bars in market_years(quick):
            partitions = partitions_of(Market.parse(key), Window(START, END))
            for partition in partitions:
                month = partition.month
                frame = bars.filter(
                    pl.col("open_time").is_between(month.start, month.end, closed="left")
                )
                size, digest = context.storage.lake.write(table, partition, frame)
                state = PartitionState(
                    start=month.start,
                    through=month.end,
                    newest=frame["open_time"][-1],
                    is_complete=True,
                    rows=frame.height,
                    bytes=size,
                    digest=digest,
                    rollup_source_digest=None,
                    attempts=1,
                    failures=0,
                    error=None,
                )
                absent = find_gaps(frame["open_time"], table.timeframe, month)
                gaps = [
                    Gap(w, w.count(table.timeframe), GapReason.NO_BARS, 2, "synthetic")
                    for w in absent
                ]
                context.ledger.partitions.commit(
                    IngestRecord(
                        table,
                        partition,
                        state,
                        account=RowAccount(received=frame.height, stored=frame.height),
                        gaps=gaps,
                        fetches=(),
                        rejected=nothing,
                        answers=(),
                        now=END,
                    )
                )
            for _ in context.bind(RollupBuilder).build(partitions):
                pass


def count(place: str) -> int:
    """Return how many bars the data set holds."""
    return sum(
        pl.scan_parquet(file).select(pl.len()).collect().item()
        for file in Path(place, "markets").glob("*.parquet")
    )


# --------------------------------------------------------------------------------- other engines
def build_once(place: Path, build: Callable[[Path], None]) -> Path:
    """Build a folder or file if it is missing and return its path."""
    if not place.exists():
        building = place.with_name(place.name + ".building")
        shutil.rmtree(building, ignore_errors=True)
        building.unlink(missing_ok=True) if building.is_file() else None
        build(building)
        building.rename(place)
    return place


def scratch(folder: Path) -> Path:
    """Create a folder beside the data for this process alone."""
    return Path(tempfile.mkdtemp(prefix="scratch-", dir=folder))


def floats_of(folder: Path) -> Iterator[tuple[str, pl.DataFrame]]:
    for file in sorted((folder / "markets").glob("*.parquet")):
        yield file.stem, pl.read_parquet(file)


def aggregates() -> list[pl.Expr]:
    return [getattr(pl.col(name), how)() for name, how in HOW.items()]


def bucket_sql(name: str, source: str, where: str = "") -> str:
    sums = ", ".join(f"sum({column}) AS {column}" for column in SUMS)
    return (
        f"SELECT market, time_bucket(INTERVAL '{MINUTES[name]} minutes', open_time,"
        " TIMESTAMPTZ '1970-01-05 00:00:00+00') AS open_time,"
        " arg_min(open, open_time) AS open, max(high) AS high, min(low) AS low,"
        " arg_max(close, open_time) AS close,"
        f" {sums} FROM {source} {where} GROUP BY 1, 2"
    )


def parents(hierarchical: bool = True) -> dict[str, str]:
    return dict(
        zip(TARGETS, ["1m", *TARGETS[:-1]] if hierarchical else ["1m"] * len(TARGETS), strict=True)
    )


def open_arctic(folder: Path) -> Any:
    """Open the library `bars` of an ArcticDB (LMDB) with every market, 1m and stored 1h."""
    import arcticdb

    def build(place: Path) -> None:
        place.mkdir()
        library = arcticdb.Arctic(f"lmdb://{place}?map_size=20GB").create_library("bars")
        for name, frame in floats_of(folder):
            bars = (
                frame.with_columns(pl.col("open_time").dt.replace_time_zone(None))
                .to_pandas()
                .set_index("open_time")
            )
            library.write(name, bars)
            library.write(f"{name} 1h", bars.resample("1h").agg(HOW))

    return arcticdb.Arctic(f"lmdb://{build_once(folder / 'arctic', build)}?map_size=20GB")["bars"]


def own_copy(folder: Path, rollups: str, only: str = "") -> Path:
    """Copy our lake, ledger and warehouse into a scratch folder; raw bars are hard links.

    `only`: copy the raw bars of this market alone.
    """
    place = scratch(folder)
    for key in (folder / "lake" / "raw" / "ohlcv_1m").glob(f"*{only}"):
        shutil.copytree(key, place / "lake" / "raw" / "ohlcv_1m" / key.name, copy_function=os.link)
    shutil.copytree(folder / f"state-{rollups}", place / f"state-{rollups}")
    if rollups == "duckdb":
        shutil.copy(folder / "market.duckdb", place)
    text = (folder / f"universe-{rollups}.yaml").read_text()
    (place / f"universe-{rollups}.yaml").write_text(text.replace(str(folder), str(place)))
    return place


def open_delta(folder: Path, timeframe: str = "1m") -> Path:
    """Open a Delta table of all markets, partitioned by market and month."""
    from deltalake import write_deltalake

    def build(place: Path) -> None:
        for name, frame in floats_of(folder):
            if timeframe != "1m":
                frame = frame.group_by_dynamic("open_time", every=timeframe).agg(aggregates())
            month = pl.col("open_time").dt.strftime("%Y-%m").alias("month")
            rows = frame.select(pl.lit(name).alias("market"), pl.all(), month).to_arrow()
            write_deltalake(place, rows, mode="append", partition_by=["market", "month"])

    return build_once(folder / f"delta-{timeframe}", build)


def open_duckdb(folder: Path) -> Path:
    """Open a DuckDB file of all markets and nine tables, without keys: its fastest form."""
    import duckdb

    def build(place: Path) -> None:
        with duckdb.connect(str(place)) as connection:
            files = f"read_parquet('{folder}/markets/*.parquet', filename=true)"
            market = "parse_filename(filename, true) AS market"
            connection.execute(
                f"CREATE TABLE ohlcv_1m AS SELECT {market}, * EXCLUDE filename"
                f" FROM {files} ORDER BY market, open_time"
            )
            for name, parent in parents().items():
                connection.execute(
                    f"CREATE TABLE ohlcv_{name} AS {bucket_sql(name, f'ohlcv_{parent}')}"
                    " ORDER BY market, open_time"
                )

    return build_once(folder / "peers.duckdb", build)

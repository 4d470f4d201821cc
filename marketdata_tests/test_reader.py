"""Reading without Dagster: LazyFrames and SQL return every digit and open only the files needed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from marketdata_assets import open_reader
from marketdata_assets.context import open_context
from marketdata_assets.errors import BadInput
from marketdata_assets.flows.read.bars import BarReader
from marketdata_assets.model.bar import BAR_SCHEMA, ROLLUP_SCHEMA
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import raw_table
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.settings.universe import Settings
from marketdata_assets.storage.s3_client import S3Client
from marketdata_tests.steps import at, run_derive, run_ingest, window

BTC, ETH = "binance:BTC-USDT", "binance:ETH-USDT"


@pytest.fixture(params=["parquet", "duckdb", "s3"])
def stored(
    request: pytest.FixtureRequest, sandbox: Any, universe: Callable[..., Settings]
) -> Settings:
    """Two markets over the end of a month, with rollups in objects, in DuckDB, or all in S3."""
    rollups = "duckdb" if request.param == "duckdb" else "parquet"
    lake = f"s3://{request.getfixturevalue('bucket')}/lake" if request.param == "s3" else None
    settings = universe(
        sandbox[1],
        symbols="[BTC/USDT, ETH/USDT]",
        since="2023-12-25",
        until="2024-01-02",
        rollups=rollups,
        lake=lake,
    )
    run_ingest(settings)
    run_derive(settings)
    return settings


def expected(settings: Settings, key: str, timeframe: str, start: str, end: str) -> pl.DataFrame:
    with open_context(settings) as context:
        return context.bind(BarReader).read(
            settings.market(key), TIMEFRAMES[timeframe], window(start, end)
        )


@pytest.mark.parametrize("timeframe", ["1m", "1h", "1w"])
def test_a_lazy_frame_holds_every_bar_of_the_window(stored: Settings, timeframe: str):
    start, end = "2023-12-25", "2024-01-02T00:30"
    with open_reader() as reader:
        lazy = reader.bars(BTC, timeframe, start, end)
        assert isinstance(lazy, pl.LazyFrame)
        found = lazy.collect()
        assert dict(found.schema) == dict(BAR_SCHEMA if timeframe == "1m" else ROLLUP_SCHEMA)
        assert_frame_equal(found, expected(stored, BTC, timeframe, start, end))
        assert found.height > 0
        everything = reader.bars(BTC, timeframe).collect()
        assert_frame_equal(everything, expected(stored, BTC, timeframe, "2020-01-01", "2025-01-01"))


def test_many_markets_come_one_after_the_other(stored: Settings):
    with open_reader() as reader:
        assert reader.markets == [BTC, ETH]
        found = reader.bars(reader.markets, "1h", "2023-12-31", "2024-01-02").collect()
        for key in reader.markets:
            assert_frame_equal(
                found.filter(market=key).drop("market"),
                expected(stored, key, "1h", "2023-12-31", "2024-01-02"),
            )
        assert found["market"].unique(maintain_order=True).to_list() == [BTC, ETH]
        with pytest.raises(ValueError, match="at least one market"):
            reader.bars([], "1h")


def test_the_newest_bars_of_all_markets(stored: Settings):
    with open_reader() as reader:
        for timeframe in ("1m", "1h", "1d", "1w"):
            truth = [
                expected(stored, key, timeframe, "2020-01-01", "2025-01-01")["open_time"].max()
                for key in reader.markets
            ]
            assert reader.newest(timeframe).rows() == list(zip(reader.markets, truth, strict=True))


def test_sql_sees_every_table_and_every_digit(stored: Settings):
    with open_reader() as reader:
        tables = reader.sql(
            "SELECT DISTINCT schema || '.' || name AS t FROM (SHOW ALL TABLES) "
            "WHERE database = 'memory' ORDER BY t"
        )
        assert {"raw.ohlcv_1m", "rollup.ohlcv_1h", "rollup.ohlcv_1w"} <= set(tables["t"])
        for timeframe, layer in (("1m", "raw"), ("1h", "rollup")):
            found = reader.sql(
                f"SELECT * FROM {layer}.ohlcv_{timeframe} WHERE market = '{ETH}' ORDER BY open_time"
            ).drop("market")
            truth = expected(stored, ETH, timeframe, "2020-01-01", "2025-01-01")
            assert_frame_equal(found.cast(dict(truth.schema)), truth)  # type: ignore[arg-type]
        total = reader.sql("SELECT sum(volume) AS v FROM raw.ohlcv_1m").item()
        frames = [expected(stored, key, "1m", "2020-01-01", "2025-01-01") for key in reader.markets]
        assert total == sum((frame["volume"].sum() for frame in frames), Decimal(0))


def test_sql_over_some_markets_and_months_opens_only_their_files(stored: Settings):
    with open_reader() as reader, reader.connect([ETH], "2024-01-01", "2024-01-02") as connection:
        keys = connection.execute(
            "SELECT DISTINCT market, month(open_time) FROM raw.ohlcv_1m"
        ).fetchall()
        assert keys == [(ETH, 1)]


def test_nothing_is_read_before_it_is_needed_and_only_what_is_needed(
    sandbox: Any, universe: Callable[..., Settings], bucket: str
):
    """An object that is no Parquet is no problem for a query that does not reach its month."""
    settings = universe(sandbox[1], since="2023-11-29", until="2024-01-02", rollups="parquet")
    run_ingest(settings)
    (december,) = Path(settings.lake).glob("raw/ohlcv_1m/*/month=2023-12/data.parquet")
    december.write_bytes(b"no Parquet at all")
    with open_reader() as reader:
        assert reader.bars(BTC, "1m", "2024-01-01", "2024-01-02").collect().height == 1440
        assert (
            reader.bars(BTC, "1m", "2023-11-30", "2023-11-30T01:00")
            .select("close")
            .collect()
            .height
            == 60
        )


def test_reading_lists_no_bucket(
    sandbox: Any, universe: Callable[..., Settings], bucket: str, monkeypatch: pytest.MonkeyPatch
):
    settings = universe(
        sandbox[1],
        since="2023-12-30",
        until="2024-01-02",
        rollups="parquet",
        lake=f"s3://{bucket}/lake",
    )
    calls: list[str] = []
    real = S3Client.call

    def call(self: S3Client, verb: str, *arguments: Any, **options: Any) -> dict[str, Any]:
        calls.append(verb)
        return real(self, verb, *arguments, **options)

    monkeypatch.setattr(S3Client, "call", call)
    run_ingest(settings)
    run_derive(settings)
    assert "put_object" in calls
    calls.clear()
    with open_reader() as reader:
        assert reader.bars(BTC, "1m", "2023-12-31", "2024-01-01").collect().height == 1440
        assert reader.bars(BTC, "1h", "2023-12-31", "2024-01-01").collect().height == 24
        assert reader.newest("1m")["open_time"].to_list() == [at("2024-01-01T23:59")]
    assert not any("list" in verb for verb in calls)


def test_a_lake_is_read_where_there_is_no_ledger(
    stored: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The machine of an analyst has the universe and the lake, and a state folder of its own."""
    if stored.rollups == "duckdb":
        pytest.skip("the warehouse is a file of the machine that writes it")
    monkeypatch.setenv("MARKETDATA_STATE", str(tmp_path / "elsewhere"))
    with open_reader() as reader:
        assert_frame_equal(
            reader.bars(BTC, "1h").collect(),
            expected(stored, BTC, "1h", "2020-01-01", "2025-01-01"),
        )
        assert reader.bars(BTC, "1m", "2023-12-31", "2024-01-02").collect().height == 2 * 1440


def test_months_of_different_digits_are_one_frame(sandbox: Any, universe: Callable[..., Settings]):
    """One month's prices need two decimals, the next one's five."""
    settings = universe(sandbox[1], since="2023-12-31", until="2024-01-02", rollups="parquet")
    run_ingest(settings)
    january, table = Partition.parse(f"{BTC}|2024-01-01"), raw_table(TIMEFRAMES["1m"])
    with open_context(settings) as context:
        bars = context.storage.lake.read(table, january)
        assert bars is not None
        finer = bars.with_columns(pl.col("volume") + pl.lit(Decimal("0.000000000001")))
        context.storage.lake.write(table, january, finer.cast(dict(BAR_SCHEMA)))  # type: ignore[arg-type]
    with open_reader() as reader:
        found = reader.bars(BTC, "1m").collect()
        assert_frame_equal(
            found.filter(pl.col("open_time") >= at("2024-01-01")), finer.cast(dict(BAR_SCHEMA))
        )  # type: ignore[arg-type]
        by_sql = reader.sql("SELECT volume FROM raw.ohlcv_1m ORDER BY open_time")
        assert by_sql["volume"].to_list() == found["volume"].to_list()


@pytest.mark.parametrize(
    ("read", "words"),
    [
        (
            lambda r: r.bars("binance:BTC-USD", "1m"),
            "market 'binance:BTC-USD' is not in .*did you mean",
        ),
        (lambda r: r.bars(BTC, "2d"), "timeframe '2d' is not one of"),
        (lambda r: r.bars(BTC, "1m", "yesterday"), "'yesterday' is not a date"),
    ],
)
def test_a_mistake_is_bad_input(stored: Settings, read: Callable[[Any], Any], words: str):
    with open_reader() as reader, pytest.raises(BadInput, match=words):
        read(reader)


def test_moments_are_texts_or_datetimes(stored: Settings):
    with open_reader() as reader:
        by_text = reader.bars(BTC, "1m", "2023-12-31", "2024-01-01").collect()
        naive = reader.bars(
            BTC, "1m", at("2023-12-31").replace(tzinfo=None), at("2023-12-31") + timedelta(days=1)
        ).collect()
        assert_frame_equal(by_text, naive)
        assert by_text.height == 1440


def test_reading_needs_neither_dagster_nor_a_venue(stored: Settings):
    code = (
        "import sys\nfrom marketdata_assets import open_reader\n"
        "count = 'SELECT count(*) FROM raw.ohlcv_1m'\n"
        "with open_reader() as reader:\n"
        f"    print(reader.bars('{BTC}', '1m').collect().height, reader.sql(count).item())\n"
        "print(sorted({'dagster', 'ccxt', 'aiohttp', 'pandera'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == [f"{8 * 1440} {16 * 1440}", "[]"]


# --------------------------------------------------------------------------------- the command
def marketdata(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "marketdata_assets.cli.main", *arguments],
        capture_output=True,
        text=True,
    )


@pytest.fixture
def small(sandbox: Any, universe: Callable[..., Settings]) -> Settings:
    settings = universe(sandbox[1], since="2024-01-01", until="2024-01-03")
    run_ingest(settings)
    run_derive(settings)
    return settings


def test_the_command_answers(small: Settings, tmp_path: Path):
    query = "SELECT market, open_time, close FROM rollup.ohlcv_12h ORDER BY open_time LIMIT 1"
    done = marketdata("sql", query, "--format", "csv")
    first = expected(small, BTC, "12h", "2024-01-01", "2024-01-02").row(0, named=True)
    assert done.stdout.splitlines() == [
        "market,open_time,close",
        f"{BTC},2024-01-01T00:00:00Z,{first['close'].normalize():f}",
    ], done.stderr
    file = tmp_path / "answer.parquet"
    assert marketdata("sql", query, "--format", "parquet", "--out", str(file)).returncode == 0
    assert pl.read_parquet(file)["close"].item() == first["close"]


@pytest.mark.parametrize(
    "query", ["SELEKT 1", "SELECT nothing FROM raw.ohlcv_1m", "SELECT * FROM raw.ohlcv_7m"]
)
def test_a_query_that_cannot_be_answered_is_one_line(small: Settings, query: str):
    done = marketdata("sql", query)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the query cannot be answered: ")
    assert "Traceback" not in done.stderr

"""Every object of a table has the same columns and types, so that any reader is exact without
options, before, while and after a column is widened.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from decimal import Decimal
from itertools import permutations
from pathlib import Path

import duckdb
import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest

from marketdata_assets.errors import Damaged
from marketdata_assets.model.bar import COLUMN_NAMES, DECIMAL
from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import Table, market_folder, raw_table, rollup_table
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.model.window import month_of
from marketdata_assets.storage.fingerprint import fingerprint
from marketdata_assets.storage.lake import Lake
from marketdata_assets.storage.object_proof import NoBook
from marketdata_tests.samples import (
    BTC,
    FEBRUARY,
    JANUARY,
    earlier_object,
    frame,
    minutes,
    moved_to,
    random_bars,
    raw_object,
    row,
    start_python,
)

TABLE = raw_table(TIMEFRAMES["1m"])
TYPES = ".types/raw/ohlcv_1m.json"
OTHER = Partition(Market("binance", "PEPE/USDT"), JANUARY.month)
HUGE = Decimal("12345678901.5")
"""A minute's volume that needs more than 18 digits with eight of them behind the point."""


def with_volume(partition: Partition, volume: Decimal | str, count: int = 3) -> pl.DataFrame:
    return frame(
        row(moment, volume=Decimal(volume)) for moment in minutes(count, partition.month.start)
    )


def objects(folder: Path) -> list[str]:
    return sorted(str(file) for file in (folder / TABLE.name).rglob("*.parquet"))


def schemas(folder: Path) -> set[str]:
    """The physical columns of all objects of the table."""
    return {
        str([(c.name, c.physical_type, str(c.logical_type)) for c in pq.ParquetFile(f).schema])
        for f in objects(folder)
    }


# ---------------------------------------------------------------- bare readers
def by_duckdb(files: list[str]) -> pl.DataFrame:
    return duckdb.sql(f"SELECT * FROM read_parquet({files!r})").pl()


def by_polars(files: list[str]) -> pl.DataFrame:
    return pl.scan_parquet(files, hive_partitioning=True).collect()


def by_pandas(files: list[str]) -> pl.DataFrame:
    found = pd.read_parquet(files, partitioning="hive")
    assert isinstance(found["volume"].iloc[0], Decimal)
    return pl.DataFrame(
        {name: found[name].tolist() for name in ("market", "month", "volume")},
        schema_overrides={"volume": DECIMAL},
    )


def volumes(found: pl.DataFrame) -> dict[tuple[str, str], list[Decimal]]:
    """The volumes by market and month, sorted."""
    months = pl.col("month").cast(pl.String).str.head(7)
    groups = found.group_by("market", months).agg(pl.col("volume").cast(DECIMAL).sort())
    return {(str(market), month): volume for market, month, volume in groups.iter_rows()}


@pytest.mark.parametrize("read", [by_duckdb, by_polars, by_pandas])
@pytest.mark.parametrize(
    "texts",
    [
        ("1.25", "22.75", "333.01"),
        ("1.25", "1.12345", "7"),
        ("1234567890123456.25", "1.123456789012", "12345678901234567890123456"),
        ("1", "1234567.123456789012", "12345678901234567890123456.5"),
    ],
    ids=["few digits", "other digits", "wide after narrow", "wider and wider"],
)
def test_every_reader_reads_any_objects_in_any_order(
    tmp_path: Path, read: Callable[[list[str]], pl.DataFrame], texts: tuple[str, ...]
) -> None:
    """Two months of one market and one of a contract: each bar has its own market and digits."""
    lake, contract = Lake(str(tmp_path)), Market("binance", "BTC/USDT:USDT")
    partitions = (JANUARY, FEBRUARY, Partition(contract, JANUARY.month))
    expected = {}
    for partition, text in zip(partitions, texts, strict=True):
        lake.write(TABLE, partition, with_volume(partition, text))
        expected[partition.market.key, partition.month_key[:7]] = [Decimal(text)] * 3
    assert len(schemas(tmp_path)) == 1
    for files in permutations(objects(tmp_path)):
        assert volumes(read([*files])) == expected


def test_folders_are_read_as_a_whole(tmp_path: Path) -> None:
    """The file with the table's types lies outside of the table's folder."""
    lake = Lake(str(tmp_path))
    for partition, volume in ((JANUARY, "1.25"), (OTHER, HUGE)):
        lake.write(TABLE, partition, with_volume(partition, volume))
    total, folder = 3 * (Decimal("1.25") + HUGE), tmp_path / "raw"
    assert (tmp_path / TYPES).exists()
    assert pd.read_parquet(folder)["volume"].sum() == total
    found = pl.scan_parquet(folder).select(pl.col("volume").cast(DECIMAL).sum()).collect()
    assert found.item() == total
    glob = duckdb.sql(f"SELECT sum(volume) FROM read_parquet('{tmp_path}/**/*.parquet')")
    assert glob.fetchall() == [(total,)]


def test_decimals_are_stored_as_small_integers(tmp_path: Path) -> None:
    """As delta-packed INT64 with eight digits behind the point; wider ones with 38 digits."""
    lake = Lake(str(tmp_path))
    lake.write(TABLE, JANUARY, with_volume(JANUARY, "123456789012345678901.5"))
    file = pq.ParquetFile(objects(tmp_path)[0])
    kinds = {
        column.name: (column.physical_type, str(column.logical_type)) for column in file.schema
    }
    assert kinds["close"] == ("INT64", "Decimal(precision=18, scale=8)")
    assert kinds["volume"] == ("FIXED_LEN_BYTE_ARRAY", "Decimal(precision=38, scale=8)")
    chunk = file.metadata.row_group(0).column(COLUMN_NAMES.index("close"))
    assert (chunk.compression, "DELTA_BINARY_PACKED" in chunk.encodings) == ("ZSTD", True)
    hourly = rollup_table(TIMEFRAMES["1h"])
    lake.write(hourly, JANUARY, pl.DataFrame(schema=hourly.schema))
    rollup = pq.ParquetFile(tmp_path / hourly.path(JANUARY))
    kinds = {column.name: str(column.logical_type) for column in rollup.schema}
    assert kinds["vwap"] == "Decimal(precision=38, scale=12)"


class Rewritten(NoBook):
    """Remembers the sizes of objects that were written again."""

    def __init__(self) -> None:
        self.sizes: dict[Partition, int] = {}

    def note_rewritten(self, table: Table, partition: Partition, size: int) -> None:
        self.sizes[partition] = size


# ---------------------------------------------------------------- widening
def test_a_wide_value_has_every_object_rewritten_with_the_same_rows(tmp_path: Path) -> None:
    book = Rewritten()
    lake = Lake(str(tmp_path), book=book)
    written = {p: moved_to(random_bars(i), p) for i, p in enumerate((JANUARY, FEBRUARY))}
    digests = {p: lake.write(TABLE, p, bars).digest for p, bars in written.items()}
    assert not (tmp_path / TYPES).exists()
    written[OTHER] = with_volume(OTHER, HUGE)
    lake.write(TABLE, OTHER, written[OTHER])
    assert book.sizes == {p: lake.size(TABLE, p) for p in (JANUARY, FEBRUARY)}
    for partition, bars in written.items():
        found = lake.read(TABLE, partition)
        assert found is not None
        assert found.equals(bars)
        assert fingerprint(found) == digests.get(partition, fingerprint(bars))
    assert len(schemas(tmp_path)) == 1
    before = {file: Path(file).read_bytes() for file in objects(tmp_path)}
    assert Lake(str(tmp_path)).rewrite(TABLE) == 0
    assert not Lake(str(tmp_path)).write_if_changed(TABLE, OTHER, written[OTHER])
    assert before == {file: Path(file).read_bytes() for file in objects(tmp_path)}


def test_other_writers_learn_of_new_types_at_their_next_write(tmp_path: Path) -> None:
    narrow, wide = Lake(str(tmp_path)), Lake(str(tmp_path))
    narrow.write(TABLE, JANUARY, random_bars(1))
    wide.write(TABLE, OTHER, with_volume(OTHER, HUGE))
    narrow.write(TABLE, FEBRUARY, random_bars(2))
    assert len(schemas(tmp_path)) == 1
    assert len(objects(tmp_path)) == 3


def test_a_widening_that_a_wider_one_overtakes_takes_nothing_back(tmp_path: Path) -> None:
    """Another writer widens the column further after the first of two objects is rewritten."""
    wider, overtaken = Lake(str(tmp_path)), []
    third = Partition(OTHER.market, FEBRUARY.month)

    class Overtake(NoBook):
        def note_rewritten(self, table: Table, partition: Partition, size: int) -> None:
            if not overtaken:
                overtaken.append(partition)
                wider.write(TABLE, third, with_volume(third, "0.123456789012"))

    lake = Lake(str(tmp_path), book=Overtake())
    for partition in (JANUARY, FEBRUARY):
        lake.write(TABLE, partition, with_volume(partition, "1.5"))
    lake.write(TABLE, OTHER, with_volume(OTHER, HUGE))
    assert len(schemas(tmp_path)) == 1
    expected = 3 * (2 * Decimal("1.5") + HUGE + Decimal("0.123456789012"))
    for files in permutations(objects(tmp_path)):
        assert by_duckdb([*files])["volume"].cast(DECIMAL).sum() == expected


def test_many_writers_at_once_leave_one_type(tmp_path: Path) -> None:
    """Four threads write a market each, with narrow, wide and wider values in turn."""
    values = ("1.5", HUGE, "0.123456789012", "2.25")
    lakes, months = [Lake(str(tmp_path)) for _ in values], [JANUARY.month]
    for _ in range(5):
        months.append(month_of(months[-1].end))

    def write(lake: Lake, index: int) -> None:
        for step, month in enumerate(months):
            partition = Partition(Market("binance", f"C{index}/USDT"), month)
            lake.write(TABLE, partition, with_volume(partition, values[(index + step) % 4]))

    threads = [threading.Thread(target=write, args=(lake, i)) for i, lake in enumerate(lakes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(schemas(tmp_path)) == 1
    assert len(objects(tmp_path)) == 4 * len(months)
    counts = [sum((i + s) % 4 == v for i in range(4) for s in range(len(months))) for v in range(4)]
    total = sum(3 * n * Decimal(v) for n, v in zip(counts, values, strict=True))
    assert by_duckdb(objects(tmp_path))["volume"].cast(DECIMAL).sum() == total


KILLED = """
import os, signal, sys
from pathlib import Path
import polars as pl
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import raw_table
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.storage.lake import Lake
replaced, replace = 0, Path.replace
def die(self, target):
    global replaced
    replaced += 1
    if replaced == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)
Path.replace = die
partition = Partition.parse("binance:PEPE-USDT|2024-01-01")
Lake(sys.argv[1]).write(raw_table(TIMEFRAMES["1m"]), partition, pl.read_parquet(sys.argv[2]))
"""


def test_no_reader_is_wrong_wherever_a_widening_is_killed(tmp_path: Path) -> None:
    """A process that widens a column is killed before each of the replacements that it makes: the
    new types, the two objects, the mark that they are rewritten, and the wide object.
    """
    (tmp_path / "wide").write_bytes(raw_object(with_volume(OTHER, HUGE)))
    narrow = {JANUARY: "1.12345678", FEBRUARY: "7"}
    running = {}
    for moment in range(1, 6):
        lake = Lake(str(tmp_path / str(moment)))
        for partition, volume in narrow.items():
            lake.write(TABLE, partition, with_volume(partition, volume))
        arguments = [lake.location, str(tmp_path / "wide"), str(moment)]
        running[moment] = start_python(KILLED, *arguments)
    total = 3 * sum(map(Decimal, narrow.values()))
    for moment, process in running.items():
        _, errors = process.communicate()
        assert process.returncode == -9, errors
        folder = tmp_path / str(moment)
        assert len(objects(folder)) == 2
        for files in permutations(objects(folder)):
            assert sum(by_duckdb([*files])["volume"].cast(DECIMAL)) == total
        lake = Lake(str(folder))
        lake.write(TABLE, JANUARY, with_volume(JANUARY, "1.12345678"))
        lake.write(TABLE, OTHER, with_volume(OTHER, HUGE))
        assert len(schemas(folder)) == 1
        types = json.loads((folder / TYPES).read_text())
        assert types == {part: {"volume": [38, 8]} for part in ("written", "everywhere")}


# ---------------------------------------------------------------- earlier releases
def test_objects_of_earlier_releases_are_read_and_rewritten(tmp_path: Path) -> None:
    """Wherever they lie, and whatever digits they need; what is damaged stays where it is."""
    lake = Lake(str(tmp_path / "hot"), str(tmp_path / "cold"))
    damaged = tmp_path / "hot" / TABLE.path(Partition(BTC, month_of(FEBRUARY.month.end)))
    foreign = tmp_path / "hot" / TABLE.name / market_folder(BTC.key) / "month=none/data.parquet"
    for place, partition, volume in (
        ("hot", JANUARY, "1.25"),
        ("hot", OTHER, "12345678901234567.5"),
        ("cold", FEBRUARY, "1.123"),
    ):
        file = tmp_path / place / TABLE.path(partition)
        file.parent.mkdir(parents=True)
        bars = with_volume(partition, volume)
        file.write_bytes(earlier_object(raw_object(bars, partition)))
        found = lake.read(TABLE, partition)
        assert found is not None
        assert found.equals(bars)
    for file in (damaged, foreign):
        file.parent.mkdir(parents=True)
        file.write_bytes(b"no parquet")
    assert lake.rewrite(TABLE) >= 3
    assert lake.rewrite(TABLE) == 0
    assert damaged.read_bytes() == foreign.read_bytes() == b"no parquet"
    damaged.unlink()
    foreign.unlink()
    assert schemas(tmp_path / "hot") == schemas(tmp_path / "cold")
    assert len(schemas(tmp_path / "hot")) == 1
    files = objects(tmp_path / "hot") + objects(tmp_path / "cold")
    expected = 3 * (Decimal("1.25") + Decimal("12345678901234567.5") + Decimal("1.123"))
    for order in permutations(files):
        assert by_duckdb([*order])["volume"].cast(DECIMAL).sum() == expected


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"written": {"volume": [1, 2]}}'])
def test_a_damaged_file_of_types_is_named_and_nothing_is_written(
    tmp_path: Path, content: str
) -> None:
    (tmp_path / TYPES).parent.mkdir(parents=True)
    (tmp_path / TYPES).write_text(content)
    with pytest.raises(Damaged, match=rf"{TYPES} is damaged; remove it, then run `marketdata rew"):
        Lake(str(tmp_path)).write(TABLE, JANUARY, random_bars())
    assert objects(tmp_path) == []

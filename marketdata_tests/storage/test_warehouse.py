"""The DuckDB warehouse: exactly these bars, only changed rows, all or nothing, and a wait for a
file in use.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marketdata_assets.errors import StoreFailed
from marketdata_assets.model.bar import COLUMN_NAMES, ROLLUP_SCHEMA
from marketdata_assets.model.table import rollup_table
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.model.window import Window
from marketdata_assets.storage.warehouse import Warehouse
from marketdata_tests.samples import (
    BTC,
    ETH,
    FEBRUARY,
    JANUARY,
    START,
    kill,
    random_rows,
    start_python,
)

pytestmark = pytest.mark.server

H1, D1 = TIMEFRAMES["1h"], TIMEFRAMES["1d"]
MONTH = JANUARY.month
ALWAYS = Window(START - timedelta(days=400), START + timedelta(days=400))


def hours(seed: int, count: int = 24, start: int = 0, digits: int = 12) -> pl.DataFrame:
    """Return hourly rollups from January's hour `start` on, random in all numbers."""
    rows = random_rows(
        seed, [START + (start + i) * H1.width for i in range(count)], digits, nulls=0.2
    )
    rows = [
        {**r, "vwap": r["quote_volume"], "bars_expected": 60, "bars_present": 60 - i % 3}
        for i, r in enumerate(rows)
    ]
    return pl.DataFrame(
        [{name: r[name] for name in ROLLUP_SCHEMA} for r in rows], schema=ROLLUP_SCHEMA
    )


@pytest.fixture
def warehouse(tmp_path: Path) -> Warehouse:
    return Warehouse(tmp_path / "folder/market.duckdb", wait_seconds=20.0)


def put(warehouse: Warehouse, bars: pl.DataFrame, market: Any = BTC, window: Window = MONTH) -> int:
    """Replace a window of the hourly table. Return how many rows changed."""
    return warehouse.replace(market, {H1: bars}, {H1: window})["1h"]


def get(warehouse: Warehouse, market: Any = BTC, window: Window = ALWAYS) -> pl.DataFrame:
    return warehouse.read(rollup_table(H1), market, window)


def make_older(file: Path) -> None:
    """Give a file the time of an hour ago, so that it has not just changed."""
    hour_ago = file.stat().st_mtime - 3600
    os.utime(file, (hour_ago, hour_ago))


# ---------------------------------------------------------------- exactly these bars
def test_years_that_are_read_again_are_kept_until_the_file_changes(warehouse: Warehouse):
    around_new_year = hours(1, 48, start=-24)
    put(warehouse, around_new_year, window=ALWAYS)
    put(warehouse, hours(2), ETH)
    make_older(warehouse.path)
    window = Window(START - 5 * H1.width, START + 7 * H1.width)
    expected = around_new_year[19:31]
    for _ in range(3):
        assert get(warehouse, window=window).equals(expected)
    with warehouse_of_another(warehouse) as other:  # it holds the file, and nobody waits for it
        assert get(warehouse, window=window).equals(expected)
        assert get(warehouse, window=Window(START, START)).is_empty()
        other.execute('DELETE FROM "rollup"."ohlcv_1h" WHERE market = ?', [BTC.key])
    assert get(warehouse, window=window).is_empty()
    assert get(warehouse, ETH).equals(hours(2))


@contextmanager
def warehouse_of_another(warehouse: Warehouse) -> Iterator[Any]:
    with duckdb.connect(str(warehouse.path)) as connection:
        yield connection


def test_a_missing_file_is_empty(warehouse: Warehouse):
    assert not warehouse.exists
    assert get(warehouse).equals(pl.DataFrame(schema=ROLLUP_SCHEMA))
    assert not warehouse.path.parent.exists()
    put(warehouse, hours(1))
    assert warehouse.exists
    assert warehouse.read(rollup_table(D1), BTC, ALWAYS).equals(pl.DataFrame(schema=ROLLUP_SCHEMA))
    assert get(warehouse, ETH).is_empty()


def test_written_bars_are_read_here_and_by_sql(warehouse: Warehouse):
    bars = hours(1, digits=26)
    assert put(warehouse, bars) == 24
    assert get(warehouse).equals(bars)
    with duckdb.connect(str(warehouse.path), read_only=True) as connection:
        connection.execute("SET TimeZone = 'UTC'")
        found = connection.sql("SELECT * FROM rollup.ohlcv_1h ORDER BY open_time").to_arrow_table()
    assert found.column_names == ["market", *ROLLUP_SCHEMA]
    assert set(found["market"].to_pylist()) == {"binance:BTC-USDT"}
    for name in ROLLUP_SCHEMA:
        assert found[name].to_pylist() == bars[name].to_list(), name


def test_a_window_is_read_half_open(warehouse: Warehouse):
    put(warehouse, hours(1))
    found = get(warehouse, window=Window(START + 3 * H1.width, START + 5 * H1.width))
    assert found["open_time"].to_list() == [START + 3 * H1.width, START + 4 * H1.width]


def test_moments_do_not_depend_on_the_machines_time_zone(warehouse: Warehouse):
    put(warehouse, hours(1))
    reader = (
        "import sys; from pathlib import Path; from marketdata_assets.storage.warehouse import *;"
        "from marketdata_assets.model.timeframe import TIMEFRAMES;"
        "from marketdata_assets.model.window import Window, parse_time;"
        "table, market = Table('rollup', TIMEFRAMES['1h']), Market('binance', 'BTC/USDT');"
        "window = Window(parse_time('2024-01-01T03:00Z'), parse_time('2024-01-01T05:00Z'));"
        "found = Warehouse(Path(sys.argv[1])).read(table, market, window);"
        "print(*found['open_time'].dt.epoch('s'), found.schema['open_time'])"
    )
    process = start_python(
        reader, str(warehouse.path), env={**os.environ, "TZ": "America/New_York"}
    )
    output, errors = process.communicate()
    assert output.strip() == "1704078000 1704081600 Datetime(time_unit='us', time_zone='UTC')", (
        errors
    )


# ---------------------------------------------------------------- only changed rows
def test_only_rows_that_differ_are_touched(warehouse: Warehouse):
    bars = hours(1)
    assert [put(warehouse, bars), put(warehouse, bars)] == [24, 0]
    changed = bars.with_columns(
        pl.when(pl.col("open_time") == START + 5 * H1.width)
        .then(pl.lit(7))
        .otherwise("trades")
        .alias("trades")
    )
    assert put(warehouse, changed.cast(ROLLUP_SCHEMA)) == 1
    assert get(warehouse).equals(changed.cast(ROLLUP_SCHEMA))
    assert put(warehouse, pl.concat([changed.cast(ROLLUP_SCHEMA), hours(2, 2, start=24)])) == 2
    assert put(warehouse, bars) == 3
    assert put(warehouse, bars[:20]) == 4
    assert put(warehouse, bars[5:20]) == 5
    assert put(warehouse, bars[:0]) == 15
    assert get(warehouse).is_empty()


def test_untouched_rows_stay_where_they_are(warehouse: Warehouse):
    """By DuckDB's own row ids, which do not change while a connection is open: rows that did not
    change were not written again.
    """
    put(warehouse, hours(1))
    with duckdb.connect(str(warehouse.path), config={"threads": "1"}) as observer:

        def row_ids() -> dict[int, int]:
            return dict(
                observer.execute(
                    "SELECT epoch(open_time)::BIGINT // 3600, rowid FROM rollup.ohlcv_1h"
                ).fetchall()
            )

        before = row_ids()
        put(warehouse, pl.concat([hours(1)[:10], hours(9, 1, start=10), hours(1)[11:]]))
        after = row_ids()
    assert [hour for hour in before if before[hour] != after[hour]] == [
        START.timestamp() // 3600 + 10
    ]


@settings(max_examples=8)
@given(st.lists(st.tuples(st.integers(0, 3), st.sets(st.integers(0, 11))), min_size=1, max_size=4))
def test_any_frame_follows_any_other(tmp_path: Path, states: list[tuple[int, set[int]]]):
    """Whatever was stored, afterwards exactly the new bars are, and the count is the number of bars
    that differ.
    """
    warehouse = Warehouse(tmp_path / f"{len(list(tmp_path.iterdir()))}.duckdb")
    before: dict[Any, Any] = {}
    for seed, places in states:
        versions = (hours(seed + i % 2, 12) for i in range(12))
        frame = pl.concat(
            [
                hours(0, 0),
                *(version[i : i + 1] for i, version in enumerate(versions) if i in places),
            ]
        )
        after = {r[0]: r for r in frame.rows()}
        assert put(warehouse, frame) == sum(
            before.get(moment) != after.get(moment) for moment in before.keys() | after.keys()
        )
        assert get(warehouse).equals(frame)
        before = after


def test_other_markets_windows_and_timeframes_do_not_change(warehouse: Warehouse):
    put(warehouse, hours(1))
    put(warehouse, hours(2), market=ETH)
    later = hours(3, start=31 * 24)
    put(warehouse, later, window=FEBRUARY.month)
    warehouse.replace(BTC, {D1: hours(4, 1)}, {D1: MONTH})
    put(warehouse, hours(5, 10))
    assert get(warehouse, window=MONTH).equals(hours(5, 10))
    assert get(warehouse, ETH).equals(hours(2))
    assert get(warehouse, window=FEBRUARY.month).equals(later)
    assert warehouse.read(rollup_table(D1), BTC, ALWAYS).equals(hours(4, 1))


def test_columns_are_bound_by_name(warehouse: Warehouse):
    put(warehouse, hours(1))
    assert (
        put(
            warehouse,
            hours(1).select(reversed(ROLLUP_SCHEMA)).with_columns(pl.lit(1).alias("extra")),
        )
        == 0
    )
    with pytest.raises(pl.exceptions.ColumnNotFoundError):
        put(warehouse, hours(2).drop("close"))
    assert get(warehouse).equals(hours(1))


def test_rows_outside_the_window_stay(warehouse: Warehouse):
    put(warehouse, hours(1))
    middle = Window(START + 6 * H1.width, START + 12 * H1.width)
    assert put(warehouse, hours(2, 6, start=6), window=middle) == 6
    assert get(warehouse).equals(pl.concat([hours(1)[:6], hours(2, 6, start=6), hours(1)[12:]]))


# ---------------------------------------------------------------- all or nothing
def test_an_exception_in_the_middle_leaves_the_old_rows(warehouse: Warehouse):
    """The hours are good and written first; a column of the days is missing."""
    warehouse.replace(BTC, {H1: hours(1), D1: hours(2, 2)}, {H1: MONTH, D1: MONTH})
    with pytest.raises(pl.exceptions.PolarsError):
        warehouse.replace(
            BTC, {H1: hours(3), D1: hours(4, 2).drop("close")}, {H1: MONTH, D1: MONTH}
        )
    with pytest.raises(KeyError):
        warehouse.replace(BTC, {H1: hours(3), D1: hours(4, 2)}, {H1: MONTH})
    assert get(warehouse).equals(hours(1))
    assert warehouse.read(rollup_table(D1), BTC, ALWAYS).equals(hours(2, 2))


def test_a_borrowed_connection_is_closed_after_an_exception(tmp_path: Path):
    """Dagster's resource closes its connection only when all went well."""
    path, opened = tmp_path / "market.duckdb", []

    @contextmanager
    def lend() -> Iterator[duckdb.DuckDBPyConnection]:
        opened.append(duckdb.connect(str(path)))
        yield opened[-1]
        opened[-1].close()

    warehouse = Warehouse(path, connect=lend, wait_seconds=0.0)
    put(warehouse, hours(1))
    with pytest.raises(KeyError):
        warehouse.replace(BTC, {H1: hours(2)}, {})
    assert get(warehouse).equals(hours(1))
    assert len(opened) == 2


WRITER = """
import itertools, sys
from pathlib import Path
import duckdb, polars as pl, pyarrow
from marketdata_assets.errors import StoreFailed
from marketdata_assets.storage.warehouse import Warehouse
from marketdata_assets.model.market import Market
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.model.window import month_of, parse_time
market, month = Market("binance", "BTC/USDT"), month_of(parse_time("2024-01-01"))
h1, d1 = TIMEFRAMES["1h"], TIMEFRAMES["1d"]
warehouse = Warehouse(Path(sys.argv[1]))
frames = [pl.read_parquet(file) for file in sys.argv[2:]]
def write(frame):
    warehouse.replace(market, {h1: frame, d1: frame[::24]}, {h1: month, d1: month})
"""


@pytest.fixture
def frames(tmp_path: Path) -> list[str]:
    """Write two frames of a month as plain files, for a writer process."""
    for name, seed in (("a", 1), ("b", 2)):
        hours(seed, 31 * 24).write_parquet(tmp_path / name)
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def test_a_full_disk_leaves_the_old_rows(tmp_path: Path, frames: list[str]):
    warehouse = Warehouse(tmp_path / "market.duckdb")
    put(warehouse, hours(3))
    code = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    write(frames[0])
except StoreFailed as error:
    print(error)
    sys.exit(error.exit_code)
"""
    process = start_python(WRITER + code, str(warehouse.path), *frames)
    output, errors = process.communicate()
    assert process.returncode == 3, errors
    assert output.startswith(f"{warehouse.path}: ")
    assert output.count("\n") == 1
    assert get(warehouse).equals(hours(3))


FOREVER = """
import os, random, signal, threading
sys.stdin.readline()
write(frames[0])
threading.Timer(random.uniform(0, 0.3), os.kill, (os.getpid(), signal.SIGKILL)).start()
for frame in itertools.cycle(frames):
    write(frame)
"""


def test_the_file_is_consistent_whenever_its_writer_is_killed(tmp_path: Path, frames: list[str]):
    """Five writers in turn rewrite a month in two tables, each killed at a random moment: both
    tables are old or both are new.
    """
    warehouse, good = (
        Warehouse(tmp_path / "market.duckdb"),
        [pl.read_parquet(file) for file in frames],
    )
    writers = [start_python(WRITER + FOREVER, str(warehouse.path), *frames) for _ in range(5)]
    for writer in writers:
        _, errors = writer.communicate("go\n")
        assert writer.returncode == -signal.SIGKILL, errors
        found, days = get(warehouse), warehouse.read(rollup_table(D1), BTC, ALWAYS)
        assert any(found.equals(frame) and days.equals(frame[::24]) for frame in good)
    put(warehouse, hours(3))
    assert get(warehouse).equals(hours(3))


# ---------------------------------------------------------------- a file in use
@pytest.fixture
def holder(warehouse: Warehouse) -> Iterator[subprocess.Popen[str]]:
    """Run another process that holds the file until it reads a line."""
    put(warehouse, hours(1))
    program = (
        "import duckdb, sys; c = duckdb.connect(sys.argv[1]); print('open', flush=True);"
        "sys.stdin.readline(); c.close()"
    )
    process = start_python(program, str(warehouse.path))
    assert process.stdout.readline() == "open\n"
    yield process
    kill(process)


def test_a_wait_that_is_too_long_ends_with_one_clear_error(
    warehouse: Warehouse, holder: subprocess.Popen[str]
):
    hasty = Warehouse(warehouse.path, wait_seconds=0.1)
    for act in (lambda: put(hasty, hours(2)), lambda: get(hasty)):
        with pytest.raises(
            StoreFailed,
            match=r"another process holds it; close that process or set another `duckdb:`",
        ) as caught:
            act()
        assert str(caught.value).startswith(str(warehouse.path))
        assert caught.value.exit_code == 3


def test_a_writer_that_waits_gets_its_turn(
    warehouse: Warehouse, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
):
    """The file is closed while the writer waits for the third time."""
    pauses = []

    def pause(seconds: float) -> None:
        pauses.append(holder.poll())
        if len(pauses) == 3:
            holder.communicate("close\n")

    monkeypatch.setattr("marketdata_assets.storage.warehouse._pause", pause)
    assert put(warehouse, hours(2)) == 24
    assert pauses == [None, None, None]
    assert get(warehouse).equals(hours(2))


def test_readers_and_a_writer_of_one_process_take_turns(warehouse: Warehouse):
    """DuckDB refuses a reader and a writer of a file in one process, so each waits its turn."""
    put(warehouse, hours(0))
    versions = [hours(seed) for seed in range(6)]
    seen: list[bool] = []

    def read() -> None:
        for _ in range(10):
            found = get(warehouse)
            seen.append(any(found.equals(version) for version in versions))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for version in versions:
        put(warehouse, version)
    for reader in readers:
        reader.join()
    assert seen == [True] * 20


# ---------------------------------------------------------------- damaged files
def flip_bits(path: Path, first: int) -> None:
    """Flip every bit from a position on."""
    content = bytearray(path.read_bytes())
    content[first:] = bytes(byte ^ 0xFF for byte in content[first:])
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_text("hello\n" * 1000),
        lambda path: path.write_bytes(b""),
        lambda path: os.truncate(path, 5000),
        lambda path: flip_bits(path, 4096),
        lambda path: flip_bits(path, 12288),
    ],
    ids=["text", "empty", "cut short", "headers overwritten", "blocks overwritten"],
)
def test_a_damaged_file_is_reported_at_once(tmp_path: Path, damage: Any):
    """The folder's name, like DuckDB's "block", contains "lock", which is no reason to wait. The
    next write sets the file aside.
    """
    warehouse = Warehouse(tmp_path / "locker/market.duckdb", wait_seconds=3600.0)
    put(warehouse, hours(1, 700))
    damage(warehouse.path)
    with pytest.raises(StoreFailed, match=r"move the file away: it is built again") as caught:
        get(warehouse)
    assert str(caught.value).startswith(f"{warehouse.path}: ")
    assert "\n" not in str(caught.value)
    put(warehouse, hours(2))
    assert get(warehouse).equals(hours(2))
    assert warehouse.path.with_name("market.duckdb.damaged").exists()


def test_an_impossible_path_is_reported(tmp_path: Path):
    """The file would lie below a regular file, or is a folder; permissions do not stop root."""
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file/market.duckdb", tmp_path):
        with pytest.raises(StoreFailed, match="mend the folder, set another `duckdb:`"):
            put(Warehouse(path, wait_seconds=3600.0), hours(1))


def test_the_tables_have_the_columns_of_the_registry(warehouse: Warehouse):
    put(warehouse, hours(1))
    with duckdb.connect(str(warehouse.path), read_only=True) as connection:
        types = dict(
            connection.execute(
                "SELECT column_name, data_type FROM information_schema.columns"
            ).fetchall()
        )
    assert list(types) == ["market", *COLUMN_NAMES, "vwap", "bars_expected", "bars_present"]
    assert {types[name] for name in ("open", "volume", "vwap", "taker_buy_quote_volume")} == {
        "DECIMAL(38,12)"
    }
    assert (types["open_time"], types["trades"], types["bars_present"]) == (
        "TIMESTAMP WITH TIME ZONE",
        "BIGINT",
        "BIGINT",
    )


def test_the_folder_of_the_file_is_made_for_a_connection_of_others(tmp_path: Path):
    """Dagster's own DuckDB resource makes no folder."""
    path = tmp_path / "not/there/market.duckdb"
    warehouse = Warehouse(path, connect=lambda: duckdb.connect(str(path)))
    assert warehouse.replace(BTC, {}, {}) == {}
    assert path.exists()

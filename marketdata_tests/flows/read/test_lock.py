"""Lock and verify: a copy is proved bar by bar, and each change in it is found and named."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import boto3
import duckdb
import polars as pl
import pytest

from marketdata_assets.context import open_context
from marketdata_assets.errors import BadInput, BarsMissing, Damaged, StoreFailed
from marketdata_assets.flows.read.lock import DatasetLocker, locked_moment
from marketdata_assets.flows.read.verify import DatasetVerifier, Verification
from marketdata_assets.model.bar import TIME
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import Table, raw_table, rollup_table
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.model.window import Window
from marketdata_assets.settings.load import load_settings
from marketdata_assets.settings.universe import Settings
from marketdata_assets.sources.sandbox.bars import generate_bars
from marketdata_assets.sources.sandbox.server import SandboxExchange, serve_in_thread
from marketdata_assets.storage.fingerprint import fingerprint
from marketdata_assets.storage.lockfile import LockFile, read_lock, write_lock
from marketdata_tests.conftest import SANDBOX_NOW
from marketdata_tests.samples import frame, minutes, row
from marketdata_tests.steps import at, run_derive, run_ingest, window

pytestmark = pytest.mark.server

NOW = "2024-01-10T00:00:00Z"
M1, H1 = TIMEFRAMES["1m"], TIMEFRAMES["1h"]
BTC = "binance:BTC-USDT"
DECEMBER, JANUARY = (Partition.parse(f"{BTC}|{month}-01") for month in ("2023-12", "2024-01"))
WANTS = {
    "symbols": "[BTC/USDT, ETH/USDT]",
    "since": "2023-12-20",
    "base": "1m",
    "reference": "[1h]",
}

Copy = Callable[..., Settings]


def universe_of(
    folder: Path,
    rollups: str = "parquet",
    lake: str | None = None,
    now: str = NOW,
    top: str = "",
    **wants: str,
) -> Settings:
    """Write and load a universe over the stores of a folder.

    `wants` changes the keys of the venue Binance; "" leaves a key out.
    """
    lines = [f"    {key}: {value}" for key, value in {**WANTS, **wants}.items() if value]
    places = [
        f"lake: {lake or folder / 'lake'}",
        f"duckdb: {folder / 'market.duckdb'}",
        f"state: {folder / 'state'}",
    ]
    file = folder / "universe.yaml"
    file.write_text(
        "\n".join(
            ["venues:", "  binance:", *lines, *places, f"rollups: {rollups}", *top.splitlines()]
        )
        + "\n"
    )
    return load_settings({"MARKETDATA_UNIVERSE": str(file), "MARKETDATA_NOW": now})


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Store twelve days of December and nine of January, of two markets; return the folder.

    The rollups are in the lake and in DuckDB.
    """
    folder = tmp_path_factory.mktemp("original")
    with serve_in_thread(SandboxExchange(now=lambda: SANDBOX_NOW, weight_limit=10**9)) as url:
        settings = universe_of(folder, base_url=url)
        run_ingest(settings)
        run_ingest(settings, timeframe="1h")
    run_derive(settings)
    run_derive(universe_of(folder, rollups="duckdb"))
    return folder


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Copy:
    """Return a function that copies the stores of `original` and loads a universe over them."""

    def make(**changes: str) -> Settings:
        shutil.copytree(original, tmp_path, dirs_exist_ok=True)
        return universe_of(tmp_path, **changes)

    return make


@pytest.fixture(scope="module")
def locked(original: Path) -> LockFile:
    return lock_dataset(universe_of(original))


def lock_dataset(
    settings: Settings,
    name: str = "bars",
    tables: list[str] | None = None,
    span: Window | None = None,
) -> LockFile:
    with open_context(settings) as context:
        return context.bind(DatasetLocker).lock(
            name, settings.markets, span or Window(settings.since, settings.now()), tables=tables
        )


def verify(settings: Settings, locked: LockFile) -> Verification:
    with open_context(settings) as context:
        return context.bind(DatasetVerifier).verify(locked)


def find_differences(settings: Settings, locked: LockFile) -> list[tuple[str, str, str, int, int]]:
    """Return the differences without their messages, after checking that all else is proved."""
    found = verify(settings, locked)
    assert found.proved == len(locked.partitions) - sum(d.locked > 0 for d in found.differences)
    return [(d.table, d.partition.key, d.kind, d.locked, d.stored) for d in found.differences]


def assert_proved(settings: Settings, locked: LockFile) -> None:
    assert find_differences(settings, locked) == []
    assert verify(settings, locked).bars == locked.bars > 2 * 21 * 1440


def stored(settings: Settings, table: Table | None = None) -> Path:
    """The object of December, by default of raw 1m bars."""
    return Path(settings.lake) / (table or raw_table(M1)).path(DECEMBER)


# --------------------------------------------------------------------------------- the lock
def test_the_lock_describes_what_is_stored(original: Path, locked: LockFile):
    """Polars alone reads the objects; the digest of the dataset is the hash of the file's lines."""
    rows = {(p.table, p.partition.key): p for p in locked.partitions}
    files = sorted((original / "lake").glob("*/*/*/*/data.parquet"))
    bars_by_path = {
        path.relative_to(original / "lake"): pl.read_parquet(path.read_bytes()) for path in files
    }
    bars_by_path = {path: bars for path, bars in bars_by_path.items() if bars.height}
    assert {
        Path(Table(t.partition("/")[0], TIMEFRAMES[t.rpartition("_")[2]]).path(Partition.parse(k)))
        for t, k in rows
    } == set(bars_by_path)
    for pinned in locked.partitions:
        table = Table(pinned.table.partition("/")[0], TIMEFRAMES[pinned.table.rpartition("_")[2]])
        opens = bars_by_path[Path(table.path(pinned.partition))]["open_time"]
        assert (pinned.rows, pinned.first, pinned.last) == (opens.len(), opens.min(), opens.max())
        assert pinned.is_open == (pinned.partition.month_key == "2024-01-01")
    lines = locked.as_text().splitlines()
    partitions = [line.rstrip(",") for line in lines if line.startswith('{"table"')]
    assert len(partitions) == len(rows) == 2 * 2 * (2 + 8)
    assert partitions == sorted(partitions)
    assert (
        hashlib.sha256("".join(line + "\n" for line in partitions).encode()).hexdigest()
        == locked.dataset_digest
    )
    assert lines[-2:] == [f'"dataset": "{locked.dataset_digest}"', "}"]


def test_the_same_bars_and_moment_give_the_same_bytes(original: Path, locked: LockFile, copy: Copy):
    assert lock_dataset(copy()).as_text() == locked.as_text()
    later = lock_dataset(universe_of(original, now="2024-01-10T07:00:00.5Z"), "other")
    assert (later.dataset_digest, later.as_of) == (
        locked.dataset_digest,
        at("2024-01-10T07:00:00.5"),
    )


def test_the_lock_holds_no_path_and_no_address(copy: Copy, tmp_path: Path):
    text = lock_dataset(
        copy(base_url="http://127.0.0.1:9/secret", ws_url="ws://127.0.0.1:9/secret")
    ).as_text()
    assert not [
        word for word in ("http", "ws:", "secret", "127.0.0.1", str(tmp_path)) if word in text
    ]


def test_tables_markets_and_months_can_be_chosen(original: Path):
    settings = universe_of(original)
    with open_context(settings) as context:
        found = context.bind(DatasetLocker).lock(
            "few",
            [DECEMBER.market],
            window("2023-12-31", "2024-01-01"),
            tables=["rollup/ohlcv_1d", "raw/ohlcv_1m"],
        )
    assert [(p.table, p.partition) for p in found.partitions] == [
        ("raw/ohlcv_1m", DECEMBER),
        ("rollup/ohlcv_1d", DECEMBER),
    ]
    assert (found.venues["binance"].symbols, found.span) == (
        ("BTC/USDT",),
        window("2023-12-01", "2024-01-01"),
    )
    assert find_differences(settings, found) == []


def test_the_month_in_which_a_universe_ends_is_not_open(original: Path):
    found = lock_dataset(universe_of(original, until="2024-01-06"))
    assert {p.partition.month_key for p in found.partitions} == {"2023-12-01", "2024-01-01"}
    assert not any(p.is_open for p in found.partitions)


def test_a_written_lock_is_read_back_and_has_its_moment(locked: LockFile, tmp_path: Path):
    file = tmp_path / "bars.lock.json"
    write_lock(file, locked)
    assert read_lock(file) == locked
    assert locked_moment(file) == at("2024-01-10")
    assert [path.name for path in tmp_path.iterdir()] == ["bars.lock.json"]


def test_a_lake_with_a_lost_or_damaged_object_is_not_locked(copy: Copy):
    settings = copy()
    stored(settings).write_bytes(stored(settings).read_bytes()[:-100])
    with pytest.raises(Damaged, match="is damaged"):
        lock_dataset(settings)
    stored(settings).unlink()
    with pytest.raises(
        BarsMissing,
        match=r"month=2023-12/data.parquet is gone; `marketdata backfill` fetches it again",
    ):
        lock_dataset(settings)


def test_bad_tables_names_and_spans_are_refused(original: Path, tmp_path: Path):
    settings = universe_of(original)
    with pytest.raises(
        BadInput, match=r"table 'raw/ohlcv_5m' is not one of raw/ohlcv_1h, raw/ohlcv_1m, rollup"
    ):
        lock_dataset(settings, tables=["raw/ohlcv_5m"])
    with pytest.raises(BadInput, match="no name for a dataset"):
        lock_dataset(settings, name="../bars")
    with pytest.raises(BadInput, match="`marketdata backfill` fetches it"):
        lock_dataset(universe_of(tmp_path))
    with pytest.raises(BadInput, match="`marketdata backfill` fetches it"):
        lock_dataset(settings, span=window("2023-01-01", "2023-02-01"))


# --------------------------------------------------------------------------------- copies
@pytest.mark.parametrize("rollups", ["parquet", "duckdb"])
def test_a_copy_is_proved(copy: Copy, locked: LockFile, rollups: str):
    """The lock was written from rollups in Parquet; equal rollups in DuckDB have equal hashes."""
    settings = copy(rollups=rollups)
    assert_proved(settings, locked)
    assert lock_dataset(settings).as_text() == locked.as_text()


def test_a_copy_in_s3_is_proved_without_a_ledger(
    original: Path, locked: LockFile, bucket: str, tmp_path: Path
):
    client = boto3.client("s3")
    for file in (original / "lake").rglob("data.parquet"):
        client.put_object(
            Bucket=bucket, Key=f"copy/{file.relative_to(original / 'lake')}", Body=file.read_bytes()
        )
    settings = universe_of(tmp_path, lake=f"s3://{bucket}/copy")
    assert_proved(settings, locked)
    assert lock_dataset(settings).as_text() == locked.as_text()


@pytest.mark.parametrize(
    "options",
    [{"compression": "gzip"}, {"compression": "uncompressed", "row_group_size": 500}],
    ids=str,
)
def test_a_copy_with_another_compression_is_proved(
    copy: Copy, locked: LockFile, options: dict[str, Any]
):
    settings = copy()
    for file in Path(settings.lake).rglob("data.parquet"):
        before = file.read_bytes()
        pl.read_parquet(before).write_parquet(file, **options)
        assert file.read_bytes() != before
    assert_proved(settings, locked)


def test_an_open_month_can_grow(copy: Copy, locked: LockFile):
    """A bar after the last locked one is no difference; a change before it is a difference."""
    settings = copy(now="2024-01-20")
    bars = generate_bars("BTCUSDT", "1m", Window(at("2024-01-01"), at("2024-01-12")))
    with open_context(settings) as context:
        before = context.storage.lake.read(raw_table(M1), JANUARY)
        grown = pl.concat([before, bars.filter(pl.col("open_time") > before["open_time"][-1])])
        assert grown.height > before.height + 2000
        context.storage.lake.write(raw_table(M1), JANUARY, grown)
        assert_proved(settings, locked)
        context.storage.lake.write(
            raw_table(M1),
            JANUARY,
            grown.with_columns(pl.col("close").shift(1, fill_value=pl.col("close").first())),
        )
    assert find_differences(settings, locked) == [
        ("raw/ohlcv_1m", JANUARY.key, "other content", before.height, before.height)
    ]


def test_a_month_after_the_lock_is_no_difference(copy: Copy, locked: LockFile):
    settings = copy(now="2024-03-01")
    february = Partition.parse(f"{BTC}|2024-02-01")
    with open_context(settings) as context:
        context.storage.lake.write(
            raw_table(M1), february, generate_bars("BTCUSDT", "1m", february.month)
        )
    assert_proved(settings, locked)


# --------------------------------------------------------------------------------- differences
def change_one_digit(bars: pl.DataFrame) -> pl.DataFrame:
    """Add one unit of the last stored decimal place to the volume of one bar."""
    unit = pl.lit(1).cast(pl.Decimal(38, 12)) / 10**12
    return bars.with_columns(
        pl.when(pl.int_range(pl.len()) == 777).then(pl.col("volume") + unit).otherwise("volume")
    )


@pytest.mark.parametrize(
    ("change", "what", "more", "words"),
    [
        (
            change_one_digit,
            "other content",
            0,
            "stored 2023-12-20T00:00:00Z .. 2023-12-31T23:59:00Z",
        ),
        (
            lambda bars: bars.with_columns(pl.when(pl.int_range(pl.len()) != 5).then("trades")),
            "other content",
            0,
            "stored",
        ),
        (
            lambda bars: bars[1:],
            "fewer rows",
            -1,
            "locked 2023-12-20T00:00:00Z .. 2023-12-31T23:59:00Z",
        ),
        (lambda bars: bars[:700].vstack(bars[703:]), "fewer rows", -3, "stored"),
        (lambda bars: bars[:0], "missing", None, "nothing is stored"),
    ],
    ids=["one digit", "one null", "first row", "three rows", "all rows"],
)
def test_one_change_is_found(
    copy: Copy, locked: LockFile, change: Any, what: str, more: int | None, words: str
):
    settings = copy()
    with open_context(settings) as context:
        bars = context.storage.lake.read(raw_table(M1), DECEMBER)
        context.storage.lake.write(raw_table(M1), DECEMBER, change(bars))
    rows = bars.height
    assert find_differences(settings, locked) == [
        ("raw/ohlcv_1m", DECEMBER.key, what, rows, 0 if more is None else rows + more)
    ]
    assert words in verify(settings, locked).differences[0].message


def test_the_first_missing_bar_is_named(copy: Copy, locked: LockFile):
    """December has no gap in hours, so each missing hour was stored before."""
    settings = copy()
    with open_context(settings) as context:
        hours = context.storage.lake.read(rollup_table(H1), DECEMBER)
        assert hours.height == 12 * 24
        context.storage.lake.write(rollup_table(H1), DECEMBER, hours[:30].vstack(hours[32:]))
    (found,) = verify(settings, locked).differences
    assert (found.table, found.kind, found.locked, found.stored) == (
        "rollup/ohlcv_1h",
        "fewer rows",
        288,
        286,
    )
    assert found.message.endswith("the first missing bar opened 2023-12-21T06:00:00Z")


def test_rows_before_the_locked_ones_are_counted_separately(copy: Copy, locked: LockFile):
    settings = copy()
    with open_context(settings) as context:
        bars = context.storage.lake.read(raw_table(M1), DECEMBER)
        earlier = generate_bars("BTCUSDT", "1m", window("2023-12-19", "2023-12-20"))
        context.storage.lake.write(raw_table(M1), DECEMBER, earlier.vstack(bars))
    (found,) = verify(settings, locked).differences
    assert (found.kind, found.stored - found.locked) == ("extra rows", earlier.height)
    assert "the locked bars are unchanged, the others lie before or after them" in found.message


def test_a_partition_that_was_not_locked_is_extra(copy: Copy, locked: LockFile):
    settings = copy()
    few = LockFile(
        **{name: getattr(locked, name) for name in LockFile.__slots__}
        | {"partitions": locked.partitions[1:]}
    )
    gone = locked.partitions[0]
    assert find_differences(settings, few) == [
        (gone.table, gone.partition.key, "extra rows", 0, gone.rows)
    ]


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "damaged"),
        (
            lambda path: path.write_bytes(
                path.read_bytes()[:5000] + b"\xff" + path.read_bytes()[5001:]
            ),
            "damaged",
        ),
        (lambda path: path.write_bytes(b""), "damaged"),
        (
            lambda path: pl.read_parquet(path.read_bytes()).drop("close").write_parquet(path),
            "damaged",
        ),
    ],
    ids=["gone", "cut short", "a byte", "empty", "a column"],
)
@pytest.mark.parametrize("table", [raw_table(M1), rollup_table(H1)], ids=lambda table: table.name)
def test_an_object_that_is_gone_or_damaged_is_named(
    copy: Copy, locked: LockFile, damage: Any, what: str, table: Table
):
    settings = copy()
    damage(stored(settings, table))
    rows = next(
        p.rows for p in locked.partitions if (p.table, p.partition) == (table.name, DECEMBER)
    )
    assert find_differences(settings, locked) == [(table.name, DECEMBER.key, what, rows, 0)]


@pytest.mark.parametrize(
    ("statement", "what", "more"),
    [
        ("UPDATE rollup.ohlcv_1h SET vwap = vwap + 0.000000000001 WHERE {there}",
         "other content", 0),
        ("UPDATE rollup.ohlcv_1h SET bars_present = NULL WHERE {there}", "other content", 0),
        ("DELETE FROM rollup.ohlcv_1h WHERE {there}", "fewer rows", -1),
        ("INSERT INTO rollup.ohlcv_1h SELECT * REPLACE (open_time + INTERVAL 7 MINUTE AS open_time)"
         " FROM rollup.ohlcv_1h WHERE {there}", "extra rows", 1),
    ],
    ids=["digit", "null", "removed", "added"],
)  # fmt: skip
def test_a_change_in_duckdb_is_found(
    copy: Copy, locked: LockFile, statement: str, what: str, more: int
):
    settings = copy(rollups="duckdb")
    with duckdb.connect(str(settings.duckdb)) as connection:
        connection.execute(
            statement.format(there=f"market = '{BTC}' AND open_time = '2023-12-24T06:00:00Z'")
        )
    assert find_differences(settings, locked) == [
        ("rollup/ohlcv_1h", DECEMBER.key, what, 288, 288 + more)
    ]


def test_without_the_duckdb_file_every_rollup_is_missing(copy: Copy, locked: LockFile):
    settings = copy(rollups="duckdb")
    settings.duckdb.unlink()
    found = find_differences(settings, locked)
    assert {(what, n) for *_, what, _, n in found} == {("missing", 0)}
    assert len(found) == 2 * 2 * 8


def add_provenance(bars: pl.DataFrame, moments: dict[int, str]) -> pl.DataFrame:
    """Add provenance: these rows are known since these moments, the others since 2023-12-31."""
    known = pl.Series(
        "known_at", [at(moments.get(i, "2023-12-31")) for i in range(bars.height)], dtype=TIME
    )
    return bars.with_columns(known, pl.lit("rest").alias("source"))


def test_bars_that_were_added_or_corrected_since_are_counted(copy: Copy, locked: LockFile):
    """Three bars are newer than the lock; their rollup reports them too, other months do not."""
    settings = copy()
    moments = {
        0: "2024-01-10",
        60: "2024-01-10T00:00:00.25",
        70: "2024-01-11",
        90: "2024-01-10T09:00:00",
    }
    with open_context(settings) as context:
        raw_bars = context.storage.lake.read(raw_table(M1), DECEMBER)
        for table, partition in ((rollup_table(H1), DECEMBER), (rollup_table(H1), JANUARY)):
            context.storage.lake.write(
                table, partition, context.storage.lake.read(table, partition)[1:]
            )
        context.storage.lake.write(
            raw_table(M1), DECEMBER, add_provenance(change_one_digit(raw_bars), moments)
        )
        found = context.bind(DatasetVerifier).verify(locked)
    opens = [f"{raw_bars['open_time'][i]:%Y-%m-%dT%H:%M:%SZ}" for i in (60, 90)]
    ending = (
        f"; 3 bars, {opens[0]} .. {opens[1]}, came or were corrected since, "
        "the last ones at 2024-01-11T00:00:00Z"
    )
    assert [d.message.endswith(ending) for d in found.differences] == [True, True, False]


# --------------------------------------------------------------------------------- another universe
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"symbols": "[BTC/USDT]"}, "market binance:ETH-USDT is not in it"),
        ({"base": "5m"}, "binance has base 5m in it, and 1m in the lock"),
        ({"reference": ""}, "table raw/ohlcv_1h of binance is not in it"),
        (
            {"top": "timeframes: [1h, 1d]"},
            "table rollup/ohlcv_12h of binance is not in it; table rollup/ohlcv_15m",
        ),
        (
            {"since": "2024-01-01"},
            "it wants binance since 2024-01-01T00:00:00Z, "
            "and the lock holds it since 2023-12-20T00:00:00Z",
        ),
        (
            {"until": "2024-01-05"},
            "it wants binance until 2024-01-05T00:00:00Z, "
            "and the lock holds it until 2024-01-10T00:00:00Z",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else str(next(iter(value))),
)
def test_another_universe_is_refused(
    tmp_path: Path, locked: LockFile, changes: dict[str, str], words: str
):
    with pytest.raises(BadInput, match="bars was locked in another universe than ") as error:
        verify(universe_of(tmp_path, **changes), locked)
    assert words in str(error.value)


def test_another_venue_is_refused(tmp_path: Path, locked: LockFile):
    settings = universe_of(tmp_path)
    text = Path(settings.source).read_text().replace("binance:", "kraken:")
    Path(settings.source).write_text(text)
    with pytest.raises(BadInput, match="venue binance is not in it"):
        verify(load_settings({"MARKETDATA_UNIVERSE": settings.source}), locked)


def test_a_universe_that_wants_more_is_proved(copy: Copy, locked: LockFile):
    assert_proved(
        copy(symbols="[SHIB/USDT, ETH/USDT, BTC/USDT]", until="2024-01-10", reference="[1h, 1d]"),
        locked,
    )


def change_keys(**keys: Any) -> Callable[[str], str]:
    return lambda text: json.dumps({**json.loads(text), **keys})


def remove_partition(text: str, number: int) -> str:
    """Remove one of the lock's partitions."""
    found = json.loads(text)
    del found["partitions"][number]
    return json.dumps(found)


@pytest.mark.parametrize(
    ("corrupt", "words"),
    [
        (lambda text: text[: len(text) // 2], "or only a part of one"),
        (lambda text: text[:-3], "or only a part of one"),
        (lambda text: "", "or only a part of one"),
        (lambda text: text.replace('"rows":', f'"rows":{"7" * 5000}', 1), "or only a part of one"),
        (lambda text: "[" * 100_000, "or only a part of one"),
        (lambda text: text + text, "or only a part of one"),
        (lambda text: "[]", "is no lock file; `marketdata lock` writes one"),
        (lambda text: '{"a": 1}', "is no lock file; `marketdata lock` writes one"),
        (change_keys(version=2), "is of version 2, and this release reads version 1"),
        (change_keys(version=None), "is of version None"),
        (change_keys(name=7), "is not as `marketdata lock` wrote it"),
        (change_keys(name="a/b"), "is not as `marketdata lock` wrote it"),
        (change_keys(as_of="yesterday"), "is not as `marketdata lock` wrote it"),
        (change_keys(partitions=[7]), "is not as `marketdata lock` wrote it"),
        (change_keys(venues={}), "is not as `marketdata lock` wrote it"),
        (change_keys(venues={"binance": 3}), "is not as `marketdata lock` wrote it"),
        (change_keys(tables=["raw/ohlcv_1m"]), "is not as `marketdata lock` wrote it"),
        (change_keys(start="2024-01-01T00:00:00Z"), "is not as `marketdata lock` wrote it"),
        (change_keys(dataset="0" * 64), "is not as `marketdata lock` wrote it"),
        (change_keys(more=1), "is not as `marketdata lock` wrote it"),
        (lambda text: remove_partition(text, 3), "is not as `marketdata lock` wrote it"),
        (
            lambda text: text.replace('"rows":', '"rows":1', 1),
            "is not as `marketdata lock` wrote it",
        ),
        (lambda text: text.replace("2023-12", "2023-13"), "is not as `marketdata lock` wrote it"),
        (lambda text: text.replace('"symbols"', '"coins"'), "is not as `marketdata lock` wrote it"),
    ],
)
def test_a_file_that_is_no_lock_is_refused(
    locked: LockFile, tmp_path: Path, corrupt: Callable[[str], str], words: str
):
    file = tmp_path / "bars.lock.json"
    file.write_text(corrupt(locked.as_text()))
    with pytest.raises(BadInput) as error:
        read_lock(file)
    assert str(error.value).startswith(str(file))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rows", "31"),
        ("rows", True),
        ("rows", 0),
        ("rows", 31.0),
        ("rows", float("inf")),
        ("rows", 10**9),
        ("rows", 10**400),
        ("fingerprint", 7),
        ("fingerprint", "0" * 63),
        ("last", datetime(9999, 12, 31, tzinfo=UTC)),
    ],
)
def test_an_entry_that_no_lock_has_is_refused_though_its_hash_is_right(
    locked: LockFile, tmp_path: Path, field: str, value: object
):
    changed = locked.partitions[0]._replace(**{field: value})  # type: ignore[arg-type]
    file = tmp_path / "bars.lock.json"
    file.write_text(replace(locked, partitions=(changed, *locked.partitions[1:])).as_text())
    with pytest.raises(BadInput, match="is not as `marketdata lock` wrote it"):
        read_lock(file)


def test_files_that_cannot_be_read_or_written_are_refused(locked: LockFile, tmp_path: Path):
    for wrong, words in (
        (tmp_path / "none", "there is no such file"),
        (tmp_path, "cannot be read: Is a directory"),
        (Path("/dev/zero"), "cannot be read: it is a device or a pipe"),
    ):
        with pytest.raises(BadInput, match=words):
            read_lock(wrong)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="is no lock file"):
        locked_moment(tmp_path / "bytes")
    (tmp_path / "folder").mkdir()
    for target in (tmp_path / "none/bars.lock.json", tmp_path / "folder"):
        with pytest.raises(StoreFailed, match="choose another --out"):
            write_lock(target, locked)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bytes", "folder"]


# --------------------------------------------------------------------------------- the hash
def documented_fingerprint(bars: pl.DataFrame) -> str:
    """Compute the fingerprint value by value, by its documentation alone.

    Locks are verified by later releases, so the fingerprint must not change.
    """
    digest = hashlib.sha256(f"{bars.height}\n".encode())
    names = {"open_time": "Datetime(time_unit='us', time_zone='UTC')", "trades": "Int64"}
    for name in bars.columns:
        values = bars[name].to_list()
        digest.update(f"{name} {names.get(name, 'Decimal(precision=38, scale=12)')}\n".encode())
        digest.update(bytes(value is None for value in values))
        for value in values:
            if name == "open_time":
                digest.update(
                    ((value - at("1970-01-01")) // timedelta(microseconds=1)).to_bytes(
                        8, "little", signed=True
                    )
                )
            elif name == "trades":
                digest.update((value or 0).to_bytes(8, "little", signed=True))
            else:
                digest.update(int((value or 0) * 10**12).to_bytes(16, "little", signed=True))
    return digest.hexdigest()


def test_the_hash_equals_the_documented_one():
    rows = [
        row(moment, trades=None if i % 3 else i, quote_volume=None if i % 2 else -i)
        for i, moment in enumerate(minutes(9))
    ]
    for bars in (frame(rows), frame(rows)[2:5], frame(rows)[:0]):
        assert fingerprint(bars) == documented_fingerprint(bars)
    assert (
        fingerprint(frame(rows)[:0])
        == "90e0f1a3159e4ae2d0ed232eb520d44c2feadff0f1a2bbdfa0c1fa826b140124"
    )


# --------------------------------------------------------------------------------- the commands
@pytest.fixture
def command(copy: Copy, tmp_path: Path) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """Return a function that runs a command in a separate folder: exit code, output, errors."""
    settings, folder = copy(), tmp_path / "work"
    folder.mkdir()

    def run(*words: str) -> tuple[int, str, str]:
        environment = {**os.environ, "MARKETDATA_UNIVERSE": settings.source, "MARKETDATA_NOW": NOW}
        argv = [sys.executable, "-m", "marketdata_assets.cli.main", *words]
        done = subprocess.run(
            argv, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout, done.stderr

    yield run
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_the_commands_lock_and_verify(
    command: Callable[..., tuple[int, str, str]], locked: LockFile, tmp_path: Path
):
    code, output, _ = command("lock")
    file = tmp_path / "work/universe.lock.json"
    assert code == 0
    assert "40 partitions, 20 of them of a month that is not over" in output
    assert (
        output.splitlines()[-1] == locked.dataset_digest == json.loads(file.read_text())["dataset"]
    )
    code, output, _ = command("verify", "--lock", str(file))
    assert code == 0
    assert f"40 of 40 partitions proved, {locked.bars} bars, 0 differ" in " ".join(output.split())
    assert output.splitlines()[-1] == locked.dataset_digest

    stored(universe_of(tmp_path)).unlink()
    code, output, _ = command("verify", "--lock", str(file), "--format", "json")
    found = json.loads(output)
    assert (code, found["proved"], found["partitions"], found["dataset"]) == (
        1,
        39,
        40,
        locked.dataset_digest,
    )
    assert [(d["table"], d["market"], d["month"], d["what"]) for d in found["differences"]] == [
        ("raw/ohlcv_1m", BTC, "2023-12", "missing")
    ]
    code, output, _ = command("verify", "--lock", str(file))
    assert code == 1
    assert "missing" in output
    assert "39 of 40 partitions proved" in " ".join(output.split())


def test_the_commands_refuse_bad_input(
    command: Callable[..., tuple[int, str, str]], tmp_path: Path
):
    for words, message in (
        (["lock", "--table", "raw"], "is not one of"),
        (["lock", "--name", "a b"], "no name for a dataset"),
        (["verify", "--lock", "none.lock.json"], "there is no such file"),
        (
            ["verify", "--lock", "none.lock.json", "--format", "xml"],
            "is not one of 'table', 'json'",
        ),
    ):
        code, _, errors = command(*words)
        assert code == 2, words
        assert message in " ".join(errors.split())
    assert list((tmp_path / "work").iterdir()) == []

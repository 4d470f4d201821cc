"""Delta Lake tables: exact, one commit per change, no row lost or doubled by commits of others, and
readable by others.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import boto3
import dagster as dg
import deltalake
import duckdb
import polars as pl
import pytest
from deltalake import DeltaTable, Field, write_deltalake
from deltalake.schema import PrimitiveType
from hypothesis import given, settings
from hypothesis import strategies as st

import marketdata_assets.storage.delta as delta_module
from marketdata_assets.context import open_context
from marketdata_assets.defs.assets import raw_asset, rollup_assets
from marketdata_assets.defs.delta import MAINTAIN, delta_assets, delta_job
from marketdata_assets.defs.jobs import build_definitions
from marketdata_assets.defs.partitions import RANGE_END, RANGE_START, market_months
from marketdata_assets.errors import BadInput, Damaged, StoreFailed
from marketdata_assets.flows.derive.publish import DeltaPublisher, PublishResult, maintain
from marketdata_assets.model.bar import COLUMN_NAMES, DECIMAL
from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import Table, raw_table, rollup_table
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.settings.universe import Settings
from marketdata_assets.sources.sandbox.bars import generate_bars
from marketdata_assets.sources.sandbox.server import SandboxExchange
from marketdata_assets.storage.delta import MAX_ATTEMPTS, DeltaTables, delta_column_types
from marketdata_assets.transforms.rollup import roll_up
from marketdata_tests.conftest import Universe
from marketdata_tests.samples import (
    BTC,
    DECIMALS,
    ETH,
    FEBRUARY,
    JANUARY,
    frame,
    kill,
    minutes,
    row,
    start_python,
)
from marketdata_tests.samples import random_bars as bars
from marketdata_tests.steps import at, partitions, run_derive, run_ingest, window

pytestmark = pytest.mark.server

TABLE = raw_table(TIMEFRAMES["1m"])
WEEKS = rollup_table(TIMEFRAMES["1w"])
OTHER = Partition(ETH, JANUARY.month)
FEBRUARY_BARS = frame(row(moment) for moment in minutes(3, FEBRUARY.month.start))


SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print("http://%s:%s" % server.get_host_and_port(), flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """Run a real S3 server, with the usual AWS variables set. It is a process of its own, because
    deltalake holds the GIL while it waits.
    """
    server = start_python(SERVER, stderr=subprocess.DEVNULL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", server.stdout.readline().strip())
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "CANARY7e57")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("NO_PROXY", "127.0.0.1")
        boto3.resource("s3").create_bucket(Bucket="bucket")
        yield os.environ["AWS_ENDPOINT_URL"]
    kill(server)


@pytest.fixture(params=["folder", "s3"])
def tables(request: pytest.FixtureRequest, tmp_path: Path) -> DeltaTables:
    """Return tables at an empty location, in a folder and in a bucket."""
    if request.param == "folder":
        return DeltaTables(str(tmp_path / "delta lake"))
    request.getfixturevalue("s3")
    return DeltaTables(f"s3://bucket/{tmp_path.name}/delta")


@pytest.fixture
def local(tmp_path: Path) -> DeltaTables:
    return DeltaTables(str(tmp_path))


def open_table(tables: DeltaTables, table: Table = TABLE, version: int | None = None) -> DeltaTable:
    """Open the table as another program does: its newest version, or an older one."""
    found = DeltaTable(tables.uri(table), storage_options=tables._options)
    if version is not None:
        found.load_as_version(version)
    return found


def rows_of(partition: Partition, found: pl.DataFrame) -> Any:
    return found.select(
        pl.lit(partition.market.key).alias("market"),
        pl.lit(partition.month_key[:7]).alias("month"),
        pl.all(),
    ).to_arrow()


def stored(
    tables: DeltaTables,
    partition: Partition = JANUARY,
    table: Table = TABLE,
    version: int | None = None,
) -> pl.DataFrame:
    """Read a partition with Arrow, as another program does, sorted by open_time."""
    is_wanted = [("market", "=", partition.market.key), ("month", "=", partition.month_key[:7])]
    rows = open_table(tables, table, version).to_pyarrow_table(filters=is_wanted)
    return pl.DataFrame(rows).select(table.typed_columns).sort("open_time")


# ---------------------------------------------------------------- replace
def test_a_replaced_partition_holds_the_new_bars(tables: DeltaTables):
    first = tables.replace(TABLE, JANUARY, bars())
    assert (first.changed, first.version, first.rows) == (True, 1, 100)
    assert stored(tables).equals(bars())
    second = tables.replace(TABLE, JANUARY, bars(2, 30).reverse())
    assert (second.version, second.rows) == (2, 30)
    assert stored(tables).equals(bars(2, 30))
    assert tables.replace(TABLE, JANUARY, bars().clear())[:3] == (True, 3, 0)
    assert stored(tables).is_empty()


def test_the_same_rows_make_no_version(tables: DeltaTables):
    first = tables.replace(TABLE, JANUARY, bars())
    assert tables.replace(TABLE, JANUARY, bars().reverse()) == first._replace(changed=False)
    assert DeltaTables(tables.location).replace(TABLE, JANUARY, bars()) == first._replace(
        changed=False
    )
    assert open_table(tables).version() == 1
    sizes = pl.DataFrame(open_table(tables).get_add_actions())["size_bytes"]
    assert sizes.to_list() == [first.bytes]


@settings(max_examples=20)
@given(
    st.lists(st.one_of(DECIMALS, st.just(Decimal(0))), min_size=1, max_size=12), st.integers(0, 3)
)
def test_every_digit_comes_back(local: DeltaTables, values: list[Decimal], missing: int):
    rows = [
        row(moment, close=value, quote_volume=value)
        for moment, value in zip(minutes(len(values)), values, strict=True)
    ]
    for r in rows[:missing]:
        r["quote_volume"] = r["trades"] = None
    local.replace(TABLE, JANUARY, frame(rows))
    assert stored(local).equals(frame(rows))


def test_a_replacement_touches_no_other_partition(tables: DeltaTables):
    tables.replace(TABLE, FEBRUARY, FEBRUARY_BARS)
    tables.replace(TABLE, OTHER, bars(3))
    tables.replace(TABLE, JANUARY, bars(4))
    tables.replace(TABLE, JANUARY, bars(5, 7))
    assert stored(tables).equals(bars(5, 7))
    assert stored(tables, OTHER).equals(bars(3))
    assert stored(tables, FEBRUARY).equals(FEBRUARY_BARS)


def test_a_week_belongs_to_the_month_of_its_sunday(local: DeltaTables):
    monday = at("2024-01-29")
    days = frame(row(monday + i * TIMEFRAMES["1d"].width) for i in range(7))
    weeks = roll_up(
        days, TIMEFRAMES["1d"], [TIMEFRAMES["1w"]], whole=window("2024-01-29", "2024-02-05")
    )[TIMEFRAMES["1w"]]
    local.replace(WEEKS, FEBRUARY, weeks)
    assert stored(local, FEBRUARY, WEEKS).equals(weeks)
    with pytest.raises(BadInput, match="bars of another month"):
        local.replace(WEEKS, JANUARY, weeks)


@pytest.mark.parametrize(
    "wrong", [FEBRUARY_BARS, pl.concat([bars(), bars()])], ids=["another month", "twice"]
)
def test_bars_that_do_not_belong_are_refused(local: DeltaTables, wrong: pl.DataFrame):
    with pytest.raises(
        BadInput,
        match=r"^raw/ohlcv_1m binance:BTC-USDT\|2024-01-01: "
        "bars of another month, or twice the same bar$",
    ):
        local.replace(TABLE, JANUARY, wrong)


# ---------------------------------------------------------------- many processes
WORKER = """
import itertools, sys
from decimal import Decimal
import polars as pl
from marketdata_assets.storage.delta import DeltaTables
from marketdata_assets.model.table import raw_table
from marketdata_assets.model.bar import DECIMAL
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.model.partition import Partition
location, file, number = sys.argv[1:]
tables, bars, table = DeltaTables(location), pl.read_parquet(file), raw_table(TIMEFRAMES["1m"])
number = int(number)
def replace(market, **columns):
    partition = Partition.parse(f"binance:{{market}}|2024-01-01")
    tables.replace(table, partition, bars.with_columns(**columns))
print("ready", flush=True)
sys.stdin.readline()
{work}
"""
SAME = """
for turn in range(1, 4):
    replace("BTC-USDT", trades=pl.lit(10 * number + turn))
"""
DIFFERENT = """
for turn in range(1, 4):
    replace(f"C{number}-USDT", trades=pl.lit(10 * number + turn))
"""
FOREVER = """
for close in itertools.cycle((1, 2)):
    replace("BTC-USDT", close=pl.lit(Decimal(close), DECIMAL))
    print("written", flush=True)
"""


@pytest.fixture
def start(tables: DeltaTables, tmp_path: Path) -> Iterator[Callable[..., list[Any]]]:
    """Return `start(work, count)`, which runs that work in `count` processes; all are ready before
    the first begins.
    """
    bars().write_parquet(tmp_path / "bars")
    started: list[Any] = []

    def begin(work: str, count: int = 4) -> list[Any]:
        started[:] = [
            start_python(WORKER.format(work=work), tables.location, str(tmp_path / "bars"), str(n))
            for n in range(count)
        ]
        for worker in started:
            assert worker.stdout.readline() == "ready\n", worker.communicate()
        for worker in started:
            worker.stdin.write("go\n")
            worker.stdin.flush()
        return started

    yield begin
    for worker in started:
        kill(worker)


def finish(workers: list[Any]) -> None:
    errors = [worker.communicate(timeout=60)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * len(workers), errors


def test_processes_that_replace_one_partition_leave_one_of_their_frames(
    tables: DeltaTables, start: Callable[..., list[Any]]
):
    """Each replaces it three times, as fast as it can. Every replacement is a commit, and the last
    one is the third of one process.
    """
    tables.replace(TABLE, JANUARY, bars())
    finish(start(SAME))
    (trades,) = stored(tables)["trades"].unique()
    assert trades in (3, 13, 23, 33)
    assert stored(tables).equals(bars().with_columns(trades=pl.lit(trades, pl.Int64)))
    assert open_table(tables).version() == 1 + 4 * 3
    assert len(open_table(tables).file_uris()) == 1


def test_processes_that_make_the_table_and_their_own_partitions_lose_nothing(
    tables: DeltaTables, start: Callable[..., list[Any]]
):
    finish(start(DIFFERENT, 3))
    for number in range(3):
        partition = Partition(Market("binance", f"C{number}/USDT"), JANUARY.month)
        expected = bars().with_columns(trades=pl.lit(10 * number + 3, pl.Int64))
        assert stored(tables, partition).equals(expected)
    assert len(open_table(tables).file_uris()) == 3
    assert open_table(tables).version() == 3 * 3


def test_killed_writers_leave_the_partition_whole(
    tables: DeltaTables, start: Callable[..., list[Any]]
):
    good = [bars().with_columns(close=pl.lit(Decimal(close), DECIMAL)) for close in (1, 2)]
    for n, writer in enumerate(start(FOREVER, 2)):
        for _ in range(n + 1):
            assert writer.stdout.readline() == "written\n", writer.communicate()
        kill(writer)
        seen = stored(tables)
        assert any(seen.equals(one) for one in good)
    tables.replace(TABLE, JANUARY, bars(3))
    assert stored(tables).equals(bars(3))


# ---------------------------------------------------------------- commits of others
@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return `meanwhile(act)`: another program acts between our read and our commit, once."""

    def set_up(act: Callable[[], object], times: int = 1) -> None:
        left = [act] * times

        def write(*args: Any, **kwargs: Any) -> None:
            if left:
                left.pop()()
            write_deltalake(*args, **kwargs)

        monkeypatch.setattr(deltalake, "write_deltalake", write)

    return set_up


def append_again(tables: DeltaTables) -> None:
    write_deltalake(open_table(tables), rows_of(JANUARY, bars()), mode="append")


def replace_theirs(tables: DeltaTables) -> None:
    write_deltalake(
        open_table(tables), rows_of(JANUARY, bars(8)), mode="overwrite", predicate=_where(JANUARY)
    )


def _where(partition: Partition) -> str:
    return f"market = '{partition.market.key}' AND month = '{partition.month_key[:7]}'"


FOREIGN: dict[str, Callable[[DeltaTables], object]] = {
    "the same rows again": append_again,
    "the partition replaced": replace_theirs,
    "the partition deleted": lambda tables: open_table(tables).delete(_where(JANUARY)),
    "the partition sorted": lambda tables: open_table(tables).optimize.z_order(["open_time"]),
    "a property set": lambda tables: open_table(tables).alter.set_table_properties(
        {"delta.checkpointInterval": "50"}
    ),
    "rows updated": lambda tables: open_table(tables).update(
        {"trades": "42"}, predicate=_where(JANUARY)
    ),
}


@pytest.mark.parametrize("foreign", FOREIGN)
def test_a_foreign_commit_in_between_causes_one_retry(
    tables: DeltaTables, meanwhile: Callable[..., None], foreign: str
):
    pauses: list[float] = []
    tables._pause = pauses.append
    tables.replace(TABLE, JANUARY, bars())
    tables.replace(TABLE, OTHER, bars(3))
    meanwhile(lambda: FOREIGN[foreign](tables))
    tables.replace(TABLE, JANUARY, bars(2))
    assert stored(tables).equals(bars(2))
    assert stored(tables, OTHER).equals(bars(3))
    assert len(pauses) == 1
    assert 0 < pauses[0] <= 0.05


def test_a_foreign_commit_elsewhere_is_no_conflict(
    tables: DeltaTables, meanwhile: Callable[..., None]
):
    pauses: list[float] = []
    tables._pause = pauses.append
    tables.replace(TABLE, JANUARY, bars())
    meanwhile(lambda: write_deltalake(open_table(tables), rows_of(OTHER, bars(3)), mode="append"))
    tables.replace(TABLE, JANUARY, bars(2))
    assert pauses == []
    assert stored(tables).equals(bars(2))
    assert stored(tables, OTHER).equals(bars(3))


def test_doubled_rows_are_replaced_by_the_next_publication(local: DeltaTables):
    local.replace(TABLE, JANUARY, bars())
    append_again(local)
    assert stored(local).height == 200
    assert local.replace(TABLE, JANUARY, bars()).changed
    assert stored(local).equals(bars())


def test_another_writer_that_is_always_faster_is_reported(
    local: DeltaTables, meanwhile: Callable[..., None]
):
    pauses: list[float] = []
    local._pause = pauses.append
    local.replace(TABLE, JANUARY, bars())
    meanwhile(lambda: append_again(local), times=MAX_ATTEMPTS)
    with pytest.raises(
        StoreFailed,
        match=rf"raw/ohlcv_1m: other writers were faster {MAX_ATTEMPTS} times; run it again",
    ):
        local.replace(TABLE, JANUARY, bars(2))
    assert len(pauses) == MAX_ATTEMPTS - 1
    assert max(pauses) <= 2
    assert local.replace(TABLE, JANUARY, bars(2)).changed
    assert stored(local).equals(bars(2))


@pytest.mark.parametrize("when", ["before", "in between"])
def test_a_foreign_schema_change_is_reported_and_no_row_is_lost(
    tables: DeltaTables, meanwhile: Callable[..., None], when: str
):
    tables._pause = lambda seconds: None
    tables.replace(TABLE, JANUARY, bars())

    def change() -> None:
        open_table(tables).alter.add_columns([Field("note", PrimitiveType("string"))])

    change() if when == "before" else meanwhile(change)
    for _ in range(2):
        with pytest.raises(
            StoreFailed,
            match=r"raw/ohlcv_1m: another program changed note; nothing is written to it until",
        ):
            tables.replace(TABLE, JANUARY, bars(2))
    assert open_table(tables).version() == 2
    open_table(tables).restore(1)
    tables.replace(TABLE, JANUARY, bars(2))
    assert stored(tables).equals(bars(2))


def test_a_foreign_table_in_its_place_is_reported(tmp_path: Path):
    bare, flat = DeltaTables(str(tmp_path / "bare")), DeltaTables(str(tmp_path / "flat"))
    write_deltalake(bare.uri(TABLE), bars().to_arrow())
    write_deltalake(flat.uri(TABLE), rows_of(JANUARY, bars()))
    for tables, what in ((bare, "market, month"), (flat, "its partitioning")):
        with pytest.raises(StoreFailed, match=f"raw/ohlcv_1m: another program changed {what}; "):
            tables.replace(TABLE, JANUARY, bars())
        assert open_table(tables).version() == 0


# ---------------------------------------------------------------- versions
def test_older_versions_can_be_read(tables: DeltaTables):
    for version in (1, 2, 3):
        tables.replace(TABLE, JANUARY, bars(version))
    for version in (1, 2, 3):
        assert stored(tables, version=version).equals(bars(version))
    assert stored(tables, version=0).is_empty()
    assert stored(tables).equals(bars(3))


def test_every_commit_has_a_note(tables: DeltaTables):
    tables.replace(TABLE, JANUARY, bars())
    tables.replace(TABLE, JANUARY, bars(2, 30))
    replaced, written, created = open_table(tables).history()
    assert (created["operation"], written["operation"]) == ("CREATE TABLE", "WRITE")
    assert written["userMetadata"] == "replace binance:BTC-USDT|2024-01-01: 100 bars"
    assert replaced["userMetadata"] == "replace binance:BTC-USDT|2024-01-01: 30 bars"


# ---------------------------------------------------------------- maintenance
def test_files_of_others_are_sorted_into_one(tables: DeltaTables):
    assert tables.maintain(TABLE, 7) is None
    tables.replace(TABLE, JANUARY, bars()[::2])
    tables.replace(TABLE, OTHER, bars(3))
    write_deltalake(open_table(tables), rows_of(JANUARY, bars()[1::2]), mode="append")
    version, others = (
        open_table(tables).version(),
        open_table(tables).file_uris(file_pruning_predicate=_where(OTHER)),
    )
    planned = tables.maintain(TABLE, 7, dry_run=True)
    assert (planned.version, planned.partitions_compacted) == (version, 1)
    assert open_table(tables).version() == version
    done = tables.maintain(TABLE, 7)
    assert (done.partitions_compacted, done.files_removed) == (1, 0)
    assert done.version == version + 2
    files = open_table(tables).file_uris(file_pruning_predicate=_where(JANUARY))
    assert len(files) == 1
    assert open_table(tables).file_uris(file_pruning_predicate=_where(OTHER)) == others
    assert (
        pl.DataFrame(open_table(tables).to_pyarrow_table(filters=[("market", "=", BTC.key)]))
        .select(COLUMN_NAMES)
        .equals(bars())
    )
    assert stored(tables).equals(bars())
    assert stored(tables, OTHER).equals(bars(3))
    for old in range(version + 1):
        stored(tables, version=old)
    assert tables.maintain(TABLE, 7) == done._replace(partitions_compacted=0)


def age(local: DeltaTables, version: int, days: float) -> None:
    """Move a commit's removals back by so many days, in the log and on disk."""
    log = Path(local.uri(TABLE)) / "_delta_log" / f"{version:020}.json"
    actions = [json.loads(line) for line in log.read_text().splitlines()]
    for action in actions:
        if "remove" in action:
            action["remove"]["deletionTimestamp"] -= int(days * 86_400_000)
            file = Path(local.uri(TABLE)) / action["remove"]["path"].replace("%253A", "%3A")
            os.utime(file, (file.stat().st_mtime - days * 86_400,) * 2)
    log.write_text("\n".join(map(json.dumps, actions)) + "\n")


def test_old_versions_are_removed_and_those_inside_the_retention_stay(local: DeltaTables):
    for seed in (1, 2, 3, 4):
        local.replace(TABLE, JANUARY, bars(seed))
    age(local, 2, 8)  # the file of version 1 was replaced eight days ago
    age(local, 3, 6)
    orphan = (
        Path(local.uri(TABLE)) / "market=binance%3ABTC-USDT/month=2024-01/of-a-dead-writer.parquet"
    )
    orphan.write_bytes(b"x" * 1000)
    os.utime(orphan, (0, 0))
    fresh = orphan.with_name("of-a-living-writer.parquet")
    fresh.write_bytes(b"x")
    local = DeltaTables(local.location)
    first = next(
        iter(pl.DataFrame(DeltaTable(local.uri(TABLE), version=1).get_add_actions())["size_bytes"])
    )
    planned = local.maintain(TABLE, 7, dry_run=True)
    assert (planned.files_removed, planned.bytes_removed) == (2, 1000 + first)
    assert orphan.exists()
    assert stored(local, version=1).equals(bars(1))
    done = local.maintain(TABLE, 7)
    assert done[1:] == planned[1:]
    assert (orphan.exists(), fresh.exists()) == (False, True)
    assert [stored(local, version=version).equals(bars(version)) for version in (2, 3, 4)] == [
        True
    ] * 3
    assert stored(local).equals(bars(4))
    with pytest.raises(FileNotFoundError):
        stored(local, version=1)
    assert local.maintain(TABLE, 7).files_removed == 0


# ---------------------------------------------------------------- other readers
def by_duckdb_dataset(table: DeltaTable) -> pl.DataFrame:
    return duckdb.from_arrow(table.to_pyarrow_dataset()).pl()


def by_duckdb_files(table: DeltaTable) -> pl.DataFrame:
    return duckdb.sql(
        f"SELECT * FROM read_parquet({table.file_uris()}, hive_partitioning=true)"
    ).pl()


def by_polars(table: DeltaTable) -> pl.DataFrame:
    return pl.scan_delta(table).collect()


def by_pandas(table: DeltaTable) -> pl.DataFrame:
    found = table.to_pandas()
    assert isinstance(found["close"].iloc[0], Decimal)
    return pl.DataFrame(
        {
            "market": found["market"],
            "open_time": found["open_time"],
            "close": pl.Series(found["close"].tolist(), dtype=DECIMAL),
        }
    )


@pytest.mark.parametrize("read", [by_duckdb_dataset, by_duckdb_files, by_polars, by_pandas])
def test_every_reader_reads_every_digit(
    local: DeltaTables, read: Callable[[DeltaTable], pl.DataFrame]
):
    wide = [
        row(moment, close=Decimal("12345678901234567890123456.000000000001"))
        for moment in minutes(2)
    ]
    local.replace(TABLE, JANUARY, bars(9))
    local.replace(TABLE, JANUARY, bars())
    local.replace(TABLE, OTHER, frame(wide))
    found = read(open_table(local)).sort("market", "open_time")
    assert found.filter(market=BTC.key)["close"].to_list() == bars()["close"].to_list()
    assert found.filter(market=ETH.key)["close"].to_list() == [r["close"] for r in wide]
    assert found["open_time"].dt.convert_time_zone("UTC").to_list() == [*minutes(100), *minutes(2)]


def test_every_feature_is_one_that_spark_supports(local: DeltaTables):
    """Reader version 1, writer version 2, no feature; the log names each column and its type."""
    local.replace(TABLE, JANUARY, bars())
    local.replace(TABLE, JANUARY, bars(2))
    local.maintain(TABLE, 7)
    assert open_table(local).protocol() == (1, 2, None, None)
    actions = [
        json.loads(line)
        for log in sorted(Path(local.uri(TABLE)).glob("_delta_log/*.json"))
        for line in log.read_text().splitlines()
    ]
    metadata = [action["metaData"] for action in actions if "metaData" in action][-1]
    fields = {
        field["name"]: field["type"] for field in json.loads(metadata["schemaString"])["fields"]
    }
    numbers = dict.fromkeys(COLUMN_NAMES[1:], "decimal(38,12)") | {"trades": "long"}
    assert fields == {"market": "string", "month": "string", "open_time": "timestamp", **numbers}
    assert metadata["partitionColumns"] == ["market", "month"]
    assert {
        key: value
        for key, value in metadata["configuration"].items()
        if "statsColumns" not in key.lower()
    } == {
        "delta.deletedFileRetentionDuration": "interval 7 days",
        "delta.logRetentionDuration": "interval 30 days",
    } | {"delta.dataSkippingStatsColumns": "open_time"}
    adds = [action["add"] for action in actions if "add" in action]
    assert adds[0]["partitionValues"] == {"market": "binance:BTC-USDT", "month": "2024-01"}
    assert set(json.loads(adds[0]["stats"])["minValues"]) == {"open_time"}
    assert not any(add.get("deletionVector") for add in adds)


# ---------------------------------------------------------------- errors of stores
def test_a_damaged_file_is_replaced(local: DeltaTables):
    local.replace(TABLE, JANUARY, bars())
    local.replace(TABLE, OTHER, bars(3))
    (file,) = open_table(local).file_uris(file_pruning_predicate=_where(JANUARY))
    Path(file).write_bytes(b"garbage" * 100)
    assert local.replace(TABLE, JANUARY, bars()).changed
    assert stored(local).equals(bars())
    assert stored(local, OTHER).equals(bars(3))


def is_one_clean_line(caught: pytest.ExceptionInfo[Exception]) -> bool:
    return (
        not re.search(r"[\n\x1b]|CANARY|Traceback", str(caught.value))
        and len(str(caught.value)) < 500
    )


def test_a_damaged_log_is_reported(local: DeltaTables):
    local.replace(TABLE, JANUARY, bars())
    (Path(local.uri(TABLE)) / "_delta_log/00000000000000000000.json").write_text("garbage")
    with pytest.raises(StoreFailed, match="mend the folder or set another") as caught:
        DeltaTables(local.location).replace(TABLE, JANUARY, bars(2))
    assert is_one_clean_line(caught)


def test_an_impossible_folder_is_reported(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        StoreFailed, match=r"file/delta/raw/ohlcv_1m: .*mend the folder or set another"
    ) as caught:
        DeltaTables(str(tmp_path / "file/delta")).replace(TABLE, JANUARY, bars())
    assert is_one_clean_line(caught)


def test_a_missing_bucket_is_reported(s3: str):
    for act in (
        lambda t: t.replace(TABLE, JANUARY, bars()),
        lambda t: t.maintain(TABLE, 7),
    ):
        with pytest.raises(
            StoreFailed,
            match=r"^s3://missing/raw/ohlcv_1m: NoSuchBucket; check the bucket, AWS_ENDPOINT_URL",
        ) as caught:
            act(DeltaTables("s3://missing"))
        assert is_one_clean_line(caught)


def test_a_server_that_does_not_listen_is_reported_without_the_keys(
    s3: str, monkeypatch: pytest.MonkeyPatch
):
    with socket.create_server(("127.0.0.1", 0)) as free:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
    tables = DeltaTables("s3://bucket/prefix")
    with pytest.raises(
        StoreFailed, match=r"^s3://bucket/prefix/raw/ohlcv_1m: .*refused.*; check the bucket"
    ) as caught:
        tables.replace(TABLE, JANUARY, bars())
    assert is_one_clean_line(caught)


def test_without_the_library_the_error_names_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(delta_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"pip install 'marketdata-assets\[delta\]'"):
        delta_module.open_delta_tables("anywhere")


# ---------------------------------------------------------------- the flow
Sandbox = tuple[SandboxExchange, str]
BOTH = pytest.mark.parametrize("published", ["duckdb", "parquet"], indirect=True)


@pytest.fixture
def delta_in_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(
        "MARKETDATA_DELTA", f"{{location: {tmp_path / 'delta'}, timeframes: [1m, 1h]}}"
    )


@pytest.fixture
def published(
    request: pytest.FixtureRequest, sandbox: Sandbox, universe: Universe, delta_in_folder: None
) -> Settings:
    """Fetch and roll up two markets, four days over two months; `delta:` publishes 1m and 1h."""
    rollups = getattr(request, "param", "parquet")
    settings_with_data = universe(
        sandbox[1],
        symbols="[BTC/USDT, ETH/USDT]",
        since="2023-11-29",
        until="2023-12-03",
        rollups=rollups,
    )
    run_ingest(settings_with_data)
    run_derive(settings_with_data)
    return settings_with_data


def all_stored(tables: DeltaTables, market: Market, table: Table = TABLE) -> pl.DataFrame:
    months = (Partition.parse(f"{market.key}|{month}") for month in ("2023-11-01", "2023-12-01"))
    return pl.concat([stored(tables, month, table) for month in months])


def publish_all(settings: Settings, timeframe: str) -> list[PublishResult]:
    with open_context(settings) as context:
        return list(
            context.bind(DeltaPublisher).publish(TIMEFRAMES[timeframe], partitions(settings))
        )


@BOTH
def test_stored_bars_are_published(published: Settings):
    tables = DeltaTables(published.delta.location)
    for timeframe in ("1m", "1h"):
        done = publish_all(published, timeframe)
        assert [(d.changed, d.error) for d in done] == [(True, None)] * 4
        again = publish_all(published, timeframe)
        assert [(d.changed, d.rows, d.bytes) for d in again] == [
            (False, d.rows, d.bytes) for d in done
        ]
        assert {d.version for d in again} == {4}
    expected = generate_bars("ETHUSDT", "1m", window("2023-11-29", "2023-12-03"))
    assert all_stored(tables, ETH).select(expected.columns).equals(expected)
    hours = all_stored(tables, ETH, rollup_table(TIMEFRAMES["1h"]))
    assert hours.height == 96
    assert hours["volume"].sum() == expected["volume"].sum()


def test_one_partition_that_fails_does_not_stop_the_others(published: Settings):
    broken = next(Path(published.lake).glob("raw/ohlcv_1m/*BTC*/month=2023-11/data.parquet"))
    broken.write_bytes(b"garbage")
    first, *others = publish_all(published, "1m")
    assert isinstance(first.error, Damaged)
    assert [d.error for d in others] == [None] * 3
    broken.unlink()
    assert publish_all(published, "1m")[0] == PublishResult(partitions(published)[0])


@BOTH
def test_a_lost_object_erases_no_published_bars(published: Settings):
    publish_all(published, "1m")
    publish_all(published, "1h")
    before = all_stored(DeltaTables(published.delta.location), BTC)
    for file in Path(published.lake).rglob("data.parquet"):
        file.unlink()
    published.duckdb.unlink(missing_ok=True)
    for timeframe in ("1m", "1h"):
        assert {(d.version, d.changed) for d in publish_all(published, timeframe)} == {
            (None, False)
        }
    assert all_stored(DeltaTables(published.delta.location), BTC).equals(before)


def test_all_tables_are_maintained(published: Settings):
    with open_context(published) as context:
        assert maintain(context.settings) == {}
    publish_all(published, "1h")
    with open_context(published) as context:
        assert set(maintain(context.settings, dry_run=True)) == {"rollup/ohlcv_1h"}


def test_a_location_inside_the_lake_is_refused(
    sandbox: Sandbox, universe: Universe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """A maintenance would remove the lake's objects, as files that no version needs."""
    monkeypatch.setenv("MARKETDATA_DELTA", f"{{location: {tmp_path / 'lake'}, timeframes: [1m]}}")
    with pytest.raises(BadInput, match="is the lake or lies in it"):
        universe(sandbox[1], until="2024-01-02")


# ---------------------------------------------------------------- Dagster
NOTHING = ("partitions_compacted", "files_removed", "bytes_removed")
MINUTES, HOURS = dg.AssetKey(["delta", "ohlcv_1m"]), dg.AssetKey(["delta", "ohlcv_1h"])


@pytest.fixture(name="settings")
def universe_with_delta(sandbox: Sandbox, universe: Universe, delta_in_folder: None) -> Settings:
    return universe(
        sandbox[1], symbols="[BTC/USDT, ETH/USDT]", since="2023-11-29", until="2023-12-03"
    )


def definitions(settings: Settings) -> dg.Definitions:
    """Return the raw, rolled-up and Delta assets and the maintenance, joined as by
    `build_definitions`.
    """
    grid = market_months(settings)
    assets = [
        *(raw_asset(settings, tf, grid) for tf in settings.raw_timeframes),
        rollup_assets(settings, grid),
    ]
    job, schedule = delta_job(settings)
    return dg.Definitions(
        assets=[*assets, *delta_assets(settings, grid)],
        jobs=[dg.define_asset_job("everything"), job],
        schedules=[schedule],
        resources=build_definitions(settings).resources,
        executor=dg.in_process_executor,
    )


def shown(instance: dg.DagsterInstance, key: dg.AssetKey, partition: str) -> dict[str, Any]:
    records = instance.fetch_materializations(
        dg.AssetRecordsFilter(asset_key=key, asset_partitions=[partition]), limit=1
    ).records
    return {name: value.value for name, value in records[0].asset_materialization.metadata.items()}


def test_the_assets_end_to_end(settings: Settings, instance: dg.DagsterInstance):
    defs = definitions(settings)
    keys = [partition.key for partition in partitions(settings)]
    tags = {RANGE_START: keys[0], RANGE_END: keys[-1]}
    for turn in range(2):
        done = defs.resolve_job_def("everything").execute_in_process(
            instance=instance, tags=tags, raise_on_error=False
        )
        assert done.success
        for key, table, width in ((MINUTES, TABLE, 1), (HOURS, rollup_table(TIMEFRAMES["1h"]), 60)):
            assert instance.get_materialized_partitions(key) == set(keys)
            metadata = shown(instance, key, "binance:ETH-USDT|2023-11-01")
            assert metadata["rows"] == metadata["dagster/partition_row_count"] == 2 * 1440 // width
            assert metadata["bytes"] > 1000
            assert metadata["version"] == (4 if turn else 3)
            assert DeltaTable(f"{settings.delta.location}/{table.name}").version() == 4
    graph = defs.get_repository_def().asset_graph
    for key, source in ((MINUTES, "raw"), (HOURS, "rollup")):
        node = graph.get(key)
        assert (node.group_name, node.kinds) == ("delta", {"deltalake", "parquet"})
        assert node.parent_keys == {dg.AssetKey([source, key.path[-1]])}
        assert [column.name for column in node.metadata["dagster/column_schema"].columns][:3] == [
            "market",
            "month",
            "open_time",
        ]
    open_table(DeltaTables(settings.delta.location)).delete(_where(partitions(settings)[0]))
    for dry_run, published in ((True, 0), (False, 1), (False, 0)):
        config = {"ops": {"maintain_tables": {"config": {"dry_run": dry_run}}}}
        done = defs.resolve_job_def(MAINTAIN).execute_in_process(
            instance=instance, run_config=config
        )
        (event,) = [e for e in done.all_events if e.event_type == dg.DagsterEventType.STEP_OUTPUT]
        found = {
            name: value.value
            for name, value in event.event_specific_data.metadata.items()
            if name != "tables"
        }
        assert found == {
            "dry_run": dry_run,
            "partitions_published": published,
            **dict.fromkeys(NOTHING, 0),
        }
        tables = {
            record.data["table"] for record in event.event_specific_data.metadata["tables"].records
        }
        assert tables == {"raw/ohlcv_1m", "rollup/ohlcv_1h"}
        events = [
            e.asset_key
            for e in done.all_events
            if e.event_type == dg.DagsterEventType.ASSET_MATERIALIZATION
        ]
        assert events == [MINUTES] * published
    assert (
        defs.resolve_schedule_def("maintain_delta_every_night").default_status
        == dg.DefaultScheduleStatus.RUNNING
    )


def test_a_red_partition_fails_alone(settings: Settings, instance: dg.DagsterInstance):
    run_ingest(settings)
    next(Path(settings.lake).glob("raw/ohlcv_1m/*BTC*/month=2023-11/data.parquet")).write_bytes(
        b"garbage"
    )
    keys = [partition.key for partition in partitions(settings)]
    job = dg.Definitions(
        assets=delta_assets(settings, market_months(settings)),
        jobs=[dg.define_asset_job("minutes", [MINUTES])],
    ).resolve_job_def("minutes")
    done = job.execute_in_process(
        instance=instance, tags={RANGE_START: keys[0], RANGE_END: keys[-1]}, raise_on_error=False
    )
    assert not done.success
    (failure,) = [event for event in done.all_events if event.is_step_failure]
    assert "1 partitions failed and 3 are stored; first binance:BTC-USDT|2023-11-01: " in str(
        failure.step_failure_data.user_failure_data
    )
    assert instance.get_materialized_partitions(MINUTES) == set(keys[1:])


def test_a_timeframe_without_bars_is_refused(monkeypatch: pytest.MonkeyPatch, universe: Universe):
    monkeypatch.setenv("MARKETDATA_DELTA", "{location: s3://bucket/delta, timeframes: [1m]}")
    hourly = universe("http://127.0.0.1:1", extra="base: 1h")
    with pytest.raises(
        BadInput, match="publishes 1m, but there are no such bars; choose of 1h 4h 12h 1d 1w"
    ):
        delta_assets(hourly, market_months(hourly))
    monkeypatch.delenv("MARKETDATA_DELTA")
    unpublished = universe("http://127.0.0.1:1")
    assert delta_assets(unpublished, market_months(unpublished)) == []


def test_columns_of_a_table():
    assert list(delta_column_types(WEEKS)) == [
        "market",
        "month",
        *COLUMN_NAMES,
        "vwap",
        "bars_expected",
        "bars_present",
    ]

"""Where bars rest: one promise for a local folder and for S3, kept through crashes, full disks and
damaged objects.
"""

from __future__ import annotations

import io
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import boto3
import duckdb
import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moto.server import ThreadedMotoServer

from marketdata_assets.errors import Damaged, StoreFailed
from marketdata_assets.model.bar import DECIMAL, NAMES, SCHEMA, empty_bars
from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import folder, raw, rollup
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.model.window import month_of
from marketdata_assets.storage.fingerprint import fingerprint
from marketdata_assets.storage.objects import ATTEMPTS
from marketdata_assets.storage.parquet import Lake, decode, encode
from marketdata_assets.transforms.rollup import roll_up
from marketdata_tests.samples import (
    BTC,
    DECIMALS,
    FEBRUARY,
    JANUARY,
    frame,
    kill,
    minutes,
    row,
    start_python,
)
from marketdata_tests.samples import random_bars as bars

TABLE = raw(TIMEFRAMES["1m"])
PATH = "raw/ohlcv_1m/market=binance%3ABTC-USDT/month=2024-01/data.parquet"


# --------------------------------------------------------------------------------- two stores, look
@dataclass
class Place:
    """A lake, and its objects behind its back."""

    lake: Lake
    base: Path | None = None
    bucket: Any = None

    def get(self, path: str) -> bytes | None:
        if self.base:
            return (self.base / path).read_bytes() if (self.base / path).exists() else None
        found = {o.key: o for o in self.bucket.objects.filter(Prefix=self.prefix + path)}
        return (
            bytes(found[self.prefix + path].get()["Body"].read())
            if self.prefix + path in found
            else None
        )

    def put(self, path: str, content: bytes) -> None:
        if self.base:
            (self.base / path).parent.mkdir(parents=True, exist_ok=True)
            (self.base / path).write_bytes(content)
        else:
            self.bucket.put_object(Key=self.prefix + path, Body=content)

    def names(self) -> list[str]:
        if self.base:
            return sorted(
                p.relative_to(self.base).as_posix() for p in self.base.rglob("*") if p.is_file()
            )
        return sorted(
            o.key.removeprefix(self.prefix) for o in self.bucket.objects.filter(Prefix=self.prefix)
        )

    @property
    def prefix(self) -> str:
        return self.lake.location.removeprefix("s3://bucket/") + "/"


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A real S3 server on a free port, named in the environment as users name theirs; its address."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "CANARY7e57")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("NO_PROXY", "127.0.0.1")
        boto3.resource("s3").create_bucket(Bucket="bucket")
        yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """An empty lake, in a folder and in a bucket."""
    if request.param == "folder":
        return Place(Lake(str(tmp_path / "lake")), base=tmp_path / "lake")
    request.getfixturevalue("s3")
    return Place(Lake(f"s3://bucket/{tmp_path.name}"), bucket=boto3.resource("s3").Bucket("bucket"))


# --------------------------------------------------------------------------------- one contract for
def test_what_is_not_there_is_none(place: Place):
    assert place.lake.read(TABLE, JANUARY) is None
    assert place.lake.size(TABLE, JANUARY) is None
    assert place.lake.sweep() == 0


def test_what_is_written_is_read(place: Place):
    stored = place.lake.write(TABLE, JANUARY, bars())
    content = place.get(PATH)
    assert content is not None
    assert (stored.bytes, stored.digest) == (len(content), fingerprint(bars()))
    assert place.lake.size(TABLE, JANUARY) == len(content)
    assert place.lake.read(TABLE, JANUARY).equals(bars())
    assert place.names() == [PATH]


def test_sizes_of_a_whole_table_at_once(place: Place, monkeypatch: pytest.MonkeyPatch):
    assert place.lake.sizes(TABLE) == {}
    partitions = [
        Partition.parse(f"{market}|2024-{month:02}-01")
        for market in ("binance:BTC-USDT", "kraken:X-Y_Y")
        for month in (1, 2, 3)
    ]
    stored = {
        (p.market.key, p.month_key): place.lake.write(TABLE, p, bars()).bytes for p in partitions
    }
    place.lake.write(rollup(TIMEFRAMES["1h"]), JANUARY, bars())
    place.lake.set_aside(TABLE, partitions[-1])
    del stored[partitions[-1].market.key, partitions[-1].month_key]
    assert place.lake.sizes(TABLE) == stored


@settings(max_examples=20)
@given(
    st.lists(st.one_of(DECIMALS, st.just(Decimal(0))), min_size=1, max_size=12), st.integers(0, 3)
)
def test_every_digit_comes_back(place: Place, values: list[Decimal], missing: int):
    """Up to 26 digits, at any scale, with nulls where they may be; the column keeps its type."""
    rows = [
        row(moment, close=value, quote_volume=value)
        for moment, value in zip(minutes(len(values)), values, strict=True)
    ]
    for r in rows[:missing]:
        r["quote_volume"] = r["trades"] = None
    place.lake.write(TABLE, JANUARY, frame(rows))
    found = place.lake.read(TABLE, JANUARY)
    assert found.schema == pl.Schema(SCHEMA)
    assert found["close"].to_list() == values
    assert found["quote_volume"].to_list() == [r["quote_volume"] for r in rows]


def test_no_bars_are_bars_too(place: Place):
    place.lake.write(TABLE, JANUARY, empty_bars())
    assert place.lake.read(TABLE, JANUARY).equals(empty_bars())


def test_a_write_replaces_the_whole_object_and_no_other(place: Place):
    other, hourly = (
        Partition(Market("binance", "ETH/USDT"), JANUARY.month),
        rollup(TIMEFRAMES["1h"]),
    )
    place.lake.write(TABLE, FEBRUARY, bars(2))
    place.lake.write(TABLE, other, bars(3))
    place.lake.write(TABLE, JANUARY, bars(4, 500))
    place.lake.write(TABLE, JANUARY, bars(5, 3))
    made = roll_up(bars(6), TIMEFRAMES["1m"], [TIMEFRAMES["1h"]], whole=JANUARY.month)[
        TIMEFRAMES["1h"]
    ]
    place.lake.write(hourly, JANUARY, made)
    assert place.lake.read(TABLE, JANUARY).equals(bars(5, 3))
    assert place.lake.read(TABLE, FEBRUARY).equals(bars(2))
    assert place.lake.read(TABLE, other).equals(bars(3))
    assert place.lake.read(hourly, JANUARY).equals(made)
    assert len(place.names()) == 4


def test_the_same_rows_give_the_same_bytes(place: Place):
    first = place.lake.write(TABLE, JANUARY, bars())
    pieces = pl.concat([bars()[i : i + 7] for i in range(0, 100, 7)], rechunk=False)
    assert pieces.n_chunks() > 1
    assert place.lake.write(TABLE, JANUARY, pieces) == first


def rewritten(change: Any) -> bytes:
    """A good object whose frame somebody has changed."""
    sink = io.BytesIO()
    change(bars()).write_parquet(sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello, this is text\n" * 20,
        b"PAR1" + b"\x00" * 50 + b"PAR1",
        encode(bars())[:-1],
        encode(bars())[: len(encode(bars())) // 2],
        encode(bars())[:100],
        b"x" * 500 + encode(bars())[500:],
        rewritten(lambda frame: frame.drop("close")),
        rewritten(lambda frame: frame.rename({"volume": "amount"})),
        rewritten(lambda frame: frame.with_columns(pl.lit("much").alias("volume"))),
    ],
    ids=[
        "empty",
        "text",
        "only the marks",
        "a byte short",
        "half",
        "a hundred bytes",
        "overwritten",
        "no close",
        "renamed",
        "text for numbers",
    ],
)
def test_a_damaged_object_is_told_and_set_aside(place: Place, content: bytes):
    place.put(PATH, content)
    with pytest.raises(
        Damaged, match=r"data.parquet is damaged .*backfill. fetches it again"
    ) as told:
        place.lake.read(TABLE, JANUARY)
    assert "\n" not in str(told.value)
    assert place.lake.set_aside(TABLE, JANUARY).endswith(PATH + ".damaged")
    assert place.lake.read(TABLE, JANUARY) is None
    assert place.get(PATH + ".damaged") == content
    place.lake.write(TABLE, JANUARY, bars())
    assert place.lake.read(TABLE, JANUARY).equals(bars())


def test_a_flipped_bit_is_told_or_changes_nothing():
    """Checksums guard the pages; a bent footer may be any kind of nonsense, and is never another kind
    of error.
    """
    content = encode(bars())
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    told = 0
    for bit in range(0, 8 * len(content), 53):
        bent = bytearray(content)
        bent[bit // 8] ^= 1 << bit % 8
        try:
            found = decode(bytes(bent), TABLE, "it")
        except Damaged:
            told += 1
        else:
            assert bit >= 8 * footer or found.equals(bars())
    assert told > 500


def test_columns_are_bound_by_name(place: Place):
    place.put(
        PATH,
        rewritten(
            lambda frame: frame.select(reversed(NAMES)).with_columns(pl.lit(1).alias("extra"))
        ),
    )
    assert place.lake.read(TABLE, JANUARY).equals(bars())


# --------------------------------------------------------------------------------- read by anybody
def by_duckdb(shelf: Path) -> pl.DataFrame:
    return duckdb.sql(
        f"SELECT * FROM read_parquet('{shelf}/**/*.parquet', union_by_name=true)"
    ).pl()


def by_polars(shelf: Path) -> pl.DataFrame:
    objects = [
        pl.scan_parquet(file, hive_partitioning=True) for file in sorted(shelf.rglob("*.parquet"))
    ]
    return pl.concat(objects, how="vertical_relaxed").collect()


def by_pandas(shelf: Path) -> pl.DataFrame:
    found = pd.read_parquet(shelf)
    assert isinstance(found["volume"].iloc[0], Decimal)
    return pl.DataFrame(
        {name: found[name].tolist() for name in ("market", "month", "volume")},
        schema_overrides={"volume": DECIMAL},
    )


READERS = pytest.mark.parametrize("read", [by_duckdb, by_polars, by_pandas])


def volumes(found: pl.DataFrame) -> dict[tuple[str, str], list[Decimal]]:
    """The volumes by market and month, sorted."""
    months = pl.col("month").cast(pl.String).str.head(7)
    groups = found.group_by("market", months).agg(pl.col("volume").cast(DECIMAL).sort())
    return {(str(market), month): volume for market, month, volume in groups.iter_rows()}


@READERS
def test_everybody_reads_it_unaided(tmp_path: Path, read: Any):
    """Two months of one market and one of a contract, scanned together: the markets are the right
    ones.
    """
    lake, contract = Lake(str(tmp_path)), Market("binance", "BTC/USDT:USDT")
    written = {JANUARY: "1.25", FEBRUARY: "22.75", Partition(contract, JANUARY.month): "333.01"}
    for partition, volume in written.items():
        lake.write(
            TABLE,
            partition,
            frame(
                [
                    row(moment, volume=Decimal(volume))
                    for moment in minutes(3, partition.month.start)
                ]
            ),
        )
    expected = {
        (p.market.key, p.month_key[:7]): [Decimal(volume)] * 3 for p, volume in written.items()
    }
    assert volumes(read(tmp_path / "raw/ohlcv_1m")) == expected


@pytest.mark.parametrize("read", [by_duckdb, by_polars])
def test_everybody_reads_months_of_different_digits_exactly(tmp_path: Path, read: Any):
    """Each object has the scale its digits need; read as README.md says, DuckDB and Polars find the
    wider one for all.
    """
    lake = Lake(str(tmp_path))
    lake.write(TABLE, JANUARY, frame([row(JANUARY.month.start, volume=Decimal("1.25"))]))
    lake.write(TABLE, FEBRUARY, frame([row(FEBRUARY.month.start, volume=Decimal("1.12345"))]))
    found = volumes(read(tmp_path / "raw/ohlcv_1m"))
    assert found == {
        (BTC.key, "2024-01"): [Decimal("1.25")],
        (BTC.key, "2024-02"): [Decimal("1.12345")],
    }


@pytest.mark.parametrize("read", [by_duckdb, by_polars])
@pytest.mark.parametrize(
    "wide", ["12345678901234567890123456.5", "12345678901234567890123456", "1234567.123456789012"]
)
def test_everybody_reads_narrow_and_wide_numbers_exactly(tmp_path: Path, read: Any, wide: str):
    """Sixteen digits before the point, twelve behind it, and twenty-six before it: no reader may cut
    one for the other.
    """
    lake, month, written = Lake(str(tmp_path)), JANUARY.month, {}
    for text in ("1234567890123456.25", "1.123456789012", wide):
        lake.write(TABLE, Partition(BTC, month), frame([row(month.start, volume=Decimal(text))]))
        written[BTC.key, f"{month.start:%Y-%m}"] = [Decimal(text)]
        month = month_of(month.end)
    assert volumes(read(tmp_path / "raw/ohlcv_1m")) == written


def test_a_market_as_a_folder():
    assert folder(BTC) == "market=binance%3ABTC-USDT"
    assert folder(Market("binance", "A.$/B$.:C-250328")) == "market=binance%3AA.%24-B%24._C-250328"
    assert TABLE.path(JANUARY) == PATH


def test_decimals_lie_there_as_small_integers():
    """The scale the digits need, as delta-packed INT64; what is wider falls back to 38 digits."""
    sample = frame(
        [
            row(m, close=Decimal("100.25"), volume=Decimal("123456789012345678901.5"))
            for m in minutes(1000)
        ]
    )
    file = pq.ParquetFile(io.BytesIO(encode(sample)))
    kinds = {file.schema.column(i).name: file.schema.column(i) for i in range(len(NAMES))}
    assert (kinds["close"].physical_type, str(kinds["close"].logical_type)) == (
        "INT64",
        "Decimal(precision=18, scale=2)",
    )
    assert (kinds["open"].physical_type, str(kinds["open"].logical_type)) == (
        "INT64",
        "Decimal(precision=18, scale=0)",
    )
    assert (kinds["volume"].physical_type, str(kinds["volume"].logical_type)) == (
        "FIXED_LEN_BYTE_ARRAY",
        "Decimal(precision=38, scale=12)",
    )
    assert file.num_row_groups == 1
    chunk = file.metadata.row_group(0).column(NAMES.index("close"))
    assert (chunk.compression, "DELTA_BINARY_PACKED" in chunk.encodings) == ("ZSTD", True)


@pytest.mark.parametrize("digits", [17, 18, 19, 20])
def test_the_widest_integers_fit(digits: int):
    """At the edge of 18 digits nothing overflows."""
    values = [Decimal("9" * digits).scaleb(-4), Decimal(1).scaleb(-4)]
    sample = frame([row(m, volume=v) for m, v in zip(minutes(2), values, strict=True)])
    assert pl.read_parquet(encode(sample))["volume"].cast(DECIMAL).to_list() == values


HASHES = """
import hashlib, os, sys
import polars as pl
from marketdata_assets.storage.parquet import encode
assert pl.thread_pool_size() == int(os.environ["POLARS_MAX_THREADS"])
whole = pl.read_parquet(sys.argv[1])
pieces = pl.concat([whole[i : i + 333] for i in range(0, whole.height, 333)], rechunk=False)
print(*(hashlib.sha256(encode(f)).hexdigest() for f in (whole, pieces, whole.reverse().sort("open_time"))))
"""


def test_files_are_byte_identical_for_any_number_of_threads(tmp_path: Path):
    bars(7, 5000).write_parquet(tmp_path / "bars")
    running = [
        start_python(
            HASHES, str(tmp_path / "bars"), env={**os.environ, "POLARS_MAX_THREADS": str(n)}
        )
        for n in (1, 2, 8)
    ]
    said = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], said
    assert len({digest for out, _ in said for digest in out.split()}) == 1


# --------------------------------------------------------------------------------- crashes
WRITER = """
import itertools, sys
import polars as pl
from marketdata_assets.storage.parquet import Lake
from marketdata_assets.model.table import raw
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.model.partition import Partition
table, partition = raw(TIMEFRAMES["1m"]), Partition.parse("binance:BTC-USDT|2024-01-01")
lake, *frames = Lake(sys.argv[1]), *map(pl.read_parquet, sys.argv[2:])
"""
FOREVER = """
sys.stdin.readline()
for frame in itertools.cycle(frames):
    lake.write(table, partition, frame)
    print("written", flush=True)
"""


@pytest.fixture
def frames(tmp_path: Path) -> list[str]:
    """Two frames, as plain files that a lean writer process can read."""
    bars(1, 3000).write_parquet(tmp_path / "a")
    bars(2, 500).write_parquet(tmp_path / "b")
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def files(folder: Path) -> list[str]:
    """All files below a folder."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_a_reader_never_sees_half_an_object_whenever_a_writer_is_killed(
    tmp_path: Path, frames: list[str]
):
    """Ten writers rewrite one object, two at a time, and are killed one by one, each at a random
    moment of its work.
    """
    dice, lake, good = (
        Random(),
        Lake(str(tmp_path / "lake")),
        [pl.read_parquet(file) for file in frames],
    )
    lake.write(TABLE, JANUARY, good[0])

    def is_whole() -> bool:
        found = lake.read(TABLE, JANUARY)
        return found is not None and any(found.equals(one) for one in good)

    writers = [start_python(WRITER + FOREVER, str(tmp_path / "lake"), *frames) for _ in range(10)]
    try:
        for writer, following in pairwise([*writers, None]):
            for process in filter(None, (writer, following)):
                process.stdin.write("go\n")
                process.stdin.flush()
            for _ in range(dice.randint(1, 8)):
                assert writer.stdout.readline() == "written\n"
                assert is_whole()
            kill(writer)
            assert is_whole()
            lake.sweep()
    finally:
        for writer in writers:
            kill(writer)
    lake.sweep()
    assert files(tmp_path / "lake") == [PATH]
    assert is_whole()


STOPPED = """
import os
def stop(*args):
    print("written aside", flush=True)
    sys.stdin.read()
os.{moment} = stop
lake.write(table, partition, frames[1])
"""


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_sweep_takes_what_the_dead_left_and_not_what_the_living_write(
    tmp_path: Path, frames: list[str], moment: str
):
    """A writer stands still between writing aside and renaming, and is killed there."""
    lake = Lake(str(tmp_path / "lake"))
    before = lake.write(TABLE, JANUARY, bars(1))
    writer = start_python(WRITER + STOPPED.format(moment=moment), lake.location, *frames)
    assert writer.stdout.readline() == "written aside\n"
    assert len(files(tmp_path / "lake")) == 2
    assert lake.sweep() == 0
    assert len(files(tmp_path / "lake")) == 2
    kill(writer)
    assert (
        fingerprint(pl.read_parquet((tmp_path / "lake" / PATH).read_bytes()).cast(SCHEMA))
        == before.digest
    )
    assert lake.sweep() == 1
    assert files(tmp_path / "lake") == [PATH]
    assert lake.read(TABLE, JANUARY).equals(bars(1))


# --------------------------------------------------------------------------------- stores that refu
FULL = """
import resource
from marketdata_assets.errors import StoreFailed
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    lake.write(table, partition, frames[0])
except StoreFailed as error:
    print(error)
    sys.exit(error.exit_code)
"""


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, frames: list[str]):
    lake = Lake(str(tmp_path / "lake"))
    lake.write(TABLE, JANUARY, bars(1))
    process = start_python(WRITER + FULL, lake.location, *frames)
    said, errors = process.communicate()
    assert process.returncode == 3, errors
    assert (
        said
        == f"{tmp_path / 'lake' / PATH} cannot be written: File too large; mend the folder or set another `lake:`\n"
    )
    assert lake.read(TABLE, JANUARY).equals(bars(1))
    assert files(tmp_path / "lake") == [PATH]


def test_a_folder_that_cannot_be_is_told(tmp_path: Path):
    """As root no permission bites: the lake lies below a regular file."""
    (tmp_path / "file").write_text("x")
    lake = Lake(str(tmp_path / "file/lake"))
    for act, verb in (
        (lambda: lake.write(TABLE, JANUARY, bars()), "written"),
        (lambda: lake.read(TABLE, JANUARY), "read"),
    ):
        with pytest.raises(
            StoreFailed,
            match=rf"file/lake/{PATH} cannot be {verb}: Not a directory; mend the folder or set another",
        ):
            act()
    assert lake.size(TABLE, JANUARY) is None
    assert lake.sweep() == 0


def test_a_folder_in_the_objects_place_is_told(tmp_path: Path):
    (tmp_path / PATH).mkdir(parents=True)
    lake = Lake(str(tmp_path))
    with pytest.raises(StoreFailed, match="cannot be written: Is a directory"):
        lake.write(TABLE, JANUARY, bars())
    with pytest.raises(StoreFailed, match="cannot be read: Is a directory"):
        lake.read(TABLE, JANUARY)
    assert files(tmp_path) == []


def test_a_bucket_that_is_not_there_is_told(s3: str):
    lake = Lake("s3://nobodys-bucket/prefix")
    acts = (
        lambda: lake.write(TABLE, JANUARY, bars()),
        lambda: lake.read(TABLE, JANUARY),
        lambda: lake.size(TABLE, JANUARY),
    )
    for act in acts:
        with pytest.raises(
            StoreFailed,
            match=r"^s3://nobodys-bucket/prefix/raw/.*: NoSuchBucket; there is no such bucket; make it",
        ):
            act()


def test_a_server_that_is_not_there_is_told_without_the_keys(
    s3: str, monkeypatch: pytest.MonkeyPatch
):
    with socket.create_server(("127.0.0.1", 0)) as free:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
    monkeypatch.setattr(
        "botocore.endpoint.time", type("Clock", (), {"sleep": staticmethod(lambda seconds: None)})
    )
    with pytest.raises(
        StoreFailed,
        match="EndpointConnectionError; the server does not answer; check AWS_ENDPOINT_URL",
    ) as told:
        Lake("s3://bucket/prefix").read(TABLE, JANUARY)
    assert "CANARY" not in str(told.value)


def test_keys_that_are_not_there_are_told(s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(
        StoreFailed, match="NoCredentialsError; there are no AWS credentials; set AWS_ACCESS_KEY_ID"
    ):
        Lake("s3://bucket/prefix").read(TABLE, JANUARY)


def test_an_answer_that_breaks_off_is_told(s3: str, monkeypatch: pytest.MonkeyPatch):
    """A server promises a thousand bytes and hangs up after ten, as often as it is asked."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            for _ in range(ATTEMPTS):
                connection, _ = server.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(
                        b"HTTP/1.1 200 OK\r\nETag: x\r\nContent-Length: 1000\r\nContent-Type: x/y\r\n\r\n0123456789"
                    )

        thread = threading.Thread(target=answer)
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(
            StoreFailed,
            match=r"^s3://bucket/prefix/raw/.*: \w+; the server's answers break off; check AWS_ENDPOINT_URL",
        ):
            Lake("s3://bucket/prefix").read(TABLE, JANUARY)
        thread.join()

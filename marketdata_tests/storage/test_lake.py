"""The lake: one contract for a local folder and for S3, through crashes, full disks and damaged
objects.
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
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moto.server import ThreadedMotoServer

from marketdata_assets.errors import Damaged, StoreFailed
from marketdata_assets.model.bar import BAR_SCHEMA, COLUMN_NAMES, empty_bars
from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import market_folder, raw_table, rollup_table
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.model.window import Window
from marketdata_assets.storage.fingerprint import fingerprint
from marketdata_assets.storage.lake import Lake
from marketdata_assets.storage.parquet import decode
from marketdata_assets.storage.s3_client import MAX_ATTEMPTS
from marketdata_assets.transforms.rollup import roll_up
from marketdata_tests.samples import (
    BTC,
    DECIMALS,
    FEBRUARY,
    JANUARY,
    at,
    frame,
    kill,
    minutes,
    raw_object,
    row,
    start_python,
)
from marketdata_tests.samples import random_bars as bars

pytestmark = pytest.mark.server

TABLE = raw_table(TIMEFRAMES["1m"])
PATH = "raw/ohlcv_1m/market=binance%3ABTC-USDT/month=2024-01/data.parquet"


# ---------------------------------------------------------------- a folder and S3
@dataclass
class Place:
    """A lake, and its objects as its folder or bucket has them."""

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
    """Run a real S3 server on a free port, with the usual AWS variables set. Yield its address."""
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
    """Return an empty lake, in a folder and in a bucket."""
    if request.param == "folder":
        return Place(Lake(str(tmp_path / "lake")), base=tmp_path / "lake")
    request.getfixturevalue("s3")
    return Place(Lake(f"s3://bucket/{tmp_path.name}"), bucket=boto3.resource("s3").Bucket("bucket"))


# ---------------------------------------------------------------- one contract for both
def test_a_missing_object_is_none(place: Place):
    assert place.lake.read(TABLE, JANUARY) is None
    assert place.lake.size(TABLE, JANUARY) is None
    assert place.lake.remove_abandoned_uploads() == 0


def test_written_bars_are_read_again(place: Place):
    stored = place.lake.write(TABLE, JANUARY, bars())
    content = place.get(PATH)
    assert content is not None
    assert (stored.bytes, stored.digest) == (len(content), fingerprint(bars()))
    assert place.lake.size(TABLE, JANUARY) == len(content)
    assert place.lake.read(TABLE, JANUARY).equals(bars())
    assert place.names() == [PATH]


def test_sizes_of_a_whole_table_at_once(place: Place):
    assert place.lake.list_sizes(TABLE) == {}
    partitions = [
        Partition.parse(f"{market}|2024-{month:02}-01")
        for market in ("binance:BTC-USDT", "kraken:X-Y_Y")
        for month in (1, 2, 3)
    ]
    stored = {p.stored_key: place.lake.write(TABLE, p, bars()).bytes for p in partitions}
    place.lake.write(rollup_table(TIMEFRAMES["1h"]), JANUARY, bars())
    place.lake.quarantine_object(TABLE, partitions[-1])
    del stored[partitions[-1].stored_key]
    sizes = place.lake.list_sizes(TABLE)
    assert sizes == stored
    assert {market for market, _ in sizes} == {"binance:BTC-USDT", "kraken:X-Y_Y"}
    assert {month for _, month in sizes} == {"2024-01-01", "2024-02-01", "2024-03-01"}


@settings(max_examples=20)
@given(
    st.lists(st.one_of(DECIMALS, st.just(Decimal(0))), min_size=1, max_size=12), st.integers(0, 3)
)
def test_every_digit_comes_back(place: Place, values: list[Decimal], missing: int):
    """Up to 26 digits, at any scale, with nulls in optional columns; the column keeps its type."""
    rows = [
        row(moment, close=value, quote_volume=value)
        for moment, value in zip(minutes(len(values)), values, strict=True)
    ]
    for r in rows[:missing]:
        r["quote_volume"] = r["trades"] = None
    place.lake.write(TABLE, JANUARY, frame(rows))
    found = place.lake.read(TABLE, JANUARY)
    assert found.schema == pl.Schema(BAR_SCHEMA)
    assert found["close"].to_list() == values
    assert found["quote_volume"].to_list() == [r["quote_volume"] for r in rows]


def test_an_object_without_bars_is_read_as_no_bars(place: Place):
    place.lake.write(TABLE, JANUARY, empty_bars())
    assert place.lake.read(TABLE, JANUARY).equals(empty_bars())


def test_a_write_replaces_the_whole_object_and_no_other(place: Place):
    other, hourly = (
        Partition(Market("binance", "ETH/USDT"), JANUARY.month),
        rollup_table(TIMEFRAMES["1h"]),
    )
    later = bars(2).with_columns(pl.col("open_time").dt.offset_by("1mo"))
    place.lake.write(TABLE, FEBRUARY, later)
    place.lake.write(TABLE, other, bars(3))
    place.lake.write(TABLE, JANUARY, bars(4, 500))
    place.lake.write(TABLE, JANUARY, bars(5, 3))
    rolled_up = roll_up(bars(6), TIMEFRAMES["1m"], [TIMEFRAMES["1h"]], whole=JANUARY.month)[
        TIMEFRAMES["1h"]
    ]
    place.lake.write(hourly, JANUARY, rolled_up)
    assert place.lake.read(TABLE, JANUARY).equals(bars(5, 3))
    assert place.lake.read(TABLE, FEBRUARY).equals(later)
    assert place.lake.read(TABLE, other).equals(bars(3))
    assert place.lake.read(hourly, JANUARY).equals(rolled_up)
    assert len(place.names()) == 4


def test_the_same_rows_give_the_same_bytes(place: Place):
    first = place.lake.write(TABLE, JANUARY, bars())
    pieces = pl.concat([bars()[i : i + 7] for i in range(0, 100, 7)], rechunk=False)
    assert pieces.n_chunks() > 1
    assert place.lake.write(TABLE, JANUARY, pieces) == first


def changed_object(change: Any) -> bytes:
    """Return a good object of a changed frame."""
    sink = io.BytesIO()
    change(bars()).write_parquet(sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello, this is text\n" * 20,
        b"PAR1" + b"\x00" * 50 + b"PAR1",
        raw_object(bars())[:-1],
        raw_object(bars())[: len(raw_object(bars())) // 2],
        raw_object(bars())[:100],
        b"x" * 500 + raw_object(bars())[500:],
        changed_object(lambda frame: frame.drop("close")),
        changed_object(lambda frame: frame.rename({"volume": "amount"})),
        changed_object(lambda frame: frame.with_columns(pl.lit("much").alias("volume"))),
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
def test_a_damaged_object_is_reported_and_quarantined(place: Place, content: bytes):
    place.put(PATH, content)
    with pytest.raises(
        Damaged, match=r"data.parquet is damaged .*backfill. fetches it again"
    ) as caught:
        place.lake.read(TABLE, JANUARY)
    assert "\n" not in str(caught.value)
    assert place.lake.quarantine_object(TABLE, JANUARY).endswith(PATH + ".damaged")
    assert place.lake.read(TABLE, JANUARY) is None
    assert place.get(PATH + ".damaged") == content
    place.lake.write(TABLE, JANUARY, bars())
    assert place.lake.read(TABLE, JANUARY).equals(bars())


def test_a_flipped_bit_is_reported_or_changes_nothing():
    """Checksums protect the pages. A footer with a flipped bit may hold any nonsense, and never
    raises another kind of error.
    """
    content = raw_object(bars())
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    reported = 0
    for bit in range(0, 8 * len(content), 53):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            found = decode(bytes(damaged), TABLE, name="it")
        except Damaged:
            reported += 1
        else:
            assert bit >= 8 * footer or found.equals(bars())
    assert reported > 500


def make_older(file: Path) -> None:
    """Give a file the time of an hour ago, so that it has not just changed."""
    hour_ago = file.stat().st_mtime - 3600
    os.utime(file, (hour_ago, hour_ago))


def test_an_object_on_a_disk_that_is_read_again_is_kept_until_it_changes(tmp_path: Path):
    lake, file = Lake(str(tmp_path)), tmp_path / PATH
    lake.write(TABLE, JANUARY, bars())
    make_older(file)
    window = Window(at("2024-01-01"), at("2024-01-01T00:30"))
    expected = bars().filter(pl.col("open_time") < window.end)
    for _ in range(2):
        assert lake.read_inside(TABLE, JANUARY, window).equals(expected)
    before = file.stat()
    file.write_bytes(b"x" * before.st_size)  # in place, and with the time of before
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert lake.read_inside(TABLE, JANUARY, window).equals(expected)
    assert lake.scan(TABLE, [JANUARY], JANUARY.month).collect().equals(bars())
    os.utime(file)
    with pytest.raises(Damaged, match="is damaged"):
        lake.read_inside(TABLE, JANUARY, window)
    with pytest.raises(Damaged, match="is damaged"):
        lake.scan(TABLE, [JANUARY], JANUARY.month).collect()
    lake.write(TABLE, JANUARY, bars(7))
    assert lake.read_inside(TABLE, JANUARY, JANUARY.month).equals(bars(7))
    lake.delete(TABLE, JANUARY)
    assert lake.read_inside(TABLE, JANUARY, window) is None


def test_a_scan_reads_what_is_asked_of_it(place: Place):
    """Columns, rows and their number in every order, also with the markets in front, whether an
    object is kept in memory or not.
    """
    other = Partition(Market("binance", "ETH/USDT"), JANUARY.month)
    written = {JANUARY: bars(1), other: bars(2)}
    for partition, frame_ in written.items():
        place.lake.write(TABLE, partition, frame_)
    if place.base:
        make_older(place.base / PATH)
    for _ in range(2):
        place.lake.read_inside(TABLE, JANUARY, JANUARY.month)
    every = pl.concat(
        frame_.select(pl.lit(partition.market.key).alias("market"), pl.all())
        for partition, frame_ in written.items()
    )
    partitions = [JANUARY, FEBRUARY, other]
    found = place.lake.scan(TABLE, partitions, JANUARY.month, with_market=True)
    large = pl.col("volume") > every["volume"].median()
    for change in (
        lambda frame_: frame_,
        lambda frame_: frame_.head(130),
        lambda frame_: frame_.filter(large).select("close", "market"),
        lambda frame_: frame_.filter(large).head(3).select("trades"),
        lambda frame_: frame_.select("market").unique(maintain_order=True),
        lambda frame_: frame_.select(pl.len()),
    ):
        assert change(found).collect().equals(change(every))


def test_columns_are_bound_by_name(place: Place):
    place.put(
        PATH,
        changed_object(
            lambda frame: frame.select(reversed(COLUMN_NAMES)).with_columns(
                pl.lit(1).alias("extra")
            )
        ),
    )
    assert place.lake.read(TABLE, JANUARY).equals(bars())


# ---------------------------------------------------------------- objects
def test_the_folder_of_a_market():
    assert market_folder(BTC.key) == "market=binance%3ABTC-USDT"
    assert (
        market_folder(Market("binance", "A.$/B$.:C-250328").key)
        == "market=binance%3AA.%24-B%24._C-250328"
    )
    assert TABLE.path(JANUARY) == PATH


HASHES = """
import hashlib, os, sys
import polars as pl
from marketdata_tests.samples import raw_object
assert pl.thread_pool_size() == int(os.environ["POLARS_MAX_THREADS"])
whole = pl.read_parquet(sys.argv[1])
pieces = pl.concat([whole[i : i + 333] for i in range(0, whole.height, 333)], rechunk=False)
frames = (whole, pieces, whole.reverse().sort("open_time"))
print(*(hashlib.sha256(raw_object(frame)).hexdigest() for frame in frames))
"""


def test_files_are_byte_identical_for_any_number_of_threads(tmp_path: Path):
    bars(7, 5000).write_parquet(tmp_path / "bars")
    running = [
        start_python(
            HASHES, str(tmp_path / "bars"), env={**os.environ, "POLARS_MAX_THREADS": str(n)}
        )
        for n in (1, 2, 8)
    ]
    outputs = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], outputs
    assert len({digest for stdout, _ in outputs for digest in stdout.split()}) == 1


# ---------------------------------------------------------------- crashes
WRITER = """
import itertools, sys
import polars as pl
from marketdata_assets.storage.lake import Lake
from marketdata_assets.model.table import raw_table
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.model.partition import Partition
table, partition = raw_table(TIMEFRAMES["1m"]), Partition.parse("binance:BTC-USDT|2024-01-01")
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
    """Write two frames as plain files, for a writer process."""
    bars(1, 3000).write_parquet(tmp_path / "a")
    bars(2, 500).write_parquet(tmp_path / "b")
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def files(folder: Path) -> list[str]:
    """Return all files below a folder."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_a_reader_never_sees_half_an_object_whenever_a_writer_is_killed(
    tmp_path: Path, frames: list[str]
):
    """Ten writers rewrite one object, two at a time, and are killed one by one, each at a random
    moment.
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
            lake.remove_abandoned_uploads()
    finally:
        for writer in writers:
            kill(writer)
    lake.remove_abandoned_uploads()
    assert files(tmp_path / "lake") == [PATH]
    assert is_whole()


STOPPED = """
import os
def stop(*args):
    print("temporary file written", flush=True)
    sys.stdin.read()
os.{moment} = stop
lake.write(table, partition, frames[1])
"""


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_files_of_dead_writers_are_removed_and_those_of_living_ones_stay(
    tmp_path: Path, frames: list[str], moment: str
):
    """A writer is killed after it has written its temporary file and before it renames it."""
    lake = Lake(str(tmp_path / "lake"))
    before = lake.write(TABLE, JANUARY, bars(1))
    writer = start_python(WRITER + STOPPED.format(moment=moment), lake.location, *frames)
    assert writer.stdout.readline() == "temporary file written\n"
    assert len(files(tmp_path / "lake")) == 2
    assert lake.remove_abandoned_uploads() == 0
    assert len(files(tmp_path / "lake")) == 2
    kill(writer)
    stored = pl.read_parquet((tmp_path / "lake" / PATH).read_bytes()).select(COLUMN_NAMES)
    assert fingerprint(stored.cast(BAR_SCHEMA)) == before.digest
    assert lake.remove_abandoned_uploads() == 1
    assert files(tmp_path / "lake") == [PATH]
    assert lake.read(TABLE, JANUARY).equals(bars(1))


# ---------------------------------------------------------------- errors of stores
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
    output, errors = process.communicate()
    assert process.returncode == 3, errors
    assert output == (
        f"{tmp_path / 'lake' / PATH} cannot be written: File too large; "
        "mend the folder or set another `lake:`\n"
    )
    assert lake.read(TABLE, JANUARY).equals(bars(1))
    assert files(tmp_path / "lake") == [PATH]


def test_an_impossible_folder_is_reported(tmp_path: Path):
    """The lake lies below a regular file, because permissions do not stop root."""
    (tmp_path / "file").write_text("x")
    lake = Lake(str(tmp_path / "file/lake"))
    for act in (lambda: lake.write(TABLE, JANUARY, bars()), lambda: lake.read(TABLE, JANUARY)):
        with pytest.raises(
            StoreFailed,
            match=r"file/lake/\S+/ohlcv_1m\S+ cannot be read: Not a directory; mend the folder",
        ):
            act()
    assert lake.size(TABLE, JANUARY) is None
    assert lake.remove_abandoned_uploads() == 0


def test_a_folder_in_place_of_the_object_is_reported(tmp_path: Path):
    (tmp_path / PATH).mkdir(parents=True)
    lake = Lake(str(tmp_path))
    with pytest.raises(StoreFailed, match="cannot be written: Is a directory"):
        lake.write(TABLE, JANUARY, bars())
    with pytest.raises(StoreFailed, match="cannot be read: Is a directory"):
        lake.read(TABLE, JANUARY)
    assert files(tmp_path) == []


def test_a_missing_bucket_is_reported(s3: str):
    lake = Lake("s3://missing/prefix")
    acts = (
        lambda: lake.write(TABLE, JANUARY, bars()),
        lambda: lake.read(TABLE, JANUARY),
        lambda: lake.size(TABLE, JANUARY),
    )
    for act in acts:
        with pytest.raises(
            StoreFailed,
            match=r"^s3://missing/prefix/\S*raw/.*: NoSuchBucket; there is no such bucket; make it",
        ):
            act()


def test_a_server_that_does_not_listen_is_reported_without_the_keys(
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
    ) as caught:
        Lake("s3://bucket/prefix").read(TABLE, JANUARY)
    assert "CANARY" not in str(caught.value)


def test_missing_keys_are_reported(s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(
        StoreFailed, match="NoCredentialsError; there are no AWS credentials; set AWS_ACCESS_KEY_ID"
    ):
        Lake("s3://bucket/prefix").read(TABLE, JANUARY)


def test_an_answer_that_breaks_off_is_reported(s3: str, monkeypatch: pytest.MonkeyPatch):
    """A server announces a thousand bytes and closes after ten, at every request."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            for _ in range(MAX_ATTEMPTS):
                connection, _ = server.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(
                        b"HTTP/1.1 200 OK\r\nETag: x\r\nContent-Length: 1000\r\n"
                        b"Content-Type: x/y\r\n\r\n0123456789"
                    )

        thread = threading.Thread(target=answer)
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(
            StoreFailed,
            match=r"^s3://bucket/prefix/raw/.*: \w+; the server's answers break off; ",
        ):
            Lake("s3://bucket/prefix").read(TABLE, JANUARY)
        thread.join()


def test_rows_of_another_month_are_not_returned(place: Place):
    """Somebody copied January's object below February."""
    place.lake.write(TABLE, FEBRUARY, bars(2))
    for read in (
        lambda: place.lake.read(TABLE, FEBRUARY),
        lambda: place.lake.read_inside(TABLE, FEBRUARY, JANUARY.month),
    ):
        with pytest.raises(Damaged, match="holds rows of another month; `marketdata backfill`"):
            read()

"""The lake in S3, against real servers on loopback and through a proxy that damages requests: an
acknowledged object is stored completely.

The servers are moto, ministack (keeps its data through kill -9), and the one that
MARKETDATA_TEST_S3_ENDPOINT names, with the keys of the usual AWS variables.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import random
import re
import secrets
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from aiohttp import web

from marketdata_assets.context import open_context
from marketdata_assets.errors import Damaged, StoreFailed
from marketdata_assets.flows.fetch.open_partition import IngestResult
from marketdata_assets.flows.fetch.plan import BackfillPlanner
from marketdata_assets.flows.operate.backfill import BacklogFinder
from marketdata_assets.flows.read.coverage import Coverage, CoverageReporter
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.model.bar import BAR_SCHEMA
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import raw_table
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.model.window import Window
from marketdata_assets.settings.universe import Settings
from marketdata_assets.sources.sandbox.bars import generate_bars
from marketdata_assets.storage import s3, s3_client
from marketdata_assets.storage.lake import Lake
from marketdata_assets.storage.ledger_files import NAME as LEDGER_ROWS
from marketdata_assets.storage.objects import open_object_store
from marketdata_assets.storage.s3_client import MAX_ATTEMPTS
from marketdata_assets.storage.views import open_views, run_query
from marketdata_tests.conftest import SANDBOX_NOW, universe
from marketdata_tests.flows.fetch.test_ingest import everything_is_true, exchange_at
from marketdata_tests.s3_proxy import (
    PASSING,
    Ending,
    Fault,
    Proxy,
    ProxyRequest,
    answer,
    open_proxy,
    refusal,
)
from marketdata_tests.samples import (
    FEBRUARY,
    JANUARY,
    frame,
    kill,
    minutes,
    moved_to,
    raw_object,
    row,
    start_python,
)
from marketdata_tests.samples import random_bars as bars
from marketdata_tests.sources.test_fetching import self_signed
from marketdata_tests.steps import (
    assert_bars,
    at,
    bar_requests,
    lake_files,
    partitions,
    run_derive,
    run_ingest,
    serving,
    window,
)

pytestmark = pytest.mark.server

NAMED = os.environ.get("MARKETDATA_TEST_S3_ENDPOINT")
M1 = TIMEFRAMES["1m"]
TABLE = raw_table(M1)
PATH = TABLE.path(JANUARY)
GOOD = bars(1)


# ---------------------------------------------------------------- servers
@dataclass
class Store:
    """A bucket of a server, and its objects as the server has them."""

    kind: str
    url: str
    bucket: str
    client: Any

    @property
    def location(self) -> str:
        return f"s3://{self.bucket}/lake"

    def lake(self) -> Lake:
        """Open a lake of its own, as another process or another host does."""
        return Lake(self.location)

    def contents(self) -> dict[str, bytes]:
        """Return every object below the lake, byte for byte, without copies of a ledger's rows."""
        pages = self.client.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket, Prefix="lake/"
        )
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
        return {
            key.removeprefix("lake/"): self.client.get_object(Bucket=self.bucket, Key=key)[
                "Body"
            ].read()
            for key in keys
            if not key.endswith(LEDGER_ROWS)
        }

    def put(self, path: str, content: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=f"lake/{path}", Body=content)

    def uploads(self) -> list[str]:
        """Return the ids of unfinished multipart uploads."""
        return [
            upload["UploadId"]
            for upload in self.client.list_multipart_uploads(Bucket=self.bucket).get("Uploads", ())
        ]


def open_store(kind: str, url: str, patch: pytest.MonkeyPatch) -> Store:
    """Create a fresh bucket, and set the AWS variables for it; the keys of the named server are
    already set.
    """
    if kind != "named":
        for name, value in {
            "AWS_ACCESS_KEY_ID": "CANARYID",
            "AWS_SECRET_ACCESS_KEY": "CANARYSECRET",
        }.items():
            patch.setenv(name, value)
    patch.setenv("AWS_ENDPOINT_URL", url)
    patch.setenv("AWS_REGION", "us-east-1")
    patch.setenv("NO_PROXY", "127.0.0.1")
    client, bucket = s3_client.create_client(), f"test-{secrets.token_hex(6)}"
    client.create_bucket(Bucket=bucket)
    return Store(kind, url, bucket, client)


@contextmanager
def ministack(folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run a server that stores its objects in that folder. Yield its address and its process, which
    is killed at the end.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    place = {
        "GATEWAY_HOST": "127.0.0.1",
        "GATEWAY_PORT": port,
        "S3_PERSIST": "1",
        "S3_DATA_DIR": str(folder),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "ministack"],
        env={**os.environ, **place},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(600):
            try:
                socket.create_connection(("127.0.0.1", int(port)), timeout=1).close()
                break
            except OSError:
                threading.Event().wait(0.05)
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module", params=["moto", "ministack", *(["named"] if NAMED else [])])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, str]]:
    """Return kind and address of each server in turn."""
    if request.param == "ministack":
        with ministack(tmp_path_factory.mktemp("ministack")) as (url, _):
            yield request.param, url
    else:
        yield (
            request.param,
            NAMED if request.param == "named" else request.getfixturevalue("s3_server"),
        )


@pytest.fixture
def store(server: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> Store:
    """Return a fresh bucket on each server in turn."""
    return open_store(*server, monkeypatch)


@pytest.fixture
def fast(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Return a fresh bucket on moto."""
    return open_store("moto", s3_server, monkeypatch)


@pytest.fixture
def proxy(fast: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Run a proxy before `fast`; lakes that are opened from now on use it."""
    with open_proxy(fast.url) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let botocore not pause, and give a silent server up soon."""
    monkeypatch.setattr(
        "botocore.endpoint.time", type("Clock", (), {"sleep": staticmethod(lambda seconds: None)})
    )
    monkeypatch.setattr(s3_client, "READ_TIMEOUT_SECONDS", 5)


def acts(lake: Lake) -> dict[str, Callable[[], Any]]:
    """Return every call that makes requests, by name."""
    return {
        "read": lambda: lake.read(TABLE, JANUARY),
        "write": lambda: lake.write(TABLE, JANUARY, bars(2)),
        "create": lambda: lake.write(TABLE, FEBRUARY, bars(2)),
        "size": lambda: lake.size(TABLE, JANUARY),
        "sizes": lambda: lake.list_sizes(TABLE),
        "delete": lambda: lake.delete(TABLE, JANUARY),
        "quarantine": lambda: lake.quarantine_object(TABLE, JANUARY),
        "classes": lambda: lake.list_storage_classes(TABLE),
        "set class": lambda: lake.set_storage_class(TABLE, JANUARY, "STANDARD_IA"),
    }


# ---------------------------------------------------------------- on every server
def test_a_lake_on_each_server(store: Store):
    """The contract of test_lake, once, on servers of different makers."""
    lake = store.lake()
    assert (lake.read(TABLE, JANUARY), lake.size(TABLE, JANUARY), lake.list_sizes(TABLE)) == (
        None,
        None,
        {},
    )
    for seed in (1, 2, 3):
        written = lake.write(TABLE, JANUARY, bars(seed))
        assert lake.read(TABLE, JANUARY).equals(bars(seed))
        assert store.lake().size(TABLE, JANUARY) == written.bytes
    place = open_object_store(store.location)
    place.write("empty", b"")
    assert (place.read("empty"), place.find("empty")) == (b"", (0, ""))
    lake.write(TABLE, FEBRUARY, moved_to(GOOD, FEBRUARY))
    assert set(lake.list_sizes(TABLE)) == {
        ("binance:BTC-USDT", "2024-01-01"),
        ("binance:BTC-USDT", "2024-02-01"),
    }
    assert lake.list_storage_classes(TABLE) == {PATH: "STANDARD", TABLE.path(FEBRUARY): "STANDARD"}
    window = Window(JANUARY.month.start, FEBRUARY.month.end)
    assert lake.scan(TABLE, [JANUARY, FEBRUARY], window).collect().height == 200
    assert lake.quarantine_object(TABLE, JANUARY).endswith(PATH + ".damaged")
    lake.delete(TABLE, FEBRUARY)
    store.lake().delete(TABLE, FEBRUARY)
    assert set(store.contents()) == {"empty", PATH + ".damaged"}
    assert (lake.read(TABLE, JANUARY), lake.list_sizes(TABLE), store.uploads()) == (None, {}, [])


def test_one_of_two_writers_wins_and_the_other_gets_an_error(store: Store):
    """Two hosts have read one object; and after that, neither finds one, and both create it."""
    store.lake().write(TABLE, JANUARY, GOOD)
    for partition in (JANUARY, FEBRUARY):
        first, second = store.lake(), store.lake()
        two, three = (moved_to(bars(seed), partition) for seed in (2, 3))
        first.read(TABLE, partition), second.read(TABLE, partition)
        first.write(TABLE, partition, two)
        for _ in range(2):  # a second attempt does not help
            with pytest.raises(
                StoreFailed,
                match=r"^s3://.*/data.parquet was changed by another writer meanwhile; [^\n]*$",
            ):
                second.write(TABLE, partition, three)
        assert second.read(TABLE, partition).equals(two)
        second.write(TABLE, partition, three)
        assert first.read(TABLE, partition).equals(three)


def test_two_writers_of_the_same_bars_are_no_conflict(store: Store):
    first, second = store.lake(), store.lake()
    for lake in (first, second):
        lake.read(TABLE, JANUARY)
    assert first.write(TABLE, JANUARY, GOOD) == second.write(TABLE, JANUARY, GOOD)
    assert store.lake().read(TABLE, JANUARY).equals(GOOD)


def test_an_object_that_another_writer_has_replaced_is_not_removed(store: Store):
    """radosgw 16 fails here: it ignores the condition of a removal."""
    first, second = store.lake(), store.lake()
    first.write(TABLE, JANUARY, GOOD)
    second.read(TABLE, JANUARY)
    first.write(TABLE, JANUARY, bars(2))
    with pytest.raises(StoreFailed, match="was changed by another writer"):
        second.delete(TABLE, JANUARY)
    assert first.read(TABLE, JANUARY).equals(bars(2))


def test_an_object_that_another_writer_has_removed_is_not_created_again(store: Store):
    first, second = store.lake(), store.lake()
    first.write(TABLE, JANUARY, GOOD)
    second.read(TABLE, JANUARY)
    first.delete(TABLE, JANUARY)
    with pytest.raises(StoreFailed, match="was changed by another writer"):
        second.write(TABLE, JANUARY, bars(3))
    assert store.contents() == {}


def add_rows(
    lake: Lake, mine: Iterator[int], acked: set[int], tried: set[int], rounds: int
) -> None:
    """Add a host's own minutes to an object that others write too, one by one, until `rounds` are
    acknowledged.
    """
    while len(acked) < rounds:
        number = next(mine)
        tried.add(number)
        try:
            stored = lake.read(TABLE, JANUARY)
            more = frame([row(minutes(1)[0] + number * timedelta(minutes=1))])
            lake.write(
                TABLE,
                JANUARY,
                more if stored is None else pl.concat([stored, more]).sort("open_time"),
            )
        except StoreFailed:
            continue
        acked.add(number)


def many_writers(store: Store, writers: int, rounds: int) -> tuple[list[int], set[int], set[int]]:
    """Let many hosts write. Return the stored minutes, the acknowledged ones, and all that a host
    has tried to store.
    """
    acked, tried = [set() for _ in range(writers)], [set() for _ in range(writers)]
    threads = [
        threading.Thread(
            target=add_rows, args=(store.lake(), count(i, writers), acked[i], tried[i], rounds)
        )
        for i in range(writers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = Lake(store.location).read(TABLE, JANUARY)
    stored = [(t - minutes(1)[0]) // timedelta(minutes=1) for t in found["open_time"]]
    return stored, set().union(*acked), set().union(*tried)


def test_eight_writers_lose_nothing(store: Store):
    """Each adds three rows to one object. Acknowledged rows are stored, refused ones are not."""
    if store.kind == "moto":
        pytest.skip("moto compares the ETag and stores in two steps: two writers may both win")
    stored, acked, _ = many_writers(store, 8, 3)
    assert len(acked) == 24
    assert sorted(stored) == sorted(acked)


@dataclass
class Writer:
    """Rewrites one object until its server is gone. `acked` and `tried` are the numbers of the last
    acknowledged and the last attempted frame.
    """

    partition: Partition
    frames: list[pl.DataFrame]
    done: threading.Semaphore
    acked: int = -1
    tried: int = -1

    def write(self, lake: Lake) -> None:
        try:
            lake.read(TABLE, self.partition)
            while True:
                self.tried += 1
                lake.write(TABLE, self.partition, self.frames[self.tried % len(self.frames)])
                self.acked = self.tried
                self.done.release()
        except StoreFailed:
            self.done.release(100)

    def check(self, lake: Lake) -> None:
        """Compare the object with the frames. The server itself does not write atomically: when it
        dies, it may leave a part of the object, which the lake reports and can replace.
        """
        try:
            found = lake.read(TABLE, self.partition)
        except StoreFailed:
            assert self.tried > self.acked
            lake.write(TABLE, self.partition, self.frames[self.tried % len(self.frames)])
            self.acked, found = self.tried, lake.read(TABLE, self.partition)
        allowed = [self.frames[i % len(self.frames)] for i in (self.acked, self.tried) if i >= 0]
        assert any(found.equals(one) for one in allowed) if self.acked >= 0 else True


def test_a_server_that_is_killed_keeps_what_it_has_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """kill -9, three times, while two writers work: every object is the last acknowledged one or
    the attempted one, never a mixture.
    """
    dice, frames, done = (
        random.Random(),
        [bars(seed, 2000) for seed in range(5)],
        threading.Semaphore(0),
    )
    writers, location = (
        [
            Writer(partition, [moved_to(frame, partition) for frame in frames], done)
            for partition in (JANUARY, FEBRUARY)
        ],
        "",
    )
    for turn in range(4):
        with ministack(tmp_path / "data") as (url, process):
            location = location or open_store("ministack", url, monkeypatch).location
            monkeypatch.setenv("AWS_ENDPOINT_URL", url)
            for writer in writers:
                writer.check(Lake(location))
            if turn < 3:
                threads = [
                    threading.Thread(target=writer.write, args=(Lake(location),))
                    for writer in writers
                ]
                for thread in threads:
                    thread.start()
                for _ in range(dice.randint(4, 30)):
                    done.acquire()
                process.kill()
                for thread in threads:
                    thread.join()
    assert max(writer.acked for writer in writers) > 0


@pytest.mark.skipif(NAMED is None, reason="moto and ministack take any secret")
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("AWS_SECRET_ACCESS_KEY", "SignatureDoesNotMatch; the AWS_SECRET"),
        ("AWS_ACCESS_KEY_ID", "InvalidAccessKeyId; the server"),
    ],
)
def test_wrong_keys_are_reported(monkeypatch: pytest.MonkeyPatch, name: str, text: str):
    store = open_store("named", str(NAMED), monkeypatch)
    monkeypatch.setenv(name, "CANARYWRONG")
    for act in acts(store.lake()).values():
        message = message_of(act) or ""
        assert text in message
        assert "CANARY" not in message


# ---------------------------------------------------------------- abandoned uploads
def test_only_abandoned_uploads_are_aborted(store: Store, monkeypatch: pytest.MonkeyPatch):
    """Uploads below this lake that are older than a day are aborted. moto reports 2010 as the
    beginning of every upload.
    """
    keys = ["lake/raw/x", "lake/raw/y", "others/raw/x"]
    uploads = [
        store.client.create_multipart_upload(Bucket=store.bucket, Key=key)["UploadId"]
        for key in keys
    ]
    store.client.upload_part(
        Bucket=store.bucket, Key=keys[0], UploadId=uploads[0], PartNumber=1, Body=b"x" * 100
    )
    if store.kind != "moto":
        assert store.lake().remove_abandoned_uploads() == 0
        assert set(store.uploads()) == set(uploads)
        monkeypatch.setattr(s3, "ABANDONED_AFTER", timedelta(days=-1))
    assert store.lake().remove_abandoned_uploads() == 2
    assert store.uploads() == uploads[2:]
    assert store.lake().remove_abandoned_uploads() == 0


def test_keys_that_may_not_list_uploads_can_use_the_lake(fast: Store, proxy: Proxy):
    proxy.fault = lambda request: (
        Fault(is_applied=False, answer=refusal(403, "AccessDenied"))
        if "uploads" in request.path
        else None
    )
    lake = fast.lake()
    assert lake.remove_abandoned_uploads() == 0
    assert len(proxy.requests) == 1
    lake.write(TABLE, JANUARY, GOOD)


# ---------------------------------------------------------------- passing faults
@pytest.mark.parametrize("name", PASSING)
def test_passing_faults_are_survived(
    fast: Store, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, name: str
):
    """The first two answers to every call are damaged. A write that was applied already does not
    conflict with its own repetition.
    """
    fault, times = PASSING[name], 2
    if name in ("silent", "stalled"):
        monkeypatch.setattr(s3_client, "READ_TIMEOUT_SECONDS", 0.15)
        times = 1
    lake = fast.lake()

    def repeated(act: Callable[[], Any]) -> Any:
        proxy.first(times, fault)
        return act()

    assert repeated(lambda: lake.read(TABLE, JANUARY)) is None
    for seed in (1, 2):  # the object is created, then replaced
        repeated(lambda seed=seed: lake.write(TABLE, JANUARY, bars(seed)))
        assert fast.contents() == {PATH: raw_object(bars(seed))}
        assert repeated(lambda: lake.read(TABLE, JANUARY)).equals(bars(seed))
    assert repeated(lambda: lake.size(TABLE, JANUARY)) == len(raw_object(bars(2)))
    assert list(repeated(lambda: lake.list_sizes(TABLE)).values()) == [len(raw_object(bars(2)))]
    assert repeated(lambda: lake.list_storage_classes(TABLE)) == {PATH: "STANDARD"}
    assert repeated(lambda: lake.quarantine_object(TABLE, JANUARY))
    assert fast.contents() == {PATH + ".damaged": raw_object(bars(2))}
    lake.write(TABLE, JANUARY, GOOD)
    repeated(lambda: lake.delete(TABLE, JANUARY))
    assert set(fast.contents()) == {PATH + ".damaged"}
    assert fast.uploads() == []


def test_writers_in_a_storm_lose_nothing(fast: Store, proxy: Proxy):
    """Four hosts, and every third request is damaged. Acknowledged rows are stored once, and no row
    is invented.
    """
    seed = random.randrange(10**6)
    dice, faults = (
        random.Random(seed),
        [fault for name, fault in PASSING.items() if name not in ("silent", "stalled")],
    )
    proxy.fault = lambda request: dice.choice(faults) if dice.random() < 0.33 else None
    stored, acked, tried = many_writers(fast, 4, 6)
    assert len(acked) == 24
    assert acked <= set(stored) <= tried, f"seed {seed}"
    assert len(stored) == len(set(stored))
    assert set(fast.contents()) == {PATH}
    assert fast.uploads() == []


# ---------------------------------------------------------------- lasting faults
LASTING = {
    "503": (PASSING["503"], "ServiceUnavailable; check the bucket"),
    "slow down": (
        PASSING["slow down"],
        "SlowDown; the server refuses so many requests; the next run continues",
    ),
    "500 after apply": (PASSING["500 after apply"], "InternalError; check the bucket"),
    "lost response": (
        PASSING["lost response"],
        "ConnectionClosedError; the server's answers break off",
    ),
    "reset before": (
        PASSING["reset before"],
        "ConnectionClosedError; the server's answers break off",
    ),
    "truncated": (PASSING["truncated"], "the server's answers break off"),
    "bent": (PASSING["bent"], ""),
    "silent": (
        PASSING["silent"],
        "ReadTimeoutError; the server does not answer; check AWS_ENDPOINT_URL",
    ),
    "a web page": (
        Fault(is_applied=False, answer=answer(200, b"<html>CANARY welcome")),
        "AWS_ENDPOINT_URL",
    ),
    "moved": (
        Fault(is_applied=False, answer=answer(301, b"<html>CANARY")),
        "the bucket lies elsewhere; set AWS_REGION, or mend",
    ),
    "no such page": (
        Fault(is_applied=False, answer=answer(404, b"<html>CANARY nothing")),
        "check the bucket, AWS_ENDPOINT_URL",
    ),
}
REFUSALS = {
    (400, "ExpiredToken"): "the credentials have expired; get new ones",
    (403, "AccessDenied"): "these keys may not do that; give their owner s3:GetObject",
    (403, "InvalidAccessKeyId"): "the server has no such AWS_ACCESS_KEY_ID",
    (403, "SignatureDoesNotMatch"): "the AWS_SECRET_ACCESS_KEY does not fit",
    (400, "InvalidToken"): "the server does not accept this AWS_SESSION_TOKEN",
    (403, "RequestTimeTooSkewed"): "this machine's clock is wrong",
    (301, "PermanentRedirect"): "the bucket lies elsewhere; set AWS_REGION",
    (400, "AuthorizationHeaderMalformed"): "the bucket lies elsewhere; set AWS_REGION",
    (404, "NoSuchBucket"): "there is no such bucket; make it, or mend `lake:`",
    (418, "Teapot"): "check the bucket, AWS_ENDPOINT_URL and the AWS keys",
}
FAULTS = LASTING | {
    code: (
        Fault(is_applied=False, answer=refusal(status, code, "x-amz-bucket-region: eu-west-1")),
        f"{code}; {advice}",
    )
    for (status, code), advice in REFUSALS.items()
}


def message_of(act: Callable[[], Any]) -> str | None:
    """Return the message of our error, after a check that it hides its cause; None without one."""
    try:
        act()
    except StoreFailed as error:
        return (
            str(error)
            if error.__cause__ is None and error.__suppress_context__
            else f"it shows its cause: {error}"
        )
    return None


@pytest.mark.parametrize("name", FAULTS)
def test_lasting_faults_are_one_line_and_change_nothing(
    fast: Store, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, name: str
):
    """After a few attempts the error says what to do; it holds neither the server's text nor the
    keys.
    """
    if name == "silent":
        monkeypatch.setattr(s3_client, "READ_TIMEOUT_SECONDS", 0.1)
        monkeypatch.setattr(s3_client, "MAX_ATTEMPTS", 2)
    (fault, text), lake = FAULTS[name], fast.lake()
    for act_name in acts(lake):
        proxy.always(None)
        fast.put(PATH, raw_object(GOOD))
        fast.client.delete_object(Bucket=fast.bucket, Key=f"lake/{TABLE.path(FEBRUARY)}")
        assert lake.read(TABLE, JANUARY).equals(GOOD)
        assert lake.read(TABLE, FEBRUARY) is None
        proxy.always(fault)
        message = message_of(acts(lake)[act_name])
        if message is None:  # the answer had no body to damage
            assert name in ("truncated", "bent")
        else:
            assert re.match(rf"s3://{fast.bucket}/lake/[^ ]*: \w+; [^\n]*$", message)
            assert text in message
            assert "CANARY" not in message
        assert len(proxy.requests) <= MAX_ATTEMPTS**2
        content = fast.contents().get(PATH)
        assert content in (
            (raw_object(GOOD), raw_object(bars(2)), None)
            if fault.is_applied
            else (raw_object(GOOD),)
        )


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_named_and_followed_by_no_reader(fast: Store, proxy: Proxy, status: int):
    """Nothing, and no credential, reaches the host that the answer names."""
    fast.put(PATH, raw_object(GOOD))
    lake = fast.lake()
    uris = list(lake.find_uris(TABLE, [JANUARY], all_exist=True).values())
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        elsewhere.setblocking(False)
        location = f"Location: http://127.0.0.1:{elsewhere.getsockname()[1]}/CANARY"
        proxy.always(Fault(is_applied=False, answer=answer(status, b"", location)))
        ways = [
            lambda: lake.read(TABLE, JANUARY),
            lambda: lake.size(TABLE, JANUARY),
            lambda: list(lake.list_sizes(TABLE)),
            lambda: lake.write(TABLE, JANUARY, GOOD),
            lambda: sql_over(uris, "SELECT * FROM raw.ohlcv_1m"),
        ]
        for way in ways:
            message = message_of(way)
            assert message
            assert re.match(rf"s3://{fast.bucket}/lake/[^ ]*: \w+; [^\n]*$", message)
            assert "elsewhere" in message
            assert "CANARY" not in message
        with pytest.raises(BlockingIOError):
            elsewhere.accept()


def test_a_bucket_that_is_rolled_back_to_earlier_versions_is_noticed(fast: Store, tmp_path: Path):
    """An object of before, with another ETag, is no newer one; the ledger knows its revision."""
    ledger = Ledger(tmp_path)
    lake = Lake(fast.location, book=ledger.objects)
    lake.write(TABLE, JANUARY, GOOD)
    earlier = fast.contents()[PATH]
    lake.write(TABLE, JANUARY, bars(2))
    fast.put(PATH, earlier)
    for reader in (lake, Lake(fast.location, book=ledger.objects)):
        with pytest.raises(Damaged, match="or older than what was stored last"):
            reader.read(TABLE, JANUARY)
        assert reader.list_proven_sizes(TABLE) == {JANUARY.stored_key: None}
    ledger.close()


class Role:
    """An address that gives credentials for 60 seconds, as machines with a role have one."""

    def __init__(self) -> None:
        self.given: list[str] = []
        self.expired: set[str] = set()

    def expire(self) -> None:
        """The minute is over for all that were given."""
        self.expired.update(self.given)

    async def answer(self, request: web.Request) -> web.Response:
        self.given.append(f"CANARY{len(self.given)}")
        end = datetime.now(UTC) + timedelta(seconds=60)
        found = {"AccessKeyId": self.given[-1], "SecretAccessKey": "CANARYSECRET"}
        return web.json_response(found | {"Token": "CANARY", "Expiration": end.isoformat()})

    def refuse(self, request: ProxyRequest) -> Fault | None:
        """S3 knows no credential that has expired."""
        key = request.headers["authorization"].partition("Credential=")[2].partition("/")[0]
        is_valid = key in self.given and key not in self.expired
        return None if is_valid else Fault(is_applied=False, answer=refusal(400, "ExpiredToken"))


def test_credentials_of_a_minute_are_renewed_by_every_reader(
    fast: Store, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
):
    """For ten minutes: a lake and a DuckDB connection that stay open all the time."""
    role = Role()
    fast.put(PATH, raw_object(GOOD))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with serving(role.answer) as url:
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{url}/role")
        proxy.fault = role.refuse
        lake = fast.lake()
        uris = list(lake.find_uris(TABLE, [JANUARY], all_exist=True).values())
        with open_views({TABLE: uris}, None) as connection:
            for minute in range(10):
                role.expire()
                assert lake.read(TABLE, JANUARY) is not None
                lake.write(TABLE, FEBRUARY, bars(2).head(minute + 1))
                assert fast.lake().size(TABLE, FEBRUARY)
                scanned = fast.lake().scan(TABLE, [JANUARY], JANUARY.month)
                role.expire()
                assert scanned.collect().height == GOOD.height
                role.expire()
                found = run_query(connection, "SELECT count(*) AS n FROM raw.ohlcv_1m")
                assert found["n"].to_list() == [GOOD.height]
    assert len(role.given) >= 40


def sql_over(uris: list[str], query: str) -> pl.DataFrame:
    with open_views({TABLE: uris}, None) as connection:
        return run_query(connection, query)


# ---------------------------------------------------------------- stores without conditions
def has_condition(request: ProxyRequest) -> bool:
    return bool({"if-match", "if-none-match"} & set(request.headers))


LIMITED_STORES = {
    "no conditions": lambda request: Fault(hidden=("If-Match", "If-None-Match")),
    "412 to every If-Match": lambda request: (
        Fault(is_applied=False, answer=refusal(412, "PreconditionFailed"))
        if "if-match" in request.headers
        else None
    ),
    "501 to conditions": lambda request: (
        Fault(is_applied=False, answer=refusal(501, "NotImplemented"))
        if has_condition(request)
        else None
    ),
    "412 to quotes": lambda request: (
        Fault(is_applied=False, answer=refusal(412, "PreconditionFailed"))
        if '"' in request.headers.get("if-match", "")
        else None
    ),
}


@pytest.mark.parametrize("kind", LIMITED_STORES)
def test_a_store_without_conditions_works_as_far_as_possible(fast: Store, proxy: Proxy, kind: str):
    """One writer notices nothing. Of two, the second sees the first one's object, unless the store
    ignores conditions in silence.
    """
    proxy.fault = LIMITED_STORES[kind]
    lake, other = fast.lake(), fast.lake()
    assert lake.read(TABLE, JANUARY) is None
    for seed in (1, 2, 3):
        lake.write(TABLE, JANUARY, bars(seed))
        assert other.read(TABLE, JANUARY).equals(bars(seed))
    lake.write(TABLE, JANUARY, bars(4))
    conflict = message_of(lambda: other.write(TABLE, JANUARY, bars(5)))
    if kind == "no conditions":
        assert conflict is None
        assert lake.read(TABLE, JANUARY).equals(bars(5))
    else:
        assert "was changed by another writer" in str(conflict)
        assert lake.read(TABLE, JANUARY).equals(bars(4))
    lake.delete(TABLE, JANUARY)
    assert fast.contents() == {}


def test_a_store_that_wants_the_etag_without_quotes_is_as_safe_as_others(
    fast: Store, monkeypatch: pytest.MonkeyPatch
):
    """radosgw 16: another host writes after the quoted condition was refused."""
    other = fast.lake()
    other.write(TABLE, JANUARY, GOOD)

    def refuse_quotes(request: ProxyRequest) -> Fault | None:
        if '"' in request.headers.get("if-match", ""):
            return Fault(is_applied=False, answer=refusal(412, "PreconditionFailed"))
        return other.write(TABLE, JANUARY, bars(2)) and None if request.method == "PUT" else None

    with open_proxy(fast.url) as proxy, monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        lake = fast.lake()
        assert lake.read(TABLE, JANUARY).equals(GOOD)
        proxy.fault = refuse_quotes
        assert "was changed by another writer" in str(
            message_of(lambda: lake.write(TABLE, JANUARY, bars(3)))
        )
    assert fast.contents() == {PATH: raw_object(bars(2))}


def test_a_write_during_another_one_is_refused(fast: Store, proxy: Proxy):
    """409: the other write may still succeed, so none is forced."""
    lake = fast.lake()
    lake.write(TABLE, JANUARY, GOOD)
    proxy.fault = lambda request: (
        Fault(is_applied=False, answer=refusal(409, "ConditionalRequestConflict"))
        if has_condition(request)
        else None
    )
    assert "was changed by another writer" in str(
        message_of(lambda: lake.write(TABLE, JANUARY, bars(2)))
    )
    assert fast.contents() == {PATH: raw_object(GOOD)}
    proxy.always(None)
    lake.read(TABLE, JANUARY)
    lake.write(TABLE, JANUARY, bars(2))
    assert fast.contents() == {PATH: raw_object(bars(2))}


def test_an_object_that_arrives_during_a_quarantine_stays(
    fast: Store, monkeypatch: pytest.MonkeyPatch
):
    """Another host replaces the object after we read it and before we remove it."""
    fast.put(PATH, b"rubbish")
    other = fast.lake()
    with open_proxy(fast.url) as proxy, monkeypatch.context() as patch:
        assert other.size(TABLE, JANUARY) == 7  # so that its client uses the server, not the proxy
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        proxy.fault = lambda request: (
            other.write(TABLE, JANUARY, GOOD) and None if request.method == "DELETE" else None
        )
        assert "was changed by another writer" in str(
            message_of(lambda: fast.lake().quarantine_object(TABLE, JANUARY))
        )
    assert fast.contents() == {PATH: raw_object(GOOD), PATH + ".damaged": b"rubbish"}


def test_an_object_that_arrives_during_a_move_to_the_cold_location_stays(
    fast: Store, monkeypatch: pytest.MonkeyPatch
):
    other, cold = fast.lake(), f"s3://{fast.bucket}/cold"
    other.write(TABLE, JANUARY, GOOD)
    with open_proxy(fast.url) as proxy, monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        proxy.fault = lambda request: (
            other.write(TABLE, JANUARY, bars(2)) and None if request.method == "DELETE" else None
        )
        mover = Lake(fast.location, cold)
        assert "was changed by another writer" in str(
            message_of(lambda: mover.move_to_cold(TABLE, JANUARY))
        )
        assert mover.read(TABLE, JANUARY).equals(bars(2))
        proxy.fault = lambda request: None
        assert mover.move_to_cold(TABLE, JANUARY) == len(raw_object(bars(2)))
        assert mover.read(TABLE, JANUARY).equals(bars(2))
    assert fast.contents() == {}


# ---------------------------------------------------------------- the usual AWS variables
def test_tls_is_checked(fast: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A certificate that nobody signed is refused, unless AWS_CA_BUNDLE names it."""
    file, tls = self_signed(tmp_path), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(file)
    with open_proxy(fast.url, tls) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        assert "SSLError; the server's certificate is not trusted; set AWS_CA_BUNDLE" in str(
            message_of(lambda: fast.lake().read(TABLE, JANUARY))
        )
        assert proxy.requests == []
        monkeypatch.setenv("AWS_CA_BUNDLE", str(file))
        lake = fast.lake()
        lake.write(TABLE, JANUARY, GOOD)
        assert lake.read(TABLE, JANUARY).equals(GOOD)
        assert [request.method for request in proxy.requests] == ["GET", "PUT", "GET", "GET"]


@pytest.mark.parametrize(
    ("names", "region"),
    [
        (["AWS_REGION"], "eu-west-1"),
        (["AWS_DEFAULT_REGION"], "us-west-2"),
        (["AWS_REGION", "AWS_DEFAULT_REGION"], "eu-west-1"),
    ],
)
def test_the_region_is_the_one_of_the_environment(
    fast: Store, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, names: list[str], region: str
):
    regions = {"AWS_REGION": "eu-west-1", "AWS_DEFAULT_REGION": "us-west-2"}
    for name, value in regions.items():
        monkeypatch.setenv(name, value) if name in names else monkeypatch.delenv(
            name, raising=False
        )
    assert fast.lake().read(TABLE, JANUARY) is None
    (request,) = proxy.requests
    assert f"/{region}/s3/aws4_request" in request.headers["authorization"]
    assert "CANARYSECRET" not in str(proxy.requests)


# ---------------------------------------------------------------- the main job
SPAN = window("2023-12-30", "2024-01-04")
NOW = "2024-01-10T00:00:00Z"


def make(
    folder: Path, patch: pytest.MonkeyPatch, url: str, lake: str | None = None, **changes: Any
) -> Settings:
    """Return the settings of one host, with a state folder and a ledger of its own: two markets,
    five days around the end of a year.
    """
    folder.mkdir(exist_ok=True)
    settings = {
        "symbols": "[BTC/USDT, ETH/USDT]",
        "since": "2023-12-30",
        "until": "2024-01-04",
        "now": NOW,
        "rollups": "parquet",
    }
    return universe.__wrapped__(folder, patch)(url, lake=lake, **{**settings, **changes})


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, bytes]]:
    """Return the objects of the main job in a local folder."""
    with pytest.MonkeyPatch.context() as patch, exchange_at(SANDBOX_NOW) as (_, url):
        settings = make(tmp_path_factory.mktemp("local"), patch, url)
        run_ingest(settings)
        run_derive(settings)
        yield lake_files(settings)


def failures(done: list[IngestResult]) -> list[str]:
    return [str(one.error) for one in done if one.error]


def test_the_main_job_stores_the_same_bytes_as_in_a_folder(
    fast: Store,
    sandbox: Any,
    local: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """Every digit of every timeframe is stored and true, nothing else is stored, and a second run
    makes no request.
    """
    exchange, url = sandbox
    settings = make(tmp_path, monkeypatch, url, fast.location)
    assert failures(run_ingest(settings)) == []
    run_derive(settings)
    assert fast.contents() == local
    assert len(local) == 2 * 2 * 9
    everything_is_true(settings, SPAN)
    exchange.requests.clear()
    with open_context(settings) as context:
        assert context.bind(BackfillPlanner).plan(partitions(settings)) == []
        assert context.bind(BacklogFinder).plan_backfill(9, (), {}).message == "nothing is missing"
    run_ingest(settings)
    assert [derived.changed for derived in run_derive(settings)] == [
        dict.fromkeys(settings.rollup_timeframes, 0)
    ] * 4
    assert bar_requests(exchange) == []
    assert fast.uploads() == []


@pytest.mark.parametrize(("put", "applied"), [(2, False), (2, True), (12, False)])
def test_a_server_that_goes_down_in_the_middle(
    fast: Store,
    proxy: Proxy,
    sandbox: Any,
    local: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    put: int,
    applied: bool,
):
    """During fetching, or during the rollups, which come after four copies of ledger rows: stored
    objects stay, the rest fails with a message, and no stored bar is fetched again.
    """
    exchange, url = sandbox
    settings = make(tmp_path, monkeypatch, url, fast.location)
    proxy.vanish_at(put, "PUT", Fault(is_applied=applied, ending=Ending.LOST))
    messages = [
        *failures(run_ingest(settings)),
        message_of(lambda: run_derive(settings)),
        message_of(lambda: coverage_of(settings)),
    ]
    assert len(messages) == (5 if put == 2 else 2)
    for message in messages:
        assert re.match(
            rf"{fast.location}/[.r][^ ]*: EndpointConnectionError; the server does not answer; ",
            str(message),
        )
    assert "CANARY" not in str(messages)
    stored = fast.contents()
    assert {path: local[path] for path in stored} == stored
    assert len(stored) == put - 1 + applied - 4 * (put > 4)
    exchange.requests.clear()
    proxy.always(None)
    proxy.up()
    assert failures(run_ingest(settings)) == []
    run_derive(settings)
    assert fast.contents() == local
    requested = {
        p.key
        for p in partitions(settings)
        for request in bar_requests(exchange)
        if is_about(request, p)
    }
    assert requested == {p.key for p in partitions(settings) if TABLE.path(p) not in stored}
    assert [one.not_fetched for one in coverage_of(settings)] == [0, 0]


def is_about(request: Any, partition: Partition) -> bool:
    """Say whether a request is about bars of a month, and not only about its neighbor's bar."""
    start, end = (int(request.query[name]) for name in ("startTime", "endTime"))
    inside = min(end, partition.month.end.timestamp() * 1000) - max(
        start, partition.month.start.timestamp() * 1000
    )
    return (
        request.query["symbol"] == partition.market.symbol.replace("/", "") and inside > 5 * 60_000
    )


def coverage_of(settings: Settings) -> list[Coverage]:
    with open_context(settings) as context:
        return context.bind(CoverageReporter).report(settings.markets)


HOST = """
import sys
from marketdata_assets.errors import MarketDataError
from marketdata_assets.settings.load import load_settings
from marketdata_tests.steps import partitions, run_derive, run_ingest
settings, failed = load_settings(), []
print("ready", flush=True)
for line in sys.stdin:
    first, last = map(int, line.split())
    wanted = partitions(settings)[first:last]
    failed = [str(one.error) for one in run_ingest(settings, wanted=wanted) if one.error]
    try:
        run_derive(settings)
    except MarketDataError as error:
        failed.append(str(error))
    print(failed, flush=True)
"""


def test_two_hosts_with_overlapping_backfills(
    fast: Store,
    sandbox: Any,
    local: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """Two processes with state folders of their own fill one bucket at once; each succeeds after at
    most one repetition.
    """
    hosts = []
    for name in ("a", "b"):
        settings = make(tmp_path / name, monkeypatch, sandbox[1], fast.location)
        hosts.append(start_python(HOST, env=dict(os.environ)))
    try:
        assert [host.stdout.readline() for host in hosts] == ["ready\n"] * 2
        for work in (["0 3", "1 4"], ["0 4", "0 4"]):
            for host, span in zip(hosts, work, strict=True):
                host.stdin.write(span + "\n")
                host.stdin.flush()
            lines = [host.stdout.readline() for host in hosts]
            assert all("was changed by another writer" in line or line == "[]\n" for line in lines)
    finally:
        for host in hosts:
            kill(host)
    assert lines == ["[]\n"] * 2
    assert fast.contents() == local
    for name in ("a", "b"):
        settings = make(tmp_path / name, monkeypatch, sandbox[1], fast.location)
        assert [one.not_fetched for one in coverage_of(settings)] == [0, 0]
        with open_context(settings) as context:
            assert context.bind(BackfillPlanner).plan(partitions(settings)) == []


def test_two_hosts_that_want_different_days_of_one_month(
    fast: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """While one fetches, the other stores. The first gets an error, and its repetition adds its own
    days, with no bar lost or doubled.
    """
    spans, others = {"a": ("2024-01-01", "2024-01-04"), "b": ("2024-01-03", "2024-01-07")}, []

    async def meanwhile(*_: Any) -> None:
        if others:
            await asyncio.to_thread(lambda: others.pop()())

    with exchange_at(SANDBOX_NOW, meanwhile) as (exchange, url):
        a, b = (
            make(
                tmp_path / name,
                monkeypatch,
                url,
                fast.location,
                symbols="[BTC/USDT]",
                since=since,
                until=until,
            )
            for name, (since, until) in spans.items()
        )
        others.append(lambda: run_ingest(b))
        (message,) = failures(run_ingest(a))
        assert re.fullmatch(
            rf"{fast.location}/{PATH} was changed by another writer meanwhile; "
            "the next run reads it again",
            message,
        )
        (stored,) = fast.contents().values()
        assert_bars(
            pl.read_parquet(stored).cast(BAR_SCHEMA),
            generate_bars("BTCUSDT", "1m", window(*spans["b"])),
        )
        exchange.requests.clear()
        assert failures(run_ingest(a)) == []
        assert len(bar_requests(exchange)) <= 4
        (stored,) = fast.contents().values()
        assert_bars(
            pl.read_parquet(stored).cast(BAR_SCHEMA),
            generate_bars("BTCUSDT", "1m", window("2024-01-01", "2024-01-07")),
        )
        for settings in (b, a, b):
            exchange.requests.clear()
            assert failures(run_ingest(settings)) == []
            assert bar_requests(exchange) == []
        assert fast.contents() == {PATH: stored}


# ---------------------------------------------------------------- files of others
MARKET = "raw/ohlcv_1m/market=binance%3ABTC-USDT"
FOREIGN = {
    "README.txt": b"hello",
    "other/thing/data.parquet": b"PAR1",
    "raw/ohlcv_1m/notes.txt": b"x",
    "raw/ohlcv_1m/_delta_log/00000000000000000000.json": b"{}",
    f"{MARKET}/notes.txt": b"x",
    f"{MARKET}/month=2024-01/data.parquet.bak": b"x",
    f"{MARKET}/month=2024-01/old/data.parquet": b"x",
    f"{MARKET}/month=2019-07/part-0.parquet": b"x",
    "raw/ohlcv_1m/a/b/data.parquet": b"x",
    "raw/ohlcv_1m/market=%ff/month=/data.parquet": b"x",
    f"raw/ohlcv_1m/backup/{MARKET.rpartition('/')[2]}/month=2024-01/data.parquet": b"x",
    f"raw/ohlcv_1m_copy/{MARKET.rpartition('/')[2]}/month=2024-01/data.parquet": b"x",
}


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_foreign_files_disturb_nothing(
    kind: str,
    sandbox: Any,
    local: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
):
    """Files and folders of others, before and after: the job, coverage, `missed` and the listing
    ignore them.
    """
    exchange, url = sandbox
    store = request.getfixturevalue("fast") if kind == "s3" else None
    settings = make(tmp_path, monkeypatch, url, store and store.location)
    for path, content in FOREIGN.items():
        if store:
            store.put(path, content)
            store.put(path.rpartition("/")[0] + "/", b"")  # as consoles make folders
        else:
            file = Path(settings.lake, path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    assert failures(run_ingest(settings)) == []
    run_derive(settings)
    exchange.requests.clear()
    found = {
        p: c
        for p, c in (store.contents() if store else lake_files(settings)).items()
        if not p.endswith("/")
    }
    assert found == local | FOREIGN
    assert [one.not_fetched for one in coverage_of(settings)] == [0, 0]
    with open_context(settings) as context:
        assert context.bind(BackfillPlanner).plan(partitions(settings)) == []
        for minute in range(8):  # the tables of the rollups are checked in turn
            now = settings.clock.model_copy(update={"start": at(f"2024-01-10T00:{minute:02}")})
            later = dataclasses.replace(
                context, settings=settings.model_copy(update={"clock": now})
            )
            backlog = later.bind(BacklogFinder).plan_backfill(9, (), {})
            assert backlog.message == "nothing is missing"
        ours = {
            key: size
            for key, size in context.storage.lake.list_sizes(TABLE).items()
            if key[0] in ("binance:BTC-USDT", "binance:ETH-USDT")
        }
        assert ours == {p.stored_key: len(local[TABLE.path(p)]) for p in partitions(settings)}
        assert context.storage.lake.remove_abandoned_uploads() == 0
    assert failures(run_ingest(settings)) == []
    assert bar_requests(exchange) == []

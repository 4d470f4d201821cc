"""The lake in S3, against real servers on loopback and through a proxy that breaks things: what is acknowledged is stored, whole.

The servers are moto, ministack (keeps its data through kill -9), and the one that MARKETDATA_TEST_S3_ENDPOINT names, with
the keys of the usual AWS variables.
"""

from __future__ import annotations

import os
import random
import re
import secrets
import socket
import ssl
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from marketdata_assets.errors import StoreFailed
from marketdata_assets.lake import objects
from marketdata_assets.lake.objects import ATTEMPTS, open_objects
from marketdata_assets.lake.parquet import Lake, encode
from marketdata_assets.lake.tables import raw, rollup
from marketdata_assets.model.window import TIMEFRAMES, Partition
from marketdata_tests.s3_proxy import PASSING, Fault, Proxy, Seen, answer, proxied, refusal
from marketdata_tests.samples import BTC, FEBRUARY, JANUARY, frame, minutes, row
from marketdata_tests.samples import random_bars as bars
from marketdata_tests.test_fetching import self_signed

NAMED = os.environ.get("MARKETDATA_TEST_S3_ENDPOINT")
M1 = TIMEFRAMES["1m"]
TABLE = raw(M1)
PATH = TABLE.path(JANUARY)
GOOD = bars(1)


# --------------------------------------------------------------------------------- servers
@dataclass
class Store:
    """A bucket of a server, looked at behind the lake's back."""

    url: str
    bucket: str
    client: Any

    @property
    def location(self) -> str:
        return f"s3://{self.bucket}/lake"

    def lake(self) -> Lake:
        """A lake of its own, as another process or another host has one."""
        return Lake(self.location)

    def contents(self) -> dict[str, bytes]:
        """Every object below the lake, byte for byte."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix="lake/")
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
        return {key.removeprefix("lake/"): self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read() for key in keys}

    def put(self, path: str, content: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=f"lake/{path}", Body=content)

    def uploads(self) -> list[str]:
        """Uploads in parts that nobody has finished."""
        return [upload["UploadId"] for upload in self.client.list_multipart_uploads(Bucket=self.bucket).get("Uploads", ())]


def open_store(url: str, patch: pytest.MonkeyPatch) -> Store:
    """A fresh bucket there, with the AWS variables set for it; the named server's keys are the user's."""
    if url != NAMED:
        for name, value in {"AWS_ACCESS_KEY_ID": "CANARYID", "AWS_SECRET_ACCESS_KEY": "CANARYSECRET"}.items():
            patch.setenv(name, value)
    patch.setenv("AWS_ENDPOINT_URL", url)
    patch.setenv("AWS_REGION", "us-east-1")
    patch.setenv("NO_PROXY", "127.0.0.1")
    client, bucket = objects.open_client(), f"test-{secrets.token_hex(6)}"
    client.create_bucket(Bucket=bucket)
    return Store(url, bucket, client)


@contextmanager
def ministack(folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server that keeps its objects in that folder; its address and its process, which is killed in the end."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    place = {"GATEWAY_HOST": "127.0.0.1", "GATEWAY_PORT": port, "S3_PERSIST": "1", "S3_DATA_DIR": str(folder)}
    process = subprocess.Popen(
        [sys.executable, "-m", "ministack"], env={**os.environ, **place}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
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
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Each server in turn."""
    if request.param == "ministack":
        with ministack(tmp_path_factory.mktemp("ministack")) as (url, _):
            yield url
    else:
        yield NAMED if request.param == "named" else request.getfixturevalue("s3_server")


@pytest.fixture
def store(server: str, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A fresh bucket on each server in turn."""
    return open_store(server, monkeypatch)


@pytest.fixture
def fast(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A fresh bucket on moto alone."""
    return open_store(s3_server, monkeypatch)


@pytest.fixture
def proxy(fast: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before `fast`, which lakes opened from now on go through."""
    with proxied(fast.url) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """botocore's pauses cost nothing, and who is silent is not waited for."""
    monkeypatch.setattr("botocore.endpoint.time", type("Clock", (), {"sleep": staticmethod(lambda seconds: None)}))
    monkeypatch.setattr(objects, "ANSWER_SECONDS", 5)


def acts(lake: Lake) -> dict[str, Callable[[], Any]]:
    """Everything that asks the server for something, after JANUARY has been read."""
    place = open_objects(lake.location)
    return {
        "read": lambda: lake.read(TABLE, JANUARY),
        "write": lambda: lake.write(TABLE, JANUARY, bars(2)),
        "create": lambda: lake.write(TABLE, FEBRUARY, bars(2)),
        "size": lambda: lake.size(TABLE, JANUARY),
        "sizes": lambda: lake.sizes(TABLE),
        "delete": lambda: lake.delete(TABLE, JANUARY),
        "set aside": lambda: place.set_aside(PATH),
        "classes": lambda: lake.classes(TABLE),
        "set class": lambda: lake.set_class(TABLE, JANUARY, "STANDARD_IA"),
    }


# --------------------------------------------------------------------------------- what every server must be able to do
def test_a_lake_on_each_server(store: Store):
    """The contract of test_lake, once through, on servers of different makes."""
    lake = store.lake()
    assert (lake.read(TABLE, JANUARY), lake.size(TABLE, JANUARY), lake.sizes(TABLE)) == (None, None, {})
    for seed in (1, 2, 3):
        written = lake.write(TABLE, JANUARY, bars(seed))
        assert lake.read(TABLE, JANUARY).equals(bars(seed))
        assert store.lake().size(TABLE, JANUARY) == written.bytes
    place = open_objects(store.location)
    place.write("empty", b"")
    assert (place.read("empty"), place.size("empty")) == (b"", 0)
    lake.write(TABLE, FEBRUARY, GOOD)
    assert set(lake.sizes(TABLE)) == {("binance:BTC-USDT", "2024-01-01"), ("binance:BTC-USDT", "2024-02-01")}
    assert lake.classes(TABLE) == {PATH: "STANDARD", TABLE.path(FEBRUARY): "STANDARD"}
    assert [frame.collect().height for frame in lake.scan(TABLE, [JANUARY, FEBRUARY])] == [100, 100]
    assert lake.set_aside(TABLE, JANUARY).endswith(PATH + ".damaged")
    lake.delete(TABLE, FEBRUARY)
    store.lake().delete(TABLE, FEBRUARY)
    assert set(store.contents()) == {"empty", PATH + ".damaged"}
    assert (lake.read(TABLE, JANUARY), lake.sizes(TABLE), store.uploads()) == (None, {}, [])


def test_one_of_two_writers_wins_and_the_other_is_told(store: Store):
    """Two hosts have read the same object; and after that, neither finds one, and both create it."""
    store.lake().write(TABLE, JANUARY, GOOD)
    for partition in (JANUARY, FEBRUARY):
        first, second = store.lake(), store.lake()
        first.read(TABLE, partition), second.read(TABLE, partition)
        first.write(TABLE, partition, bars(2))
        for _ in range(2):  # it does not help to insist
            with pytest.raises(StoreFailed, match=r"^s3://.*/data.parquet was changed by another writer meanwhile; the next run reads it") as told:
                second.write(TABLE, partition, bars(3))
            assert "\n" not in str(told.value)
        assert second.read(TABLE, partition).equals(bars(2))
        second.write(TABLE, partition, bars(3))
        assert first.read(TABLE, partition).equals(bars(3))


def test_two_writers_of_the_same_bars_are_no_conflict(store: Store):
    first, second = store.lake(), store.lake()
    for lake in (first, second):
        lake.read(TABLE, JANUARY)
    assert first.write(TABLE, JANUARY, GOOD) == second.write(TABLE, JANUARY, GOOD)
    assert store.lake().read(TABLE, JANUARY).equals(GOOD)


def test_what_another_writer_has_changed_is_neither_removed_nor_brought_back(store: Store, request: pytest.FixtureRequest):
    """A host removes an object that another one has just replaced, or replaces one that another one has removed."""
    first, second = store.lake(), store.lake()
    for lake in (first, second):
        lake.write(TABLE, JANUARY, GOOD) if lake is first else lake.read(TABLE, JANUARY)
    first.write(TABLE, JANUARY, bars(2))
    if "named" not in request.node.name:  # radosgw 16 knows no condition here
        with pytest.raises(StoreFailed, match="was changed by another writer"):
            second.delete(TABLE, JANUARY)
    assert first.read(TABLE, JANUARY).equals(bars(2)) or "named" in request.node.name
    second.read(TABLE, JANUARY)
    first.delete(TABLE, JANUARY)
    with pytest.raises(StoreFailed, match="was changed by another writer"):
        second.write(TABLE, JANUARY, bars(3))
    assert store.contents() == {}


def add_rows(lake: Lake, mine: Iterator[int], acked: set[int], tried: set[int], rounds: int) -> None:
    """A host that adds its own minutes to an object that others write too, one by one, until so many are acknowledged."""
    while len(acked) < rounds:
        number = next(mine)
        tried.add(number)
        try:
            there = lake.read(TABLE, JANUARY)
            more = frame([row(minutes(1)[0] + number * timedelta(minutes=1))])
            lake.write(TABLE, JANUARY, more if there is None else pl.concat([there, more]).sort("open_time"))
        except StoreFailed:
            continue
        acked.add(number)


def many_writers(store: Store, writers: int, rounds: int) -> tuple[list[int], set[int], set[int]]:
    """The minutes that are stored, those that were acknowledged, and all that anybody has tried to store."""
    acked, tried = [set() for _ in range(writers)], [set() for _ in range(writers)]
    threads = [
        threading.Thread(target=add_rows, args=(store.lake(), count(i, writers), acked[i], tried[i], rounds)) for i in range(writers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = Lake(store.location).read(TABLE, JANUARY)
    stored = [(t - minutes(1)[0]) // timedelta(minutes=1) for t in found["open_time"]]
    return stored, set().union(*acked), set().union(*tried)


def test_eight_writers_lose_nothing(store: Store):
    """Each adds four rows to one object: acknowledged is stored, and what was refused is not."""
    stored, acked, _ = many_writers(store, 8, 4)
    assert len(acked) == 32
    assert sorted(stored) == sorted(acked)


def test_a_server_killed_while_it_writes_keeps_what_it_has_acknowledged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """kill -9, three times, in the midst of two writers' work: every object is the last acknowledged or the one under way."""
    dice, frames = random.Random(), [bars(seed, 3000) for seed in range(7)]
    acked: dict[Partition, int] = {}
    tried: dict[Partition, int] = {}
    done = threading.Semaphore(0)

    def write(lake: Lake, partition: Partition) -> None:
        lake.read(TABLE, partition)
        try:
            for i in count(tried.get(partition, -1) + 1):
                tried[partition] = i
                lake.write(TABLE, partition, frames[i % 7])
                acked[partition] = i
                done.release()
        except StoreFailed:
            done.release()

    def check(lake: Lake) -> None:
        for partition, last in acked.items():
            found = lake.read(TABLE, partition)
            assert any(found.equals(frames[i % 7]) for i in (last, tried[partition]))

    for turn in range(4):
        with ministack(tmp_path / "data") as (url, process):
            store = open_store(url, monkeypatch)
            location = f"s3://{store.bucket if turn == 0 else bucket}/lake"
            bucket = location[5:-5]
            check(Lake(location))
            if turn == 3:
                break
            threads = [threading.Thread(target=write, args=(Lake(location), p)) for p in (JANUARY, FEBRUARY)]
            for thread in threads:
                thread.start()
            for _ in range(dice.randint(4, 30)):
                done.acquire()
            process.kill()
            for thread in threads:
                thread.join()
    assert min(acked.values()) > 0


# --------------------------------------------------------------------------------- uploads that nobody finishes
def test_sweep_ends_uploads_that_nobody_finishes(fast: Store):
    """moto says of every upload that it began in 2010."""
    upload = fast.client.create_multipart_upload(Bucket=fast.bucket, Key="lake/raw/x")["UploadId"]
    other = fast.client.create_multipart_upload(Bucket=fast.bucket, Key="others/raw/x")["UploadId"]
    fast.client.upload_part(Bucket=fast.bucket, Key="lake/raw/x", UploadId=upload, PartNumber=1, Body=b"x" * 100)
    assert fast.lake().sweep() == 1
    assert fast.uploads() == [other]
    assert fast.lake().sweep() == 0


def test_sweep_leaves_uploads_that_somebody_may_finish(store: Store, monkeypatch: pytest.MonkeyPatch):
    if store.url not in (NAMED, None) and "moto" in os.environ.get("PYTEST_CURRENT_TEST", ""):
        pytest.skip("moto knows no time of an upload")
    uploads = {store.client.create_multipart_upload(Bucket=store.bucket, Key=f"lake/{i}")["UploadId"] for i in range(3)}
    assert store.lake().sweep() == 0
    assert set(store.uploads()) == uploads
    monkeypatch.setattr(objects, "ABANDONED", timedelta(days=-1))
    assert store.lake().sweep() == 3
    assert store.uploads() == []


def test_who_may_not_list_uploads_has_a_lake_all_the_same(fast: Store, proxy: Proxy):
    proxy.fault = lambda seen: Fault(applied=False, answer=refusal(403, "AccessDenied")) if "uploads" in seen.path else None
    lake = fast.lake()
    assert lake.sweep() == 0
    assert len(proxy.seen) == 1
    lake.write(TABLE, JANUARY, GOOD)


# --------------------------------------------------------------------------------- faults that pass
@pytest.mark.parametrize("name", PASSING)
def test_what_passes_is_outlived(fast: Store, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, name: str):
    """The first answer to everything goes wrong, and the second too: what was applied already is no conflict with itself."""
    monkeypatch.setattr(objects, "ANSWER_SECONDS", 0.3)
    fault, lake = PASSING[name], fast.lake()
    times = 1 if name == "silent" else 2

    def outlived(act: Callable[[], Any]) -> Any:
        proxy.first(times, fault)
        return act()

    assert outlived(lambda: lake.read(TABLE, JANUARY)) is None
    for seed in (1, 2):  # it is created, then replaced
        outlived(lambda seed=seed: lake.write(TABLE, JANUARY, bars(seed)))
        assert fast.contents() == {PATH: encode(bars(seed))}
        assert outlived(lambda: lake.read(TABLE, JANUARY)).equals(bars(seed))
    assert outlived(lambda: lake.size(TABLE, JANUARY)) == len(encode(bars(2)))
    assert list(outlived(lambda: lake.sizes(TABLE)).values()) == [len(encode(bars(2)))]
    assert outlived(lambda: lake.classes(TABLE)) == {PATH: "STANDARD"}
    assert outlived(lambda: lake.set_aside(TABLE, JANUARY))
    assert fast.contents() == {PATH + ".damaged": encode(bars(2))}
    lake.write(TABLE, JANUARY, GOOD)
    outlived(lambda: lake.delete(TABLE, JANUARY))
    assert set(fast.contents()) == {PATH + ".damaged"}
    assert fast.uploads() == []


def test_writers_in_a_storm_lose_nothing(fast: Store, proxy: Proxy):
    """Four hosts, and every third request meets a fault: what is acknowledged is stored, once, and nothing is made up."""
    seed = random.randrange(10**6)
    dice, faults = random.Random(seed), [fault for name, fault in PASSING.items() if name != "silent"]
    proxy.fault = lambda seen: dice.choice(faults) if dice.random() < 0.33 else None
    stored, acked, tried = many_writers(fast, 4, 6)
    assert len(acked) == 24
    assert acked <= set(stored) <= tried, f"seed {seed}"
    assert len(stored) == len(set(stored))
    assert set(fast.contents()) == {PATH}
    assert fast.uploads() == []


# --------------------------------------------------------------------------------- faults that last
LASTING = {
    "503": (PASSING["503"], "ServiceUnavailable; check the bucket"),
    "slow down": (PASSING["slow down"], "SlowDown; the server asks for patience; the next run goes on"),
    "500 after apply": (PASSING["500 after apply"], "InternalError; check the bucket"),
    "lost response": (PASSING["lost response"], "ConnectionClosedError; the server's answers break off"),
    "reset before": (PASSING["reset before"], "ConnectionClosedError; the server's answers break off"),
    "truncated": (PASSING["truncated"], "the server's answers break off"),
    "bent": (PASSING["bent"], ""),
    "silent": (PASSING["silent"], "ReadTimeoutError; the server does not answer; check AWS_ENDPOINT_URL"),
    "a web page": (Fault(applied=False, answer=answer(200, b"<html>CANARY welcome")), "that is no answer of S3; check AWS_ENDPOINT_URL"),
    "no such page": (Fault(applied=False, answer=answer(404, b"<html>CANARY nothing")), "check the bucket, AWS_ENDPOINT_URL"),
}
REFUSALS = {
    (400, "ExpiredToken"): "the credentials have expired; get new ones",
    (403, "AccessDenied"): "these keys may not do that; give their owner s3:GetObject",
    (403, "InvalidAccessKeyId"): "the server does not know this AWS_ACCESS_KEY_ID",
    (403, "SignatureDoesNotMatch"): "the AWS_SECRET_ACCESS_KEY does not fit",
    (400, "InvalidToken"): "AWS_SESSION_TOKEN is not one that the server knows",
    (403, "RequestTimeTooSkewed"): "this machine's clock is wrong",
    (301, "PermanentRedirect"): "the bucket lies in another region; set AWS_REGION",
    (400, "AuthorizationHeaderMalformed"): "the bucket lies in another region; set AWS_REGION",
    (404, "NoSuchBucket"): "there is no such bucket; make it, or mend `lake:`",
    (418, "Teapot"): "check the bucket, AWS_ENDPOINT_URL and the AWS keys",
}
FAULTS = LASTING | {
    code: (Fault(applied=False, answer=refusal(status, code)), f"{code}; {advice}") for (status, code), advice in REFUSALS.items()
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_lasts_is_told_in_one_line_and_harms_nothing(fast: Store, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, name: str):
    """After a few attempts, with what to do about it and without what the server said or what the keys are."""
    monkeypatch.setattr(objects, "ANSWER_SECONDS", 0.1)
    fast.put(PATH, encode(GOOD))
    fault, words = FAULTS[name]
    for act_name in acts(fast.lake()):
        proxy.always(None)
        fast.put(PATH, encode(GOOD))
        lake = fast.lake()
        assert lake.read(TABLE, JANUARY).equals(GOOD)
        assert lake.read(TABLE, FEBRUARY) is None
        proxy.always(fault)
        try:
            found = acts(lake)[act_name]()
        except StoreFailed as error:
            assert re.match(rf"s3://{fast.bucket}/lake/[^ ]*: \w+; .*", str(error))
            assert words in str(error)
            assert "CANARY" not in str(error)
            assert "\n" not in str(error)
            assert (error.__cause__, error.__suppress_context__) == (None, True)
        else:  # no body to cut or bend
            assert name in ("truncated", "bent"), f"{act_name} gave {found}"
        assert len(proxy.seen) <= ATTEMPTS**2
        content = fast.contents().get(PATH)
        assert content in ((encode(GOOD), encode(bars(2)), None) if fault.applied else (encode(GOOD),))

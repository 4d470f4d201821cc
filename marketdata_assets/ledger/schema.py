"""The tables of the ledger, their version, and the way from every earlier version to this one.

A column or table is added by raising VERSION, changing TABLES, and writing the step that brings the
version before to the new one. All of it is SQL that SQLite and PostgreSQL both understand; `{id}`
is a number that the database gives.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

VERSION = 3


class Statements(Protocol):
    """An open transaction; `?` stands for a value in both databases."""

    def execute(self, sql: str, values: Sequence[Any] = ()) -> Any:
        """Run one statement; its cursor."""
        ...

    def executemany(self, sql: str, rows: Sequence[Sequence[Any]]) -> Any:
        """Run one statement once for each row."""
        ...


_QUARANTINE = """CREATE TABLE quarantine (
    id {id}, tbl TEXT NOT NULL, market TEXT NOT NULL, month TEXT NOT NULL, open_time TEXT,
    reasons TEXT NOT NULL, fields TEXT NOT NULL, source TEXT NOT NULL, fetch_id BIGINT, seen INTEGER NOT NULL DEFAULT 1,
    first_seen TEXT NOT NULL, last_seen TEXT NOT NULL, content TEXT NOT NULL,
    UNIQUE (tbl, market, month, content))"""

# the first ledgers had none of these
_LATE = (
    """CREATE TABLE IF NOT EXISTS asks (
    market TEXT NOT NULL, month TEXT NOT NULL, attempts INTEGER NOT NULL, asked_at TEXT NOT NULL, parked_at TEXT,
    reason TEXT NOT NULL, PRIMARY KEY (market, month))""",
    """CREATE TABLE IF NOT EXISTS red_checks (
    tbl TEXT NOT NULL, market TEXT NOT NULL, month TEXT NOT NULL, name TEXT NOT NULL, blocking INTEGER NOT NULL,
    says TEXT NOT NULL, times INTEGER NOT NULL DEFAULT 1, since TEXT NOT NULL, PRIMARY KEY (tbl, market, month, name))""",
    "CREATE TABLE IF NOT EXISTS beats (name TEXT PRIMARY KEY, at TEXT NOT NULL)",
    """CREATE TABLE IF NOT EXISTS incidents (
    id {id}, key TEXT NOT NULL, severity TEXT NOT NULL, title TEXT NOT NULL, body TEXT NOT NULL,
    opened_at TEXT NOT NULL, recovered_at TEXT)""",
    "CREATE UNIQUE INDEX IF NOT EXISTS incidents_open ON incidents (key) WHERE recovered_at IS NULL",
    """CREATE TABLE IF NOT EXISTS letters (
    id {id}, incident BIGINT NOT NULL, event TEXT NOT NULL, channel TEXT NOT NULL,
    sent_at TEXT, tries INTEGER NOT NULL DEFAULT 0, error TEXT,
    UNIQUE (incident, event, channel))""",
)

# what version 3 brought: proof
_PROOF = (
    """CREATE TABLE anomalies (
    id {id}, tbl TEXT NOT NULL, market TEXT NOT NULL, month TEXT NOT NULL, kind TEXT NOT NULL, severity TEXT NOT NULL,
    state TEXT NOT NULL, start TEXT NOT NULL, "end" TEXT NOT NULL, bars INTEGER NOT NULL, evidence TEXT NOT NULL,
    found_at TEXT NOT NULL, changed_at TEXT NOT NULL, note TEXT, UNIQUE (tbl, market, kind, start))""",
    "ALTER TABLE quarantine ADD COLUMN replayed_at TEXT",
    "CREATE TABLE receipts (id {id}, kind TEXT NOT NULL, at TEXT NOT NULL, says TEXT NOT NULL, body TEXT NOT NULL)",
    "CREATE INDEX gaps_to_ask ON gaps (tbl, next_ask) WHERE next_ask IS NOT NULL",
)

TABLES = (
    "CREATE TABLE schema_version (version INTEGER NOT NULL)",
    """CREATE TABLE venues (
    venue TEXT PRIMARY KEY, next_at DOUBLE PRECISION NOT NULL DEFAULT 0, paused_until DOUBLE PRECISION NOT NULL DEFAULT 0,
    failures INTEGER NOT NULL DEFAULT 0, opened INTEGER NOT NULL DEFAULT 0, broken_until DOUBLE PRECISION NOT NULL DEFAULT 0)""",
    "CREATE TABLE markets (market TEXT PRIMARY KEY, listed TEXT NOT NULL, evidence TEXT NOT NULL)",
    """CREATE TABLE partitions (
    tbl TEXT NOT NULL, market TEXT NOT NULL, month TEXT NOT NULL,
    start TEXT NOT NULL, through TEXT NOT NULL, newest TEXT, complete INTEGER NOT NULL, rows INTEGER NOT NULL,
    bytes BIGINT, digest TEXT, rolled TEXT,
    attempts INTEGER NOT NULL DEFAULT 0, failures INTEGER NOT NULL DEFAULT 0, error TEXT,
    account TEXT, updated_at TEXT NOT NULL, whole_at TEXT,
    PRIMARY KEY (tbl, market, month))""",
    """CREATE TABLE gaps (
    tbl TEXT NOT NULL, market TEXT NOT NULL, month TEXT NOT NULL, start TEXT NOT NULL, "end" TEXT NOT NULL,
    bars INTEGER NOT NULL, reason TEXT NOT NULL, answers INTEGER NOT NULL, evidence TEXT NOT NULL,
    cause TEXT NOT NULL DEFAULT '', proof TEXT NOT NULL DEFAULT '{}', first_asked TEXT, last_asked TEXT, next_ask TEXT,
    PRIMARY KEY (tbl, market, start))""",
    _QUARANTINE,
    """CREATE TABLE fetches (
    id {id}, tbl TEXT NOT NULL, market TEXT NOT NULL, start TEXT NOT NULL, "end" TEXT NOT NULL,
    asked_at DOUBLE PRECISION NOT NULL, seconds DOUBLE PRECISION NOT NULL, outcome TEXT NOT NULL, status INTEGER, rows INTEGER,
    error TEXT)""",
    "CREATE INDEX fetches_by_market ON fetches (market, asked_at)",
    *_LATE,
    *_PROOF,
)


def content(open_time: str | None, reasons: str, fields: str) -> str:
    """What makes a refused row the same row when it comes again."""
    return hashlib.sha256("\x1f".join((open_time or "", reasons, fields)).encode()).hexdigest()


def _to_2(db: Statements, identity: str) -> None:
    """Version 1 compared the fields of refused rows themselves, which no index of PostgreSQL can
    hold.
    """
    db.execute("ALTER TABLE quarantine RENAME TO quarantine_1")
    db.execute("DROP INDEX IF EXISTS quarantine_content")
    db.execute(_QUARANTINE.replace("{id}", identity))
    names = "id, tbl, market, month, open_time, reasons, fields, source, fetch_id, seen, first_seen, last_seen"
    rows = db.execute(f"SELECT {names} FROM quarantine_1").fetchall()
    marks = ", ".join("?" * 13)
    db.executemany(
        f"INSERT INTO quarantine ({names}, content) VALUES ({marks})",
        [(*row, content(*row[4:7])) for row in rows],
    )
    db.execute("DROP TABLE quarantine_1")
    for statement in _LATE:
        db.execute(statement.replace("{id}", identity))
    db.execute("CREATE TABLE schema_version (version INTEGER NOT NULL)")
    db.execute("INSERT INTO schema_version VALUES (1)")


def _to_3(db: Statements, identity: str) -> None:
    """Version 2 knew no causes of gaps, no anomalies and no receipts."""
    for column in (
        "cause TEXT NOT NULL DEFAULT ''",
        "proof TEXT NOT NULL DEFAULT '{}'",
        "first_asked TEXT",
        "last_asked TEXT",
        "next_ask TEXT",
    ):
        db.execute(f"ALTER TABLE gaps ADD COLUMN {column}")
    db.execute("ALTER TABLE partitions ADD COLUMN whole_at TEXT")
    for statement in _PROOF:
        db.execute(statement.replace("{id}", identity))


STEPS: dict[int, Callable[[Statements, str], None]] = {2: _to_2, 3: _to_3}
"""By version: the step to it from the one before."""

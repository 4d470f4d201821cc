"""The ledger (SQLite, WAL): what neither the lake nor Dagster holds.

Fetch log, watermarks, gap evidence, quarantine, attempts and failures per partition, and what all processes of an
instance share of a venue: its limiter, its pauses, its circuit breaker. All moments in it are seconds since 1970, or
ISO text in UTC where a person reads them.
"""

from __future__ import annotations

import json
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, NamedTuple

import polars as pl

from marketdata_assets.lake.database import Database
from marketdata_assets.lake.tables import Table
from marketdata_assets.model.market import Market
from marketdata_assets.model.window import Partition, Window, iso, month_of, parse_time

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
CREATE TABLE IF NOT EXISTS asks (
    market TEXT NOT NULL, month TEXT NOT NULL, attempts INTEGER NOT NULL, asked_at TEXT NOT NULL, parked_at TEXT,
    reason TEXT NOT NULL, PRIMARY KEY (market, month));
CREATE TABLE IF NOT EXISTS red_checks (
    tbl TEXT NOT NULL, market TEXT NOT NULL, month TEXT NOT NULL, name TEXT NOT NULL, blocking INTEGER NOT NULL,
    says TEXT NOT NULL, times INTEGER NOT NULL DEFAULT 1, since TEXT NOT NULL, PRIMARY KEY (tbl, market, month, name));
CREATE TABLE IF NOT EXISTS beats (
    name TEXT PRIMARY KEY, at TEXT NOT NULL);
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


class Outline(NamedTuple):
    """A State in few words, for whoever looks at all of them. `start` and `through` are ISO text."""

    start: str
    through: str
    complete: int
    bytes: int | None
    rolled: int
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


@dataclass(frozen=True, slots=True)
class Ask:
    """How often `backfill_missed` asked for a partition, and since when it does not any more."""

    partition: Partition
    attempts: int
    asked_at: datetime
    parked_at: datetime | None
    reason: str


class RedCheck(NamedTuple):
    """A check that is red now. `times`: how many evaluations in a row."""

    table: str
    partition: Partition
    name: str
    blocking: bool
    says: str
    times: int
    since: datetime


class VenueHealth(NamedTuple):
    """A venue's circuit breaker: failures in a row, and until when it lets nothing through (0: it is closed)."""

    failures: int
    broken_until: float
    paused_until: float


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


class Ledger(Database):
    """What the instance's processes know of venues, markets and partitions. Raises StoreFailed."""

    schema = _SCHEMA

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

    def venue_health(self, venue: str) -> VenueHealth:
        """What the breaker and the limiter hold against a venue; asking changes nothing."""
        found = self._rows("SELECT failures, broken_until, paused_until FROM venues WHERE venue = ?", venue)
        return VenueHealth(*found[0]) if found else VenueHealth(0, 0.0, 0.0)

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

    def outlines(self, table: Table) -> dict[tuple[str, str], Outline]:
        """What is known of every partition of a table, by market key and month key; made for tens of thousands at once."""
        columns = "market, month, start, through, complete, bytes, rolled IS NOT NULL AND rolled = digest, error"
        return {(m, k): Outline(*rest) for m, k, *rest in self._rows(f"SELECT {columns} FROM partitions WHERE tbl = ?", table.name)}

    def stored_span(self, market: Market) -> dict[str, Window]:
        """By table name: from the first to the last month of which something of a market is stored."""
        sql = "SELECT tbl, min(month), max(month) FROM partitions WHERE market = ? AND bytes IS NOT NULL GROUP BY tbl"
        return {t: Window(parse_time(a), month_of(parse_time(b)).end) for t, a, b in self._rows(sql, market.key)}

    def newest(self, table: Table) -> dict[str, tuple[datetime, str, int]]:
        """By market key: the open time of its newest stored bar, and month key and size of the object that holds it."""
        columns = "market, max(newest), month, bytes"  # SQLite takes the other columns from the row of the maximum
        found = self._rows(f"SELECT {columns} FROM partitions WHERE tbl = ? AND newest IS NOT NULL GROUP BY market", table.name)
        return {market: (parse_time(newest), month, size) for market, newest, month, size in found}

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

    def fail(
        self,
        table: Table,
        partition: Partition,
        wanted: Window,
        error: str,
        fetches: Sequence[LoggedFetch],
        now: datetime,
        forgiven: bool = False,
    ) -> None:
        """Write down an ingest that failed: what is stored stays as it was.

        `forgiven`: the partition is not to blame (its venue or a store does not answer), so the failure does not count
        against it, nor does the last attempt of `backfill_missed`.
        """
        where, counts = _where(table, partition), int(not forgiven)
        with self._transaction() as db:
            _log_fetches(db, table, partition.market, fetches)
            db.execute("UPDATE asks SET attempts = max(0, attempts - ?) WHERE market = ? AND month = ?", (1 - counts, *where[1:]))
            db.execute(
                "INSERT INTO partitions VALUES (?, ?, ?, ?, ?, NULL, 0, 0, NULL, NULL, NULL, 1, ?, ?, NULL, ?)"
                " ON CONFLICT DO UPDATE SET"
                " attempts = attempts + 1, failures = failures + excluded.failures, error = excluded.error,"
                " updated_at = excluded.updated_at",
                (*where, iso(wanted.start), iso(wanted.start), counts, error, iso(now)),
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

    # ------------------------------------------------------------------------------ automation
    def failing(self) -> dict[str, tuple[int, str]]:
        """By market key: how many ingests of one partition failed in a row, at the most, and why the last one did."""
        sql = "SELECT market, failures, coalesce(error, '') FROM partitions WHERE failures > 0 ORDER BY 1, 2, 3"
        return {market: (failures, error) for market, failures, error in self._rows(sql)}  # the worst comes last and stays

    def unsettled(self, table: Table) -> dict[tuple[str, str], list[Window]]:
        """The gaps that will be asked for again, by market key and month key."""
        found: dict[tuple[str, str], list[Window]] = defaultdict(list)
        sql = 'SELECT market, month, start, "end" FROM gaps WHERE tbl = ? AND reason != ? AND answers < ?'
        for market, month, start, end in self._rows(sql, table.name, "no_bars", GIVE_UP_AFTER):
            found[market, month].append(Window(parse_time(start), parse_time(end)))
        return found

    def open_gaps(self) -> dict[str, int]:
        """By market key: bars that the venue has not answered for yet."""
        sql = "SELECT market, sum(bars) FROM gaps WHERE reason = 'unanswered' AND answers < ? GROUP BY market"
        return {market: int(bars) for market, bars in self._rows(sql, GIVE_UP_AFTER)}

    def quarantine_rate(self, since: datetime) -> dict[str, tuple[int, int]]:
        """By market key: rows that a rule refused since a moment, and rows that requests brought since then."""
        refused = dict(self._rows("SELECT market, count(*) FROM quarantine WHERE last_seen >= ? GROUP BY market", iso(since)))
        brought = self._rows("SELECT market, sum(coalesce(rows, 0)) FROM fetches WHERE asked_at >= ? GROUP BY market", since.timestamp())
        return {market: (int(refused.get(market, 0)), int(rows)) for market, rows in brought}

    def asks(self) -> dict[tuple[str, str], Ask]:
        """What `backfill_missed` has asked for and not got yet, by market key and month key."""
        found = self._rows("SELECT market, month, attempts, asked_at, parked_at, reason FROM asks ORDER BY market, month")
        return {(m, k): _ask(m, k, *rest) for m, k, *rest in found}

    def ask(self, partitions: Iterable[tuple[Partition, str]], now: datetime) -> None:
        """Count one more attempt for each partition, with the reason it is asked for."""
        rows = [(p.market.key, p.month_key, iso(now), reason) for p, reason in partitions]
        with self._transaction() as db:
            db.executemany(
                "INSERT INTO asks VALUES (?, ?, 1, ?, NULL, ?) ON CONFLICT DO UPDATE SET"
                " attempts = attempts + 1, asked_at = excluded.asked_at, reason = excluded.reason",
                rows,
            )

    def park(self, partitions: Iterable[tuple[Partition, str]], now: datetime) -> None:
        """These are not asked for any more, until somebody unparks them."""
        rows = [(iso(now), reason, p.market.key, p.month_key) for p, reason in partitions]
        with self._transaction() as db:
            db.executemany("UPDATE asks SET parked_at = ?, reason = ? WHERE market = ? AND month = ?", rows)

    def forget_asks(self, partitions: Iterable[Partition]) -> int:
        """The attempts of these are forgotten (they are done, or unparked); how many there were."""
        with self._transaction() as db:
            keys = [(p.market.key, p.month_key) for p in partitions]
            return db.executemany("DELETE FROM asks WHERE market = ? AND month = ?", keys).rowcount if keys else 0

    def set_check(self, table: Table, partition: Partition, name: str, red: tuple[bool, str] | None, now: datetime) -> None:
        """A check is red (whether it blocks, and what it says), or green (None)."""
        where = (*_where(table, partition), name)
        if red is None and not self._rows("SELECT 1 FROM red_checks WHERE tbl = ? AND market = ? AND month = ? AND name = ?", *where):
            return
        with self._transaction() as db:
            if red is None:
                db.execute("DELETE FROM red_checks WHERE tbl = ? AND market = ? AND month = ? AND name = ?", where)
                return
            db.execute(
                "INSERT INTO red_checks VALUES (?, ?, ?, ?, ?, ?, 1, ?) ON CONFLICT DO UPDATE SET"
                " times = times + 1, blocking = excluded.blocking, says = excluded.says",
                (*where, *red, iso(now)),
            )

    def red_checks(self) -> list[RedCheck]:
        """Every check that is red now."""
        columns = "tbl, market, month, name, blocking, says, times, since"
        found = self._rows(f"SELECT {columns} FROM red_checks ORDER BY tbl, market, month, name")
        return [RedCheck(t, Partition.parse(f"{m}|{k}"), n, bool(b), s, c, parse_time(a)) for t, m, k, n, b, s, c, a in found]

    def beat(self, name: str, now: datetime) -> None:
        """Something that must go on for ever has just been done."""
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO beats VALUES (?, ?)", (name, iso(now)))

    def last_beat(self, name: str) -> datetime | None:
        """When it was done last."""
        found = self._rows("SELECT at FROM beats WHERE name = ?", name)
        return parse_time(found[0][0]) if found else None

    def forget_fetches(self, before: float, dry_run: bool = False) -> int:
        """Delete the fetch log's rows from before a moment, but for those that quarantine names; how many."""
        old = "asked_at < ? AND id NOT IN (SELECT fetch_id FROM quarantine WHERE fetch_id IS NOT NULL)"
        if dry_run:
            return int(self._rows(f"SELECT count(*) FROM fetches WHERE {old}", before)[0][0])
        with self._transaction() as db:
            return db.execute(f"DELETE FROM fetches WHERE {old}", (before,)).rowcount

    def requests(self) -> list[tuple[Any, ...]]:
        """Outcomes of the fetch log with their counts."""
        return self._rows("SELECT outcome, coalesce(error, ''), count(*) FROM fetches GROUP BY 1, 2 ORDER BY 3 DESC")


_STATE = "start, through, newest, complete, rows, bytes, digest, rolled, attempts, failures, error"


def _state(start: str, through: str, newest: str | None, complete: int, *rest: Any) -> State:
    return State(parse_time(start), parse_time(through), parse_time(newest) if newest else None, bool(complete), *rest)


def _ask(market: str, month: str, attempts: int, asked_at: str, parked_at: str | None, reason: str) -> Ask:
    parked = parse_time(parked_at) if parked_at else None
    return Ask(Partition.parse(f"{market}|{month}"), attempts, parse_time(asked_at), parked, reason)


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

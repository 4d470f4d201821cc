"""The ledger: what neither the lake nor Dagster holds.

Fetch log, watermarks, gap evidence, quarantine, attempts and failures per partition, and what all
processes of an instance share of a venue: its limiter, its pauses, its circuit breaker. All moments
in it are seconds since 1970, or ISO text in UTC where a person reads them.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, NamedTuple

import polars as pl

from marketdata_assets.ledger.database import Database
from marketdata_assets.ledger.schema import Statements, content
from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import Table
from marketdata_assets.model.window import Window, format_time, month_of, parse_time

BREAKER_LIMIT = 30
BREAKER_FIRST, BREAKER_LONGEST = 30.0, 600.0


class Gap(NamedTuple):
    """A window of open times without bars. `reason` is what the answers said: `no_bars`, `quarantined`
    or `unanswered`.

    `no_bars`: the venue delivered both neighbours and nothing between, in two answers.
    `quarantined`: what it delivered broke a rule. `unanswered`: nobody knows yet. `answers` counts
    the answers, or the runs, that ended so.

    `cause` is what that means (quality.causes; empty: not told apart yet) and `proof`, JSON, why.
    `next_ask` is when, by our clock, it is asked for again; None with a cause: never, two kinds of
    evidence agree.
    """

    window: Window
    bars: int
    reason: str
    answers: int
    evidence: str
    cause: str = ""
    proof: str = "{}"
    first_asked: datetime | None = None
    last_asked: datetime | None = None
    next_ask: datetime | None = None

    @property
    def settled(self) -> bool:
        """True when it is known what it is, or it was asked for in so many runs that later ones keep a
        distance.
        """
        return self.reason == "no_bars" or self.cause != "" or self.answers >= PROMPT_ASKS

    @property
    def part(self) -> str:
        """Under which part of the coverage its bars stand."""
        return "quarantined" if self.reason == "quarantined" else self.cause or "missing_at_source"

    def due(self, now: datetime) -> bool:
        """Whether a run asks for it."""
        return self.next_ask <= now if self.next_ask else not self.settled


PROMPT_ASKS = 3
"""In so many runs a hole that nobody has answered for is asked for without a pause between them."""
WAREHOUSE = "warehouse"


@dataclass(frozen=True, slots=True)
class State:
    """What the ledger knows of one partition of a raw table.

    `[start, through)` has been asked for; `newest` is the open time of the last bar that is stored;
    `whole_at` is when, by our clock, the whole of it had been asked for.
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
    whole_at: datetime | None = None


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
    """A venue's circuit breaker: failures in a row, and until when it lets nothing through (0: it is
    closed).
    """

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
    sources: Sequence[str] = ()
    """What told the rows where it was not the venue, by `answer`."""


class Ledger(Database):
    """What the instance's processes know of venues, markets and partitions. Raises StoreFailed."""

    # ------------------------------------------------------------------------------ venues, shared
    def reserve(self, venue: str, now: float, requests_per_minute: int | None) -> float:
        """A place in the queue: at most `requests_per_minute` in any 60 s, with bursts of a quarter
        second's worth.
        """
        if requests_per_minute is None:
            return now
        burst = max(1.0, requests_per_minute / 240)
        interval = 60 / max(requests_per_minute - burst, requests_per_minute / 2)
        shared = now + self.skew
        with self.transaction() as db:
            db.execute(_NEW_VENUE, (venue,))
            sql = "UPDATE venues SET next_at = CASE WHEN next_at > ? THEN next_at ELSE ? END + ? WHERE venue = ? RETURNING next_at"
            (next_at,) = db.execute(sql, (shared, shared, interval, venue)).fetchone()
        return float(next_at - burst * interval - self.skew)

    def pause(self, venue: str, until: float) -> None:
        """No request of any process before `until`."""
        with self.transaction() as db:
            db.execute(_NEW_VENUE, (venue,))
            moment = until + self.skew
            db.execute(
                "UPDATE venues SET paused_until = ? WHERE venue = ? AND paused_until < ?",
                (moment, venue, moment),
            )

    def paused_until(self, venue: str) -> float:
        """The moment the venue asked for; 0 when it did not."""
        found = self.rows("SELECT paused_until FROM venues WHERE venue = ?", venue)
        return self._ours(found[0][0]) if found else 0.0

    def record(self, venue: str, ok: bool, now: float) -> None:
        """Count failures in a row; at BREAKER_LIMIT the breaker opens, each time longer. A success
        closes it.
        """
        found = self.rows("SELECT failures FROM venues WHERE venue = ?", venue)
        if ok and (not found or found[0][0] == 0):
            return
        shared = now + self.skew
        with self.transaction() as db:
            db.execute(_NEW_VENUE, (venue,))
            if ok:
                db.execute(
                    "UPDATE venues SET failures = 0, opened = 0, broken_until = 0 WHERE venue = ?",
                    (venue,),
                )
                return
            sql = "UPDATE venues SET failures = failures + 1 WHERE venue = ? RETURNING failures, opened, broken_until"
            failures, opened, until = db.execute(sql, (venue,)).fetchone()
            if failures == BREAKER_LIMIT or (failures > BREAKER_LIMIT and until <= shared):
                stay = min(BREAKER_LONGEST, BREAKER_FIRST * 2.0**opened)
                db.execute(
                    "UPDATE venues SET opened = opened + 1, broken_until = ? WHERE venue = ?",
                    (shared + stay, venue),
                )

    def broken_until(self, venue: str, now: float) -> float:
        """0 when requests may go. When an open breaker's time is up, one caller is let through to try.

        It tries on its last failure: one more, and the breaker opens again, for longer.
        """
        found = self.rows("SELECT broken_until FROM venues WHERE venue = ?", venue)
        if not found or found[0][0] == 0:
            return 0.0
        shared, last = now + self.skew, BREAKER_LIMIT - 1
        with self.transaction() as db:
            over = "broken_until > 0 AND broken_until <= ?"
            sql = f"UPDATE venues SET broken_until = ?, failures = ? WHERE venue = ? AND {over} RETURNING venue"
            if db.execute(sql, (shared + BREAKER_FIRST, last, venue, shared)).fetchone():
                return 0.0
            (until,) = db.execute(
                "SELECT broken_until FROM venues WHERE venue = ?", (venue,)
            ).fetchone()
        return self._ours(until)

    def venue_health(self, venue: str) -> VenueHealth:
        """What the breaker and the limiter hold against a venue; asking changes nothing."""
        found = self.rows(
            "SELECT failures, broken_until, paused_until FROM venues WHERE venue = ?", venue
        )
        if not found:
            return VenueHealth(0, 0.0, 0.0)
        failures, broken, paused = found[0]
        return VenueHealth(failures, self._ours(broken), self._ours(paused))

    def _ours(self, moment: float) -> float:
        """A moment of the shared clock by this machine's clock; 0 stays 0."""
        return float(moment - self.skew) if moment else 0.0

    # ------------------------------------------------------------------------------ markets and par
    def listed(self, market: Market) -> datetime | None:
        """The open time of the market's first bar ever, where the venue told it twice."""
        found = self.rows("SELECT listed FROM markets WHERE market = ?", market.key)
        return parse_time(found[0][0]) if found else None

    def set_listed(self, market: Market, listed: datetime, evidence: str) -> None:
        """Remember a market's first bar."""
        with self.transaction() as db:
            db.execute(
                _upsert("markets", "market", "listed, evidence"),
                (market.key, format_time(listed), evidence),
            )

    def states(self, table: Table, market: Market) -> dict[str, State]:
        """What is known of a market's partitions, by month key."""
        found = self.rows(
            f"SELECT month, {_STATE} FROM partitions WHERE tbl = ? AND market = ?",
            table.name,
            market.key,
        )
        return {month: _state(*rest) for month, *rest in found}

    def outlines(self, table: Table) -> dict[tuple[str, str], Outline]:
        """What is known of every partition of a table, by market key and month key; made for tens of
        thousands at once.
        """
        columns = "market, month, start, through, complete, bytes, rolled IS NOT NULL AND rolled = digest, error"
        return {
            (m, k): Outline(*rest)
            for m, k, *rest in self.rows(
                f"SELECT {columns} FROM partitions WHERE tbl = ?", table.name
            )
        }

    def stored_span(self, market: Market) -> dict[str, Window]:
        """By table name: from the first to the last month of which something of a market is stored."""
        sql = "SELECT tbl, min(month), max(month) FROM partitions WHERE market = ? AND bytes IS NOT NULL GROUP BY tbl"
        return {
            t: Window(parse_time(a), month_of(parse_time(b)).end)
            for t, a, b in self.rows(sql, market.key)
        }

    def newest(self, table: Table) -> dict[str, tuple[datetime, str, int]]:
        """By market key: the open time of its newest stored bar, and month key and size of the object
        that holds it.
        """
        newest = "row_number() OVER (PARTITION BY market ORDER BY newest DESC)"
        ranked = f"SELECT market, newest, month, bytes, {newest} AS place FROM partitions WHERE tbl = ? AND newest IS NOT NULL"
        found = self.rows(
            f"SELECT market, newest, month, bytes FROM ({ranked}) AS ranked WHERE place = 1",
            table.name,
        )
        return {market: (parse_time(newest), month, size) for market, newest, month, size in found}

    def state(self, table: Table, partition: Partition) -> State | None:
        """What is known of one partition."""
        found = self.rows(
            f"SELECT {_STATE} FROM partitions WHERE tbl = ? AND market = ? AND month = ?",
            *_where(table, partition),
        )
        return _state(*found[0]) if found else None

    def gaps(self, table: Table, partition: Partition) -> list[Gap]:
        """The gaps of one partition, in order."""
        where = "tbl = ? AND market = ? AND month = ?"
        return [
            gap_of(row)
            for row in self.rows(
                f"SELECT {GAP} FROM gaps WHERE {where} ORDER BY start", *_where(table, partition)
            )
        ]

    def commit(self, entry: Entry) -> None:
        """Write down one ingest, whole or not at all."""
        where, now, s = _where(entry.table, entry.partition), format_time(entry.now), entry.state
        with self.transaction() as db:
            ids = _log_fetches(db, entry.table, entry.partition.market, entry.fetches)
            db.execute("DELETE FROM gaps WHERE tbl = ? AND market = ? AND month = ?", where)
            write_gaps(db, entry.table, entry.partition, entry.gaps)
            _quarantine(db, entry, ids, now)
            db.execute(
                _upsert("partitions", "tbl, market, month", f"{_STATE}, account, updated_at"),
                (*where, format_time(s.start), format_time(s.through), s.newest and format_time(s.newest), s.complete, s.rows, s.bytes, s.digest, s.rolled,
                 s.attempts, s.failures, s.error, s.whole_at and format_time(s.whole_at), json.dumps(asdict(entry.account)), now),
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

        `forgiven`: the partition is not to blame (its venue or a store does not answer), so the
        failure does not count against it, nor does the last attempt of `backfill_missed`.
        """
        where, counts = _where(table, partition), int(not forgiven)
        with self.transaction() as db:
            _log_fetches(db, table, partition.market, fetches)
            if forgiven:
                db.execute(
                    "UPDATE asks SET attempts = attempts - 1 WHERE market = ? AND month = ? AND attempts > 0",
                    where[1:],
                )
            db.execute(
                "INSERT INTO partitions VALUES (?, ?, ?, ?, ?, NULL, 0, 0, NULL, NULL, NULL, 1, ?, ?, NULL, ?, NULL)"
                " ON CONFLICT (tbl, market, month) DO UPDATE SET attempts = partitions.attempts + 1,"
                " failures = partitions.failures + excluded.failures, error = excluded.error,"
                " updated_at = excluded.updated_at",
                (
                    *where,
                    format_time(wanted.start),
                    format_time(wanted.start),
                    counts,
                    error,
                    format_time(now),
                ),
            )

    def set_rolled(self, table: Table, partition: Partition, digest: str) -> None:
        """The rollups of this partition were made from raw bars of this digest."""
        with self.transaction() as db:
            db.execute(
                "UPDATE partitions SET rolled = ? WHERE tbl = ? AND market = ? AND month = ?",
                (digest, *_where(table, partition)),
            )

    def retire(self, table: Table, partition: Partition) -> None:
        """Retention has removed the object; what was made of it, and every gap and refused row,
        stays.
        """
        with self.transaction() as db:
            db.execute(
                "UPDATE partitions SET bytes = NULL WHERE tbl = ? AND market = ? AND month = ?",
                _where(table, partition),
            )

    def forget_rollups(self) -> None:
        """All rollups have to be made again (the warehouse file is gone)."""
        with self.transaction() as db:
            db.execute(
                "UPDATE partitions SET rolled = NULL WHERE rolled IS NOT NULL AND tbl LIKE 'raw/%'"
            )

    def quarantined(
        self, market: Market | None, window: Window, limit: int = 1000
    ) -> list[dict[str, Any]]:
        """Rejected rows, oldest first: all fields as text, reasons, source and fetch id."""
        names = "id, tbl, market, month, open_time, reasons, fields, source, fetch_id, seen, first_seen, last_seen, replayed_at"
        sql = (
            f"SELECT {names} FROM quarantine WHERE (? IS NULL OR market = ?)"
            " AND (open_time IS NULL OR (rtrim(open_time, 'Z') >= ? AND rtrim(open_time, 'Z') < ?))"
            " ORDER BY market, rtrim(open_time, 'Z'), id LIMIT ?"
        )
        key = market and market.key
        found = self.rows(
            sql, key, key, format_time(window.start)[:-1], format_time(window.end)[:-1], limit
        )
        rows = [
            dict(zip(names.replace("tbl", "table").split(", "), values, strict=True))
            for values in found
        ]
        return [{**row, "fields": json.loads(row["fields"])} for row in rows]

    def set_replayed(self, ids: Iterable[int], now: datetime) -> None:
        """These refused rows have become bars."""
        with self.transaction() as db:
            db.executemany(
                "UPDATE quarantine SET replayed_at = ? WHERE id = ?",
                [(format_time(now), id) for id in ids],
            )

    def accounts(self) -> list[dict[str, Any]]:
        """The last account of every partition, for audits."""
        found = self.rows(
            "SELECT tbl, market, month, rows, account FROM partitions WHERE account IS NOT NULL ORDER BY tbl, market, month"
        )
        return [
            {"table": t, "market": m, "month": k, "rows": r, **json.loads(a)}
            for t, m, k, r, a in found
        ]

    def account(self, table: Table, partition: Partition) -> Account:
        """The last account of one partition."""
        sql = "SELECT account FROM partitions WHERE tbl = ? AND market = ? AND month = ?"
        found = self.rows(sql, *_where(table, partition))
        return Account(**json.loads(found[0][0])) if found and found[0][0] else Account()

    # ------------------------------------------------------------------------------ automation
    def failing(self) -> dict[str, tuple[int, str]]:
        """By market key: how many ingests of one partition failed in a row, at the most, and why the
        last one did.
        """
        sql = "SELECT market, failures, coalesce(error, '') FROM partitions WHERE failures > 0 ORDER BY 1, 2, 3"
        return {
            market: (failures, error) for market, failures, error in self.rows(sql)
        }  # the worst comes last and stays

    def unsettled(self, table: Table) -> dict[tuple[str, str], list[Window]]:
        """The gaps that are not settled, by market key and month key."""
        found: dict[tuple[str, str], list[Window]] = defaultdict(list)
        sql = "SELECT market, month, start, \"end\" FROM gaps WHERE tbl = ? AND reason != ? AND cause = '' AND answers < ?"
        for market, month, start, end in self.rows(sql, table.name, "no_bars", PROMPT_ASKS):
            found[market, month].append(Window(parse_time(start), parse_time(end)))
        return found

    def open_gaps(self) -> dict[str, int]:
        """By market key: bars that the venue has not answered for yet."""
        sql = "SELECT market, sum(bars) FROM gaps WHERE reason = 'unanswered' AND cause = '' AND answers < ? GROUP BY market"
        return {market: int(bars) for market, bars in self.rows(sql, PROMPT_ASKS)}

    def quarantine_rate(self, since: datetime) -> dict[str, tuple[int, int]]:
        """By market key: rows that a rule refused since a moment, and rows that requests brought since
        then.
        """
        refused = dict(
            self.rows(
                "SELECT market, count(*) FROM quarantine WHERE last_seen >= ? GROUP BY market",
                format_time(since),
            )
        )
        brought = self.rows(
            "SELECT market, sum(coalesce(rows, 0)) FROM fetches WHERE asked_at >= ? GROUP BY market",
            since.timestamp(),
        )
        return {market: (int(refused.get(market, 0)), int(rows)) for market, rows in brought}

    def asks(self) -> dict[tuple[str, str], Ask]:
        """What `backfill_missed` has asked for and not got yet, by market key and month key."""
        found = self.rows(
            "SELECT market, month, attempts, asked_at, parked_at, reason FROM asks ORDER BY market, month"
        )
        return {(m, k): _ask(m, k, *rest) for m, k, *rest in found}

    def ask(self, partitions: Iterable[tuple[Partition, str]], now: datetime) -> None:
        """Count one more attempt for each partition, with the reason it is asked for."""
        rows = [(p.market.key, p.month_key, format_time(now), reason) for p, reason in partitions]
        with self.transaction() as db:
            db.executemany(
                "INSERT INTO asks VALUES (?, ?, 1, ?, NULL, ?) ON CONFLICT (market, month) DO UPDATE SET"
                " attempts = asks.attempts + 1, asked_at = excluded.asked_at, reason = excluded.reason",
                rows,
            )

    def park(self, partitions: Iterable[tuple[Partition, str]], now: datetime) -> None:
        """These are not asked for any more, until somebody unparks them."""
        rows = [(format_time(now), reason, p.market.key, p.month_key) for p, reason in partitions]
        with self.transaction() as db:
            db.executemany(
                "UPDATE asks SET parked_at = ?, reason = ? WHERE market = ? AND month = ?", rows
            )

    def forget_asks(self, partitions: Iterable[Partition]) -> int:
        """The attempts of these are forgotten (they are done, or unparked); how many there were."""
        with self.transaction() as db:
            keys = [(p.market.key, p.month_key) for p in partitions]
            return sum(
                db.execute("DELETE FROM asks WHERE market = ? AND month = ?", key).rowcount
                for key in keys
            )

    def set_check(
        self,
        table: Table,
        partition: Partition,
        name: str,
        red: tuple[bool, str] | None,
        now: datetime,
    ) -> None:
        """A check is red (whether it blocks, and what it says), or green (None)."""
        where = (*_where(table, partition), name)
        if red is None and not self.rows(
            "SELECT 1 FROM red_checks WHERE tbl = ? AND market = ? AND month = ? AND name = ?",
            *where,
        ):
            return
        with self.transaction() as db:
            if red is None:
                db.execute(
                    "DELETE FROM red_checks WHERE tbl = ? AND market = ? AND month = ? AND name = ?",
                    where,
                )
                return
            db.execute(
                "INSERT INTO red_checks VALUES (?, ?, ?, ?, ?, ?, 1, ?) ON CONFLICT (tbl, market, month, name) DO UPDATE SET"
                " times = red_checks.times + 1, blocking = excluded.blocking, says = excluded.says",
                (*where, *red, format_time(now)),
            )

    def red_checks(self) -> list[RedCheck]:
        """Every check that is red now."""
        columns = "tbl, market, month, name, blocking, says, times, since"
        found = self.rows(f"SELECT {columns} FROM red_checks ORDER BY tbl, market, month, name")
        return [
            RedCheck(t, Partition.parse(f"{m}|{k}"), n, bool(b), s, c, parse_time(a))
            for t, m, k, n, b, s, c, a in found
        ]

    def beat(self, name: str, now: datetime) -> None:
        """Something that must go on for ever has just been done."""
        with self.transaction() as db:
            db.execute(_upsert("beats", "name", "at"), (name, format_time(now)))

    def last_beat(self, name: str) -> datetime | None:
        """When it was done last."""
        found = self.rows("SELECT at FROM beats WHERE name = ?", name)
        return parse_time(found[0][0]) if found else None

    def forget_fetches(self, before: float, dry_run: bool = False) -> int:
        """Delete the fetch log's rows from before a moment, but for those that quarantine names; how
        many.
        """
        old = "asked_at < ? AND id NOT IN (SELECT fetch_id FROM quarantine WHERE fetch_id IS NOT NULL)"
        if dry_run:
            return int(self.rows(f"SELECT count(*) FROM fetches WHERE {old}", before)[0][0])
        with self.transaction() as db:
            return int(db.execute(f"DELETE FROM fetches WHERE {old}", (before,)).rowcount)

    def requests(self) -> list[tuple[Any, ...]]:
        """Outcomes of the fetch log with their counts."""
        return self.rows(
            "SELECT outcome, coalesce(error, ''), count(*) FROM fetches GROUP BY 1, 2 ORDER BY 3 DESC"
        )


_NEW_VENUE = "INSERT INTO venues (venue) VALUES (?) ON CONFLICT DO NOTHING"
_STATE = "start, through, newest, complete, rows, bytes, digest, rolled, attempts, failures, error, whole_at"


def _upsert(table: str, keys: str, values: str, order: str | None = None) -> str:
    """Insert a row of keys and values (in this order, or in another), or give the one with these keys
    new values.
    """
    names = order or f"{keys}, {values}"
    replaced = ", ".join(f"{name} = excluded.{name}" for name in values.split(", "))
    marks = ", ".join("?" for _ in names.split(", "))
    return f"INSERT INTO {table} ({names}) VALUES ({marks}) ON CONFLICT ({keys}) DO UPDATE SET {replaced}"


def _state(start: str, through: str, newest: str | None, complete: int, *rest: Any) -> State:
    known: tuple[Any, ...] = (*rest[:-1], parse_time(rest[-1]) if rest[-1] else None)
    return State(
        parse_time(start),
        parse_time(through),
        parse_time(newest) if newest else None,
        bool(complete),
        *known,
    )


def _ask(
    market: str, month: str, attempts: int, asked_at: str, parked_at: str | None, reason: str
) -> Ask:
    parked = parse_time(parked_at) if parked_at else None
    return Ask(Partition.parse(f"{market}|{month}"), attempts, parse_time(asked_at), parked, reason)


def _where(table: Table, partition: Partition) -> tuple[str, str, str]:
    return table.name, partition.market.key, partition.month_key


GAP = (
    'start, "end", bars, reason, answers, evidence, cause, proof, first_asked, last_asked, next_ask'
)
"""The columns of a Gap in its table."""


def gap_of(row: Sequence[Any]) -> Gap:
    """The gap of a row of GAP."""
    start, end, *said, first, last, following = row
    return Gap(
        Window(parse_time(start), parse_time(end)),
        *said,
        *(parse_time(t) if t else None for t in (first, last, following)),
    )


def write_gaps(db: Statements, table: Table, partition: Partition, gaps: Iterable[Gap]) -> None:
    """Insert gaps of one partition, or replace those that begin at the same time."""
    where = _where(table, partition)
    rows = [
        (
            *where,
            format_time(g.window.start),
            format_time(g.window.end),
            *g[1:7],
            *(t and format_time(t) for t in (g.first_asked, g.last_asked, g.next_ask)),
        )
        for g in gaps
    ]
    db.executemany(
        _upsert(
            "gaps",
            "tbl, market, start",
            f"month, {GAP.removeprefix('start, ')}",
            "tbl, market, month, " + GAP,
        ),
        rows,
    )


def _log_fetches(
    db: Statements, table: Table, market: Market, fetches: Sequence[LoggedFetch]
) -> list[int]:
    sql = (
        'INSERT INTO fetches (tbl, market, start, "end", asked_at, seconds, outcome, status, rows, error)'
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING id"
    )
    where = table.name, market.key
    return [
        int(
            db.execute(
                sql, (*where, format_time(f.window.start), format_time(f.window.end), *f[1:])
            ).fetchone()[0]
        )
        for f in fetches
    ]


def _quarantine(db: Statements, entry: Entry, ids: list[int], now: str) -> None:
    rows = []
    for answer, moment, reasons, fields in entry.rejected.select(
        "answer", "open_time", "reasons", "fields"
    ).iter_rows():
        fetch, open_time = (
            ids[entry.answers[answer]] if 0 <= answer < len(entry.answers) else None,
            moment and format_time(moment),
        )
        source = _teller(entry, answer)
        rows.append(
            (
                *_where(entry.table, entry.partition),
                open_time,
                reasons,
                fields,
                source,
                fetch,
                now,
                now,
                content(open_time, reasons, fields),
            )
        )
    names = "tbl, market, month, open_time, reasons, fields, source, fetch_id, first_seen, last_seen, content"
    db.executemany(
        f"INSERT INTO quarantine ({names}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (tbl, market, month, content)"
        " DO UPDATE SET seen = quarantine.seen + 1, last_seen = excluded.last_seen, fetch_id = excluded.fetch_id",
        rows,
    )


def _teller(entry: Entry, answer: int) -> str:
    if not entry.sources:
        return entry.partition.market.venue
    return entry.sources[answer if 0 <= answer < len(entry.sources) else 0]


def logged(requests: Sequence[Any], window: Window) -> list[LoggedFetch]:
    """Requests (as `sources.base.Request`) about one window, as rows of the fetch log."""
    return [
        LoggedFetch(window, r.asked_at, r.seconds, r.outcome, r.status, r.rows, r.error)
        for r in requests
    ]

"""The instance's database: one SQLite file (WAL) in the state folder, or PostgreSQL where several
machines share it.

Both give transactions, rows, and locks between processes that end with their process. In PostgreSQL
all lies in the schema `marketdata`, beside whatever else (Dagster's own storage) is in that
database.
"""

from __future__ import annotations

import fcntl
import hashlib
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from marketdata_assets.errors import BadInput, StoreFailed
from marketdata_assets.ledger.schema import STEPS, TABLES, VERSION, Statements

if TYPE_CHECKING:
    from psycopg2.extensions import connection as PgConnection


PATIENCE = 30.0
"""Seconds for which a PostgreSQL server that starts again is waited for."""


class Database:
    """Tables, transactions and locks, a connection per thread. `url` (postgresql://) instead of the
    file. Raises StoreFailed.
    """

    def __init__(self, state: Path, url: str | None = None) -> None:
        self._engine: _Engine = _Postgres(url) if url else _Sqlite(state)
        if self._version() != VERSION:
            self._migrate()

    def transaction(self) -> AbstractContextManager[Statements]:
        """Statements that happen all or not at all."""
        return self._engine.transaction()

    def rows(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """What a query finds."""
        return self._engine.rows(sql, values)

    def lock(self, what: str, wait: bool = True) -> AbstractContextManager[bool]:
        """Hold a partition's key, or WAREHOUSE, against all other processes; the lock ends with its
        process.

        False when `wait` is off and somebody else holds it.
        """
        return self._engine.lock(what, wait)

    @property
    def skew(self) -> float:
        """How many seconds the clock that all workers share is ahead of ours; 0 where one machine
        works alone.
        """
        return self._engine.skew

    def _version(self) -> int | None:
        if self._engine.has_table("schema_version"):
            found = self.rows("SELECT version FROM schema_version")
            return int(found[0][0]) if found else None
        return 1 if self._engine.has_table("partitions") else None

    def _migrate(self) -> None:
        """Make the tables, or bring them from the version they have to ours, in one transaction."""
        with self.lock("schema"):
            found = self._version()
            if found is not None and found > VERSION:
                raise BadInput(
                    f"{self._engine.name} was written by a newer release (version {found}, ours is {VERSION}); upgrade this one"
                )
            with self.transaction() as db:
                if found is None:
                    for statement in TABLES:
                        db.execute(statement.replace("{id}", self._engine.identity))
                    db.execute("INSERT INTO schema_version VALUES (?)", (VERSION,))
                for version in range((found or VERSION) + 1, VERSION + 1):
                    STEPS[version](db, self._engine.identity)
                db.execute("UPDATE schema_version SET version = ?", (VERSION,))


class _Engine(Protocol):
    """What differs between the two."""

    name: str
    identity: str

    @property
    def skew(self) -> float: ...

    def has_table(self, name: str) -> bool: ...

    def transaction(self) -> AbstractContextManager[Statements]: ...

    def rows(self, sql: str, values: Sequence[Any]) -> list[tuple[Any, ...]]: ...

    def lock(self, what: str, wait: bool) -> AbstractContextManager[bool]: ...


class _Sqlite:
    """`<state>/ledger.db`, and files in `<state>/locks`."""

    identity = "INTEGER PRIMARY KEY"
    skew = 0.0

    def __init__(self, state: Path) -> None:
        self._locks, self._file = state / "locks", state / "ledger.db"
        self.name = str(self._file)
        self._local = threading.local()
        try:
            self._locks.mkdir(parents=True, exist_ok=True)
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

    def has_table(self, name: str) -> bool:
        return bool(self.rows("SELECT 1 FROM sqlite_master WHERE name = ?", (name,)))

    @contextmanager
    def transaction(self) -> Iterator[Statements]:
        try:
            db = self._db
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise self._failed("written", error) from None

    def rows(self, sql: str, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        try:
            return self._db.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise self._failed("read", error) from None

    def _failed(self, verb: str, error: Exception) -> StoreFailed:
        return StoreFailed(
            f"{self._file} cannot be {verb} ({error}); mend the folder or set another `state:`"
        )

    @contextmanager
    def lock(self, what: str, wait: bool) -> Iterator[bool]:
        try:
            handle = (self._locks / what).open("w")
        except OSError as error:
            raise self._failed("locked", error) from None
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True


class _Postgres:
    """A PostgreSQL database. Locks live in the connection that writes: when it breaks, they are gone,
    and nothing more is written.
    """

    identity = "BIGINT GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY"

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._url = url
        self.name = f"postgresql://{parts.hostname or ''}{parts.path}"
        self._local = threading.local()
        self._skew: float | None = None

    @property
    def skew(self) -> float:
        if self._skew is None:
            before = time.time()
            ((theirs,),) = self.rows("SELECT extract(epoch FROM clock_timestamp())", ())
            self._skew = float(theirs) - (before + time.time()) / 2
        return self._skew

    def has_table(self, name: str) -> bool:
        return bool(
            self.rows(
                "SELECT 1 FROM pg_tables WHERE schemaname = current_schema() AND tablename = ?",
                (name,),
            )
        )

    @contextmanager
    def transaction(self) -> Iterator[Statements]:
        with self._translated("written"):
            db = self._begun()
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                with suppress(Exception):
                    db.execute("ROLLBACK")
                raise

    def rows(self, sql: str, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        with self._translated("read"):
            db = self._begun()
            try:
                found: list[tuple[Any, ...]] = db.execute(sql, values).fetchall()
            finally:
                with suppress(Exception):
                    db.execute("COMMIT")
            return found

    def _begun(self) -> _PgStatements:
        """A transaction on this thread's connection; one that broke while nothing was held is opened
        again.
        """
        import psycopg2

        try:
            db = _PgStatements(self._connection())
            db.execute("BEGIN")
        except (psycopg2.OperationalError, psycopg2.InterfaceError):
            self._local.db = None
            if self._held:
                raise
            db = _PgStatements(self._connection())
            db.execute("BEGIN")
        return db

    @property
    def _held(self) -> int:
        return int(getattr(self._local, "held", 0))

    def _connection(self) -> PgConnection:
        """This thread's connection; a server that is starting again is waited for."""
        import psycopg2

        known: PgConnection | None = getattr(self._local, "db", None)
        deadline = time.monotonic() + PATIENCE
        while known is None:
            if self._held:
                raise psycopg2.OperationalError(
                    "the connection broke, and the locks it held are gone"
                )
            try:
                known = self._connect()
            except psycopg2.OperationalError as error:
                if time.monotonic() > deadline or _final(error):
                    raise
                _pause(0.5)
        self._local.db = known
        return known

    def _connect(self) -> PgConnection:
        """A dead peer is noticed within half a minute on both sides, so that its locks do not outlive
        it.
        """
        import psycopg2

        alive = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3}
        theirs = "-c tcp_keepalives_idle=10 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=3 -c search_path=marketdata"
        connection = psycopg2.connect(
            self._url, connect_timeout=10, application_name="marketdata", options=theirs, **alive
        )
        connection.autocommit = True
        taken = suppress(
            psycopg2.errors.UniqueViolation, psycopg2.errors.InsufficientPrivilege
        )  # two at once; made by an admin
        with taken, connection.cursor() as cursor:
            cursor.execute("CREATE SCHEMA IF NOT EXISTS marketdata")
        return connection

    @contextmanager
    def _translated(self, verb: str) -> Iterator[None]:
        import psycopg2

        try:
            yield
        except psycopg2.Error as error:
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise StoreFailed(
                f"{self.name} cannot be {verb} ({why}); see to the server, or set another `database:`"
            ) from None

    @contextmanager
    def lock(self, what: str, wait: bool) -> Iterator[bool]:
        key = int.from_bytes(hashlib.sha256(what.encode()).digest()[:8], "big", signed=True)
        while not (got := self._try_lock(key)) and wait:
            _pause(0.1)
        if not got:
            yield False
            return
        self._local.held = self._held + 1
        try:
            yield True
        finally:
            self._local.held = self._held - 1
            with suppress(StoreFailed):  # with the connection the lock is gone, too
                self._unlock(key)

    def _try_lock(self, key: int) -> bool:
        return bool(self.rows("SELECT pg_try_advisory_lock(?)", (key,))[0][0])

    def _unlock(self, key: int) -> None:
        if getattr(self._local, "db", None) is not None:
            self.rows("SELECT pg_advisory_unlock(?)", (key,))


class _PgStatements:
    """A connection of psycopg2 that reads SQL written for both."""

    def __init__(self, connection: PgConnection) -> None:
        self._connection = connection

    def execute(self, sql: str, values: Sequence[Any] = ()) -> Any:
        cursor = self._connection.cursor()
        cursor.execute(_placeholders(sql), [_plain(value) for value in values])
        return cursor

    def executemany(self, sql: str, rows: Sequence[Sequence[Any]]) -> Any:
        from psycopg2.extras import execute_batch

        cursor = self._connection.cursor()
        execute_batch(
            cursor, _placeholders(sql), [[_plain(value) for value in row] for row in rows]
        )
        return cursor


@lru_cache(maxsize=512)
def _placeholders(sql: str) -> str:
    return sql.replace("%", "%%").replace("?", "%s")


def _plain(value: Any) -> Any:
    """SQLite knows no booleans; our columns hold 0 and 1."""
    return int(value) if isinstance(value, bool) else value


def _final(error: Exception) -> bool:
    """Whether waiting cannot help: a wrong password, a database that does not exist."""
    return any(
        sign in str(error)
        for sign in (
            "authentication failed",
            "does not exist",
            "no pg_hba.conf",
            "permission denied",
        )
    )


def _pause(seconds: float) -> None:
    threading.Event().wait(seconds)

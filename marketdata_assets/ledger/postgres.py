"""The ledger in a PostgreSQL database that several machines share, in the schema `marketdata`.

A thread's locks are advisory locks of one server session, and the thread sends all its statements
over that session as long as it holds one: when the connection breaks, the locks have ended, and
nothing more is written under them.

A pooler in transaction mode gives every transaction another session, and so breaks these locks. It
is found when the ledger is opened, and refused. Rows with leases would hold behind such a pooler,
but a lease outlives its process, and a process that stops for longer than its lease continues to
write without a lock. PostgreSQL ends a lock with its session, at once and never before.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import psycopg2
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from marketdata_assets.errors import BadInput
from marketdata_assets.ledger.database import Database, Sent, Values
from marketdata_assets.ledger.tables import metadata

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Session

PATIENCE = 30.0
"""Seconds for which a server that starts again is waited for."""
PROBES = 20
"""How often two sessions behind a pooler are compared before each counts as its client's own."""
FINAL = ("authentication failed", "does not exist", "no pg_hba.conf", "permission denied")
"""Signs of errors that waiting does not mend."""
_KEY = sa.bindparam("key", type_=sa.BigInteger)
_LOCK, _UNLOCK = (
    sa.select(function(_KEY))
    for function in (sa.func.pg_try_advisory_lock, sa.func.pg_advisory_unlock)
)


class PostgresDatabase(Database):
    """One database of a PostgreSQL server. Raises StoreFailed, and BadInput for a pooler that
    shares sessions.
    """

    begin = sa.text("BEGIN")
    begin_reading = sa.text("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
    remedy = "see to the server, or set another `database:`"

    def __init__(self, url: str) -> None:
        self._url, self._local, self._is_checked = url, threading.local(), False
        engine = sa.create_engine(
            "postgresql+psycopg2://",
            creator=self._connect,
            isolation_level="AUTOCOMMIT",
            max_overflow=-1,
            executemany_mode="values_plus_batch",
            use_native_hstore=False,
        )
        parts = urlsplit(url)
        super().__init__(f"postgresql://{parts.hostname or ''}{parts.path}", engine)
        # two processes may make it at once, and an administrator may have made it
        is_there = suppress(sa.exc.IntegrityError, sa.exc.ProgrammingError)
        with self.translate_errors("read"), self._open() as connection, is_there:
            connection.exec_driver_sql("CREATE SCHEMA IF NOT EXISTS marketdata")

    @cached_property
    def clock_skew(self) -> float:
        """Seconds that the server's clock is ahead of ours, measured once."""
        before = time.time()
        ((server,),) = self.rows(sa.text("SELECT extract(epoch FROM clock_timestamp())"))
        return float(server) - (before + time.time()) / 2

    def insert(self, table: sa.Table) -> postgresql.Insert:
        """PostgreSQL's INSERT."""
        return postgresql.insert(table)

    def restart_numbers(self, connection: sa.Connection) -> None:
        """Set each sequence behind the highest number."""
        for table in metadata.sorted_tables:
            if "id" in table.c:
                connection.exec_driver_sql(
                    f"SELECT setval(pg_get_serial_sequence('{table.name}', 'id'),"
                    f" (SELECT coalesce(max(id), 0) + 1 FROM {table.name}), false)"
                )

    # ----------------------------------------------------------------------------- sessions
    @contextmanager
    def send(self, statement: sa.Executable, values: Values = None) -> Iterator[Sent]:
        """Execute a statement in the session that holds this thread's locks, or a pooled one."""
        locked = self._locked
        if locked:
            connection = locked.unbroken()
            yield connection, connection.execute(statement, values)
            return
        connection, result = self._send_pooled(statement, values)
        with connection:
            yield connection, result

    @property
    def _locked(self) -> _LockedSession | None:
        """The session that holds this thread's locks."""
        found: _LockedSession | None = getattr(self._local, "locked", None)
        return found if found and found.locks else None

    def _send_pooled(
        self, statement: sa.Executable, values: Values = None, *, attempts: int = 2
    ) -> Sent:
        """A session may have broken while it was idle: the pool then makes all its sessions anew,
        and the statement is sent once more.
        """
        connection = self._open()
        try:
            return connection, connection.execute(statement, values)
        except BaseException as error:
            connection.close()
            if attempts == 1 or not getattr(error, "connection_invalidated", False):
                raise
            return self._send_pooled(statement, values, attempts=attempts - 1)

    def _open(self) -> sa.Connection:
        """A pooled session; a server that is starting again is waited for."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return self.engine.connect()
            except sa.exc.OperationalError as error:
                is_final = any(sign in str(error.orig) for sign in FINAL)
                if is_final or time.monotonic() > deadline:
                    raise
                _pause(0.5)

    def _connect(self) -> Session:
        """A new session whose end both sides notice within half a minute, so that its locks do not
        outlive its process.
        """
        session = _open_session(self._url)
        if not self._is_checked:
            if is_shared(session, lambda: _open_session(self._url)):
                raise BadInput(
                    f"{self.name} is a pooler that gives every transaction another session, so"
                    " that locks do not hold; let `database:` name the server itself, or a pooler"
                    " in session mode (pool_mode = session)"
                )
            self._is_checked = True
        with session.cursor() as cursor:
            cursor.execute(
                "SET search_path TO marketdata; SET tcp_keepalives_idle TO 10;"
                " SET tcp_keepalives_interval TO 5; SET tcp_keepalives_count TO 3"
            )
        return session

    # ----------------------------------------------------------------------------- locks
    @contextmanager
    def lock(self, name: str, wait: bool = True) -> Iterator[bool]:
        """Hold the advisory lock of a name in this thread's session."""
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)
        while not (locked := self._try_lock(key)) and wait:
            _pause(0.1)
        try:
            yield locked is not None
        finally:
            if locked:
                locked.release(key)

    def _try_lock(self, key: int) -> _LockedSession | None:
        """The session, if it holds the lock now."""
        with self.translate_errors("locked"):
            locked = self._locked
            if locked:
                return locked if locked.try_lock(key) else None
            connection, result = self._send_pooled(_LOCK, {"key": key})
            if not result.scalar():
                connection.close()
                return None
            locked = self._local.locked = _LockedSession(connection)
            return locked


class _LockedSession:
    """A session that holds a number of locks, one to begin with."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection, self.locks = connection, 1

    def unbroken(self) -> sa.Connection:
        """The session, as long as it has its locks. SQLAlchemy would replace a broken one."""
        if self._connection.invalidated:
            lost = psycopg2.OperationalError("the connection broke, and its locks have ended")
            raise sa.exc.OperationalError("", None, lost)
        return self._connection

    def try_lock(self, key: int) -> bool:
        """Take one more lock, if it is free."""
        is_held = bool(self.unbroken().scalar(_LOCK, {"key": key}))
        self.locks += is_held
        return is_held

    def release(self, key: int) -> None:
        """End a lock; with a broken session it has ended already."""
        self.locks -= 1
        try:
            self.unbroken().scalar(_UNLOCK, {"key": key})
        except sa.exc.SQLAlchemyError:
            self._connection.invalidate()
        if not self.locks:
            self._connection.close()


def is_shared(session: Session, connect: Callable[[], Session]) -> bool:
    """Whether other clients may get the server process of a session between its transactions.

    A server sends its process's number when a session begins. Where that is the number that a query
    gives, no pooler stands between: a pooler sends a number of its own, by which it knows the
    client. Behind a pooler, a second session is opened. Poolers hand out the process that became
    free last, or the one that is free for longest: in transaction mode, either both sessions meet
    in one process, or the first one changes its process from one query to the next.
    """
    own = _process(session)
    if session.info.backend_pid == own:
        return False
    other = connect()
    try:
        for _ in range(PROBES):
            if _process(other) == own or {_process(session), _process(session)} != {own}:
                return True
        return False
    finally:
        other.close()


def _process(session: Session) -> int:
    with session.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        ((number,),) = cursor.fetchall()
    return int(number)


def _open_session(url: str) -> Session:
    session = psycopg2.connect(
        url,
        connect_timeout=10,
        application_name="marketdata",
        keepalives_idle=10,
        keepalives_interval=5,
        keepalives_count=3,
    )
    session.autocommit = True
    return session


def _pause(seconds: float) -> None:
    threading.Event().wait(seconds)

"""The ledger in a SQLite file, `<state>/ledger.db`, with locks as files in `<state>/locks`.

In WAL mode with `synchronous=NORMAL`, a crash of the process loses no commit; a power failure may
lose the newest ones, and never leaves half of one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.dialects import sqlite

from marketdata_assets.errors import StoreFailed
from marketdata_assets.ledger.database import Database, Sent, Values
from marketdata_assets.retry import pauses_until, retry
from marketdata_assets.system import lock_file, make_private_folder

if TYPE_CHECKING:
    from sqlite3 import Connection

FILE = "ledger.db"
TIMEOUT = 60.0
"""Seconds for which a statement waits while another process writes."""


class SqliteDatabase(Database):
    """One file of one machine. Raises StoreFailed.

    A transaction takes the file's only write lock at its beginning (BEGIN IMMEDIATE), so that it
    never fails half way because another process was faster. `name`: what messages call the file,
    where it is a copy.
    """

    begin, begin_reading = sa.text("BEGIN IMMEDIATE"), sa.text("BEGIN")
    remedy = "mend the folder or set another `state:`"

    def __init__(self, state: Path, name: str | None = None) -> None:
        self._state, self._locks = state, state / "locks"
        engine = sa.create_engine(
            sa.URL.create("sqlite", database=str(state / FILE)),
            isolation_level="AUTOCOMMIT",
            connect_args={"timeout": TIMEOUT},
            max_overflow=-1,
        )
        sa.event.listen(engine, "connect", _set_pragmas)
        super().__init__(name or str(state / FILE), engine)
        try:
            make_private_folder(state)
            self._locks.mkdir(parents=True, exist_ok=True)
            if not (state / FILE).exists():  # SQLite gives the files beside it the same mode
                (state / FILE).touch(mode=0o600)
        except OSError as error:
            raise self.failure("opened", error) from None

    def failure(self, verb: str, error: BaseException) -> StoreFailed:
        """One line of an error. SQLite's own words for a file that is read-only are many."""
        if not is_writable(self._state):
            error = PermissionError("the folder or the file is read-only")
        return super().failure(verb, error)

    @contextmanager
    def send(self, statement: sa.Executable, values: Values = None) -> Iterator[Sent]:
        """Execute a statement on a pooled connection."""
        with self.engine.connect() as connection:
            yield connection, connection.execute(statement, values)

    def insert(self, table: sa.Table) -> sqlite.Insert:
        """SQLite's INSERT."""
        return sqlite.insert(table)

    def restart_numbers(self, connection: sa.Connection) -> None:
        """SQLite gives the number after the highest one."""

    def lock(self, name: str, wait: bool = True) -> AbstractContextManager[bool]:
        """Hold the file of this name."""
        return lock_file(self._locks / name, wait=wait)


def is_writable(state: Path) -> bool:
    """Whether this process may write the file in a folder, or make both."""
    file = state / FILE
    if file.exists() and not os.access(file, os.W_OK):
        return False
    existing = next(folder for folder in (state, *state.absolute().parents) if folder.is_dir())
    return os.access(existing, os.W_OK | os.X_OK)


def _set_pragmas(connection: Connection, record: Any) -> None:
    from sqlite3 import SQLITE_BUSY

    retry(  # SQLite itself does not wait for another process that does this to a new file
        lambda: connection.execute("PRAGMA journal_mode=WAL"),
        should_retry=lambda error: getattr(error, "sqlite_errorcode", None) == SQLITE_BUSY,
        pauses=pauses_until(TIMEOUT, every=0.01),
        sleep=threading.Event().wait,
    )
    connection.execute("PRAGMA synchronous=NORMAL")

"""One SQLite file (WAL) in the state folder, and locks between processes that end with their process."""

from __future__ import annotations

import fcntl
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from marketdata_assets.errors import StoreFailed


class Database:
    """A connection per thread to `<state>/ledger.db`, shared by all processes of an instance. Raises StoreFailed."""

    schema = ""

    def __init__(self, state: Path) -> None:
        self._folder = state
        self._file = state / "ledger.db"
        self._local = threading.local()
        try:
            (state / "locks").mkdir(parents=True, exist_ok=True)
            with self._transaction() as db:
                db.executescript(self.schema)
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

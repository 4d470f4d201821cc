"""Transactions, reads and locks in the ledger's database, which is SQLite or PostgreSQL.

Every connection is in autocommit mode: a read is one statement, and `transaction` sends BEGIN and
COMMIT itself, because each database begins in its own way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from marketdata_assets.errors import BadInput, StoreFailed

if TYPE_CHECKING:
    from sqlalchemy.dialects import postgresql, sqlite

    Insert = postgresql.Insert | sqlite.Insert

Rows = Sequence["sa.Row[*tuple[Any, ...]]"]
Values = Mapping[str, Any] | None
Sent = tuple[sa.Connection, "sa.CursorResult[*tuple[Any, ...]]"]
"""A connection, and the result of the statement that was sent on it first."""


class Database(ABC):
    """Statements and locks. Raises StoreFailed.

    `name` is what messages call the database, without secrets. `is_read_only` is True for the copy
    of a database that cannot be written: then `transaction` raises.
    """

    begin: sa.Executable
    """The statement that begins a transaction."""
    begin_reading: sa.Executable
    """The statement that begins reading everything as it is at one moment."""
    remedy: str
    """What a person does when the database fails."""

    def __init__(self, name: str, engine: sa.Engine) -> None:
        self.name, self.engine, self.is_read_only = name, engine, False

    @property
    def clock_skew(self) -> float:
        """Seconds that the clock which all workers share is ahead of ours; 0 on one machine."""
        return 0.0

    @abstractmethod
    def send(self, statement: sa.Executable, values: Values = None) -> AbstractContextManager[Sent]:
        """Execute a statement on the connection that holds this thread's locks, or a pooled one."""

    @abstractmethod
    def insert(self, table: sa.Table) -> Insert:
        """An INSERT that may have an ON CONFLICT clause."""

    @abstractmethod
    def restart_numbers(self, connection: sa.Connection) -> None:
        """Have the database give numbers after those that were inserted with rows."""

    @abstractmethod
    def lock(self, name: str, wait: bool = True) -> AbstractContextManager[bool]:
        """Hold a name against all other threads and processes; the lock ends with its process.

        False when `wait` is off and the name is held elsewhere.
        """

    @contextmanager
    def transaction(self) -> Iterator[sa.Connection]:
        """A connection whose statements take effect together, or not at all."""
        if self.is_read_only:
            raise StoreFailed(f"{self.name} cannot be written (it is read-only); {self.remedy}")
        with self.translate_errors("written"), self.send(self.begin) as (connection, _):
            try:
                yield connection
                connection.exec_driver_sql("COMMIT")
            except BaseException:
                with suppress(sa.exc.SQLAlchemyError):
                    connection.exec_driver_sql("ROLLBACK")
                raise

    @contextmanager
    def snapshot(self) -> Iterator[sa.Connection]:
        """A connection that reads everything as it is at one moment."""
        with self.translate_errors("read"), self.send(self.begin_reading) as (connection, _):
            try:
                yield connection
            finally:
                with suppress(sa.exc.SQLAlchemyError):
                    connection.exec_driver_sql("ROLLBACK")

    def rows(self, statement: sa.Executable, values: Values = None) -> Rows:
        """What a query with these parameters finds."""
        with self.translate_errors("read"), self.send(statement, values) as (_, result):
            try:
                return result.all()
            except (ValueError, BadInput):  # no value of ours is written so
                raise self.failure("read", ValueError("a value in it is damaged")) from None

    def plain_rows(self, statement: sa.Executable) -> list[tuple[Any, ...]]:
        """What a query finds, with values as they are stored; for tens of thousands of rows."""
        with self.translate_errors("read"), self.send(statement) as (_, result):
            return list(result.cursor.fetchall()) if result.cursor else []

    def upsert(
        self,
        table: sa.Table,
        replaced: Iterable[str],
        computed: Mapping[str, sa.ColumnElement[Any]] | None = None,
    ) -> Insert:
        """An INSERT that changes the row instead where one with this primary key exists.

        The columns in `replaced` take the new row's values, those in `computed` these expressions.
        """
        insert = self.insert(table)
        changes = {name: insert.excluded[name] for name in replaced}
        return insert.on_conflict_do_update(
            index_elements=list(table.primary_key), set_={**changes, **(computed or {})}
        )

    @contextmanager
    def translate_errors(self, verb: str) -> Iterator[None]:
        """Raise the database's errors as StoreFailed: it cannot be read, written, ..."""
        try:
            yield
        except sa.exc.DBAPIError as error:
            raise self.failure(verb, error.orig or error) from None
        except UnicodeDecodeError:  # SQLite's own words about a damaged file
            raise self.failure(verb, ValueError("it is damaged")) from None

    def failure(self, verb: str, error: BaseException) -> StoreFailed:
        """One line of an error, which never holds a statement or a secret."""
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return StoreFailed(f"{self.name} cannot be {verb} ({reason}); {self.remedy}")

    def check_connection(self) -> None:
        """Raise StoreFailed where this thread's connection broke, and with it its locks."""
        self.rows(sa.select(1))

    def close(self) -> None:
        """Close all connections that no thread uses."""
        self.engine.dispose()

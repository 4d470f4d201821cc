"""Copies of the ledger: whole ones in a file, and the rows about each market-month for the lake.

A trigger on each table in KEPT notes in `unsaved` that a market-month changed, in the transaction
that changes it; whoever has written its rows beside the lake removes the note.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from marketdata_assets.errors import BadInput, StoreFailed
from marketdata_assets.ledger.book import Book
from marketdata_assets.ledger.database import Database
from marketdata_assets.ledger.opening import open_database
from marketdata_assets.ledger.sqlite import FILE
from marketdata_assets.ledger.tables import (
    KEPT,
    metadata,
    partitions,
    receipts,
    schema_version,
    unsaved,
)
from marketdata_assets.model.partition import PartitionKey
from marketdata_assets.system import open_regular

RECEIPTS: PartitionKey = ("receipts", "all-01")
"""Stands for all receipts among the market-months."""
_ROWS_AT_ONCE = 10_000
_u = unsaved.c

StoredRows = dict[str, list[dict[str, Any]]]
"""Rows by the stored name of their table, each by the stored names of its columns."""


class CopyBook(Book):
    """What is to be copied to the lake, and comes back from there. Raises StoreFailed."""

    def unsaved(self, most: int | None = None) -> dict[PartitionKey, int]:
        """The market-months whose rows changed since they were saved last, with a number that grows
        with each change.
        """
        statement = sa.select(_u.market, _u.month, _u.version).order_by(_u.market, _u.month)
        found = self._database.plain_rows(statement.limit(most))
        return {(market, month): version for market, month, version in found}

    def note_saved(self, key: PartitionKey, version: int) -> None:
        """Remove the note about a market-month, unless it has changed since that version."""
        delete = sa.delete(unsaved).where(*_is_it(unsaved, key), _u.version == version)
        with self._database.transaction() as connection:
            connection.execute(delete)

    def rows(self, key: PartitionKey) -> StoredRows:
        """The rows about one market-month, as they are stored; of RECEIPTS, all receipts."""
        found: StoredRows = {}
        for table in _tables(key):
            where = () if key == RECEIPTS else _is_it(table, key)
            statement = sa.select(table).where(*where).order_by(*table.primary_key)
            names = [column.name for column in table.columns]
            if rows := self._database.plain_rows(statement):
                found[table.name] = [dict(zip(names, row, strict=True)) for row in rows]
        return found

    def known(self) -> set[PartitionKey]:
        """The market-months about which it holds something already."""
        found: set[PartitionKey] = set()
        for table in KEPT:
            statement = sa.select(table.c.market, table.c.month).distinct()
            found |= {(market, month) for market, month in self._database.plain_rows(statement)}
        has_receipts = self._database.rows(sa.select(receipts.c.id).limit(1))
        return found | ({RECEIPTS} if has_receipts else set())

    def adopt(self, key: PartitionKey, rows: StoredRows) -> None:
        """Insert the rows about a market-month of which it holds none. Raises BadInput."""
        tables = {table.name: table for table in _tables(key)}
        with self._database.transaction() as connection:
            for name, found in rows.items():
                table = tables.get(name)
                names = {column.name for column in table.columns} if table is not None else set()
                if table is None or any(row.keys() != names for row in found):
                    raise BadInput(f"the saved rows of {name!r} are not of this release")
                _insert(connection, table, found)
            connection.execute(sa.delete(unsaved).where(*_is_it(unsaved, key)))
            self._database.restart_numbers(connection)

    def back_up(self, file: Path) -> int:
        """Write all tables, as they are at one moment, to a new file; return the number of rows."""
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=file.parent, prefix=".backup-") as folder:
                with closing(open_database(Path(folder), None, for_reading=False)) as target:
                    count = _copy_tables(self._database, target)
                written = Path(folder, FILE)
                written.chmod(0o600)
                written.replace(file)
        except OSError as error:
            raise StoreFailed(f"{file} cannot be written ({error.strerror})") from None
        return count

    def restore(self, file: Path, *, replace: bool) -> int:
        """Read all tables from a backup, of this release or an earlier one; return the number of
        rows. Raises BadInput for another file, and unless `replace`, where the ledger is not empty.
        """
        if not replace and self._database.rows(sa.select(partitions.c.market).limit(1)):
            raise BadInput(
                f"{self._database.name} is not empty; `--replace` puts the backup in its place"
            )
        with tempfile.TemporaryDirectory(prefix="marketdata-restore-") as folder:
            try:
                with open_regular(file) as source, Path(folder, FILE).open("wb") as copy:
                    shutil.copyfileobj(source, copy)
            except OSError as error:
                raise BadInput(f"{file} cannot be read ({error.strerror})") from None
            try:
                source_database = open_database(Path(folder), None, for_reading=False)
            except StoreFailed:
                raise BadInput(f"{file} is no backup, or is damaged; name another one") from None
            with closing(source_database):
                return _copy_tables(source_database, self._database)


def _copy_tables(source: Database, target: Database) -> int:
    """Put the rows of one database in place of those of another, all or nothing."""
    count = 0
    with source.snapshot() as reading, target.transaction() as writing:
        for table in metadata.sorted_tables:
            if table in (schema_version, unsaved):
                continue
            writing.execute(sa.delete(table))
            names = [column.name for column in table.columns]
            result = reading.execute(sa.select(table))
            while rows := result.cursor.fetchmany(_ROWS_AT_ONCE):
                _insert(writing, table, [dict(zip(names, row, strict=True)) for row in rows])
                count += len(rows)
        target.restart_numbers(writing)
    return count


def _insert(connection: sa.Connection, table: sa.Table, rows: Iterable[Mapping[str, Any]]) -> None:
    """Insert rows of stored values: columns without types pass them as they are."""
    names = [column.name for column in table.columns]
    plain = sa.table(table.name, *map(sa.column, names))
    if found := list(rows):
        connection.execute(sa.insert(plain), found)


def _tables(key: PartitionKey) -> tuple[sa.Table, ...]:
    return (receipts,) if key == RECEIPTS else KEPT


def _is_it(table: sa.Table, key: PartitionKey) -> tuple[sa.ColumnElement[bool], ...]:
    return table.c.market == key[0], table.c.month == key[1]

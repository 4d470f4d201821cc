"""Open the ledger's database: make its tables, or bring those of an earlier release forward.

An older release that opens a newer ledger refuses it by the number in `schema_version`; that table
and its meaning stay for ever.
"""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from marketdata_assets.errors import BadInput
from marketdata_assets.ledger.database import Database
from marketdata_assets.ledger.tables import VERSION, metadata, partitions, schema_version


def open_database(state: Path, url: str | None, *, for_reading: bool) -> Database:
    """The database at `url`, or the file in the state folder, with the tables of this release.

    With `for_reading`, a file that cannot be written is read from a copy. Raises StoreFailed, and
    BadInput for a ledger of a newer release.
    """
    # imports in here: a process needs the driver of one database only
    if url:
        from marketdata_assets.ledger.postgres import PostgresDatabase

        return _prepare_tables(PostgresDatabase(url))
    from marketdata_assets.ledger.sqlite import SqliteDatabase, is_writable

    if for_reading and not is_writable(state):
        from marketdata_assets.ledger.reading_copy import ReadingCopy

        copy = _prepare_tables(ReadingCopy(state))
        copy.is_read_only = True
        return copy
    return _prepare_tables(SqliteDatabase(state))


def _prepare_tables(database: Database) -> Database:
    with database.translate_errors("read"), database.send(sa.select(1)) as (connection, _):
        if _read_version(connection, database.name) == VERSION:
            return database
    # another process may be doing it: whoever comes second finds it done
    with database.lock("schema"), database.transaction() as connection:
        found = _read_version(connection, database.name)
        if found is None:
            metadata.create_all(connection, checkfirst=False)
            connection.execute(sa.insert(schema_version).values(version=VERSION))
        elif found < VERSION:
            # imported in here: Alembic takes a third of a second
            from marketdata_assets.ledger.migrations.upgrade import upgrade

            upgrade(connection, found)
            connection.execute(sa.update(schema_version).values(version=VERSION))
    return database


def _read_version(connection: sa.Connection, name: str) -> int | None:
    """The version of the tables that are there; None where there are none. Raises BadInput."""
    tables = sa.inspect(connection)
    if not tables.has_table(schema_version.name):
        return 1 if tables.has_table(partitions.name) else None
    found: int | None = connection.scalar(sa.select(schema_version.c.version))
    if found is not None and found > VERSION:
        raise BadInput(
            f"{name} was written by a newer release (version {found}, ours is {VERSION});"
            " upgrade this one"
        )
    return found

"""What the books of the ledger share: each reads and writes a group of tables."""

from __future__ import annotations

import sqlalchemy as sa

from marketdata_assets.ledger.database import Database
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import Table


class Book:
    """Statements about a group of tables. Raises StoreFailed."""

    def __init__(self, database: Database) -> None:
        self._database = database


def key_of(table: Table, partition: Partition) -> dict[str, str]:
    """The columns that name a partition of a table."""
    return {"tbl": table.name, "market": partition.market.key, "month": partition.month_key}


def is_about(stored: sa.Table, table: Table, partition: Partition) -> sa.ColumnElement[bool]:
    """The condition that a stored row is about a partition of a table."""
    return sa.and_(*(stored.c[name] == value for name, value in key_of(table, partition).items()))

"""What the books of the ledger share: each reads and writes a group of tables.

A statement that is executed for every request or partition is made once, at the top of its module,
with its values as parameters: SQLAlchemy takes several times as long to make one as to execute it.
"""

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


def is_about(stored: sa.Table) -> sa.ColumnElement[bool]:
    """The condition that a stored row is about one partition, whose values are `about`."""
    names = ("tbl", "market", "month")
    return sa.and_(*(stored.c[name] == sa.bindparam(f"its_{name}") for name in names))


def about(table: Table, partition: Partition) -> dict[str, str]:
    """The values of `is_about`."""
    return {f"its_{name}": value for name, value in key_of(table, partition).items()}

"""What was stored last of every object of the lake."""

from __future__ import annotations

from collections.abc import Mapping

import sqlalchemy as sa

from marketdata_assets.ledger.book import Book, about, is_about, key_of
from marketdata_assets.ledger.tables import objects, partitions
from marketdata_assets.model.partition import Partition, PartitionKey
from marketdata_assets.model.table import ObjectRecord, Table

DAMAGED = -1
"""The size of an object that somebody found damaged: none has it."""

_c, _p = objects.c, partitions.c
_GET = sa.select(_c.revision, _c.checksum, _c.stamp).where(is_about(objects))
_HOLDS_BYTES = is_about(partitions) & _p.bytes.is_not(None)
_IS_SOURCE = sa.and_(
    _p.tbl.startswith("raw/"),
    _p.market == sa.bindparam("its_market"),
    _p.month == sa.bindparam("its_month"),
)
_MADE_WITH = {"reconciled": "consolidated"}
"""The layer whose next build writes another layer's objects as well."""


class ObjectBook(Book):
    """The table `objects`; a ledger that cannot be written stays as it is. Raises StoreFailed."""

    def get(self, table: Table, partition: Partition) -> ObjectRecord | None:
        """The record of one object."""
        found = self._database.rows(_GET, about(table, partition))
        return ObjectRecord(*found[0]) if found else None

    def of_table(
        self, table: Table, market_keys: frozenset[str] | None = None
    ) -> dict[PartitionKey, ObjectRecord]:
        """The records of a table, or of these markets in it, by market key and month key."""
        columns = (_c.market, _c.month, _c.revision, _c.checksum, _c.stamp)
        statement = sa.select(*columns).where(_c.tbl == table.name)
        if market_keys is not None:
            statement = statement.where(_c.market.in_(market_keys))
        found = self._database.plain_rows(statement)
        return {(market, month): ObjectRecord(*record) for market, month, *record in found}

    def put(self, table: Table, partition: Partition, record: ObjectRecord) -> None:
        """Replace the record of an object."""
        values = record._asdict()
        self._execute(self._database.upsert(objects, values), key_of(table, partition) | values)

    def remove(self, table: Table, partition: Partition) -> None:
        """Forget an object."""
        self._execute(sa.delete(objects).where(is_about(objects)), about(table, partition))

    def note_rewritten(self, table: Table, partition: Partition, size: int) -> None:
        """Remember the size in bytes of an object that was written again with the same rows."""
        update = sa.update(partitions).where(_HOLDS_BYTES)
        self._execute(update, about(table, partition) | {"bytes": size})

    def note_damage(self, table: Table, partition: Partition) -> None:
        """Remember that an object is not what it should be: it counts as lost, or its rollups as
        outdated, so that the next backfill fetches or makes it again.
        """
        if table.layer == "rollup":
            update = sa.update(partitions).where(_IS_SOURCE)
            self._execute(update, about(table, partition) | {"rollup_source_digest": None})
        else:
            made_with = Table(_MADE_WITH.get(table.layer, table.layer), table.timeframe)
            self.note_rewritten(made_with, partition, DAMAGED)

    def _execute(self, statement: sa.Executable, values: Mapping[str, object]) -> None:
        if self._database.is_read_only:
            return
        with self._database.transaction() as connection:
            connection.execute(statement, values)

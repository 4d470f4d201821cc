"""What was stored last of every object of the lake."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

import sqlalchemy as sa

from marketdata_assets.ledger.book import Book, about, is_about, key_of
from marketdata_assets.ledger.tables import objects, partitions, scrubs
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

    def scrubbed(self, table: Table) -> dict[PartitionKey, datetime]:
        """When each object of a table was read whole last, by market key and month key."""
        columns = (scrubs.c.market, scrubs.c.month, scrubs.c["at"])
        found = self._database.rows(sa.select(*columns).where(scrubs.c.tbl == table.name))
        return {(market, month): moment for market, month, moment in found}

    def note_scrubbed(self, table: Table, partition: Partition, now: datetime) -> None:
        """Remember that an object was read whole, and was what it should be."""
        self._execute(
            self._database.upsert(scrubs, ("at",)), key_of(table, partition) | {"at": now}
        )

    def damaged(self) -> list[tuple[str, Partition]]:
        """The objects that somebody found damaged and nobody has replaced yet, by table name."""
        statement = sa.select(_p.tbl, _p.market, _p.month).where(_p.bytes == DAMAGED)
        return [
            (name, Partition.from_stored_key((market, month)))
            for name, market, month in self._database.rows(statement)
        ]

    def note_rewritten(self, table: Table, partition: Partition, size: int) -> None:
        """Remember the size in bytes of an object that was written again with the same rows."""
        update = sa.update(partitions).where(_HOLDS_BYTES)
        self._execute(update, about(table, partition) | {"bytes": size})

    def note_damage(self, table: Table, partition: Partition) -> None:
        """Remember that an object is not what it should be: it counts as lost, or its rollups as
        outdated, so that the next backfill fetches or makes it again. Until then each reader
        compares its content.
        """
        forget_stamp = sa.update(objects).where(is_about(objects))
        self._execute(forget_stamp, about(table, partition) | {"stamp": ""})
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

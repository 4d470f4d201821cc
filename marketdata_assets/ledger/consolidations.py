"""What every consolidated partition was made of, and what it would be made of now."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

import sqlalchemy as sa

from marketdata_assets.ledger.book import Book, about, is_about, key_of
from marketdata_assets.ledger.tables import gaps, partitions
from marketdata_assets.model.gap import GapCause
from marketdata_assets.model.partition import Partition, PartitionKey
from marketdata_assets.model.table import Table
from marketdata_assets.model.window import Window

_c, _g = partitions.c, gaps.c


class SourcePartition(NamedTuple):
    """One raw partition: the digest of its rows, whether they are stored, and a checksum of its
    windows without trades.
    """

    digest: str
    is_stored: bool
    no_trade_checksum: str


class ConsolidationState(NamedTuple):
    """One consolidated partition: the size of its object (None: retention has removed it), the
    digest of its rows, and the hash of what it was made of.
    """

    bytes: int | None
    digest: str | None
    source_digest: str | None


@dataclass(frozen=True, slots=True)
class ConsolidationRecord:
    """A consolidated partition as it is stored now: its bars open in `span`, the last at `newest`,
    and were made of what `source_digest` is the hash of.
    """

    table: Table
    partition: Partition
    span: Window
    newest: datetime | None
    rows: int
    bytes: int
    digest: str
    source_digest: str
    now: datetime


class ConsolidationBook(Book):
    """Consolidated partitions, and the raw ones below them, in the tables `partitions` and `gaps`.
    Raises StoreFailed.
    """

    def sources(self, table: Table, month: str = "") -> dict[PartitionKey, SourcePartition]:
        """Every raw partition of which something was ever stored, or those of one month."""
        checksums = self._no_trade_checksums(table, month)
        statement = sa.select(_c.market, _c.month, _c.digest, _c.bytes.is_not(None)).where(
            _c.tbl == table.name, _c.digest.is_not(None), *_in_month(_c.month, month)
        )
        return {
            (market, key): SourcePartition(
                digest, bool(is_stored), checksums.get((market, key), "")
            )
            for market, key, digest, is_stored in self._database.plain_rows(statement)
        }

    def no_trade_windows(self, table: Table, partition: Partition) -> list[Window]:
        """The windows of a raw partition in which its venue was up and nobody traded, in order."""
        is_it = sa.and_(is_about(gaps), _g.cause == GapCause.NO_TRADE)
        statement = sa.select(_g.start, _g.end).where(is_it).order_by(_g.start)
        found = self._database.rows(statement, about(table, partition))
        return [Window(start, end) for start, end in found]

    def states(self, table: Table) -> dict[PartitionKey, ConsolidationState]:
        """Every consolidated partition."""
        columns = (_c.market, _c.month, _c.bytes, _c.digest, _c.rollup_source_digest)
        found = self._database.plain_rows(sa.select(*columns).where(_c.tbl == table.name))
        return {(market, month): ConsolidationState(*state) for market, month, *state in found}

    def record(self, record: ConsolidationRecord) -> None:
        """Write down that a partition was built and is stored."""
        values = {
            "start": record.span.start,
            "through": record.span.end,
            "newest": record.newest,
            "is_complete": True,
            "rows": record.rows,
            "bytes": record.bytes,
            "digest": record.digest,
            "rollup_source_digest": record.source_digest,
            "error": None,
            "failures": 0,
            "updated_at": record.now,
        }
        upsert = self._database.upsert(partitions, values)
        with self._database.transaction() as connection:
            connection.execute(upsert, key_of(record.table, record.partition) | values)

    def _no_trade_checksums(self, table: Table, month: str) -> dict[PartitionKey, str]:
        """The place of the bars in the month counts, so that no gap can replace another."""
        day, hour, minute = (
            sa.cast(sa.func.substr(_g.start, place, 2), sa.Integer) for place in (9, 12, 15)
        )
        place = day * 1440 + hour * 60 + minute
        sums = (sa.func.count(), sa.func.sum(_g.bars), sa.func.sum(_g.bars * place))
        is_quiet = sa.and_(_g.tbl == table.name, _g.cause == GapCause.NO_TRADE)
        statement = sa.select(_g.market, _g.month, *sums).where(
            is_quiet, *_in_month(_g.month, month)
        )
        found = self._database.plain_rows(statement.group_by(_g.market, _g.month))
        return {
            (market, key): " ".join(str(int(number)) for number in numbers)
            for market, key, *numbers in found
        }


def _in_month(column: sa.ColumnElement[str], month: str) -> list[sa.ColumnElement[bool]]:
    return [column == month] if month else []

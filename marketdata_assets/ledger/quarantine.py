"""Rows that a rule rejected, with their reasons and the request that returned them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import sqlalchemy as sa

from marketdata_assets.ledger.book import Book, key_of
from marketdata_assets.ledger.database import Database
from marketdata_assets.ledger.records import IngestRecord
from marketdata_assets.ledger.tables import fetches, quarantine
from marketdata_assets.model.market import Market
from marketdata_assets.model.window import Window, format_time

_c = quarantine.c
_ROW = (
    *(_c.id, _c.tbl.label("table"), _c.market, _c.month, _c.open_time, _c.reasons, _c.fields),
    *(_c.source, _c.fetch_id, _c.seen, _c.first_seen, _c.last_seen, _c.replayed_at),
)


class RejectionRate(NamedTuple):
    """How many rows a rule rejected, and how many rows requests brought."""

    rejected: int
    received: int


class QuarantineBook(Book):
    """The table `quarantine`. Raises StoreFailed."""

    def rows(
        self, market: Market | None, window: Window, limit: int = 1000
    ) -> list[dict[str, Any]]:
        """Rejected rows of a market (None: of all) that open in a window or at no known time.

        By market and time, at most `limit`. Moments are ISO text; `fields` holds all fields as they
        were sent.
        """
        # text with and without a fraction of a second sorts by time without the Z at its end
        open_time = sa.func.rtrim(_c.open_time, "Z")
        start, end = (format_time(moment)[:-1] for moment in (window.start, window.end))
        is_inside = sa.and_(open_time >= start, open_time < end)
        statement = sa.select(*_ROW).where(_c.open_time.is_(None) | is_inside)
        if market:
            statement = statement.where(_c.market == market.key)
        in_order = statement.order_by(_c.market, open_time, _c.id).limit(limit)
        return [
            {**row._mapping, "fields": json.loads(row.fields)}
            for row in self._database.rows(in_order)
        ]

    def mark_replayed(self, ids: Iterable[int], now: datetime) -> None:
        """Remember that rows have become bars."""
        update = sa.update(quarantine).where(_c.id == sa.bindparam("its_id"))
        rows = [{"its_id": number, "replayed_at": format_time(now)} for number in ids]
        if rows:
            with self._database.transaction() as connection:
                connection.execute(update, rows)

    def rejection_rates(self, since: datetime) -> dict[str, RejectionRate]:
        """Rows rejected, and rows received, since a moment, by market key."""
        counted = sa.select(_c.market, sa.func.count()).where(_c.last_seen >= format_time(since))
        rejected = dict(self._database.plain_rows(counted.group_by(_c.market)))
        received = sa.func.sum(sa.func.coalesce(fetches.c.rows, 0))
        is_new = fetches.c.asked_at >= since.timestamp()
        summed = sa.select(fetches.c.market, received).where(is_new).group_by(fetches.c.market)
        return {
            market: RejectionRate(rejected.get(market, 0), int(count))
            for market, count in self._database.rows(summed)
        }


def quarantine_rows(
    database: Database, connection: sa.Connection, record: IngestRecord, *, fetch_ids: Sequence[int]
) -> None:
    """Write down the rejected rows of an ingest; a row that is there already is counted."""
    rows: dict[str, dict[str, Any]] = {}
    for answer, moment, reasons, fields in record.rejected.select(
        "answer", "open_time", "reasons", "fields"
    ).iter_rows():
        has_answer = 0 <= answer < len(record.answers)
        row = {
            **key_of(record.table, record.partition),
            "open_time": moment and format_time(moment),
            "reasons": reasons,
            "fields": fields,
            "source": _source(record, answer),
            "fetch_id": fetch_ids[record.answers[answer]] if has_answer else None,
            "seen": 1,
            "first_seen": format_time(record.now),
            "last_seen": format_time(record.now),
        }
        content = hash_content(row["open_time"], reasons, fields)
        before = rows.get(content, {"seen": 0})
        rows[content] = {**row, "content": content, "seen": before["seen"] + 1}
    if rows:
        connection.execute(_count_again(database), list(rows.values()))


def hash_content(open_time: str | None, reasons: str, fields: str) -> str:
    """The hash by which a rejected row is known when it comes again."""
    return hashlib.sha256("\x1f".join((open_time or "", reasons, fields)).encode()).hexdigest()


def _count_again(database: Database) -> sa.Insert:
    insert = database.insert(quarantine)
    again = insert.excluded
    return insert.on_conflict_do_update(
        index_elements=[_c.tbl, _c.market, _c.month, _c.content],
        set_={
            "seen": _c.seen + again.seen,
            "last_seen": again.last_seen,
            "fetch_id": again.fetch_id,
        },
    )


def _source(record: IngestRecord, answer: int) -> str:
    if not record.sources:
        return record.partition.market.venue
    return record.sources[answer if 0 <= answer < len(record.sources) else 0]

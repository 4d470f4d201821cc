"""What is stored and requested of each partition."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, fields
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from marketdata_assets.ledger.attempts import take_back
from marketdata_assets.ledger.book import Book, about, is_about, key_of
from marketdata_assets.ledger.database import Rows
from marketdata_assets.ledger.fetches import log_fetches
from marketdata_assets.ledger.gaps import delete_gaps, write_gaps
from marketdata_assets.ledger.quarantine import quarantine_rows
from marketdata_assets.ledger.records import (
    FailureStreak,
    IngestFailure,
    IngestRecord,
    NewestBar,
    PartitionState,
    PartitionSummary,
    RowAccount,
)
from marketdata_assets.ledger.tables import partitions
from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import Partition, PartitionKey
from marketdata_assets.model.table import Table
from marketdata_assets.model.window import Window, month_of, parse_time

_c = partitions.c
_STATE = [_c[field.name] for field in fields(PartitionState)]
_IS_IT = is_about(partitions)
_GET = sa.select(*_STATE).where(_IS_IT)
_GET_ACCOUNT = sa.select(_c.account).where(_IS_IT)


class PartitionBook(Book):
    """The table `partitions`, and with it what an ingest writes into others. Raises StoreFailed."""

    def get(self, table: Table, partition: Partition) -> PartitionState | None:
        """What the ledger holds of one partition."""
        found = self._database.rows(_GET, about(table, partition))
        return PartitionState(*found[0]) if found else None

    def of_market(self, table: Table, market: Market) -> dict[str, PartitionState]:
        """The partitions of a market, by month key."""
        where = sa.and_(_c.tbl == table.name, _c.market == market.key)
        found = self._rows(_c.month, *_STATE, where=where)
        return {month: PartitionState(*state) for month, *state in found}

    def summaries(self, table: Table) -> dict[PartitionKey, PartitionSummary]:
        """Every partition of a table, by market key and month key."""
        is_rolled_up = sa.and_(
            _c.rollup_source_digest.is_not(None), _c.rollup_source_digest == _c.digest
        )
        columns = (_c.market, _c.month, _c.start, _c.through, _c.is_complete, _c.bytes)
        statement = sa.select(*columns, is_rolled_up, _c.error).where(_c.tbl == table.name)
        return {
            (market, month): PartitionSummary(
                start, through, done == 1, size, with_rollups == 1, error
            )
            for market, month, start, through, done, size, with_rollups, error in (
                self._database.plain_rows(statement)
            )
        }

    def stored_span(self, market: Market) -> dict[str, Window]:
        """By table name, from the first to the last month of which something is stored."""
        columns = (_c.tbl, sa.func.min(_c.month), sa.func.max(_c.month))
        where = sa.and_(_c.market == market.key, _c.bytes.is_not(None))
        found = self._database.rows(sa.select(*columns).where(where).group_by(_c.tbl))
        return {
            name: Window(parse_time(first), month_of(parse_time(last)).end)
            for name, first, last in found
        }

    def stored_markets(self) -> list[Market]:
        """All markets of which a raw table holds something, in the order of their keys."""
        where = sa.and_(_c.tbl.startswith("raw/"), _c.bytes.is_not(None))
        statement = sa.select(_c.market).where(where).distinct().order_by(_c.market)
        return [Market.parse(row.market) for row in self._database.rows(statement)]

    def newest(self, table: Table) -> dict[str, NewestBar]:
        """The newest stored bar of each market, by market key."""
        place = sa.func.row_number().over(partition_by=_c.market, order_by=_c.newest.desc())
        where = sa.and_(_c.tbl == table.name, _c.newest.is_not(None))
        columns = (_c.market, _c.newest, _c.month, _c.bytes)
        ranked = sa.select(*columns, place.label("place")).where(where).subquery("ranked")
        first = sa.select(*list(ranked.c)[:4]).where(ranked.c.place == 1)
        return {market: NewestBar(*bar) for market, *bar in self._database.rows(first)}

    def last_bar(self, table: Table, market: Market) -> datetime | None:
        """The open time of a market's newest stored bar."""
        where = sa.and_(_c.tbl == table.name, _c.market == market.key)
        ((found,),) = self._rows(sa.func.max(_c.newest), where=where)
        newest: datetime | None = found
        return newest

    def accounts(self) -> list[dict[str, Any]]:
        """The account of the last ingest of every partition, for audits."""
        statement = sa.select(_c.tbl, _c.market, _c.month, _c.rows, _c.account)
        in_order = statement.where(_c.account.is_not(None)).order_by(_c.tbl, _c.market, _c.month)
        return [
            {"table": name, "market": market, "month": month, "rows": rows, **account}
            for name, market, month, rows, account in self._database.rows(in_order)
        ]

    def account(self, table: Table, partition: Partition) -> RowAccount:
        """The account of the last ingest of one partition."""
        found = self._database.rows(_GET_ACCOUNT, about(table, partition))
        return RowAccount(**found[0].account) if found and found[0].account else RowAccount()

    def failure_streaks(self) -> dict[str, FailureStreak]:
        """The longest streak of failures of a partition of each market, by market key."""
        error = sa.func.coalesce(_c.error, "")
        statement = sa.select(_c.market, _c.failures, error).where(_c.failures > 0)
        # the longest streak comes last, and replaces the others
        found = self._database.rows(statement.order_by(_c.market, _c.failures, error))
        return {market: FailureStreak(*streak) for market, *streak in found}

    # ----------------------------------------------------------------------------- writing
    def commit(self, record: IngestRecord) -> None:
        """Write down one ingest, whole or not at all."""
        table, partition = record.table, record.partition
        values = asdict(record.state) | {
            "account": asdict(record.account),
            "updated_at": record.now,
        }
        with self._database.transaction() as connection:
            numbers = log_fetches(connection, table, partition.market, requests=record.fetches)
            delete_gaps(connection, about(table, partition))
            write_gaps(self._database, connection, key_of(table, partition), new=record.gaps)
            quarantine_rows(self._database, connection, record, fetch_ids=numbers)
            upsert = self._database.upsert(partitions, values)
            connection.execute(upsert, key_of(table, partition) | values)

    def record_failure(self, failure: IngestFailure) -> None:
        """Write down an ingest that failed; what is stored stays as it was."""
        table, partition, now = failure.table, failure.partition, failure.now
        start, count = failure.wanted.start, int(not failure.is_excused)
        values = {
            **key_of(table, partition),
            "start": start,
            "through": start,
            "is_complete": False,
            "rows": 0,
            "attempts": 1,
            "failures": count,
            "error": failure.error,
            "updated_at": now,
        }
        counts = {"attempts": _c.attempts + 1, "failures": _c.failures + count}
        with self._database.transaction() as connection:
            log_fetches(connection, table, partition.market, requests=failure.fetches)
            if failure.is_excused:
                take_back(connection, partition)
            upsert = self._database.upsert(partitions, ("error", "updated_at"), counts)
            connection.execute(upsert, values)

    def set_rollup_source(self, table: Table, partition: Partition, digest: str) -> None:
        """Remember the digest of the raw rows that the rollups of a partition were made of."""
        self._update(_IS_IT, about(table, partition) | {"rollup_source_digest": digest})

    def rollup_sources(
        self, market_keys: Collection[str] | None = None, months: tuple[str, str] | None = None
    ) -> dict[PartitionKey, str]:
        """The digest of the raw rows that the rollups of each partition were made of last, of all
        partitions or those of these markets and months (the first and the last month key).
        """
        where = [_c.rollup_source_digest.is_not(None), _c.tbl.like("raw/%")]
        if market_keys is not None:
            where.append(_c.market.in_(market_keys))
        if months is not None:
            where.append(_c.month.between(*months))
        statement = sa.select(_c.market, _c.month, _c.rollup_source_digest).where(*where)
        return {
            (market, month): digest
            for market, month, digest in self._database.plain_rows(statement)
        }

    def clear_rollup_sources(self) -> None:
        """Have all rollups made again, because the warehouse file is gone."""
        self._update(
            _c.rollup_source_digest.is_not(None) & _c.tbl.like("raw/%"),
            {"rollup_source_digest": None},
        )

    def mark_retired(self, table: Table, partition: Partition) -> None:
        """Remember that retention has removed the object; all else about the partition stays."""
        self._update(_IS_IT, about(table, partition) | {"bytes": None})

    def _update(self, where: sa.ColumnElement[bool], values: dict[str, Any]) -> None:
        with self._database.transaction() as connection:
            connection.execute(sa.update(partitions).where(where), values)

    def _rows(self, *columns: sa.ColumnElement[Any], where: sa.ColumnElement[bool]) -> Rows:
        return self._database.rows(sa.select(*columns).where(where))

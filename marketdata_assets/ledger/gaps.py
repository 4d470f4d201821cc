"""The gaps of all partitions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from marketdata_assets.ledger.book import Book, about, is_about, key_of
from marketdata_assets.ledger.database import Database
from marketdata_assets.ledger.tables import gaps
from marketdata_assets.model.gap import (
    ANSWERED,
    EXPLAIN_THEMSELVES,
    LONGEST_PAUSE,
    PROMPT_ATTEMPTS,
    Gap,
    GapCause,
    GapReason,
    GapStatus,
)
from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import Partition, PartitionKey
from marketdata_assets.model.table import Table
from marketdata_assets.model.window import Window, format_time

_c = gaps.c
_GAP = (
    *(_c.start, _c.end, _c.bars, _c.reason, _c.answers, _c.evidence),
    *(_c.cause, _c.status, _c.proof, _c.first_requested, _c.last_requested, _c.next_request),
)
_OPEN = (GapReason.UNANSWERED, GapReason.DOUBTED)
_NO_CAUSE = ""
"""Stored where no cause is known."""
_IS_ABOUT = is_about(gaps)
_OF = sa.select(*_GAP).where(_IS_ABOUT).order_by(_c.start)
_DELETE = sa.delete(gaps).where(_IS_ABOUT)


class GapBook(Book):
    """The table `gaps`. Raises StoreFailed."""

    def of(self, table: Table, partition: Partition) -> list[Gap]:
        """The gaps of one partition, in order."""
        return [_gap(*row) for row in self._database.rows(_OF, about(table, partition))]

    def of_month(self, table: Table, venue: str, month: str) -> dict[str, list[Gap]]:
        """The gaps of a venue's markets in one month, by market key, each in order."""
        is_of_venue = sa.and_(_c.market >= f"{venue}:", _c.market < f"{venue};")
        statement = sa.select(_c.market, *_GAP).order_by(_c.market, _c.start)
        found: dict[str, list[Gap]] = defaultdict(list)
        for market, *row in self._database.rows(
            statement.where(_c.tbl == table.name, is_of_venue, _c.month == month)
        ):
            found[market].append(_gap(*row))
        return dict(found)

    def between(self, table: Table, market: Market, window: Window) -> list[Gap]:
        """The gaps of a market that touch a window, in order."""
        touches = sa.and_(_c.start < window.end, _c.end > window.start)
        where = sa.and_(_c.tbl == table.name, _c.market == market.key, touches)
        statement = sa.select(*_GAP).where(where).order_by(_c.start)
        return [_gap(*row) for row in self._database.rows(statement)]

    def last_before(self, table: Table, market: Market, moment: datetime) -> Gap | None:
        """The last gap of a market that begins before a moment."""
        where = sa.and_(_c.tbl == table.name, _c.market == market.key, _c.start < moment)
        statement = sa.select(*_GAP).where(where).order_by(_c.start.desc()).limit(1)
        return next((_gap(*row) for row in self._database.rows(statement)), None)

    def unexamined(self, table: Table) -> list[Partition]:
        """The partitions with a gap whose cause was never looked for."""
        where = sa.and_(
            _c.tbl == table.name,
            _c.status == GapStatus.OPEN,
            _c.proof == {},
            _c.reason.not_in(EXPLAIN_THEMSELVES),
        )
        found = self._database.rows(sa.select(_c.market, _c.month).where(where).distinct())
        return [Partition.parse(f"{market}|{month}") for market, month in found]

    def due(self, table: Table, now: datetime) -> set[PartitionKey]:
        """Market key and month key of the partitions with a gap that is to be requested again."""
        moment = now.replace(microsecond=0)
        waits = sa.and_(_c.next_request > moment, _c.next_request <= moment + LONGEST_PAUSE)
        where = sa.and_(_c.tbl == table.name, _c.next_request.is_not(None), ~waits)
        statement = sa.select(_c.market, _c.month).where(where).distinct()
        return {(market, month) for market, month in self._database.plain_rows(statement)}

    def unsettled(self, table: Table) -> dict[PartitionKey, list[Window]]:
        """The windows of the gaps that are not settled, by market key and month key."""
        where = sa.and_(_c.tbl == table.name, _c.reason.not_in(ANSWERED), _is_unsettled())
        found: dict[PartitionKey, list[Window]] = defaultdict(list)
        for market, month, start, end in self._database.rows(
            sa.select(_c.market, _c.month, _c.start, _c.end).where(where)
        ):
            found[market, month].append(Window(start, end))
        return dict(found)

    def open_bars(self) -> dict[str, int]:
        """How many bars no answer has settled yet, by market key."""
        where = sa.and_(_c.reason.in_(_OPEN), _is_unsettled())
        bars = sa.func.sum(_c.bars)
        statement = sa.select(_c.market, bars).where(where).group_by(_c.market)
        return {market: int(count) for market, count in self._database.rows(statement)}

    def reopen(self, table: Table, market: Market, gap: Gap, *, now: datetime) -> None:
        """Discard a gap's cause and have the next run request it. `now` is our clock."""
        is_inside = sa.and_(_c.start >= gap.window.start, _c.end <= gap.window.end)
        is_it = sa.and_(_c.tbl == table.name, _c.market == market.key, is_inside)
        with self._database.transaction() as connection:
            connection.execute(_discard(GapStatus.REOPENED, "reopened", now).where(is_it))

    def withdraw(
        self, tables: Iterable[Table], market: Market, cause: GapCause, *, now: datetime
    ) -> None:
        """Discard this cause of all gaps of a market, which bars contradict, and have the next runs
        request them. `now` is our clock.
        """
        names = [table.name for table in tables]
        is_it = sa.and_(_c.tbl.in_(names), _c.market == market.key, _c.cause == cause)
        with self._database.transaction() as connection:
            connection.execute(_discard(GapStatus.OPEN, "withdrawn", now).where(is_it))

    def rewrite(
        self, table: Table, partition: Partition, *, old: Iterable[Gap], new: Sequence[Gap]
    ) -> None:
        """Replace gaps of a partition by others that hold the same bars, all or nothing."""
        is_old = _c.start == sa.bindparam("old_start")
        rows = [about(table, partition) | {"old_start": gap.window.start} for gap in old]
        with self._database.transaction() as connection:
            if rows:
                connection.execute(_DELETE.where(is_old), rows)
            write_gaps(self._database, connection, key_of(table, partition), new=new)


def _discard(status: GapStatus, word: str, now: datetime) -> sa.Update:
    return sa.update(gaps).values(
        status=status,
        cause=_NO_CAUSE,
        proof={word: format_time(now)},
        next_request=now.replace(microsecond=0),
    )


def delete_gaps(connection: sa.Connection, values: Mapping[str, str]) -> None:
    """Delete the gaps of the partition that these values of `is_about` name."""
    connection.execute(_DELETE, values)


def write_gaps(
    database: Database, connection: sa.Connection, key: Mapping[str, str], *, new: Iterable[Gap]
) -> None:
    """Insert gaps of the partition with this key, or replace those that begin at the same time."""
    rows = {gap.window.start: {**key, **_values(gap)} for gap in new}
    replaced = [column.key for column in _c if not column.primary_key]
    if rows:
        connection.execute(database.upsert(gaps, replaced), list(rows.values()))


def _is_unsettled() -> sa.ColumnElement[bool]:
    """No cause is known, and it is doubted, or was requested in too few runs to wait between
    requests.
    """
    is_open = sa.or_(_c.answers < PROMPT_ATTEMPTS, _c.reason == GapReason.DOUBTED)
    return sa.and_(_c.cause == _NO_CAUSE, is_open)


def _gap(start: datetime, end: datetime, *row: Any) -> Gap:
    bars, reason, answers, evidence, cause, status, proof, *moments = row
    meaning = (GapCause(cause) if cause else None, GapStatus(status), proof)
    return Gap(Window(start, end), bars, GapReason(reason), answers, evidence, *meaning, *moments)


def _values(gap: Gap) -> dict[str, Any]:
    """A gap by the names of its columns."""
    return {
        "start": gap.window.start,
        "end": gap.window.end,
        "bars": gap.bars,
        "reason": gap.reason,
        "answers": gap.answers,
        "evidence": gap.evidence,
        "cause": gap.cause or _NO_CAUSE,
        "status": gap.status,
        "proof": gap.proof,
        "first_requested": gap.first_requested,
        "last_requested": gap.last_requested,
        "next_request": gap.next_request,
    }

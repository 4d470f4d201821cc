"""The checks that fail now."""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

import sqlalchemy as sa

from marketdata_assets.ledger.book import Book, about, is_about, key_of
from marketdata_assets.ledger.tables import failed_checks
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import Table

_c = failed_checks.c
_IS_IT = sa.and_(is_about(failed_checks), _c.name == sa.bindparam("its_name"))
_FIND = sa.select(_c.name).where(_IS_IT)
_DELETE = sa.delete(failed_checks).where(_IS_IT)


class CheckFailure(NamedTuple):
    """Whether a check that fails stops what is made from its partition, and what is wrong."""

    blocking: bool
    message: str


class FailedCheck(NamedTuple):
    """A check that fails, `times` evaluations in a row, the first at `since` (our clock). `table`
    is the name of the table.
    """

    table: str
    partition: Partition
    name: str
    blocking: bool
    message: str
    times: int
    since: datetime


class CheckBook(Book):
    """The table `red_checks`. Raises StoreFailed."""

    def set(
        self,
        table: Table,
        partition: Partition,
        name: str,
        *,
        failure: CheckFailure | None,
        now: datetime,
    ) -> None:
        """Write down that a check of a partition fails, or passes (None)."""
        if failure is None:
            key = about(table, partition) | {"its_name": name}
            if self._database.rows(_FIND, key):
                with self._database.transaction() as connection:
                    connection.execute(_DELETE, key)
            return
        row = {
            **key_of(table, partition),
            "name": name,
            "blocking": failure.blocking,
            "message": failure.message,
            "times": 1,
            "since": now,
        }
        count = {"times": _c.times + 1}
        with self._database.transaction() as connection:
            upsert = self._database.upsert(failed_checks, ("blocking", "message"), count)
            connection.execute(upsert, row)

    def failed(self) -> list[FailedCheck]:
        """Every check that fails, by table, market, month and name."""
        columns = (
            _c.tbl,
            _c.market,
            _c.month,
            _c.name,
            _c.blocking,
            _c.message,
            _c.times,
            _c.since,
        )
        statement = sa.select(*columns).order_by(_c.tbl, _c.market, _c.month, _c.name)
        return [
            FailedCheck(table, Partition.parse(f"{market}|{month}"), *check)
            for table, market, month, *check in self._database.rows(statement)
        ]

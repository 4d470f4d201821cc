"""The checks that fail now."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import NamedTuple

import sqlalchemy as sa

from marketdata_assets.ledger.book import Book, about, is_about, key_of
from marketdata_assets.ledger.tables import failed_checks
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import Table

_c = failed_checks.c
_IS_ABOUT = is_about(failed_checks)
_FIND = sa.select(_c.name).where(_IS_ABOUT)
_DELETE = sa.delete(failed_checks).where(_IS_ABOUT, _c.name == sa.bindparam("its_name"))


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
        failures: Mapping[str, CheckFailure | None],
        *,
        now: datetime,
    ) -> None:
        """Write down which checks of a partition fail, and which pass (None), by their names."""
        key = about(table, partition)
        failed_before = {name for (name,) in self._database.rows(_FIND, key)}
        passes = [n for n, failure in failures.items() if not failure and n in failed_before]
        rows = [
            {
                **key_of(table, partition),
                "name": name,
                "blocking": failure.blocking,
                "message": failure.message,
                "times": 1,
                "since": now,
            }
            for name, failure in failures.items()
            if failure
        ]
        if not passes and not rows:
            return
        count = {"times": _c.times + 1}
        upsert = self._database.upsert(failed_checks, ("blocking", "message"), count)
        with self._database.transaction() as connection:
            for name in passes:
                connection.execute(_DELETE, key | {"its_name": name})
            for row in rows:
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

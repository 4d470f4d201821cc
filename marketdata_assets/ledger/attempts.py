"""How often a backfill tried each partition, and which it has given up."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from marketdata_assets.ledger.book import Book
from marketdata_assets.ledger.tables import backfill_attempts
from marketdata_assets.model.partition import Partition, PartitionKey

_c = backfill_attempts.c


@dataclass(frozen=True, slots=True)
class BackfillAttempt:
    """The attempts of `backfill_missed` to complete one partition, the last one at `attempted_at`
    for `reason`. It is parked, and not tried any more, where `parked_at` is set. Both are moments
    of our clock.
    """

    partition: Partition
    attempts: int
    attempted_at: datetime
    parked_at: datetime | None
    reason: str


class AttemptBook(Book):
    """The table `asks`. Raises StoreFailed."""

    def all(self) -> dict[PartitionKey, BackfillAttempt]:
        """Every partition that was tried and is not complete, by market key and month key."""
        statement = sa.select(
            _c.market, _c.month, _c.attempts, _c.attempted_at, _c.parked_at, _c.reason
        )
        return {
            (market, month): BackfillAttempt(Partition.parse(f"{market}|{month}"), *attempt)
            for market, month, *attempt in (
                self._database.rows(statement.order_by(_c.market, _c.month))
            )
        }

    def add(self, partitions: Iterable[tuple[Partition, str]], now: datetime) -> None:
        """Count one more attempt for each partition, with its reason."""
        rows = [
            {"market": partition.market.key, "month": partition.month_key, "attempts": 1}
            | {"attempted_at": now, "reason": reason}
            for partition, reason in partitions
        ]
        count = {"attempts": _c.attempts + 1}
        upsert = self._database.upsert(backfill_attempts, ("attempted_at", "reason"), count)
        if rows:
            with self._database.transaction() as connection:
                connection.execute(upsert, rows)

    def park(self, partitions: Iterable[tuple[Partition, str]], now: datetime) -> None:
        """Try these no more, until a person unparks them."""
        is_it = sa.and_(
            _c.market == sa.bindparam("its_market"), _c.month == sa.bindparam("its_month")
        )
        rows = [
            {"its_market": partition.market.key, "its_month": partition.month_key}
            | {"parked_at": now, "reason": reason}
            for partition, reason in partitions
        ]
        if rows:
            with self._database.transaction() as connection:
                connection.execute(sa.update(backfill_attempts).where(is_it), rows)

    def clear(self, partitions: Iterable[Partition]) -> int:
        """Forget the attempts of these, because they are complete or unparked; how many had any."""
        with self._database.transaction() as connection:
            return sum(
                connection.execute(sa.delete(backfill_attempts).where(_is_of(partition))).rowcount
                for partition in partitions
            )


def take_back(connection: sa.Connection, partition: Partition) -> None:
    """Do not count the last attempt of a partition."""
    update = sa.update(backfill_attempts).where(_is_of(partition), _c.attempts > 0)
    connection.execute(update.values(attempts=_c.attempts - 1))


def _is_of(partition: Partition) -> sa.ColumnElement[bool]:
    return sa.and_(_c.market == partition.market.key, _c.month == partition.month_key)

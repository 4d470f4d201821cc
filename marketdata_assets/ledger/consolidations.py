"""The consolidations: what every consolidated partition was made of, and what it would be made of
now.
"""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

from marketdata_assets.ledger.database import Database
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import StoredObject, Table
from marketdata_assets.model.window import Window, format_time, parse_time

NO_TRADE = "no_trade"
"""The cause of a gap that shows its venue up."""

_Key = tuple[str, str]
"""Market key and month key."""


class Source(NamedTuple):
    """One raw partition as the ledger has it: its rows' digest, whether they are stored, and a
    checksum of its quiet windows.
    """

    digest: str
    stored: bool
    quiet: str


class Made(NamedTuple):
    """One consolidated partition: its object's size (None: retention has removed it), its rows'
    digest, and what it was made of.
    """

    bytes: int | None
    digest: str | None
    of: str | None


class Consolidations:
    """What the ledger's tables `partitions` and `gaps` say of consolidated bars and those below them.
    Raises StoreFailed.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def sources(self, table: Table, month: str = "") -> dict[_Key, Source]:
        """Every raw partition of which something was ever stored, or those of one month."""
        inside, values = (" AND month = ?", (month,)) if month else ("", ())
        # where the bars lie in the month weighs in, so that one gap cannot stand for another
        day, hour, minute = (f"CAST(substr(start, {place}, 2) AS INTEGER)" for place in (9, 12, 15))
        sums = f"count(*), sum(bars), sum(bars * ({day} * 1440 + {hour} * 60 + {minute}))"
        sql = f"SELECT market, month, {sums} FROM gaps WHERE tbl = ? AND cause = ?{inside} GROUP BY market, month"
        quiet = {
            (m, k): " ".join(str(int(n)) for n in found)
            for m, k, *found in self._database.rows(sql, table.name, NO_TRADE, *values)
        }
        sql = f"SELECT market, month, digest, bytes IS NOT NULL FROM partitions WHERE tbl = ? AND digest IS NOT NULL{inside}"
        rows = self._database.rows(sql, table.name, *values)
        return {
            (m, k): Source(digest, bool(stored), quiet.get((m, k), ""))
            for m, k, digest, stored in rows
        }

    def quiet(self, table: Table, partition: Partition) -> list[Window]:
        """The windows of a raw partition in which its venue was up and nobody traded, in order."""
        sql = 'SELECT start, "end" FROM gaps WHERE tbl = ? AND market = ? AND month = ? AND cause = ? ORDER BY start'
        rows = self._database.rows(
            sql, table.name, partition.market.key, partition.month_key, NO_TRADE
        )
        return [Window(parse_time(start), parse_time(end)) for start, end in rows]

    def made(self, table: Table) -> dict[_Key, Made]:
        """Every consolidated partition."""
        sql = "SELECT market, month, bytes, digest, rolled FROM partitions WHERE tbl = ?"
        return {(m, k): Made(*rest) for m, k, *rest in self._database.rows(sql, table.name)}

    def record(
        self,
        table: Table,
        partition: Partition,
        span: Window,
        newest: datetime | None,
        rows: int,
        stored: StoredObject,
        of: str,
        now: datetime,
    ) -> None:
        """This partition was made of `of` and is stored; its bars open in `span`."""
        keys, values = (
            "tbl, market, month",
            "start, through, newest, complete, rows, bytes, digest, rolled, error, failures, updated_at",
        )
        replaced = ", ".join(f"{name} = excluded.{name}" for name in values.split(", "))
        names = f"{keys}, {values}"
        marks = ", ".join("?" for _ in names.split(", "))
        moments = format_time(span.start), format_time(span.end), newest and format_time(newest)
        row = (
            table.name,
            partition.market.key,
            partition.month_key,
            *moments,
            1,
            rows,
            *stored,
            of,
            None,
            0,
            format_time(now),
        )
        with self._database.transaction() as db:
            db.execute(
                f"INSERT INTO partitions ({names}) VALUES ({marks}) ON CONFLICT ({keys}) DO UPDATE SET {replaced}",
                row,
            )

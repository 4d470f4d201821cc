"""The book of gaps: what is asked about the gaps of many partitions at once, and what is written down
about their causes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

from marketdata_assets.ledger.database import Database
from marketdata_assets.ledger.ledger import GAP, Gap, gap_of, write_gaps
from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import Table
from marketdata_assets.model.window import Window, format_time, parse_time

REOPENED = '"reopened"'
"""In the proof of a gap that somebody wants to have asked for again: no cause is looked for until it
is.
"""


class Asked(NamedTuple):
    """One request of the fetch log: its number, what it asked for, when (ISO, our clock), how it
    ended, and how many rows came.
    """

    id: int
    window: Window
    at: str
    outcome: str
    rows: int | None


class Gaps:
    """The gaps in the ledger's database, across partitions. Raises StoreFailed."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def of_month(self, table: Table, venue: str, month: str) -> dict[str, list[Gap]]:
        """By market key, in order: all gaps of a venue's markets in one month."""
        found: dict[str, list[Gap]] = {}
        sql = f"SELECT market, {GAP} FROM gaps WHERE tbl = ? AND market >= ? AND market < ? AND month = ? ORDER BY market, start"
        for market, *row in self._database.rows(sql, table.name, f"{venue}:", f"{venue};", month):
            found.setdefault(market, []).append(gap_of(row))
        return found

    def between(self, table: Table, market: Market, window: Window) -> list[Gap]:
        """The gaps of a market that touch a window, in order."""
        sql = f'SELECT {GAP} FROM gaps WHERE tbl = ? AND market = ? AND start < ? AND "end" > ? ORDER BY start'
        return [
            gap_of(row)
            for row in self._database.rows(
                sql, table.name, market.key, format_time(window.end), format_time(window.start)
            )
        ]

    def unexamined(self, table: Table) -> list[Partition]:
        """The partitions with a gap whose cause nobody has looked for."""
        sql = "SELECT DISTINCT market, month FROM gaps WHERE tbl = ? AND cause = '' AND proof = '{}' AND reason != 'quarantined'"
        return [
            Partition.parse(f"{market}|{month}")
            for market, month in self._database.rows(sql, table.name)
        ]

    def due(self, table: Table, now: datetime) -> set[tuple[str, str]]:
        """Market key and month key of every partition with a gap whose time to be asked for again has
        come.
        """
        sql = "SELECT DISTINCT market, month FROM gaps WHERE tbl = ? AND next_ask IS NOT NULL AND next_ask <= ?"
        return {
            (market, month)
            for market, month in self._database.rows(
                sql, table.name, format_time(now.replace(microsecond=0))
            )
        }

    def last_bar(self, table: Table, market: Market) -> datetime | None:
        """The open time of a market's newest stored bar."""
        found = self._database.rows(
            "SELECT max(newest) FROM partitions WHERE tbl = ? AND market = ?",
            table.name,
            market.key,
        )
        return parse_time(found[0][0]) if found and found[0][0] else None

    def requests(self, table: Table, market: Market, window: Window) -> list[Asked]:
        """The requests of the fetch log about a window, in order."""
        sql = (
            'SELECT id, start, "end", asked_at, outcome, rows FROM fetches'
            ' WHERE tbl = ? AND market = ? AND start < ? AND "end" > ? ORDER BY id'
        )
        found = self._database.rows(
            sql, table.name, market.key, format_time(window.end), format_time(window.start)
        )
        return [
            Asked(id, Window(parse_time(a), parse_time(b)), _moment(at), outcome, rows)
            for id, a, b, at, outcome, rows in found
        ]

    def reopen(self, table: Table, market: Market, gap: Gap, now: datetime) -> None:
        """Forget a gap's cause and ask for it in the next run."""
        proof = f'{{{REOPENED}: "{format_time(now)}"}}'
        with self._database.transaction() as db:
            sql = "UPDATE gaps SET cause = '', proof = ?, next_ask = ? WHERE tbl = ? AND market = ? AND start = ?"
            db.execute(
                sql,
                (
                    proof,
                    format_time(now.replace(microsecond=0)),
                    table.name,
                    market.key,
                    format_time(gap.window.start),
                ),
            )

    def rewrite(
        self, table: Table, partition: Partition, old: Iterable[Gap], new: Sequence[Gap]
    ) -> None:
        """Put gaps in the place of others of the same partition, which hold the same bars together;
        all or nothing.
        """
        with self._database.transaction() as db:
            where = [
                (table.name, partition.market.key, format_time(gap.window.start)) for gap in old
            ]
            db.executemany("DELETE FROM gaps WHERE tbl = ? AND market = ? AND start = ?", where)
            write_gaps(db, table, partition, new)


def _moment(seconds: float) -> str:
    return format_time(datetime.fromtimestamp(int(seconds), UTC))

"""The fetch log: every request about bars, and how it ended."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import NamedTuple, Protocol

import sqlalchemy as sa

from marketdata_assets.ledger.book import Book
from marketdata_assets.ledger.records import LoggedFetch
from marketdata_assets.ledger.tables import fetches, quarantine
from marketdata_assets.model.market import Market
from marketdata_assets.model.table import Table
from marketdata_assets.model.window import Window, format_time

_c = fetches.c


class LoggedRequest(NamedTuple):
    """One request of the fetch log. `at` is ISO text by our clock; `rows` is how many came."""

    id: int
    window: Window
    at: str
    outcome: str
    rows: int | None


class FetchBook(Book):
    """The table `fetches`. Raises StoreFailed."""

    def about(self, table: Table, market: Market, window: Window) -> list[LoggedRequest]:
        """The requests of a market that touch a window, in order."""
        columns = (_c.id, _c.start, _c.end, _c.asked_at, _c.outcome, _c.rows)
        statement = sa.select(*columns).where(
            _c.tbl == table.name,
            _c.market == market.key,
            _c.start < window.end,
            _c.end > window.start,
        )
        return [
            LoggedRequest(number, Window(start, end), _second(asked_at), outcome, rows)
            for number, start, end, asked_at, outcome, rows in (
                self._database.rows(statement.order_by(_c.id))
            )
        ]

    def last_error(self, venue: str) -> str | None:
        """The error of a venue's newest request that failed; None where none did."""
        is_its = _c.market.startswith(f"{venue}:", autoescape=True)
        failed = sa.select(_c.error).where(is_its, _c.error.is_not(None))
        newest = failed.order_by(_c.id.desc()).limit(1)
        return next((row.error for row in self._database.rows(newest)), None)

    def delete_before(self, moment: float, dry_run: bool = False) -> int:
        """Delete the rows from before a moment, but for those that quarantined rows name; how many.

        `moment` is in seconds since 1970; with `dry_run` nothing is deleted.
        """
        named = sa.select(quarantine.c.fetch_id).where(quarantine.c.fetch_id.is_not(None))
        is_old = sa.and_(_c.asked_at < moment, _c.id.not_in(named))
        if dry_run:
            ((count,),) = self._database.rows(sa.select(sa.func.count()).where(is_old))
            return int(count)
        with self._database.transaction() as connection:
            return connection.execute(sa.delete(fetches).where(is_old)).rowcount


class _Request(Protocol):
    """The part of sources.base.Request that the fetch log keeps."""

    @property
    def sent_at(self) -> float: ...
    @property
    def seconds(self) -> float: ...
    @property
    def outcome(self) -> str: ...
    @property
    def status(self) -> int | None: ...
    @property
    def rows(self) -> int | None: ...
    @property
    def error(self) -> str | None: ...


def to_log(requests: Iterable[_Request], window: Window) -> list[LoggedFetch]:
    """Requests about one window, as the fetch log holds them."""
    return [
        LoggedFetch(window, r.sent_at, r.seconds, r.outcome, r.status, r.rows, r.error)
        for r in requests
    ]


def log_fetches(
    connection: sa.Connection, table: Table, market: Market, *, requests: Sequence[LoggedFetch]
) -> list[int]:
    """Add rows to the fetch log; their numbers, in order."""
    rows = [
        {"tbl": table.name, "market": market.key, "start": window.start, "end": window.end}
        | {"asked_at": asked_at, "seconds": seconds, "outcome": outcome}
        | {"status": status, "rows": rows, "error": error}
        for window, asked_at, seconds, outcome, status, rows, error in requests
    ]
    if not rows:
        return []
    statement = sa.insert(fetches).returning(_c.id, sort_by_parameter_order=True)
    return list(connection.scalars(statement, rows))


def _second(asked_at: float) -> str:
    return format_time(datetime.fromtimestamp(int(asked_at), UTC))

"""The anomalies that were found, and what became of each."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any, NamedTuple

import sqlalchemy as sa

from marketdata_assets.ledger.book import Book
from marketdata_assets.ledger.database import Database
from marketdata_assets.ledger.tables import anomalies
from marketdata_assets.model.anomaly import Anomaly, AnomalySeverity, AnomalyState
from marketdata_assets.model.market import Market
from marketdata_assets.model.table import Table
from marketdata_assets.model.timeframe import TIMEFRAME_OF_LABEL
from marketdata_assets.model.window import Window, month_of

GONE = "no longer found: its bars, or those beside it, have changed"

_c = anomalies.c
_RECORD = (
    *(_c.id, _c.tbl, _c.market, _c.state, _c.found_at, _c.changed_at, _c.note),
    *(_c.kind, _c.severity, _c.start, _c.end, _c.bars, _c.evidence),
)


class AnomalyRecord(NamedTuple):
    """An anomaly as it is stored. `changed_at` is when its state was set, by our clock, and `note`
    why.
    """

    id: int
    table: Table
    market: Market
    anomaly: Anomaly
    state: AnomalyState
    found_at: datetime
    changed_at: datetime
    note: str | None


class AnomalyBook(Book):
    """The table `anomalies`, with one row for each table, market, kind and start. Raises
    StoreFailed.
    """

    def find(
        self, window: Window, market: Market | None = None, table: Table | None = None
    ) -> list[AnomalyRecord]:
        """Those that touch a window, by start."""
        statement = sa.select(*_RECORD).where(_c.start < window.end, _c.end > window.start)
        if market:
            statement = statement.where(_c.market == market.key)
        if table:
            statement = statement.where(_c.tbl == table.name)
        in_order = statement.order_by(_c.start, _c.market, _c.kind, _c.id)
        return [_record(*row) for row in self._database.rows(in_order)]

    def get(self, id: int) -> AnomalyRecord | None:
        """The one with this number."""
        found = self._database.rows(sa.select(*_RECORD).where(_c.id == id))
        return _record(*found[0]) if found else None

    def settle(
        self,
        table: Table,
        market: Market,
        judged: Window,
        *,
        found: Iterable[Anomaly],
        now: datetime,
    ) -> list[AnomalyRecord]:
        """Make what is stored of a window equal what was found in it, whole or not at all; the
        records then.

        An anomaly that is found again keeps its state, unless it was resolved only because it had
        not been found. An open one that is not found any more is resolved, with a note. What a
        person acknowledged stays.
        """
        known = self._begun(table, market, judged)
        by_key = {(record.anomaly.kind, record.anomaly.start): record for record in known}
        new, again = [], []
        for anomaly in found:
            record = by_key.pop((anomaly.kind, anomaly.start), None)
            if record is None:
                new.append(anomaly)
            elif record.anomaly != anomaly or record.note == GONE:
                again.append((record, anomaly))
        gone = [record for record in by_key.values() if record.state == AnomalyState.OPEN]
        if not (new or again or gone):
            return known
        with self._database.transaction() as connection:
            key = {"tbl": table.name, "market": market.key}
            _insert(self._database, connection, [key | _values(a) for a in new], now=now)
            for record, anomaly in again:
                _update(connection, record.id, **_values(anomaly))
                if record.note == GONE:
                    _mark(connection, record.id, AnomalyState.OPEN, note=None, now=now)
            for record in gone:
                _mark(connection, record.id, AnomalyState.RESOLVED, note=GONE, now=now)
        return self._begun(table, market, judged)

    def mark(self, id: int, state: AnomalyState, *, note: str | None, now: datetime) -> None:
        """Set the state of one that a person judged."""
        with self._database.transaction() as connection:
            _mark(connection, id, state, note=note, now=now)

    def _begun(self, table: Table, market: Market, window: Window) -> list[AnomalyRecord]:
        found = self.find(window, market, table)
        return [record for record in found if window.start <= record.anomaly.start]


def _insert(
    database: Database, connection: sa.Connection, rows: list[dict[str, Any]], *, now: datetime
) -> None:
    new = {"state": AnomalyState.OPEN, "found_at": now, "changed_at": now}
    insert = database.insert(anomalies).on_conflict_do_nothing()
    if rows:
        connection.execute(insert, [row | new for row in rows])


def _update(connection: sa.Connection, id: int, **values: Any) -> None:
    connection.execute(sa.update(anomalies).where(_c.id == id).values(**values))


def _mark(
    connection: sa.Connection, id: int, state: AnomalyState, *, note: str | None, now: datetime
) -> None:
    _update(connection, id, state=state, note=note, changed_at=now)


def _record(id: int, tbl: str, market: str, state: str, *row: Any) -> AnomalyRecord:
    found_at, changed_at, note, kind, severity, start, end, bars, evidence = row
    layer, _, name = tbl.partition("/ohlcv_")
    return AnomalyRecord(
        id,
        Table(layer, TIMEFRAME_OF_LABEL[name]),
        Market.parse(market),
        Anomaly(kind, AnomalySeverity[severity.upper()], start, end, bars, evidence),
        AnomalyState(state),
        found_at,
        changed_at,
        note,
    )


def _values(anomaly: Anomaly) -> dict[str, Any]:
    """An anomaly by the names of its columns."""
    return {
        "month": month_of(anomaly.start).start.date().isoformat(),
        "kind": anomaly.kind,
        "severity": anomaly.severity.label,
        "start": anomaly.start,
        "end": anomaly.end,
        "bars": anomaly.bars,
        "evidence": anomaly.evidence,
    }

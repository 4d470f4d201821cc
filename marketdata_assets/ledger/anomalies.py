"""The anomalies: what was found in which bars, whether a person knows it, and whether it is over."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from marketdata_assets.ledger.database import Database
from marketdata_assets.model.anomaly import Anomaly, AnomalySeverity, AnomalyState
from marketdata_assets.model.market import Market
from marketdata_assets.model.table import Table
from marketdata_assets.model.timeframe import parse_timeframe
from marketdata_assets.model.window import Window, format_time, month_of, parse_time

GONE = "no longer found: its bars, or those beside it, have changed"


class Entry(NamedTuple):
    """An anomaly as it is written down. `changed_at` is when its state was set, `note` what was said
    then.
    """

    id: int
    table: Table
    market: Market
    anomaly: Anomaly
    state: AnomalyState
    found_at: datetime
    changed_at: datetime
    note: str | None


class Anomalies:
    """The entries, in the ledger's database: one for each table, market, kind and start. Raises
    StoreFailed.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def find(
        self, window: Window, market: Market | None = None, table: Table | None = None
    ) -> list[Entry]:
        """Those that share a moment with the window, by start."""
        sql, values = (
            f'SELECT {_ENTRY} FROM anomalies WHERE start < ? AND "end" > ?',
            [format_time(window.end), format_time(window.start)],
        )
        for name, value in (
            ("market", market.key if market else ""),
            ("tbl", table.name if table else ""),
        ):
            if value:
                sql, values = f"{sql} AND {name} = ?", [*values, value]
        return [
            _entry(row)
            for row in self._database.rows(f"{sql} ORDER BY start, market, kind, id", *values)
        ]

    def get(self, id: int) -> Entry | None:
        """The entry of a number."""
        found = self._database.rows(f"SELECT {_ENTRY} FROM anomalies WHERE id = ?", id)
        return _entry(found[0]) if found else None

    def settle(
        self, table: Table, market: Market, judged: Window, found: Iterable[Anomaly], now: datetime
    ) -> list[Entry]:
        """Make the entries that begin in a window equal what was found in it, whole or not at all; the
        entries then.

        One that is found again keeps its state, unless it was resolved only because it had not been
        found. An open one that is not found any more is resolved, with a note; what a person
        acknowledged stays as it is.
        """
        known = self._begun(table, market, judged)
        by_key = {(entry.anomaly.kind, entry.anomaly.start): entry for entry in known}
        new, same = [], []
        for one in found:
            entry = by_key.pop((one.kind, one.start), None)
            if entry is None:
                new.append(one)
            elif entry.anomaly != one or entry.note == GONE:
                same.append((entry, one))
        gone = [entry for entry in by_key.values() if entry.state == AnomalyState.OPEN]
        if not (new or same or gone):
            return known
        with self._database.transaction() as db:
            names = 'tbl, market, month, state, found_at, changed_at, kind, severity, start, "end", bars, evidence'
            sql = f"INSERT INTO anomalies ({names}) VALUES ({', '.join('?' * 12)}) ON CONFLICT DO NOTHING"
            db.executemany(
                sql,
                [
                    (
                        table.name,
                        market.key,
                        _month(a),
                        AnomalyState.OPEN.value,
                        format_time(now),
                        format_time(now),
                        *_columns(a),
                    )
                    for a in new
                ],
            )
            sql = 'UPDATE anomalies SET kind = ?, severity = ?, start = ?, "end" = ?, bars = ?, evidence = ? WHERE id = ?'
            db.executemany(sql, [(*_columns(one), entry.id) for entry, one in same])
            db.executemany(
                _MARK,
                [
                    (AnomalyState.OPEN.value, None, format_time(now), entry.id)
                    for entry, _ in same
                    if entry.note == GONE
                ],
            )
            db.executemany(
                _MARK,
                [(AnomalyState.RESOLVED.value, GONE, format_time(now), entry.id) for entry in gone],
            )
        return self._begun(table, market, judged)

    def mark(self, id: int, state: AnomalyState, note: str | None, now: datetime) -> None:
        """A person's word on one of them."""
        with self._database.transaction() as db:
            db.execute(_MARK, (state.value, note, format_time(now), id))

    def _begun(self, table: Table, market: Market, window: Window) -> list[Entry]:
        return [
            entry
            for entry in self.find(window, market, table)
            if window.start <= entry.anomaly.start
        ]


_ENTRY = 'id, tbl, market, state, found_at, changed_at, note, kind, severity, start, "end", bars, evidence'
_MARK = "UPDATE anomalies SET state = ?, note = ?, changed_at = ? WHERE id = ?"


def _entry(row: Sequence[Any]) -> Entry:
    (
        id,
        tbl,
        market,
        state,
        found_at,
        changed_at,
        note,
        kind,
        severity,
        start,
        end,
        bars,
        evidence,
    ) = row
    layer, _, name = tbl.partition("/ohlcv_")
    anomaly = Anomaly(
        kind,
        AnomalySeverity[severity.upper()],
        parse_time(start),
        parse_time(end),
        bars,
        json.loads(evidence),
    )
    table = Table(layer, parse_timeframe(name))
    return Entry(
        id,
        table,
        Market.parse(market),
        anomaly,
        AnomalyState(state),
        parse_time(found_at),
        parse_time(changed_at),
        note,
    )


def _columns(one: Anomaly) -> tuple[str | int, ...]:
    return (
        one.kind,
        one.severity.label,
        format_time(one.start),
        format_time(one.end),
        one.bars,
        json.dumps(one.evidence),
    )


def _month(one: Anomaly) -> str:
    return month_of(one.start).start.date().isoformat()

"""The incidents: what went wrong, since when and until when, and who still has to be told."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import NamedTuple

from marketdata_assets.ledger.database import Database
from marketdata_assets.model.window import format_time, parse_time

OPENED, RECOVERED = "opened", "recovered"


class Problem(NamedTuple):
    """Something that is wrong now. `key` is the same as long as it is the same thing; `severity` is a
    word of `notify`.
    """

    key: str
    severity: str
    title: str
    body: str


class Incident(NamedTuple):
    """A problem with its beginning, and its end where it has one."""

    id: int
    problem: Problem
    opened_at: datetime
    recovered_at: datetime | None


class Letter(NamedTuple):
    """What one channel has to be told: an incident's opening or its recovery. `tries`: how often it
    could not be sent.
    """

    id: int
    event: str
    incident: Incident
    tries: int


class Incidents:
    """Incidents and the letters about them, in the ledger's database. One open incident per key.
    Raises StoreFailed.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def open(self) -> dict[str, Incident]:
        """What has not recovered, by key."""
        found = self._database.rows(
            f"SELECT {_INCIDENT} FROM incidents WHERE recovered_at IS NULL ORDER BY id"
        )
        return {incident.problem.key: incident for incident in map(_incident, found)}

    def history(self, limit: int) -> list[Incident]:
        """The newest incidents, the newest first."""
        return [
            _incident(row)
            for row in self._database.rows(
                f"SELECT {_INCIDENT} FROM incidents ORDER BY id DESC LIMIT ?", limit
            )
        ]

    def settle(
        self,
        opened: Iterable[Problem],
        recovered: Iterable[Incident],
        channels: Sequence[str],
        now: datetime,
    ) -> None:
        """Write down what began and what ended, with a letter to every channel, whole or not at
        all.
        """
        with self._database.transaction() as db:
            events = []
            for problem in opened:
                names = "key, severity, title, body, opened_at"
                sql = f"INSERT INTO incidents ({names}) VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING RETURNING id"
                events += [
                    (id, OPENED)
                    for (id,) in db.execute(sql, (*problem, format_time(now))).fetchall()
                ]
            for incident in recovered:
                sql = "UPDATE incidents SET recovered_at = ? WHERE id = ? AND recovered_at IS NULL RETURNING id"
                events += [
                    (id, RECOVERED)
                    for (id,) in db.execute(sql, (format_time(now), incident.id)).fetchall()
                ]
            rows = [(*event, channel) for event in events for channel in channels]
            db.executemany("INSERT INTO letters (incident, event, channel) VALUES (?, ?, ?)", rows)

    def unsent(self, channel: str) -> list[Letter]:
        """What a channel has not been told, in order."""
        columns = ", ".join("incidents." + name.strip() for name in _INCIDENT.split(","))
        sql = f"SELECT letters.id, event, tries, {columns} FROM letters JOIN incidents ON incidents.id = incident"
        found = self._database.rows(
            sql + " WHERE channel = ? AND sent_at IS NULL ORDER BY letters.id", channel
        )
        return [Letter(id, event, _incident(rest), tries) for id, event, tries, *rest in found]

    def sent(self, letter: Letter, now: datetime) -> None:
        """It was told."""
        with self._database.transaction() as db:
            db.execute(
                "UPDATE letters SET sent_at = ?, error = NULL WHERE id = ?",
                (format_time(now), letter.id),
            )

    def not_sent(self, letter: Letter, error: str) -> None:
        """It could not be told; it stays where it is."""
        with self._database.transaction() as db:
            db.execute(
                "UPDATE letters SET tries = tries + 1, error = ? WHERE id = ?", (error, letter.id)
            )

    def undelivered(self) -> dict[str, tuple[int, str]]:
        """Channels that failed: how many letters wait, and why the oldest was not sent."""
        waiting = "sent_at IS NULL AND tries > 0"
        oldest = f"(SELECT min(id) FROM letters WHERE {waiting} GROUP BY channel)"
        counts = f"(SELECT channel, count(*) AS waiting FROM letters WHERE {waiting} GROUP BY channel) AS counted"
        sql = f"SELECT channel, waiting, coalesce(error, '') FROM letters JOIN {counts} USING (channel) WHERE id IN {oldest}"
        return {channel: (count, error) for channel, count, error in self._database.rows(sql)}

    def forget(self, before: datetime, dry_run: bool = False) -> int:
        """Delete incidents that recovered before a moment, with their letters; how many."""
        old = "SELECT id FROM incidents WHERE recovered_at < ?"
        if dry_run:
            return len(self._database.rows(old, format_time(before)))
        with self._database.transaction() as db:
            db.execute(f"DELETE FROM letters WHERE incident IN ({old})", (format_time(before),))
            return int(
                db.execute(
                    "DELETE FROM incidents WHERE recovered_at < ?", (format_time(before),)
                ).rowcount
            )


_INCIDENT = "id, key, severity, title, body, opened_at, recovered_at"


def _incident(row: Sequence[str | int | None]) -> Incident:
    id, key, severity, title, body, opened_at, recovered_at = row
    ended = parse_time(str(recovered_at)) if recovered_at else None
    return Incident(
        int(id or 0),
        Problem(str(key), str(severity), str(title), str(body)),
        parse_time(str(opened_at)),
        ended,
    )

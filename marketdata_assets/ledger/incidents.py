"""What went wrong, from when to when, and which notifications about it are still to be sent."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from enum import StrEnum
from typing import Any, NamedTuple

import sqlalchemy as sa

from marketdata_assets.ledger.book import Book
from marketdata_assets.ledger.database import Database
from marketdata_assets.ledger.tables import incidents, notifications

_c, _n = incidents.c, notifications.c
_INCIDENT = (_c.id, _c.key, _c.severity, _c.title, _c.body, _c.opened_at, _c.recovered_at)


class IncidentEvent(StrEnum):
    """What a notification is about."""

    OPENED = "opened"
    RECOVERED = "recovered"


class Problem(NamedTuple):
    """Something that is wrong now. `key` stays as long as the problem does; `severity` is a word of
    `notify`.
    """

    key: str
    severity: str
    title: str
    body: str


class Incident(NamedTuple):
    """A problem from its beginning to its end, by our clock; `recovered_at` is None until then."""

    id: int
    problem: Problem
    opened_at: datetime
    recovered_at: datetime | None


class Notification(NamedTuple):
    """A message that one channel has to send. `tries` counts how often it failed to."""

    id: int
    event: IncidentEvent
    incident: Incident
    tries: int


class Backlog(NamedTuple):
    """How many notifications a channel failed to send, and why it failed with the oldest."""

    waiting: int
    error: str


class IncidentBook(Book):
    """The tables `incidents` and `letters`. One incident of a key is open at most. Raises
    StoreFailed.
    """

    def open(self) -> dict[str, Incident]:
        """The incidents that have not recovered, by key, the oldest first."""
        statement = sa.select(*_INCIDENT).where(_c.recovered_at.is_(None)).order_by(_c.id)
        found = (_incident(*row) for row in self._database.rows(statement))
        return {incident.problem.key: incident for incident in found}

    def history(self, limit: int) -> list[Incident]:
        """The newest incidents, the newest first."""
        statement = sa.select(*_INCIDENT).order_by(_c.id.desc()).limit(limit)
        return [_incident(*row) for row in self._database.rows(statement)]

    def settle(
        self,
        opened: Iterable[Problem],
        recovered: Iterable[Incident],
        *,
        channels: Sequence[str],
        now: datetime,
    ) -> None:
        """Write down what began and what ended, with a notification for every channel, whole or not
        at all.
        """
        with self._database.transaction() as connection:
            began = _open(self._database, connection, opened, now=now)
            ended = _close(connection, recovered, now)
            events = [
                *((number, IncidentEvent.OPENED) for number in began),
                *((number, IncidentEvent.RECOVERED) for number in ended),
            ]
            rows = [
                {"incident": number, "event": event, "channel": channel}
                for number, event in events
                for channel in channels
            ]
            if rows:
                connection.execute(sa.insert(notifications), rows)

    def pending(self, channel: str) -> list[Notification]:
        """What a channel has not sent yet, in order."""
        statement = sa.select(_n.id, _n.event, _n.tries, *_INCIDENT).join_from(
            notifications, incidents, _c.id == _n.incident
        )
        unsent = statement.where(_n.channel == channel, _n.sent_at.is_(None)).order_by(_n.id)
        return [
            Notification(number, IncidentEvent(event), _incident(*incident), tries)
            for number, event, tries, *incident in self._database.rows(unsent)
        ]

    def mark_sent(self, notification: Notification, now: datetime) -> None:
        """Remember that a notification was sent."""
        self._update(notification, sent_at=now, error=None)

    def mark_failed(self, notification: Notification, error: str) -> None:
        """Remember that a notification could not be sent; it stays pending."""
        self._update(notification, tries=_n.tries + 1, error=error)

    def backlogs(self) -> dict[str, Backlog]:
        """The channels that failed to send, by name."""
        is_waiting = sa.and_(_n.sent_at.is_(None), _n.tries > 0)
        counted = (
            sa.select(
                _n.channel, sa.func.count().label("waiting"), sa.func.min(_n.id).label("first")
            )
            .where(is_waiting)
            .group_by(_n.channel)
            .subquery()
        )
        error = sa.func.coalesce(_n.error, "")
        statement = sa.select(_n.channel, counted.c.waiting, error).join_from(
            notifications, counted, _n.id == counted.c.first
        )
        return {channel: Backlog(*backlog) for channel, *backlog in self._database.rows(statement)}

    def delete_before(self, moment: datetime, dry_run: bool = False) -> int:
        """Delete incidents that recovered before a moment, with their notifications; how many.

        With `dry_run` nothing is deleted.
        """
        old = sa.select(_c.id).where(_c.recovered_at < moment)
        if dry_run:
            return len(self._database.rows(old))
        with self._database.transaction() as connection:
            connection.execute(sa.delete(notifications).where(_n.incident.in_(old)))
            return connection.execute(sa.delete(incidents).where(_c.recovered_at < moment)).rowcount

    def _update(self, notification: Notification, **values: Any) -> None:
        update = sa.update(notifications).where(_n.id == notification.id)
        with self._database.transaction() as connection:
            connection.execute(update.values(**values))


def _open(
    database: Database, connection: sa.Connection, problems: Iterable[Problem], *, now: datetime
) -> list[int]:
    """Insert an incident for each problem that has no open one; their numbers."""
    insert = database.insert(incidents).on_conflict_do_nothing().returning(_c.id)
    numbers = (
        connection.scalar(insert, {**problem._asdict(), "opened_at": now}) for problem in problems
    )
    return [int(number) for number in numbers if number is not None]


def _close(connection: sa.Connection, recovered: Iterable[Incident], now: datetime) -> list[int]:
    """Close each incident that is still open; their numbers."""
    update = sa.update(incidents).values(recovered_at=now).returning(_c.id)
    return [
        int(number)
        for incident in recovered
        for number in connection.scalars(
            update.where(_c.id == incident.id, _c.recovered_at.is_(None))
        )
    ]


def _incident(
    number: int, key: str, severity: str, title: str, body: str, *moments: Any
) -> Incident:
    return Incident(number, Problem(key, severity, title, body), *moments)

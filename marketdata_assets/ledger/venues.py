"""What all processes share about a venue: its rate limit, its pauses, its circuit breaker."""

from __future__ import annotations

from typing import Any, NamedTuple

import sqlalchemy as sa

from marketdata_assets.ledger.book import Book
from marketdata_assets.ledger.tables import venues

BREAKER_LIMIT = 30
"""So many failures in a row open the breaker."""
BREAKER_FIRST, BREAKER_LONGEST = 30.0, 600.0
"""Seconds for which it stays open at first, doubled each time, and at the most."""

_c = venues.c


class VenueHealth(NamedTuple):
    """A venue's failures in a row, and until when its breaker and its pause let no request through
    (our clock, seconds since 1970; 0: they let all through).
    """

    failures: int
    broken_until: float
    paused_until: float


class VenueBook(Book):
    """The table `venues`; a sources.guards.VenueState. Raises StoreFailed.

    Arguments and results are moments of our clock, in seconds since 1970; the table holds moments
    of the clock that all workers share.
    """

    def reserve(self, venue: str, now: float, requests_per_minute: int | None) -> float:
        """Take the next place in the queue; the moment at which its request may be sent.

        At most `requests_per_minute` (None: no limit) fall into any 60 s, a quarter of a second's
        worth of them at once.
        """
        if requests_per_minute is None:
            return now
        burst = max(1.0, requests_per_minute / 240)
        interval = 60 / max(requests_per_minute - burst, requests_per_minute / 2)
        shared = now + self._skew
        free = sa.case((_c.next_at > shared, _c.next_at), else_=shared)
        with self._database.transaction() as connection:
            self._add(connection, venue)
            update = sa.update(venues).where(_c.venue == venue).values(next_at=free + interval)
            next_at: float = connection.execute(update.returning(_c.next_at)).scalar_one()
        return next_at - burst * interval - self._skew

    def pause(self, venue: str, until: float) -> None:
        """Send no request before `until`; a pause never becomes shorter."""
        moment = until + self._skew
        update = sa.update(venues).where(_c.venue == venue, _c.paused_until < moment)
        with self._database.transaction() as connection:
            self._add(connection, venue)
            connection.execute(update.values(paused_until=moment))

    def paused_until(self, venue: str) -> float:
        """The end of the pause, 0 where there was none."""
        return self.health(venue).paused_until

    def record(self, venue: str, ok: bool, now: float) -> None:
        """Count failures in a row; at BREAKER_LIMIT the breaker opens. A success closes it."""
        found = self._database.rows(sa.select(_c.failures).where(_c.venue == venue))
        if ok and (not found or found[0].failures == 0):
            return
        with self._database.transaction() as connection:
            self._add(connection, venue)
            if ok:
                _set(connection, venue, failures=0, opened=0, broken_until=0)
            else:
                _count_failure(connection, venue, now + self._skew)

    def broken_until(self, venue: str, now: float) -> float:
        """Until when the breaker lets no request through; 0 where it lets this caller's through.

        When its time is over, it lets one caller through to try. That request counts as the last
        failure but one: if it fails, the breaker opens again, for longer.
        """
        if self.health(venue).broken_until == 0:
            return 0.0
        shared = now + self._skew
        update = sa.update(venues).where(
            _c.venue == venue, _c.broken_until > 0, _c.broken_until <= shared
        )
        trial = update.values(broken_until=shared + BREAKER_FIRST, failures=BREAKER_LIMIT - 1)
        with self._database.transaction() as connection:
            if connection.execute(trial).rowcount:
                return 0.0
        return self.health(venue).broken_until

    def health(self, venue: str) -> VenueHealth:
        """What is held against a venue; reading changes nothing."""
        columns = (_c.failures, _c.broken_until, _c.paused_until)
        found = self._database.rows(sa.select(*columns).where(_c.venue == venue))
        if not found:
            return VenueHealth(0, 0.0, 0.0)
        failures, *moments = found[0]
        return VenueHealth(failures, *(moment and moment - self._skew for moment in moments))

    @property
    def _skew(self) -> float:
        return self._database.clock_skew

    def _add(self, connection: sa.Connection, venue: str) -> None:
        insert = self._database.insert(venues).values(venue=venue)
        connection.execute(insert.on_conflict_do_nothing())


def _set(connection: sa.Connection, venue: str, **values: Any) -> None:
    connection.execute(sa.update(venues).where(_c.venue == venue).values(**values))


def _count_failure(connection: sa.Connection, venue: str, now: float) -> None:
    """Open the breaker at the limit, and again when a request fails after its time was over."""
    update = sa.update(venues).where(_c.venue == venue).values(failures=_c.failures + 1)
    counted = update.returning(_c.failures, _c.opened, _c.broken_until)
    failures, opened, until = connection.execute(counted).one()
    if failures == BREAKER_LIMIT or (failures > BREAKER_LIMIT and until <= now):
        seconds = min(BREAKER_LONGEST, BREAKER_FIRST * 2.0**opened)
        _set(connection, venue, opened=opened + 1, broken_until=now + seconds)

"""What all processes share about a venue: its rate limit, its pauses, its circuit breaker."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import sqlalchemy as sa

from marketdata_assets.ledger.book import Book
from marketdata_assets.ledger.tables import venues
from marketdata_assets.model.venue_health import VenueHealth

BREAKER_LIMIT = 30
"""So many failures in a row open the breaker."""
BREAKER_FIRST, BREAKER_LONGEST = 30.0, 600.0
"""Seconds for which it stays open at first, doubled each time, and at the most."""

_c = venues.c
_IS_IT = _c.venue == sa.bindparam("its_venue")
_NOW, _UNTIL = (sa.bindparam(name, type_=sa.Double) for name in ("shared_now", "until"))
"""Moments of the clock that all workers share."""
_UPDATE = sa.update(venues).where(_IS_IT)
_RESERVE = _UPDATE.values(
    next_at=sa.case((_c.next_at > _NOW, _c.next_at), else_=_NOW) + sa.bindparam("interval")
).returning(_c.next_at)
_PAUSE = _UPDATE.where(_c.paused_until < _UNTIL).values(paused_until=_UNTIL)
_TRY = _UPDATE.where(_c.broken_until > 0, _c.broken_until <= _NOW).values(
    broken_until=_UNTIL, failures=BREAKER_LIMIT - 1
)
_COUNT_FAILURE = _UPDATE.values(failures=_c.failures + 1).returning(
    _c.failures, _c.opened, _c.broken_until
)
_CLOSED = {"failures": 0, "opened": 0, "broken_until": 0}
_HEALTH = sa.select(_c.failures, _c.broken_until, _c.paused_until).where(_IS_IT)


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
        values = {"shared_now": now + self._skew, "interval": interval}
        with self._database.transaction() as connection:
            (next_at,) = self._change(connection, _RESERVE, _its(venue) | values)
        return float(next_at) - burst * interval - self._skew

    def pause(self, venue: str, until: float) -> None:
        """Send no request before `until`; a pause never becomes shorter."""
        with self._database.transaction() as connection:
            connection.execute(self._insert, {"venue": venue})
            connection.execute(_PAUSE, _its(venue) | {"until": until + self._skew})

    def record(self, venue: str, ok: bool, now: float) -> None:
        """Count failures in a row; at BREAKER_LIMIT the breaker opens. A success closes it."""
        if ok and self.health(venue).failures == 0:
            return
        with self._database.transaction() as connection:
            if ok:
                connection.execute(_UPDATE, _its(venue) | _CLOSED)
            else:
                self._count_failure(connection, venue, now + self._skew)

    def broken_until(self, venue: str, now: float) -> float:
        """Until when the breaker lets no request through; 0 where it lets this caller's through.

        When its time is over, it lets one caller through to try. That request counts as the last
        failure but one: if it fails, the breaker opens again, for longer.
        """
        if self.health(venue).broken_until == 0:
            return 0.0
        shared = now + self._skew
        values = {"shared_now": shared, "until": shared + BREAKER_FIRST}
        with self._database.transaction() as connection:
            if connection.execute(_TRY, _its(venue) | values).rowcount:
                return 0.0
        return self.health(venue).broken_until

    def health(self, venue: str) -> VenueHealth:
        """What is held against a venue; reading changes nothing."""
        found = self._database.rows(_HEALTH, _its(venue))
        if not found:
            return VenueHealth(0, 0.0, 0.0)
        failures, *moments = found[0]
        return VenueHealth(failures, *(moment and moment - self._skew for moment in moments))

    @property
    def _skew(self) -> float:
        return self._database.clock_skew

    @cached_property
    def _insert(self) -> sa.Insert:
        return self._database.insert(venues).on_conflict_do_nothing()

    def _change(
        self, connection: sa.Connection, update: sa.Executable, values: dict[str, Any]
    ) -> sa.Row[*tuple[Any, ...]]:
        """The row that an UPDATE returns; a venue without a row gets one first."""
        found = connection.execute(update, values).first()
        if found is None:
            connection.execute(self._insert, {"venue": values["its_venue"]})
            found = connection.execute(update, values).one()
        return found

    def _count_failure(self, connection: sa.Connection, venue: str, now: float) -> None:
        """Open the breaker at the limit, and again when a request fails after its time was over."""
        failures, opened, until = self._change(connection, _COUNT_FAILURE, _its(venue))
        if failures == BREAKER_LIMIT or (failures > BREAKER_LIMIT and until <= now):
            seconds = min(BREAKER_LONGEST, BREAKER_FIRST * 2.0**opened)
            values = {"opened": opened + 1, "broken_until": now + seconds}
            connection.execute(_UPDATE, _its(venue) | values)


def _its(venue: str) -> dict[str, Any]:
    return {"its_venue": venue}

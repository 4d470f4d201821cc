"""When each thing that must go on for ever was done last."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa

from marketdata_assets.ledger.book import Book
from marketdata_assets.ledger.tables import heartbeats


class HeartbeatBook(Book):
    """The table `beats`. Raises StoreFailed."""

    def record(self, name: str, now: datetime) -> None:
        """Remember that it was done at `now`, by our clock."""
        with self._database.transaction() as connection:
            connection.execute(self._database.upsert(heartbeats, ["at"]), {"name": name, "at": now})

    def last(self, name: str) -> datetime | None:
        """When it was done last."""
        found = self._database.rows(sa.select(heartbeats.c["at"]).where(heartbeats.c.name == name))
        return found[0].at if found else None

"""The first bar of each market."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa

from marketdata_assets.ledger.book import Book
from marketdata_assets.ledger.tables import markets
from marketdata_assets.model.market import Market


class MarketBook(Book):
    """The table `markets`. Raises StoreFailed."""

    def first_bar(self, market: Market) -> datetime | None:
        """The open time of a market's first bar ever, once two answers agree on it."""
        statement = sa.select(markets.c.listed).where(markets.c.market == market.key)
        found = self._database.rows(statement)
        return found[0].listed if found else None

    def set_first_bar(self, market: Market, moment: datetime, evidence: str) -> None:
        """Remember a market's first bar, and in words what shows it."""
        upsert = self._database.upsert(markets, ("listed", "evidence"))
        with self._database.transaction() as connection:
            connection.execute(
                upsert, {"market": market.key, "listed": moment, "evidence": evidence}
            )

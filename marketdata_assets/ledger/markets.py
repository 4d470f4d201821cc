"""The first bar of each market, as far as answers of its venue showed it."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa

from marketdata_assets.ledger.book import Book
from marketdata_assets.ledger.tables import markets
from marketdata_assets.model.market import Market


class MarketBook(Book):
    """The table `markets`. Raises StoreFailed."""

    def first_bar(self, market: Market) -> datetime | None:
        """The open time of a market's first bar ever; None where no witness confirmed it."""
        first, evidence = self.claim(market)
        return first if evidence else None

    def claim(self, market: Market) -> tuple[datetime | None, str]:
        """The open time of the first bar that the venue or the store has, and what confirms that
        none lies before it: an empty text where nobody has looked for that.
        """
        statement = sa.select(markets.c.listed, markets.c.evidence).where(_is_it(market))
        found = self._database.rows(statement)
        return (found[0].listed, found[0].evidence) if found else (None, "")

    def set_first_bar(self, market: Market, moment: datetime, evidence: str) -> None:
        """Remember a market's first bar, and in words what confirms it."""
        upsert = self._database.upsert(markets, ("listed", "evidence"))
        with self._database.transaction() as connection:
            connection.execute(
                upsert, {"market": market.key, "listed": moment, "evidence": evidence}
            )

    def withdraw_first_bar(self, market: Market) -> None:
        """Forget a market's first bar: it was wrong, or is doubted."""
        with self._database.transaction() as connection:
            connection.execute(sa.delete(markets).where(_is_it(market)))


def _is_it(market: Market) -> sa.ColumnElement[bool]:
    return markets.c.market == market.key

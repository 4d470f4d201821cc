"""The lists of markets that venues gave, with every change, and what patterns meant in them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from marketdata_assets.ledger.book import Book
from marketdata_assets.ledger.tables import instruments, selections, snapshots
from marketdata_assets.model.instrument import Instrument

_c, _s, _t = instruments.c, selections.c, snapshots.c


@dataclass(frozen=True, slots=True)
class ListChanges:
    """What changed in a venue's list since the snapshot before, as symbols."""

    listed: tuple[str, ...]
    gone: tuple[str, ...]
    changed: tuple[str, ...]
    total: int


@dataclass(frozen=True, slots=True)
class Selection:
    """What the patterns of a venue meant at a moment of our clock."""

    id: int
    resolved_at: datetime
    symbols: tuple[str, ...]


class InstrumentBook(Book):
    """The tables `instruments`, `snapshots` and `selections`. Raises StoreFailed."""

    def record(
        self, venue: str, listed: Iterable[Instrument], types: Collection[str], now: datetime
    ) -> ListChanges:
        """Keep a venue's whole list of markets of these types as the snapshot of now, our clock.

        A row of an instrument holds from `since` until `until`; what stays equal stays one row.
        """
        before = {one.symbol: one for one in self.list(venue) if one.type in types}
        after = {one.symbol: one for one in listed}
        gone = [symbol for symbol in before if symbol not in after]
        changed = [s for s, one in before.items() if s in after and one != after[s]]
        new = [symbol for symbol in after if symbol not in before]
        with self._database.transaction() as connection:
            if ended := [*gone, *changed]:
                close = sa.update(instruments).values(until=now)
                its = (_c.venue == venue, _c.symbol == sa.bindparam("its"), _c.until.is_(None))
                connection.execute(close.where(*its), [{"its": symbol} for symbol in ended])
            if begun := [*new, *changed]:
                rows = [
                    {"venue": venue, "symbol": s, "since": now, "body": after[s].as_dict()}
                    for s in begun
                ]
                connection.execute(self._database.upsert(instruments, ("body",)), rows)
            snapshot = {"venue": venue, "day": f"{now:%Y-%m-%d}", "at": now, "markets": len(after)}
            connection.execute(self._database.upsert(snapshots, ("at", "markets")), snapshot)
        return ListChanges(tuple(new), tuple(gone), tuple(changed), len(after))

    def taken_at(self, venue: str) -> datetime | None:
        """The moment of a venue's newest snapshot."""
        found = self._database.rows(sa.select(sa.func.max(_t["at"])).where(_t.venue == venue))
        return found[0][0] if found else None

    def list(self, venue: str, at: datetime | None = None) -> Sequence[Instrument]:
        """A venue's list as the newest snapshot had it, or the newest one at a moment."""
        statement = sa.select(_c.body).where(_c.venue == venue).order_by(_c.symbol)
        if at is None:
            statement = statement.where(_c.until.is_(None))
        else:
            statement = statement.where(_c.since <= at, sa.or_(_c.until.is_(None), _c.until > at))
        return [Instrument.from_dict(row.body) for row in self._database.rows(statement)]

    def ended(self, venue: str) -> Sequence[Instrument]:
        """What earlier snapshots of a venue said and the newest one does not, the latest last."""
        statement = sa.select(_c.body).where(_c.venue == venue, _c.until.is_not(None))
        rows = self._database.rows(statement.order_by(_c.until))
        return [Instrument.from_dict(row.body) for row in rows]

    def selection(self, venue: str, patterns: str) -> Selection | None:
        """What these patterns of a venue meant when they were resolved last."""
        statement = sa.select(_s.id, _s.resolved_at, _s.symbols).where(
            _s.venue == venue, _s.patterns == patterns
        )
        found = self._database.rows(statement.order_by(_s.id.desc()).limit(1))
        return Selection(found[0][0], found[0][1], tuple(found[0][2])) if found else None

    def add_selection(
        self, venue: str, patterns: str, symbols: Sequence[str], now: datetime
    ) -> Selection:
        """Keep what the patterns of a venue mean from now on; what they meant before stays."""
        row = {"venue": venue, "patterns": patterns, "resolved_at": now, "symbols": [*symbols]}
        with self._database.transaction() as connection:
            insert = sa.insert(selections).returning(_s.id)
            number: int = connection.execute(insert, row).scalar_one()
        return Selection(number, now, tuple(symbols))

    def newest_selection(self) -> int:
        """The number of the newest selection of any venue; 0 where there is none."""
        return int(self._database.rows(sa.select(sa.func.max(_s.id)))[0][0] or 0)

"""The venues' lists of markets, and what the patterns of a universe mean in them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from marketdata_assets.errors import BadInput
from marketdata_assets.ledger.instruments import ListChanges, Selection
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.model.instrument import Instrument
from marketdata_assets.model.market import find_market
from marketdata_assets.settings.fields import reveal_secret
from marketdata_assets.settings.load import load_settings
from marketdata_assets.settings.parts import SymbolPattern, Venue
from marketdata_assets.settings.universe import Settings
from marketdata_assets.venues.facts import MarketType, market_type
from marketdata_assets.venues.registry import RENAMED_ASSETS

if TYPE_CHECKING:
    from marketdata_assets.sources.clients import VenueClients


@dataclass(frozen=True, slots=True)
class InstrumentKeeper:
    """Requests lists of markets, keeps them, and looks patterns up in them."""

    settings: Settings
    ledger: Ledger
    venues: VenueClients

    def take(self, venue: str, types: Collection[MarketType] = ()) -> ListChanges:
        """Request a venue's list and keep it as the snapshot of today: the markets of these types,
        by default of those that the universe wants of it.

        Raises VenueDown, VenueRefused, and BadInput for a list without a market.
        """
        wanted = set(types) or wanted_types(self.settings.venues[venue])
        request = self.venues.client(venue).source.instruments(wanted)
        listed = [one for one in self.venues.submit(request).result() if one.type in wanted]
        if not listed:
            raise BadInput(
                f"{venue} lists no market of type {' or '.join(sorted(wanted))}; nothing is kept"
            )
        return self.ledger.instruments.record(venue, listed, wanted, self.settings.now())

    def resolve(self, venue: Venue) -> Selection:
        """Look up what the patterns of a venue mean in its newest list, and keep that.

        What they meant before stays in its order, what is new follows: ranges of markets stay
        contiguous. Raises BadInput for a pattern that no market has.
        """
        book, key = self.ledger.instruments, pattern_key(venue)
        listed = [
            one
            for one in book.list(venue.name)
            if one.active is not False and find_market(venue.name, one.symbol)
        ]
        found = {s for pattern in venue.patterns for s in self._find(venue, pattern, listed)}
        before = book.selection(venue.name, key)
        kept = [symbol for symbol in (before.symbols if before else ()) if symbol in found]
        symbols = (*kept, *sorted(found.difference(kept)))
        if before and symbols == before.symbols:
            return before
        return book.add_selection(venue.name, key, symbols, self.settings.now())

    def _find(
        self, venue: Venue, pattern: str | SymbolPattern, listed: Sequence[Instrument]
    ) -> Iterable[str]:
        found = [one.symbol for one in listed if _matches(one, pattern)]
        if not found:
            what = pattern if isinstance(pattern, str) else _describe(pattern)
            quotes = " ".join(sorted({one.quote for one in listed})[:20])
            raise BadInput(
                f"{self.settings.source}: {venue.name} has no market {what}; its quote currencies "
                f"are {quotes}"
            )
        if isinstance(pattern, str) or pattern.top is None:
            return found
        request = self.venues.client(venue.name).source.traded_volumes(MarketType(pattern.type))
        volumes = self.venues.submit(request).result()
        known = [symbol for symbol in found if symbol in volumes]
        if not known:
            raise BadInput(
                f"{venue.name} tells no volumes of {_describe(pattern)}, which `top:` needs; write "
                "the symbols"
            )
        return sorted(known, key=lambda symbol: (-volumes[symbol], symbol))[: pattern.top]


def _matches(one: Instrument, pattern: str | SymbolPattern) -> bool:
    if isinstance(pattern, SymbolPattern):
        return one.quote == pattern.quote and one.type == pattern.type and not one.expiry
    return market_type(one.symbol) is market_type(pattern) and fnmatchcase(one.symbol, pattern)


def _describe(pattern: SymbolPattern) -> str:
    return f"of type {pattern.type} with quote currency {pattern.quote}"


def former_symbols(ledger: Ledger, venue: str) -> dict[str, str]:
    """Return the symbol that a market of a venue's newest list had before, by its symbol now.

    Its id had another symbol in an earlier snapshot; or its asset is known to have been renamed,
    and the market of the old name has stored bars or stood in an earlier snapshot.
    """
    ended, current = ledger.instruments.ended(venue), ledger.instruments.list(venue)
    by_id = {(one.id, one.type): one.symbol for one in ended}
    found = {one.symbol: by_id.get((one.id, one.type), one.symbol) for one in current}
    stored = ledger.partitions.stored_markets()
    old = {one.symbol for one in ended} | {m.symbol for m in stored if m.venue == venue}
    for one in current:
        if one.base in RENAMED_ASSETS and found[one.symbol] == one.symbol:
            before = RENAMED_ASSETS[one.base] + one.symbol.removeprefix(one.base)
            found[one.symbol] = before if before in old - set(found) else one.symbol
    return {symbol: former for symbol, former in found.items() if symbol != former}


def wanted_types(venue: Venue) -> set[MarketType]:
    """Return the types of the markets that the universe wants of a venue."""
    patterns = [e for e in venue.patterns if isinstance(e, SymbolPattern)]
    texts = [e for e in venue.entries if isinstance(e, str)]
    return {*map(market_type, texts), *(MarketType(pattern.type) for pattern in patterns)}


def pattern_key(venue: Venue) -> str:
    """Return the patterns of a venue as text, under which their meaning is kept."""
    return json.dumps(
        [e if isinstance(e, str) else e.model_dump(mode="json") for e in venue.patterns]
    )


def load_universe(
    environ: Mapping[str, str] | None = None, *, for_reading: bool = False
) -> Settings:
    """Read the universe that the environment names, with what its patterns meant last.

    Patterns that were never looked up are looked up now: a request for the venue's list.
    `for_reading`, none is sent. Raises BadInput, VenueDown, VenueRefused, StoreFailed.
    """
    settings = load_settings(environ)
    if not any(venue.patterns for venue in settings.venues.values()):
        return settings
    ledger = Ledger(settings.state, reveal_secret(settings.database), for_reading=for_reading)
    try:
        venues = dict(_resolve_all(settings, ledger, for_reading=for_reading))
    finally:
        ledger.close()
    return settings.model_copy(update={"venues": venues})


def _resolve_all(
    settings: Settings, ledger: Ledger, *, for_reading: bool
) -> Iterator[tuple[str, Venue]]:
    for name, venue in settings.venues.items():
        if not venue.patterns:
            yield name, venue
            continue
        known = ledger.instruments.selection(name, pattern_key(venue))
        if known is None and for_reading:
            raise BadInput(
                f"{settings.source}: what the patterns of {name} mean was not looked up yet; run "
                f"`marketdata markets --venue {name} --refresh`"
            )
        known = known or _look_up(settings, ledger, venue)
        yield name, venue.resolve(known.symbols)


def _look_up(settings: Settings, ledger: Ledger, venue: Venue) -> Selection:
    from marketdata_assets.sources.clients import VenueClients
    from marketdata_assets.sources.guards import RetryPolicy

    venues = VenueClients(settings.venues, ledger.venues, RetryPolicy())
    try:
        keeper = InstrumentKeeper(settings, ledger, venues)
        keeper.take(venue.name)
        return keeper.resolve(venue)
    finally:
        venues.close()

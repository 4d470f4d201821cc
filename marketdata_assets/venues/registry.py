"""All venues with facts of their own."""

from __future__ import annotations

from marketdata_assets.venues import binance, binanceus, binanceusdm, kraken
from marketdata_assets.venues.facts import ArchiveFormat, VenueFacts

VENUES: dict[str, VenueFacts] = {
    facts.venue: facts
    for facts in (binance.FACTS, binanceus.FACTS, binanceusdm.FACTS, kraken.FACTS)
}
"""By ccxt's id."""
ARCHIVE_FORMATS: tuple[ArchiveFormat, ...] = tuple(
    dict.fromkeys(facts.archive.format for facts in VENUES.values() if facts.archive)
)
"""Every kind of file that a venue publishes, once each."""


def facts_of(venue: str) -> VenueFacts:
    """Return what is known of a venue (ccxt's id); the defaults for one without a file."""
    return VENUES.get(venue) or VenueFacts(venue=venue)

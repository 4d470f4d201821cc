"""All venues with facts of their own."""

from __future__ import annotations

from dataclasses import replace

from marketdata_assets.venues import (
    binance,
    binanceus,
    binanceusdm,
    bitfinex,
    bitget,
    bithumb,
    bitstamp,
    bybit,
    cryptocom,
    deribit,
    gate,
    gemini,
    htx,
    hyperliquid,
    kraken,
    krakenfutures,
    kucoin,
    kucoinfutures,
    mexc,
    okx,
    phemex,
    upbit,
)
from marketdata_assets.venues.facts import ArchiveFormat, VenueFacts
from marketdata_assets.venues.others import OTHERS

VENUES: dict[str, VenueFacts] = {
    module.FACTS.venue: module.FACTS
    for module in (
        *(binance, binanceus, binanceusdm, bitfinex, bitget, bithumb, bitstamp, bybit, cryptocom),
        *(deribit, gate, gemini, htx, hyperliquid, kraken, krakenfutures, kucoin, kucoinfutures),
        *(mexc, okx, phemex, upbit),
    )
}
"""By ccxt's id."""
SAME_API = {
    **dict.fromkeys(("myokx", "okxus"), "okx"),
    **dict.fromkeys(("bybiteu", "bybitid"), "bybit"),
    "gateeu": "gate",
}
"""By the id of a venue that ccxt derives from another one: the other one, whose facts hold."""
ARCHIVE_FORMATS: tuple[ArchiveFormat, ...] = tuple(
    dict.fromkeys(facts.archive.format for facts in VENUES.values() if facts.archive)
)
"""Every kind of file that a venue publishes, once each."""


def facts_of(venue: str) -> VenueFacts:
    """Return what is known of a venue (ccxt's id); the defaults for one without a file."""
    if venue in SAME_API:
        return replace(VENUES[SAME_API[venue]], venue=venue)
    return VENUES.get(venue) or OTHERS.get(venue) or VenueFacts(venue=venue)

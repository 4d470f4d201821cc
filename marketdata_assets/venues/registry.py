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
from marketdata_assets.venues.facts import (
    ArchiveFormat,
    BarsEndpoint,
    MarketType,
    VenueFacts,
)

VENUES: dict[str, VenueFacts] = {
    module.FACTS.venue: module.FACTS
    for module in (
        *(binance, binanceus, binanceusdm, bitfinex, bitget, bithumb, bitstamp, bybit, cryptocom),
        *(deribit, gate, gemini, htx, hyperliquid, kraken, krakenfutures, kucoin, kucoinfutures),
        *(mexc, okx, phemex, upbit),
    )
}
"""By ccxt's id."""
_NO_START, _WITH_END = BarsEndpoint(has_start=False), BarsEndpoint(takes_until=True)
OTHERS: dict[str, VenueFacts] = {
    name: VenueFacts(venue=name, endpoints={MarketType.SPOT: endpoint})
    for name, endpoint in (
        *((name, _NO_START) for name in ("bitrue", "bitteam", "bittrade", "p2b", "weex")),
        *((name, _WITH_END) for name in ("deepcoin", "extended", "nado", "zebpay")),
    )
}
"""By ccxt's id: venues of which no more is known than how ccxt 4.5.90 requests their bars, measured
by `marketdata_tests/venues/test_every_venue.py`.
"""
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


RENAMED_ASSETS = {
    "POL": "MATIC",  # polygon.technology/blog, migration from 2024-09-04
    "RENDER": "RNDR",  # know.rendernetwork.com, RNP-006, venues in 2024-07
    "S": "FTM",  # soniclabs.com, upgrade portal, venues in 2025-01
    "A": "EOS",  # vaulta.com, token swap, venues in 2025-05
    "XNO": "NANO",  # blog.nano.org, ticker change of 2021-11
    "FIRO": "XZC",  # firo.org, rebranding of 2020-10
}
"""By new name: the name before, of assets that got another one, one new unit for one old one.
Venues list the new one as another market, with another id.
"""


def facts_of(venue: str) -> VenueFacts:
    """Return what is known of a venue (ccxt's id); the defaults for one without a file."""
    if venue in SAME_API:
        return replace(VENUES[SAME_API[venue]], venue=venue)
    return VENUES.get(venue) or OTHERS.get(venue) or VenueFacts(venue=venue)

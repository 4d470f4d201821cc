"""Bitfinex: spot, and perpetuals whose volume counts base currency."""

from __future__ import annotations

from marketdata_assets.venues.facts import BarsEndpoint, MarketType, VenueFacts

# docs.bitfinex.com, Candles (2026-11): 10000 bars, 30 requests a minute
_ENDPOINT = BarsEndpoint(page_size=10_000, requests_per_minute=30)

FACTS = VenueFacts(
    venue="bitfinex", endpoints={MarketType.SPOT: _ENDPOINT, MarketType.LINEAR: _ENDPOINT}
)

"""Crypto.com: spot and perpetuals."""

from __future__ import annotations

from marketdata_assets.venues.facts import BarsEndpoint, MarketType, VenueFacts

# exchange-docs.crypto.com, public/get-candlestick (2026-11): 300 bars, `v` in base currency (a
# contract is one of it)
_ENDPOINT = BarsEndpoint(page_size=300, requests_per_minute=600)

FACTS = VenueFacts(
    venue="cryptocom", endpoints={MarketType.SPOT: _ENDPOINT, MarketType.LINEAR: _ENDPOINT}
)

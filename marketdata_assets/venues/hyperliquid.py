"""Hyperliquid: the newest 5000 bars of spot and of perpetuals."""

from __future__ import annotations

from marketdata_assets.venues.facts import BarsEndpoint, MarketType, VenueFacts, list_types

# hyperliquid.gitbook.io, Candle snapshot (2026-11): only the most recent 5000 bars; `n` trades
_ENDPOINT = BarsEndpoint(
    page_size=5000,
    requests_per_minute=60,
    newest_bars_only=5000,
    row_keys={"trades": "n"},
)

FACTS = VenueFacts(
    venue="hyperliquid",
    endpoints={MarketType.SPOT: _ENDPOINT, MarketType.LINEAR: _ENDPOINT},
    markets_option=list_types(spot=["spot"], linear=["swap", "hip3"]),
)

"""Bybit: spot, linear and inverse contracts."""

from __future__ import annotations

from marketdata_assets.venues.facts import BarsEndpoint, MarketType, VenueFacts, list_types

# bybit-exchange.github.io, Get Kline (2026-11): 1000 bars, 600 requests in 5 s. Columns: 5 volume,
# 6 turnover; an inverse contract counts its volume in quote and its turnover in base currency
_ENDPOINT = BarsEndpoint(page_size=1000, requests_per_minute=1200, row_keys={"quote_volume": 6})

FACTS = VenueFacts(
    venue="bybit",
    endpoints={
        MarketType.SPOT: _ENDPOINT,
        MarketType.LINEAR: _ENDPOINT,
        MarketType.INVERSE: BarsEndpoint(
            page_size=1000,
            requests_per_minute=1200,
            row_keys={"volume": 6, "quote_volume": 5},
        ),
    },
    markets_option=list_types(
        spot=["spot"], linear=["linear"], inverse=["inverse"], option=["option"]
    ),
)

"""Bitget: spot and linear perpetuals."""

from __future__ import annotations

from marketdata_assets.venues.facts import BarsEndpoint, MarketType, VenueFacts, list_types

# bitget.com/api-doc, Get History Candlestick Data (2026-11): 200 bars (recent ones 1000). Columns:
# 5 base; of contracts 6 quote currency (which of 6 and 7 that is of spot, its pages contradict)
FACTS = VenueFacts(
    venue="bitget",
    endpoints={
        MarketType.SPOT: BarsEndpoint(page_size=200, requests_per_minute=600),
        MarketType.LINEAR: BarsEndpoint(
            page_size=200, requests_per_minute=600, row_keys={"quote_volume": 6}
        ),
    },
    markets_option=list_types(spot=["spot"], linear=["swap"], inverse=["swap"]),
)

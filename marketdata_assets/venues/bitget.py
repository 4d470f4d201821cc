"""Bitget: spot and linear perpetuals."""

from __future__ import annotations

from marketdata_assets.venues.facts import BarsEndpoint, MarketType, VenueFacts, list_types

# bitget.com/api-doc, Get History Candlestick Data (2026-11): 200 bars (recent ones 1000). Columns:
# 5 base; of spot 6 USDT, 7 quote currency; of contracts 6 quote currency
FACTS = VenueFacts(
    venue="bitget",
    endpoints={
        MarketType.SPOT: BarsEndpoint(
            page_size=200, requests_per_minute=600, row_keys={"quote_volume": 7}
        ),
        MarketType.LINEAR: BarsEndpoint(
            page_size=200, requests_per_minute=600, row_keys={"quote_volume": 6}
        ),
    },
    markets_option=list_types(spot=["spot"], linear=["swap"], inverse=["swap"]),
)

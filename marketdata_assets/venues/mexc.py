"""MEXC: spot."""

from __future__ import annotations

from marketdata_assets.venues.facts import BarsEndpoint, MarketType, VenueFacts

FACTS = VenueFacts(
    venue="mexc",
    # mexc.com/api-docs, Kline Data (2026-11): 500 bars (ccxt states 1000); column 7 quote currency
    endpoints={
        MarketType.SPOT: BarsEndpoint(
            page_size=500, requests_per_minute=600, row_keys={"quote_volume": 7}
        )
    },
    market_lists={
        MarketType.SPOT: "fetch_spot_markets",
        MarketType.LINEAR: "fetch_swap_markets",
        MarketType.INVERSE: "fetch_swap_markets",
    },
)

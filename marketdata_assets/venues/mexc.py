"""MEXC: spot, and perpetuals whose volume counts contracts."""

from __future__ import annotations

from marketdata_assets.venues.facts import BarsEndpoint, MarketType, VenueFacts, VolumeUnit

FACTS = VenueFacts(
    venue="mexc",
    # mexc.com/api-docs, Kline Data (2026-11): 500 bars (ccxt states 1000); column 7 quote currency
    endpoints={
        MarketType.SPOT: BarsEndpoint(
            page_size=500, requests_per_minute=600, row_keys={"quote_volume": 7}
        ),
        # mexc.com/api-docs, Contract K-line (2026-11): 2000 bars; without an end it goes on to now
        MarketType.LINEAR: BarsEndpoint(
            page_size=2000,
            requests_per_minute=600,
            takes_until=True,
            volume_unit=VolumeUnit.CONTRACTS,
        ),
    },
    market_lists={
        MarketType.SPOT: "fetch_spot_markets",
        MarketType.LINEAR: "fetch_swap_markets",
        MarketType.INVERSE: "fetch_swap_markets",
    },
)

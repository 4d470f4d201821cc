"""Kraken Futures: linear perpetuals."""

from __future__ import annotations

from marketdata_assets.venues.facts import BarsEndpoint, MarketType, VenueFacts, VolumeUnit

FACTS = VenueFacts(
    venue="krakenfutures",
    # docs.kraken.com/api, Charts (2026-11): 2000 bars; volumes count contracts, of `contractSize`
    # each
    endpoints={
        MarketType.LINEAR: BarsEndpoint(
            page_size=2000, requests_per_minute=120, volume_unit=VolumeUnit.CONTRACTS
        )
    },
)

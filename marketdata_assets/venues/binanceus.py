"""Binance.US, whose API is an older one of Binance's."""

from __future__ import annotations

from dataclasses import replace

from marketdata_assets.venues.binance import SPOT_ENDPOINT
from marketdata_assets.venues.facts import MarketType, VenueFacts

FACTS = VenueFacts(
    venue="binanceus",
    # exchangeInfo (2026-11): REQUEST_WEIGHT 1200 a minute
    endpoints={
        MarketType.SPOT: replace(SPOT_ENDPOINT, requests_per_minute=600, weight_per_minute=1200)
    },
)

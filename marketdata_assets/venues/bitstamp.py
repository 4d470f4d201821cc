"""Bitstamp: spot."""

from __future__ import annotations

from marketdata_assets.venues.facts import BarsEndpoint, MarketType, VenueFacts

FACTS = VenueFacts(
    venue="bitstamp",
    # bitstamp.net/api, OHLC data (2026-11): 1000 bars, volumes in base currency; 400 requests a
    # second
    endpoints={MarketType.SPOT: BarsEndpoint(page_size=1000, requests_per_minute=600)},
    # ccxt 4.5.90 requests a step of 259200 s for 1w
    odd_timeframes={"1w": "they are three days long"},
)

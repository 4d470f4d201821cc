"""Gemini: the newest bars of spot, about a day of minutes."""

from __future__ import annotations

from marketdata_assets.venues.facts import BarsEndpoint, MarketType, VenueFacts

FACTS = VenueFacts(
    venue="gemini",
    # docs.gemini.com, Candles (2026-11): a request has neither bounds nor a limit
    endpoints={
        MarketType.SPOT: BarsEndpoint(page_size=1000, requests_per_minute=120, has_start=False)
    },
)

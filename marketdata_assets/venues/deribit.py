"""Deribit: spot and contracts, whose volume counts base currency."""

from __future__ import annotations

from marketdata_assets.venues.facts import BarsEndpoint, MarketType, VenueFacts

# docs.deribit.com, get_tradingview_chart_data (2026-11): `volume` is in base currency, `cost` in
# quote currency; ccxt 4.5.90 states 1000 bars
_ENDPOINT = BarsEndpoint(page_size=1000, requests_per_minute=600)

FACTS = VenueFacts(
    venue="deribit",
    endpoints=dict.fromkeys((MarketType.SPOT, MarketType.LINEAR, MarketType.INVERSE), _ENDPOINT),
)

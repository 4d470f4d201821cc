"""OKX: spot, perpetuals, futures and options."""

from __future__ import annotations

from marketdata_assets.venues.facts import BarsEndpoint, MarketType, VenueFacts, list_types

# docs.okx.com, Get candlesticks history (2026-11): 300 bars, 20 requests in 2 s. Columns: 5 volume
# (contracts of a derivative), 6 base currency of a derivative, 7 quote currency, 8 "1" once closed
_ENDPOINT = BarsEndpoint(
    page_size=300,
    requests_per_minute=600,
    row_keys={"quote_volume": 7, "closed": 8},
)

FACTS = VenueFacts(
    venue="okx",
    endpoints={kind: _ENDPOINT for kind in MarketType if kind is not MarketType.OPTION},
    markets_option=list_types(
        spot=["spot"], linear=["swap", "future"], inverse=["swap", "future"], option=["option"]
    ),
)

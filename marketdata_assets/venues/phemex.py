"""Phemex: the newest 1000 bars of spot, and linear perpetuals."""

from __future__ import annotations

from marketdata_assets.venues.facts import BarsEndpoint, MarketType, VenueFacts

# phemex-docs.github.io, Query kline (2026-11): these numbers of bars are accepted
_LIMITS = (5, 10, 50, 100, 500, 1000)

FACTS = VenueFacts(
    venue="phemex",
    endpoints={
        # ccxt 4.5.90 sends neither since nor until for spot: the newest bars come
        MarketType.SPOT: BarsEndpoint(
            page_size=1000, requests_per_minute=60, newest_bars_only=1000, has_start=False
        ),
        # column 7 is in base currency, as a contract is one unit of it; 8 is the turnover
        MarketType.LINEAR: BarsEndpoint(
            page_size=1000,
            requests_per_minute=60,
            takes_until=True,
            limits=_LIMITS,
            row_keys={"quote_volume": 8},
        ),
    },
)

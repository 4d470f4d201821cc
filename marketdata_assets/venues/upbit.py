"""Upbit: spot."""

from __future__ import annotations

from marketdata_assets.venues.facts import BarsEndpoint, MarketType, VenueFacts

FACTS = VenueFacts(
    venue="upbit",
    # docs.upbit.com, List Minute Candles (2026-11): 200 bars, newest first, none of a minute
    # without trades; 10 requests a second
    endpoints={
        MarketType.SPOT: BarsEndpoint(
            page_size=200,
            requests_per_minute=600,
            row_keys={"quote_volume": "candle_acc_trade_price"},
        )
    },
)

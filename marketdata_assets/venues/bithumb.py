"""Bithumb: the newest 200 bars of spot."""

from __future__ import annotations

from marketdata_assets.venues.facts import BarsEndpoint, MarketType, VenueFacts

FACTS = VenueFacts(
    venue="bithumb",
    # apidocs.bithumb.com, Candles (2026-11): 200 bars; ccxt 4.5.90 sends neither since nor until
    endpoints={
        MarketType.SPOT: BarsEndpoint(
            page_size=200,
            requests_per_minute=600,
            newest_bars_only=200,
            has_start=False,
            row_keys={"quote_volume": "candle_acc_trade_price"},
        )
    },
)

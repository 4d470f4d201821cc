"""Bitstamp: seconds, both bounds inclusive, 1000 bars; it tells no time."""

from __future__ import annotations

from typing import Any

from marketdata_tests.fake_venues.frame import FakeVenue, text

MARKET = {
    "market_symbol": "btcusd",
    "base_currency": "BTC",
    "counter_currency": "USD",
    "base_decimals": 8,
    "counter_decimals": 0,
    "trading": "Enabled",
    "market_type": "SPOT",
}


class Bitstamp(FakeVenue):
    name, spot, max_page = "bitstamp", "BTC/USD", 1000
    unknown_market = (404, {"status": "error", "reason": "Not found", "code": "API0000"})

    def answer(self, path: str, query: dict[str, Any]) -> Any:
        if path.endswith("/markets/"):
            return [] if self.is_gone else [MARKET]
        if "/ohlc/" in path:
            start, end = int(query["start"]) * 1000, int(query["end"]) * 1000
            bars = self.bars(start, end, int(query["limit"]), interval=query["step"])
            rows = [
                {
                    "timestamp": str(bar.t // 1000),
                    "open": text(bar.o),
                    "high": text(bar.h),
                    "low": text(bar.l),
                    "close": text(bar.c),
                    "volume": text(bar.v),
                }
                for bar in self.rows(bars)
            ]
            return {"data": {"pair": "BTC/USD", "ohlc": rows}}
        return None

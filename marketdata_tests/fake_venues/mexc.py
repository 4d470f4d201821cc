"""MEXC: 500 bars though it documents 1000, the end exclusive."""

from __future__ import annotations

from typing import Any

from marketdata_tests.fake_venues.frame import FakeVenue, text

SPOT = {
    "symbol": "BTCUSDT",
    "status": "1",
    "baseAsset": "BTC",
    "quoteAsset": "USDT",
    "baseAssetPrecision": "6",
    "quoteAssetPrecision": "2",
    "baseSizePrecision": "0.000001",
    "quotePrecision": "4",
    "quoteAmountPrecision": "5",
    "maxQuoteAmount": "5000000",
    "isSpotTradingAllowed": True,
    "permissions": ["SPOT"],
    "filters": [],
    "makerCommission": "0.002",
    "takerCommission": "0.002",
}


class Mexc(FakeVenue):
    name, max_page = "mexc", 500
    unknown_market = (400, {"code": -1121, "msg": "Invalid symbol."})

    def answer(self, path: str, query: dict[str, Any]) -> Any:
        if path.endswith("/api/v3/time"):
            return {"serverTime": self.now}
        if path.endswith("/api/v3/exchangeInfo"):
            return {"serverTime": self.now, "symbols": [] if self.is_gone else [SPOT]}
        if path.endswith("/api/v3/klines"):
            start, end = int(query["startTime"]), int(query.get("endTime", self.now))
            limit = int(query.get("limit", 500))
            bars = self.rows(self.bars(start, end - 1, limit, interval=query["interval"]))
            return [
                [
                    *(bar.t, text(bar.o), text(bar.h), text(bar.l), text(bar.c), text(bar.v)),
                    *(bar.t + bar.width, text(bar.quote)),
                ]
                for bar in bars
            ]
        return None

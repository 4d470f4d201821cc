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


PERPETUAL = {
    "symbol": "BTC_USDT",
    "baseCoin": "BTC",
    "quoteCoin": "USDT",
    "settleCoin": "USDT",
    "contractSize": 0.0001,
    "priceUnit": 0.1,
    "volUnit": 1,
    "state": 0,
}


class Mexc(FakeVenue):
    name, linear, max_page = "mexc", "BTC/USDT:USDT", 2000
    unknown_market = (400, {"code": -1121, "msg": "Invalid symbol."})

    def answer(self, path: str, query: dict[str, Any]) -> Any:
        if path.endswith("/api/v3/time"):
            return {"serverTime": self.now}
        if path.endswith("/api/v3/exchangeInfo"):
            return {"serverTime": self.now, "symbols": [] if self.is_gone else [SPOT]}
        if path.endswith("/contract/detail"):
            return {"success": True, "code": 0, "data": [] if self.is_gone else [PERPETUAL]}
        if "/contract/kline/" in path:
            return {"success": True, "code": 0, "data": self._columns(query)}
        if path.endswith("/api/v3/klines"):
            start, end = int(query["startTime"]), int(query.get("endTime", self.now))
            limit = min(500, int(query.get("limit", 500)))
            bars = self.rows(self.bars(start, end - 1, limit, interval=query["interval"]))
            return [
                [
                    *(bar.t, text(bar.o), text(bar.h), text(bar.l), text(bar.c), text(bar.v)),
                    *(bar.t + bar.width, text(bar.quote)),
                ]
                for bar in bars
            ]
        return None

    def _columns(self, query: dict[str, Any]) -> dict[str, Any]:
        first, last = int(query["start"]) * 1000, int(query.get("end", self.now // 1000)) * 1000
        bars = self.rows(self.bars(first, last, 2000, keep="newest", interval=query["interval"]))
        return {
            "time": [bar.t // 1000 for bar in bars],
            "open": [float(bar.o) for bar in bars],
            "close": [float(bar.c) for bar in bars],
            "high": [float(bar.h) for bar in bars],
            "low": [float(bar.l) for bar in bars],
            "vol": [float(bar.v * 10_000) for bar in bars],
            "amount": [float(bar.quote) for bar in bars],
        }

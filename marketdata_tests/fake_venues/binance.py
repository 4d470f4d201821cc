"""Binance and Binance.US: klines with nine values, counted from startTime on."""

from __future__ import annotations

from typing import Any

from marketdata_tests.fake_venues.frame import FakeVenue, text

SPOT = {
    "symbol": "BTCUSDT",
    "status": "TRADING",
    "baseAsset": "BTC",
    "quoteAsset": "USDT",
    "baseAssetPrecision": 8,
    "quotePrecision": 8,
    "filters": [],
    "permissions": ["SPOT"],
    "isSpotTradingAllowed": True,
    "isMarginTradingAllowed": False,
    "orderTypes": [],
}
PERPETUAL = {
    "symbol": "BTCUSDT",
    "pair": "BTCUSDT",
    "contractType": "PERPETUAL",
    "status": "TRADING",
    "baseAsset": "BTC",
    "quoteAsset": "USDT",
    "marginAsset": "USDT",
    "filters": [],
    "deliveryDate": 4133404800000,
    "onboardDate": 0,
    "pricePrecision": 2,
    "quantityPrecision": 3,
    "orderTypes": [],
}


class Binance(FakeVenue):
    name, linear, max_page = "binance", "BTC/USDT:USDT", 1000
    counts_rows = True
    unknown_market = (400, {"code": -1121, "msg": "Invalid symbol."})

    def answer(self, path: str, query: dict[str, Any]) -> Any:
        if path.endswith("/time"):
            return {"serverTime": self.now}
        if path.endswith("/exchangeInfo"):
            market = PERPETUAL if "/fapi/" in path else SPOT
            return {"serverTime": self.now, "symbols": [] if self.is_gone else [market]}
        if path.endswith("/klines"):
            interval, limit = query["interval"], int(query.get("limit", 500))
            first = max(int(query["startTime"]), self.listed)
            last = int(query.get("endTime", self.now))
            return [
                [
                    *(bar.t, text(bar.o), text(bar.h), text(bar.l), text(bar.c), text(bar.v)),
                    *(bar.t + bar.width - 1, text(bar.quote), bar.trades, text(bar.v / 2)),
                    *(text(bar.quote / 2), "0"),
                ]
                for bar in self.rows(self.bars(first, last, limit, interval=interval))
            ]
        return None


class Binanceus(Binance):
    name, linear = "binanceus", None

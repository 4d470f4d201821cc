"""Bybit: `start` and `end` inclusive, newest first, 1000 bars."""

from __future__ import annotations

from typing import Any

from marketdata_tests.fake_venues.frame import FakeVenue, text, width_of

SPOT = {
    "symbol": "BTCUSDT",
    "baseCoin": "BTC",
    "quoteCoin": "USDT",
    "status": "Trading",
    "innovation": "0",
    "marginTrading": "none",
    "priceFilter": {"tickSize": "0.01"},
    "lotSizeFilter": {"basePrecision": "0.000001", "minOrderQty": "0.00004", "minOrderAmt": "1"},
}
LINEAR = {
    "symbol": "BTCUSDT",
    "baseCoin": "BTC",
    "quoteCoin": "USDT",
    "settleCoin": "USDT",
    "contractType": "LinearPerpetual",
    "status": "Trading",
    "launchTime": "0",
    "deliveryTime": "0",
    "priceScale": "2",
    "fundingInterval": 480,
    "leverageFilter": {"minLeverage": "1", "maxLeverage": "100.00", "leverageStep": "0.01"},
    "priceFilter": {"minPrice": "0.50", "maxPrice": "999999.00", "tickSize": "0.50"},
    "lotSizeFilter": {"maxOrderQty": "100", "minOrderQty": "0.001", "qtyStep": "0.001"},
}


class Bybit(FakeVenue):
    name, linear, max_page = "bybit", "BTC/USDT:USDT", 1000
    unknown_market = (200, {"retCode": 10001, "retMsg": "params error: Symbol Invalid"})

    def answer(self, path: str, query: dict[str, Any]) -> Any:
        if path.endswith("/market/time"):
            seconds, nanoseconds = str(self.now // 1000), str(self.now * 10**6)
            return self._wrap({"timeSecond": seconds, "timeNano": nanoseconds})
        if path.endswith("/instruments-info"):
            listed = {"spot": [SPOT], "linear": [LINEAR]}.get(query["category"], [])
            return self._wrap(
                {
                    "category": query["category"],
                    "list": [] if self.is_gone else listed,
                    "nextPageCursor": "",
                }
            )
        if path.endswith("/market/kline"):
            return self._wrap(
                {
                    "symbol": "BTCUSDT",
                    "category": query["category"],
                    "list": [
                        [
                            *(str(bar.t), text(bar.o), text(bar.h), text(bar.l), text(bar.c)),
                            *(text(bar.v), text(bar.quote)),
                        ]
                        for bar in self._bars(query)
                    ],
                }
            )
        return None

    def _bars(self, query: dict[str, str]) -> list[Any]:
        start, limit = int(query["start"]), int(query.get("limit", 200))
        end = int(query.get("end", start + (limit - 1) * width_of(query["interval"])))
        return self.rows(
            self.bars(start, end, limit, interval=query["interval"]), newest_first=True
        )

    def _wrap(self, result: Any) -> Any:
        return {"retCode": 0, "retMsg": "OK", "result": result, "retExtInfo": {}, "time": self.now}

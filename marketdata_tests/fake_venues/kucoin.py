"""KuCoin: spot in seconds without the end, newest first; perpetuals in ms and in lots."""

from __future__ import annotations

from typing import Any

from marketdata_tests.fake_venues.frame import FakeVenue, text

SPOT = {
    "symbol": "BTC-USDT",
    "name": "BTC-USDT",
    "baseCurrency": "BTC",
    "quoteCurrency": "USDT",
    "feeCurrency": "USDT",
    "market": "USDS",
    "baseMinSize": "0.00001",
    "quoteMinSize": "0.01",
    "baseMaxSize": "10000",
    "quoteMaxSize": "9999",
    "baseIncrement": "0.00000001",
    "quoteIncrement": "0.000001",
    "priceIncrement": "0.1",
    "enableTrading": True,
}
PERPETUAL = {
    "symbol": "XBTUSDTM",
    "rootSymbol": "USDT",
    "type": "FFWCSX",
    "expireDate": None,
    "baseCurrency": "XBT",
    "quoteCurrency": "USDT",
    "settleCurrency": "USDT",
    "multiplier": 0.001,
    "lotSize": 1,
    "tickSize": 0.1,
    "isInverse": False,
    "status": "Open",
    "makerFeeRate": 0.0002,
    "takerFeeRate": 0.0006,
    "maxLeverage": 100,
    "maxOrderQty": 1,
}


class Kucoin(FakeVenue):
    name, linear, max_page = "kucoin", "BTC/USDT:USDT", 1500
    unknown_market = (400, {"code": "400100", "msg": "symbol not exists"})

    def answer(self, path: str, query: dict[str, Any]) -> Any:
        if path.endswith("/timestamp"):
            return {"code": "200000", "msg": "success", "data": self.now}
        if path.endswith("/symbols"):
            return self._wrap([] if self.is_gone else [SPOT])
        if path.endswith("/allTickers"):
            return self._wrap({"time": self.now, "ticker": []})
        if path.endswith("/contracts/active"):
            return self._wrap([] if self.is_gone else [PERPETUAL])
        if path.endswith("/market/candles"):
            start, end = int(query["startAt"]) * 1000, int(query["endAt"]) * 1000
            found = self.bars(start, end - 1, 1500, keep="newest", interval=query["type"])
            bars = self.rows(found, newest_first=True)
            return self._wrap(
                [
                    [
                        *(str(bar.t // 1000), text(bar.o), text(bar.c), text(bar.h)),
                        *(text(bar.l), text(bar.v), text(bar.quote)),
                    ]
                    for bar in bars
                ]
            )
        if path.endswith("/kline/query"):
            start, end = int(query["from"]), int(query["to"])
            bars = self.rows(self.bars(start, end, 200, interval=query["granularity"]))
            return self._wrap(
                [
                    [
                        *(bar.t, float(bar.o), float(bar.h), float(bar.l), float(bar.c)),
                        *(int(bar.v * 1000), float(bar.quote)),
                    ]
                    for bar in bars
                ]
            )
        return None

    def _wrap(self, data: Any) -> Any:
        return {"code": "200000", "data": data}

"""Bitget: the end exclusive, 1000 recent bars, 200 of older ones."""

from __future__ import annotations

from typing import Any

from marketdata_tests.fake_venues.frame import FakeVenue, text, width_of

SPOT = {
    "symbol": "BTCUSDT",
    "baseCoin": "BTC",
    "quoteCoin": "USDT",
    "status": "online",
    "minTradeAmount": "0",
    "maxTradeAmount": "10000",
    "takerFeeRate": "0.002",
    "makerFeeRate": "0.002",
    "pricePrecision": "2",
    "quantityPrecision": "6",
    "quotePrecision": "8",
    "minTradeUSDT": "1",
}
PERPETUAL = {
    "symbol": "BTCUSDT",
    "baseCoin": "BTC",
    "quoteCoin": "USDT",
    "symbolType": "perpetual",
    "supportMarginCoins": ["USDT"],
    "symbolStatus": "normal",
    "makerFeeRate": "0.0002",
    "takerFeeRate": "0.0006",
    "minTradeNum": "0.001",
    "priceEndStep": "1",
    "volumePlace": "3",
    "pricePlace": "1",
    "sizeMultiplier": "0.001",
    "minTradeUSDT": "5",
    "offTime": "-1",
    "limitOpenTime": "-1",
    "deliveryTime": "",
    "launchTime": "",
    "minLever": "1",
    "maxLever": "125",
    "fundInterval": "8",
}


class Bitget(FakeVenue):
    name, linear, max_page = "bitget", "BTC/USDT:USDT", 1000
    unknown_market = (400, {"code": "40034", "msg": "Parameter BTCUSDT does not exist"})

    def answer(self, path: str, query: dict[str, Any]) -> Any:
        if path.endswith("/public/time"):
            return self._wrap({"serverTime": str(self.now)})
        if path.endswith("/spot/public/symbols"):
            return self._wrap([] if self.is_gone else [SPOT])
        if path.endswith("/margin/currencies"):
            return self._wrap([])
        if path.endswith("/mix/market/contracts"):
            is_usdt = query["productType"] == "USDT-FUTURES" and not self.is_gone
            return self._wrap([PERPETUAL] if is_usdt else [])
        if path.endswith("candles"):
            is_old, is_spot = path.endswith("history-candles"), "/spot/" in path
            limit = min(int(query.get("limit", 100)), 200 if is_old else 1000)
            end, interval = int(query["endTime"]), query["granularity"]
            start = end - limit * width_of(interval) if is_old else int(query["startTime"])
            bars = self.bars(start, end - 1, limit, keep="newest", interval=interval)
            return self._wrap(
                [
                    [
                        *(str(bar.t), text(bar.o), text(bar.h), text(bar.l), text(bar.c)),
                        *([text(bar.v)] + [text(bar.quote)] * (2 if is_spot else 1)),
                    ]
                    for bar in self.rows(bars)
                ]
            )
        return None

    def _wrap(self, data: Any) -> Any:
        return {"code": "00000", "msg": "success", "requestTime": self.now, "data": data}

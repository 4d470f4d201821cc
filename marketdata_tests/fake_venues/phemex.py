"""Phemex: the newest bars of spot, linear contracts by bounds; only some limits are accepted."""

from __future__ import annotations

from typing import Any

from marketdata_tests.fake_venues.frame import FakeVenue, Refusal, text

LIMITS = (5, 10, 50, 100, 500, 1000)
SPOT = {
    "symbol": "sBTCUSDT",
    "type": "Spot",
    "baseCurrency": "BTC",
    "quoteCurrency": "USDT",
    "priceScale": 8,
    "ratioScale": 8,
    "baseTickSize": "0.000001 BTC",
    "quoteTickSize": "0.01 USDT",
    "status": "Listed",
    "listTime": 0,
}
PERPETUAL = {
    "symbol": "BTCUSDT",
    "type": "PerpetualV2",
    "contractUnderlyingAssets": "BTC",
    "settleCurrency": "USDT",
    "quoteCurrency": "USDT",
    "contractSize": "1.0",
    "tickSize": "0.1",
    "qtyStepSize": "0.001",
    "priceScale": 0,
    "status": "Listed",
}
CURRENCIES = [{"currency": name, "valueScale": 8} for name in ("BTC", "USDT")]


class Phemex(FakeVenue):
    name, linear, max_page = "phemex", "BTC/USDT:USDT", 1000
    has_start = False
    unknown_market = (400, {"code": 30000, "msg": "Please double check input arguments"})

    def answer(self, path: str, query: dict[str, Any]) -> Any:
        if path.endswith("/public/products"):
            if path.endswith("/v1/exchange/public/products"):
                return self._wrap([])
            lists = {
                "products": [] if self.is_gone else [SPOT],
                "perpProductsV2": [] if self.is_gone else [PERPETUAL],
            }
            return self._wrap({"currencies": CURRENCIES, **lists})
        if not path.endswith(("/kline", "/kline/list")):
            return None
        limit, interval = int(query["limit"]), query["resolution"]
        if limit not in LIMITS:
            raise Refusal(*self.unknown_market)
        if path.endswith("/kline"):
            bars = self.bars(self.listed, self.now, limit, keep="newest", interval=interval)
            scale = 10**8
        else:
            first, last = int(query["from"]) * 1000, int(query["to"]) * 1000
            bars, scale = self.bars(first, last - 1, limit, interval=interval), 1
        rows = [
            [
                *(bar.t // 1000, bar.width // 1000, text(bar.o * scale)),
                *(text(value * scale) for value in (bar.o, bar.h, bar.l, bar.c, bar.v, bar.quote)),
            ]
            for bar in self.rows(bars)
        ]
        return self._wrap({"total": -1, "rows": rows})

    def _wrap(self, data: Any) -> Any:
        return {"code": 0, "msg": "OK", "data": data}

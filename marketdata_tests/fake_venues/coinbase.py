"""Coinbase Advanced and Coinbase Exchange: newest first, 300 bars, both bounds inclusive."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from marketdata_tests.fake_venues.frame import FakeVenue, text

ADVANCED = {
    "product_id": "BTC-USD",
    "product_type": "SPOT",
    "status": "online",
    "base_currency_id": "BTC",
    "quote_currency_id": "USD",
    "base_name": "Bitcoin",
    "base_increment": "0.00000001",
    "quote_increment": "0.01",
    "quote_min_size": "1",
    "quote_max_size": "50000000",
    "base_min_size": "0.0001",
    "base_max_size": "2600",
    "trading_disabled": False,
    "is_disabled": False,
    "view_only": False,
    "price": "1",
}
EXCHANGE = {
    "id": "BTC-USD",
    "base_currency": "BTC",
    "quote_currency": "USD",
    "status": "online",
    "quote_increment": "0.01",
    "base_increment": "0.00000001",
    "min_market_funds": "1",
    "trading_disabled": False,
}


class Coinbase(FakeVenue):
    name, spot, max_page = "coinbase", "BTC/USD", 300
    unknown_market = (404, {"error": "NOT_FOUND", "error_details": "unknown product"})

    def answer(self, path: str, query: dict[str, Any]) -> Any:
        if path.endswith("/time"):
            moment = datetime.fromtimestamp(self.now // 1000).astimezone().isoformat()
            return {"data": {"iso": moment, "epoch": self.now // 1000}}
        if path.endswith("/products"):
            return {"products": [] if self.is_gone else [ADVANCED], "num_products": 1}
        if path.endswith("/candles"):
            start, end = int(query["start"]) * 1000, int(query["end"]) * 1000
            bars = self.bars(start, end, 300, interval=query["granularity"])
            return {
                "candles": [
                    {
                        "start": str(bar.t // 1000),
                        "low": text(bar.l),
                        "high": text(bar.h),
                        "open": text(bar.o),
                        "close": text(bar.c),
                        "volume": text(bar.v),
                    }
                    for bar in self.rows(bars, newest_first=True)
                ]
            }
        return None


class Coinbaseexchange(FakeVenue):
    name, spot, max_page = "coinbaseexchange", "BTC/USD", 300
    unknown_market = (404, {"message": "NotFound"})

    def answer(self, path: str, query: dict[str, Any]) -> Any:
        if path.endswith("/time"):
            return {"iso": "", "epoch": self.now / 1000}
        if path.endswith("/products"):
            return [] if self.is_gone else [EXCHANGE]
        if path.endswith("/candles"):
            start, end = (int(_moment(query[key]) * 1000) for key in ("start", "end"))
            bars = self.bars(start, end, 300, interval=query["granularity"])
            return [
                [
                    *(bar.t // 1000, float(bar.l), float(bar.h), float(bar.o), float(bar.c)),
                    float(bar.v),
                ]
                for bar in self.rows(bars, newest_first=True)
            ]
        return None


def _moment(iso: str) -> float:
    return datetime.fromisoformat(iso.replace("Z", "+00:00")).timestamp()

"""Kraken Futures: seconds, both bounds inclusive, 2000 bars; it has no spot and tells no time."""

from __future__ import annotations

from typing import Any

from marketdata_tests.fake_venues.frame import FakeVenue, text

PERPETUAL = {
    "symbol": "PF_XBTUSD",
    "type": "flexible_futures",
    "tradeable": True,
    "contractSize": 1,
    "tickSize": 1,
    "contractValueTradePrecision": 4,
    "openingDate": "2019-01-01T00:00:00.000Z",
}


class Krakenfutures(FakeVenue):
    name, spot, linear, max_page = "krakenfutures", None, "BTC/USD:USD", 2000
    unknown_market = (404, {"result": "error", "error": "unknown market"})

    def answer(self, path: str, query: dict[str, Any]) -> Any:
        if path.endswith("/instruments"):
            return {"result": "success", "instruments": [] if self.is_gone else [PERPETUAL]}
        if "/charts/v1/trade/" in path:
            first, last = int(query["from"]) * 1000, int(query["to"]) * 1000
            bars = self.bars(first, last, 2000, interval=path.rpartition("/")[2])
            return {
                "candles": [
                    {
                        "time": bar.t,
                        "open": text(bar.o),
                        "high": text(bar.h),
                        "low": text(bar.l),
                        "close": text(bar.c),
                        "volume": text(bar.v),
                    }
                    for bar in self.rows(bars)
                ],
                "more_candles": False,
            }
        return None

"""Bitfinex: both bounds inclusive, oldest first, 10000 bars; it tells no time."""

from __future__ import annotations

from typing import Any

from marketdata_tests.fake_venues.frame import FakeVenue

SIZES = [None, None, None, "0.00004", "2000.0", None, None, None, 0.01, 0.005]


class Bitfinex(FakeVenue):
    name, spot, linear, max_page = "bitfinex", "BTC/USDT", "BTC/USDT:USDT", 10_000
    unknown_market = (500, ["error", 10020, "symbol: invalid"])

    def answer(self, path: str, query: dict[str, Any]) -> Any:
        if "/conf/" in path:
            if self.is_gone:
                return [[], [], [], []]
            return [[["BTCUST", SIZES]], [["BTCF0:USTF0", SIZES]], [], ["BTCUST"]]
        if "/candles/trade:" in path:
            assert query["sort"] == "1"
            first, last = int(query["start"]), int(query.get("end", self.now))
            interval = path.split("/trade:")[1].split(":")[0]
            bars = self.bars(first, last, int(query["limit"]), interval=interval)
            return [
                [bar.t, float(bar.o), float(bar.c), float(bar.h), float(bar.l), float(bar.v)]
                for bar in self.rows(bars)
            ]
        return None

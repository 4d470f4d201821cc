"""Bithumb: the newest 200 bars, whatever is requested; it tells no time."""

from __future__ import annotations

from typing import Any

from marketdata_tests.fake_venues.frame import FakeVenue
from marketdata_tests.fake_venues.upbit import candle


class Bithumb(FakeVenue):
    name, spot, max_page = "bithumb", "BTC/KRW", 200
    has_start = False
    unknown_market = (404, {"error": {"name": 404, "message": "Code not found"}})

    def answer(self, path: str, query: dict[str, Any]) -> Any:
        if path.endswith("/market/all"):
            return [{"market": "KRW-ETH" if self.is_gone else "KRW-BTC"}]
        if "/candles/" in path:
            interval = path.split("/candles/")[1]
            interval = "4hour" if interval == "minutes/240" else "1m"
            count = int(query["count"])
            bars = self.bars(self.listed, self.now, count, keep="newest", interval=interval)
            return [candle(bar) for bar in self.rows(bars, newest_first=True)]
        return None

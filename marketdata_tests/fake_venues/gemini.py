"""Gemini: the newest day of bars, whatever is requested; it tells no time."""

from __future__ import annotations

from typing import Any

from marketdata_tests.fake_venues.frame import DAY, FakeVenue, width_of


class Gemini(FakeVenue):
    name, spot, max_page = "gemini", "BTC/USD", 1441
    has_start = False
    unknown_market = (400, {"result": "error", "reason": "InvalidSymbol", "message": "unknown"})

    def answer(self, path: str, query: dict[str, Any]) -> Any:
        if path.endswith("/v1/symbols"):
            return ["ethusd"] if self.is_gone else ["btcusd"]
        if "/v2/candles/" in path:
            interval = path.rpartition("/")[2]
            first = self.now - DAY * (1 if width_of(interval) < DAY else 365)
            bars = self.bars(first, self.now, 1441, keep="newest", interval=interval)
            return [
                [bar.t, float(bar.o), float(bar.h), float(bar.l), float(bar.c), float(bar.v)]
                for bar in self.rows(bars, newest_first=True)
            ]
        return None

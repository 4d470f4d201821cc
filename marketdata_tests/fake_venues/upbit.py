"""Upbit: the newest bars before `to`, which is exclusive, 200 of them; it tells no time."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from marketdata_tests.fake_venues.frame import FakeBar, FakeVenue


class Upbit(FakeVenue):
    name, spot, max_page = "upbit", "BTC/KRW", 200
    has_start = False
    unknown_market = (404, {"error": {"name": 404, "message": "Code not found"}})

    def answer(self, path: str, query: dict[str, Any]) -> Any:
        if path.endswith("/market/all"):
            return [] if self.is_gone else [{"market": "KRW-BTC"}]
        if "/candles/" in path:
            end = int(datetime.fromisoformat(query["to"]).timestamp() * 1000)
            interval = path.split("/candles/")[1].split("/")[0]
            count = int(query["count"])
            bars = self.bars(self.listed, end - 1, count, keep="newest", interval=interval)
            return [candle(bar) for bar in self.rows(bars, newest_first=True)]
        return None


def candle(bar: FakeBar) -> dict[str, Any]:
    """Return a bar as Upbit, and Bithumb after it, writes it."""
    return {
        "market": "KRW-BTC",
        "candle_date_time_utc": f"{datetime.fromtimestamp(bar.t / 1000, UTC):%FT%T}",
        "opening_price": float(bar.o),
        "high_price": float(bar.h),
        "low_price": float(bar.l),
        "trade_price": float(bar.c),
        "candle_acc_trade_price": float(bar.quote),
        "candle_acc_trade_volume": float(bar.v),
        "timestamp": bar.t,
        "unit": 1,
    }

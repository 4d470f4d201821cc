"""Crypto.com: the start exclusive, 300 bars; it tells no time."""

from __future__ import annotations

from typing import Any

from marketdata_tests.fake_venues.frame import FakeVenue, text

SPOT = {
    "symbol": "BTC_USDT",
    "inst_type": "CCY_PAIR",
    "base_ccy": "BTC",
    "quote_ccy": "USDT",
    "price_tick_size": "0.01",
    "qty_tick_size": "0.00001",
    "tradable": True,
    "expiry_timestamp_ms": 0,
}
PERPETUAL = {
    **SPOT,
    "symbol": "BTCUSD-PERP",
    "inst_type": "PERPETUAL_SWAP",
    "quote_ccy": "USD",
    "contract_size": "1",
}


class Cryptocom(FakeVenue):
    name, linear, max_page = "cryptocom", "BTC/USD:USD", 300
    unknown_market = (400, {"code": 40003, "message": "Invalid instrument_name"})

    def answer(self, path: str, query: dict[str, Any]) -> Any:
        if path.endswith("/get-instruments"):
            return self._wrap([] if self.is_gone else [SPOT, PERPETUAL])
        if path.endswith("/get-candlestick"):
            start, end, count = (int(query[key]) for key in ("start_ts", "end_ts", "count"))
            bars = self.bars(start + 1, end - 1, count, interval=query["timeframe"])
            return self._wrap(
                [
                    {
                        "t": bar.t,
                        "o": text(bar.o),
                        "h": text(bar.h),
                        "l": text(bar.l),
                        "c": text(bar.c),
                        "v": text(bar.v),
                    }
                    for bar in self.rows(bars)
                ]
            )
        return None

    def _wrap(self, data: Any) -> Any:
        return {"code": 0, "result": {"data": data}}

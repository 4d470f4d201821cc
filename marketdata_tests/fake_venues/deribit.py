"""Deribit: both bounds inclusive, one array a column."""

from __future__ import annotations

from typing import Any

from marketdata_tests.fake_venues.frame import FakeVenue

COMMON = {
    "base_currency": "BTC",
    "counter_currency": "USDC",
    "quote_currency": "USDC",
    "is_active": True,
    "contract_size": 0.0001,
    "min_trade_amount": 0.0001,
    "tick_size": 0.5,
    "creation_timestamp": 1_546_300_800_000,
}
SPOT = {**COMMON, "kind": "spot", "instrument_name": "BTC_USDC"}
PERPETUAL = {
    **COMMON,
    "kind": "future",
    "settlement_period": "perpetual",
    "settlement_currency": "USDC",
    "instrument_name": "BTC_USDC-PERPETUAL",
    "expiration_timestamp": 32503708800000,
}


class Deribit(FakeVenue):
    name, spot, linear, max_page = "deribit", "BTC/USDC", "BTC/USDC:USDC", 5000
    unknown_market = (400, {"error": {"code": -32602, "message": "Invalid params"}})

    def answer(self, path: str, query: dict[str, Any]) -> Any:
        if path.endswith("/get_time"):
            return self._wrap(self.now)
        if path.endswith("/get_instruments"):
            return self._wrap([] if self.is_gone else [SPOT, PERPETUAL])
        if path.endswith("/get_tradingview_chart_data"):
            first, last = int(query["start_timestamp"]), int(query["end_timestamp"])
            bars = self.rows(self.bars(first, last, 5000, interval=query["resolution"]))
            return self._wrap(
                {
                    "ticks": [bar.t for bar in bars],
                    "open": [float(bar.o) for bar in bars],
                    "high": [float(bar.h) for bar in bars],
                    "low": [float(bar.l) for bar in bars],
                    "close": [float(bar.c) for bar in bars],
                    "volume": [float(bar.v) for bar in bars],
                    "cost": [float(bar.quote) for bar in bars],
                    "status": "ok" if bars else "no_data",
                }
            )
        return None

    def _wrap(self, result: Any) -> Any:
        return {"jsonrpc": "2.0", "result": result, "usIn": self.now * 1000}

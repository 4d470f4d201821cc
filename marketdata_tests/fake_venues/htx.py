"""HTX: spot newest first, contracts that ignore the bounds of a request with a size."""

from __future__ import annotations

from typing import Any

from marketdata_tests.fake_venues.frame import FakeBar, FakeVenue

SPOT = {
    "base-currency": "btc",
    "quote-currency": "usdt",
    "price-precision": 2,
    "amount-precision": 6,
    "value-precision": 8,
    "state": "online",
}
LINEAR = {
    "symbol": "BTC",
    "contract_code": "BTC-USDT",
    "contract_size": 0.001,
    "price_tick": 0.1,
    "contract_status": 1,
    "business_type": "swap",
    "pair": "BTC-USDT",
    "create_date": "20190101",
}
OTHER = {"base-currency": "eth", "symbol": "ETH", "contract_code": "ETH-USDT", "pair": "ETH-USDT"}


class Htx(FakeVenue):
    name, linear, max_page = "htx", "BTC/USDT:USDT", 2000
    unknown_market = (
        200,
        {"status": "error", "err-code": "invalid-parameter", "err-msg": "invalid symbol"},
    )

    def answer(self, path: str, query: dict[str, Any]) -> Any:
        if path.endswith("/timestamp"):
            return self._wrap(self.now)
        if path.endswith("/symbols"):
            return self._wrap([SPOT | OTHER if self.is_gone else SPOT])
        if path.endswith("/swap_contract_info"):
            return self._wrap([LINEAR | OTHER if self.is_gone else LINEAR])
        if path.endswith("/market/history/candles"):
            size, keep = min(int(query["size"]), 1000), "newest"
        elif path.endswith("/linear-swap-ex/market/history/kline"):
            assert "size" not in query, "the bounds would be ignored"
            size, keep = 2000, "oldest"
        else:
            return None
        first, last = int(query["from"]) * 1000, int(query["to"]) * 1000
        bars = self.bars(first, last, size, keep=keep, interval=query["period"])
        is_spot = keep == "newest"
        return self._wrap(
            [self._row(bar, is_spot) for bar in self.rows(bars, newest_first=is_spot)]
        )

    def _row(self, bar: FakeBar, is_spot: bool) -> dict[str, Any]:
        prices = {"open": bar.o, "close": bar.c, "high": bar.h, "low": bar.l, "amount": bar.v}
        row = {name: float(value) for name, value in prices.items()}
        row |= {"id": bar.t // 1000, "count": bar.trades}
        if is_spot:
            return row | {"vol": float(bar.quote)}
        return row | {"vol": float(bar.v * 1000), "trade_turnover": float(bar.quote)}

    def _wrap(self, data: Any) -> Any:
        return {"status": "ok", "data": data, "ts": self.now}

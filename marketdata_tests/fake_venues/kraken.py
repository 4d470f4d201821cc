"""Kraken: the newest 720 bars, whatever `since` says, and the open one last."""

from __future__ import annotations

from typing import Any

from marketdata_tests.fake_venues.frame import FakeVenue, text, width_of

PAIR = {
    "altname": "XBTUSDT",
    "wsname": "XBT/USDT",
    "base": "XXBT",
    "quote": "USDT",
    "aclass_base": "currency",
    "aclass_quote": "currency",
    "lot": "unit",
    "cost_decimals": 5,
    "pair_decimals": 1,
    "lot_decimals": 8,
    "lot_multiplier": 1,
    "status": "online",
    "leverage_buy": [],
    "leverage_sell": [],
    "fees": [],
    "fees_maker": [],
    "ordermin": "0.0001",
    "costmin": "0.5",
    "tick_size": "0.1",
}


class Kraken(FakeVenue):
    name, max_page = "kraken", 720
    has_start = False
    unknown_market = (200, {"error": ["EQuery:Unknown asset pair"]})

    def answer(self, path: str, query: dict[str, Any]) -> Any:
        if path.endswith("/Time"):
            return self._wrap({"unixtime": self.now // 1000})
        if path.endswith("/AssetPairs"):
            return self._wrap({} if self.is_gone else {"XBTUSDT": PAIR})
        if path.endswith("/Assets"):
            names = {"XXBT": "XBT", "USDT": "USDT"}
            return self._wrap(
                {k: {"aclass": "currency", "altname": v, "decimals": 8} for k, v in names.items()}
            )
        if path.endswith("/OHLC"):
            interval = query.get("interval", "1")
            first = self.now - 720 * width_of(interval)
            bars = self.bars(first, self.now, 720, keep="newest", interval=interval)
            rows = [
                [
                    *(bar.t // 1000, text(bar.o), text(bar.h), text(bar.l), text(bar.c)),
                    *("0", text(bar.v), bar.trades),
                ]
                for bar in self.rows(bars)
                if bar.t > int(query.get("since", 0)) * 1000
            ]
            return self._wrap({"XBTUSDT": rows, "last": self.now // 1000})
        return None

    def _wrap(self, result: Any) -> Any:
        return {"error": [], "result": result}

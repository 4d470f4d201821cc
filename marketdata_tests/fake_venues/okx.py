"""OKX: `before` and `after` are exclusive, newest first, 300 bars."""

from __future__ import annotations

from typing import Any

from marketdata_tests.fake_venues.frame import FakeVenue, text

SPOT = {
    "instId": "BTC-USDT",
    "instType": "SPOT",
    "baseCcy": "BTC",
    "quoteCcy": "USDT",
    "settleCcy": "",
    "state": "live",
    "tickSz": "0.1",
    "lotSz": "0.00000001",
    "minSz": "0.001",
    "ctVal": "",
    "ctType": "",
    "ctValCcy": "",
    "expTime": "",
    "listTime": "",
    "uly": "",
    "optType": "",
    "stk": "",
    "lever": "10",
    "alias": "",
    "category": "1",
    "instFamily": "",
}
SWAP = {
    **SPOT,
    "instId": "BTC-USDT-SWAP",
    "instType": "SWAP",
    "baseCcy": "",
    "quoteCcy": "",
    "settleCcy": "USDT",
    "ctVal": "0.01",
    "ctMult": "1",
    "ctType": "linear",
    "ctValCcy": "BTC",
    "uly": "BTC-USDT",
    "instFamily": "BTC-USDT",
}


class Okx(FakeVenue):
    name, linear, max_page = "okx", "BTC/USDT:USDT", 300
    unknown_market = (200, {"code": "51001", "data": [], "msg": "Instrument ID doesn't exist."})

    def answer(self, path: str, query: dict[str, Any]) -> Any:
        if path.endswith("/public/time"):
            return {"code": "0", "data": [{"ts": str(self.now)}], "msg": ""}
        if path.endswith("/public/instruments"):
            listed = {"SPOT": [SPOT], "SWAP": [SWAP]}.get(query["instType"], [])
            return {"code": "0", "data": [] if self.is_gone else listed, "msg": ""}
        if path.endswith("candles"):
            return {"code": "0", "msg": "", "data": self._candles(query)}
        return None

    def _candles(self, query: dict[str, str]) -> list[list[str]]:
        after, before = int(query.get("after", self.now + 1)), int(query.get("before", 0))
        limit = int(query.get("limit", 100))
        bars = self.bars(before + 1, after - 1, limit, keep="newest", interval=query["bar"])
        is_swap = query["instId"].endswith("SWAP")
        return [
            [
                *(str(bar.t), text(bar.o), text(bar.h), text(bar.l), text(bar.c)),
                *(text(bar.v * 100 if is_swap else bar.v), text(bar.v if is_swap else bar.quote)),
                *(text(bar.quote), str(int(bar.closed))),
            ]
            for bar in self.rows(bars, newest_first=True)
        ]

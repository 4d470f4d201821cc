"""Hyperliquid: one POST path, both bounds inclusive, the newest 5000 bars only."""

from __future__ import annotations

from typing import Any

from marketdata_tests.fake_venues.frame import FakeVenue, text, width_of

TOKENS = [
    {"name": "USDC", "szDecimals": 8, "weiDecimals": 8, "index": 0, "tokenId": "0x0"},
    {"name": "PURR", "szDecimals": 0, "weiDecimals": 5, "index": 1, "tokenId": "0x1"},
]
PRICES = {"dayNtlVlm": "1", "markPx": "20000.0", "midPx": "20000.0", "prevDayPx": "20000.0"}


class Hyperliquid(FakeVenue):
    name, spot, linear, max_page = "hyperliquid", "PURR/USDC", "BTC/USDC:USDC", 5000
    unknown_market = (500, None)

    def answer(self, path: str, query: dict[str, Any]) -> Any:
        match query.get("type"):
            case "exchangeStatus":
                return {"specialStatuses": None, "time": self.now}
            case "spotMeta" | "spotMetaAndAssetCtxs" as kind:
                pair = {"name": "PURR/USDC", "tokens": [1, 0], "index": 0, "isCanonical": True}
                meta = {"tokens": TOKENS, "universe": [] if self.is_gone else [pair]}
                return meta if kind == "spotMeta" else [meta, [{**PRICES, "coin": "PURR/USDC"}]]
            case "metaAndAssetCtxs":
                market = {"name": "BTC", "szDecimals": 5, "maxLeverage": 50}
                universe = [] if self.is_gone else [market]
                return [{"universe": universe, "collateralToken": 0}, [PRICES]]
            case "perpDexs":
                return [None]
            case "candleSnapshot":
                wanted = query["req"]
                interval, last = wanted["interval"], int(wanted["endTime"])
                first = max(int(wanted["startTime"]), self.now - 5000 * width_of(interval))
                bars = self.rows(self.bars(first, last, 5000, interval=interval))
                return [
                    {
                        "t": bar.t,
                        "T": bar.t + bar.width - 1,
                        "s": wanted["coin"],
                        "i": "1m",
                        "o": text(bar.o),
                        "h": text(bar.h),
                        "l": text(bar.l),
                        "c": text(bar.c),
                        "v": text(bar.v),
                        "n": bar.trades,
                    }
                    for bar in bars
                ]
        return None

"""Gate: seconds, both bounds inclusive, refuses a request for too many or too old bars."""

from __future__ import annotations

from typing import Any

from marketdata_tests.fake_venues.frame import FakeVenue, Refusal, text, width_of

INVALID = {"label": "INVALID_PARAM_VALUE"}
PAIR = {
    "id": "BTC_USDT",
    "base": "BTC",
    "quote": "USDT",
    "fee": "0.2",
    "type": "normal",
    "min_base_amount": "0.00001",
    "min_quote_amount": "3",
    "amount_precision": 6,
    "precision": 1,
    "trade_status": "tradable",
    "sell_start": 0,
    "buy_start": 0,
}
CONTRACT = {
    "name": "BTC_USDT",
    "type": "direct",
    "quanto_multiplier": "0.0001",
    "in_delisting": False,
    "leverage_min": "1",
    "leverage_max": "100",
    "order_price_round": "0.1",
    "order_size_min": 1,
    "order_size_max": 1000000,
    "create_time": 0,
    "status": "trading",
    "maker_fee_rate": "-0.0001",
    "taker_fee_rate": "0.00075",
    "mark_type": "index",
}


class Gate(FakeVenue):
    name, linear, max_page = "gate", "BTC/USDT:USDT", 1000
    too_old = (400, {**INVALID, "message": "Candlestick too long ago. Maximum 10000 points ago"})
    unknown_market = (400, {"label": "INVALID_CURRENCY_PAIR", "message": "Invalid currency pair"})

    def answer(self, path: str, query: dict[str, Any]) -> Any:
        if path.endswith("/spot/time"):
            return {"server_time": self.now}
        if path.endswith("/spot/currency_pairs"):
            return [] if self.is_gone else [PAIR]
        if path.endswith("/margin/currency_pairs"):
            return []
        if path.endswith("/contracts"):
            return [CONTRACT] if "/usdt/" in path and not self.is_gone else []
        if path.endswith("/candlesticks"):
            return self._candles(query, is_spot="/spot/" in path)
        return None

    def _candles(self, query: dict[str, str], *, is_spot: bool) -> list[Any]:
        first, last = int(query["from"]) * 1000, int(query["to"]) * 1000
        page = 1000 if is_spot else 2000
        if (last - first) // width_of(query["interval"]) + 1 > page:
            raise Refusal(400, {**INVALID, "message": "Too many data points requested"})
        bars = self.rows(self.bars(first, last, page, interval=query["interval"]))
        if is_spot:
            return [
                [
                    *(str(bar.t // 1000), text(bar.quote), text(bar.c), text(bar.h), text(bar.l)),
                    *(text(bar.o), text(bar.v), str(bar.closed).lower()),
                ]
                for bar in bars
            ]
        return [
            {
                "t": bar.t // 1000,
                "v": int(bar.v * 10000),
                "sum": text(bar.quote),
                "o": text(bar.o),
                "h": text(bar.h),
                "l": text(bar.l),
                "c": text(bar.c),
            }
            for bar in bars
        ]

"""HTX: spot and linear contracts; its days open at 16:00 UTC."""

from __future__ import annotations

from collections.abc import Collection

from marketdata_assets.venues.facts import BarsEndpoint, MarketType, VenueFacts


def _list_types(types: Collection[MarketType]) -> dict[str, dict[str, bool]]:
    """ccxt adds to its own `types`, so what is not wanted has to be written."""
    kinds = (MarketType.SPOT, MarketType.LINEAR, MarketType.INVERSE)
    return {"types": {kind.value: kind in types for kind in kinds}}


FACTS = VenueFacts(
    venue="htx",
    endpoints={
        # huobiapi.github.io/docs/spot, Candles (2026-11): 1000 bars (ccxt 4.5.90, `size`); `vol` is
        # in quote and `amount` in base currency
        MarketType.SPOT: BarsEndpoint(
            page_size=1000,
            requests_per_minute=600,
            takes_until=True,
            row_keys={"quote_volume": "vol", "trades": "count"},
        ),
        # huobiapi.github.io/docs/usdt_swap, KLine (2026-11): 2000 bars; with `size`, the bounds are
        # ignored. `amount` is in base currency, `vol` counts contracts
        MarketType.LINEAR: BarsEndpoint(
            page_size=2000,
            requests_per_minute=480,
            takes_until=True,
            limits=(),
            row_keys={"quote_volume": "trade_turnover", "trades": "count"},
        ),
    },
    markets_option=_list_types,
    # github.com/ccxt/ccxt/issues/18014 and 17783
    odd_timeframes=dict.fromkeys(("1d", "1w", "1M"), "they open at 16:00 UTC"),
)

"""KuCoin: spot, and perpetuals whose volume counts lots."""

from __future__ import annotations

from typing import Any

from marketdata_assets.venues.facts import (
    BarsEndpoint,
    MarketType,
    VenueFacts,
    VolumeUnit,
    list_types,
)

# kucoin.com/docs-new, Get Klines (2026-11): 1500 bars; column 6 quote currency
_SPOT = BarsEndpoint(page_size=1500, requests_per_minute=600, row_keys={"quote_volume": 6})
# the same, futures: 200 bars (ccxt states 500); column 5 lots of `multiplier`, 6 turnover
LINEAR_ENDPOINT = BarsEndpoint(
    page_size=200,
    requests_per_minute=600,
    volume_unit=VolumeUnit.CONTRACTS,
    row_keys={"quote_volume": 6},
)
PERPETUAL = "FFWCSX"
"""KuCoin's name of the type of a perpetual."""


def name_perpetuals(answer: Any) -> Any:
    """Give each perpetual the moment by which ccxt tells it from a dated future.

    A paused perpetual has none, and ccxt then fails for the whole list.
    """
    for row in answer.get("data") or ():
        if row.get("type") == PERPETUAL and row.get("nextFundingRateTime") is None:
            row["nextFundingRateTime"] = 0
    return answer


ODD_TIMEFRAMES = {"1w": "its weeks open on Thursday"}  # github.com/ccxt/ccxt/issues/25046

REPAIRS = {"futuresPublicGetContractsActive": name_perpetuals}

FACTS = VenueFacts(
    venue="kucoin",
    endpoints={MarketType.SPOT: _SPOT, MarketType.LINEAR: LINEAR_ENDPOINT},
    markets_option=list_types(spot=["spot"], linear=["swap"], inverse=["swap"]),
    repairs=REPAIRS,
    odd_timeframes=ODD_TIMEFRAMES,
)

"""KuCoin's perpetuals under ccxt's own id for them."""

from __future__ import annotations

from marketdata_assets.venues.facts import MarketType, VenueFacts
from marketdata_assets.venues.kucoin import LINEAR_ENDPOINT, ODD_TIMEFRAMES, REPAIRS

FACTS = VenueFacts(
    venue="kucoinfutures",
    endpoints={MarketType.LINEAR: LINEAR_ENDPOINT},
    repairs=REPAIRS,
    odd_timeframes=ODD_TIMEFRAMES,
)

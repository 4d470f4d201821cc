"""Binance's USD-margined futures under ccxt's own id for them."""

from __future__ import annotations

from marketdata_assets.venues.binance import ARCHIVE, LINEAR_ENDPOINT
from marketdata_assets.venues.facts import MarketType, VenueFacts

FACTS = VenueFacts(
    venue="binanceusdm",
    endpoints={MarketType.LINEAR: LINEAR_ENDPOINT},
    archive=ARCHIVE,
)

"""Gate: spot, and perpetuals whose volume counts contracts."""

from __future__ import annotations

from marketdata_assets.venues.facts import (
    BarsEndpoint,
    MarketType,
    VenueFacts,
    VolumeUnit,
    list_types,
)

# gate.com/docs/developers/apiv4, Market K-line chart (2026-11): at most 1000 bars, none more than
# 10,000 bars old. Columns: 1 quote currency, 6 base currency, 7 whether it is closed
_SPOT = BarsEndpoint(
    page_size=1000,
    requests_per_minute=600,
    newest_bars_only=10_000,
    row_keys={"quote_volume": 1, "closed": 7},
)
# the same, Futures market K-line chart: 2000 bars; `v` contracts, `sum` quote currency
_LINEAR = BarsEndpoint(
    page_size=1999,
    requests_per_minute=600,
    volume_unit=VolumeUnit.CONTRACTS,
    row_keys={"quote_volume": "sum"},
)

FACTS = VenueFacts(
    venue="gate",
    endpoints={MarketType.SPOT: _SPOT, MarketType.LINEAR: _LINEAR},
    markets_option=list_types(spot=["spot"], linear=["swap"], inverse=["swap"], option=["option"]),
)

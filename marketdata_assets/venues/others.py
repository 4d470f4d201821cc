"""Venues of which no more is known than how ccxt requests their bars of spot.

Measured on ccxt 4.5.90: `marketdata_tests/venues/test_every_venue.py` reads every request.
"""

from __future__ import annotations

from marketdata_assets.venues.facts import BarsEndpoint, MarketType, VenueFacts

_NO_START = BarsEndpoint(has_start=False)
_WITH_END = BarsEndpoint(takes_until=True)

OTHERS: dict[str, VenueFacts] = {
    name: VenueFacts(venue=name, endpoints={MarketType.SPOT: endpoint})
    for name, endpoint in (
        *((name, _NO_START) for name in ("bitrue", "bitteam", "bittrade", "p2b", "weex")),
        *((name, _WITH_END) for name in ("deepcoin", "extended", "zebpay")),
    )
}
"""By ccxt's id."""

"""Freshness: how far the newest stored bar of each market lies behind what could be stored."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import raw_table
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.settings.parts import FreshnessLimits
from marketdata_assets.settings.universe import Settings
from marketdata_assets.storage.lake import Lake


@dataclass(frozen=True, slots=True)
class MarketFreshness:
    """One market: when its newest stored bar ended, and how far that lies behind now.

    Behind the last wanted day instead, for a market that has one.
    """

    market: Market
    through: datetime | None
    lag: timedelta
    limits: FreshnessLimits

    @property
    def is_late(self) -> bool:
        """Whether this deserves a warning."""
        return self.through is None or self.lag > self.limits.warn

    @property
    def is_stale(self) -> bool:
        """Whether this is an error."""
        return self.through is None or self.lag > self.limits.error


def market_freshness(
    settings: Settings,
    ledger: Ledger,
    lake: Lake,
    *,
    timeframe: Timeframe,
    markets: Iterable[Market],
) -> list[MarketFreshness]:
    """Return the freshness of every market whose venue fetches the timeframe.

    It is judged by the newest bar in the lake and not by the newest run: a run may succeed over a
    feed that is dead.
    """
    newest, found = ledger.partitions.newest(raw_table(timeframe)), []
    for market in markets:
        if timeframe not in settings.venues[market.venue].fetched_timeframes:
            continue
        span, through = settings.span(market), None
        if market.key in newest:
            bar, month, size = newest[market.key]
            partition = Partition.parse(f"{market.key}|{month}")
            if lake.size(raw_table(timeframe), partition) == size:
                through = timeframe.shift(bar, 1)
        lag = max(timedelta(0), timeframe.floor(span.end) - (through or span.start))
        if market.expires and market.expires <= settings.now():
            lag = timedelta(0)  # it ended at some hour of its last day
        found.append(MarketFreshness(market, through, lag, settings.limits(timeframe)))
    return found

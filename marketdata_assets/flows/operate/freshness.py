"""Freshness by data: how far the newest stored bar of each market lies behind what could be there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from marketdata_assets.context import Toolbox
from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import raw_table
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.settings.universe import Limits


@dataclass(frozen=True, slots=True)
class Freshness:
    """One market: when its newest stored bar ended, and how far that lies behind now or its last
    wanted day.
    """

    market: Market
    through: datetime | None
    lag: timedelta
    limits: Limits

    @property
    def late(self) -> bool:
        """Whether this deserves a warning."""
        return self.through is None or self.lag > self.limits.warn

    @property
    def stale(self) -> bool:
        """Whether this is an error."""
        return self.through is None or self.lag > self.limits.error


def freshness(toolbox: Toolbox, timeframe: Timeframe, markets: Iterable[Market]) -> list[Freshness]:
    """Every market whose venue fetches this timeframe, by the newest bar on disk and not by the newest
    run.
    """
    newest = toolbox.ledger.newest(raw_table(timeframe))
    fetched = [m for m in markets if timeframe in toolbox.settings.venues[m.venue].fetched]
    return [_of(toolbox, timeframe, market, newest.get(market.key)) for market in fetched]


def _of(
    toolbox: Toolbox, timeframe: Timeframe, market: Market, newest: tuple[datetime, str, int] | None
) -> Freshness:
    span = toolbox.settings.span(market)
    through = None
    if newest is not None:
        bar, month, size = newest
        there = (
            toolbox.lake.size(raw_table(timeframe), Partition.parse(f"{market.key}|{month}"))
            == size
        )
        through = bar + timeframe.width if there else None
    lag = max(timedelta(0), timeframe.floor(span.end) - (through or span.start))
    return Freshness(market, through, lag, toolbox.settings.limits(timeframe))

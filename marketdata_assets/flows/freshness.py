"""Freshness by data: how far the newest stored bar of each market lies behind what could be there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from marketdata_assets.lake.tables import raw
from marketdata_assets.model.market import Market
from marketdata_assets.model.window import Timeframe
from marketdata_assets.toolbox import Toolbox

WARN_BARS, ERROR_BARS = 10, 60
"""How many bars late is a warning, and how many an error."""


@dataclass(frozen=True, slots=True)
class Freshness:
    """One market: when its newest stored bar ended, and how far that lies behind now or its last wanted day."""

    market: Market
    through: datetime | None
    lag: timedelta
    timeframe: Timeframe

    @property
    def late(self) -> bool:
        """Whether this deserves a warning."""
        return self.through is None or self.lag > WARN_BARS * self.timeframe.width

    @property
    def stale(self) -> bool:
        """Whether this is an error."""
        return self.through is None or self.lag > ERROR_BARS * self.timeframe.width


def freshness(toolbox: Toolbox, timeframe: Timeframe, markets: Iterable[Market]) -> list[Freshness]:
    """Every market whose venue fetches this timeframe, by the newest bar on disk and not by the newest run."""
    fetched = [m for m in markets if timeframe in toolbox.settings.venues[m.venue].fetched]
    return [_of(toolbox, timeframe, market) for market in fetched]


def _of(toolbox: Toolbox, timeframe: Timeframe, market: Market) -> Freshness:
    span = toolbox.settings.span(market)
    states = toolbox.ledger.states(raw(timeframe), market)
    newest = max((state.newest for state in states.values() if state.newest), default=None)
    through = newest + timeframe.width if newest else None
    end = timeframe.floor(span.end)
    return Freshness(market, through, max(timedelta(0), end - (through or span.start)), timeframe)

"""Refresh: which venues' open month may be brought to the last closed bar now. Sends no request."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from marketdata_assets.context import Toolbox
from marketdata_assets.flows.fetch.ingest import wanted_window
from marketdata_assets.flows.operate.backfill import GRACE
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import raw_table
from marketdata_assets.model.window import month_of
from marketdata_assets.settings.universe import Venue


@dataclass(frozen=True, slots=True)
class Refresh:
    """One venue: the corners of what a run is asked for, or why there is none."""

    venue: str
    first: Partition | None
    last: Partition | None
    says: str


def refreshes(toolbox: Toolbox, busy: Container[str]) -> list[Refresh]:
    """One for each venue of the universe. `busy` holds the keys of partitions that a run works on or
    waits for.

    In the first hour of a month the month before comes along, until it is complete.
    """
    return [_refresh(toolbox, venue, busy) for venue in toolbox.settings.venues.values()]


def _refresh(toolbox: Toolbox, venue: Venue, busy: Container[str]) -> Refresh:
    now = toolbox.settings.now()
    if venue.until and venue.until <= now - GRACE:
        return Refresh(
            venue.name, None, None, f"{venue.name}: nothing is wanted after {venue.until.date()}"
        )
    if toolbox.breaker_open(venue.name):
        return Refresh(venue.name, None, None, f"{venue.name}: its circuit breaker is open")
    month = month_of(now)
    months = [m for m in (month_of(now - GRACE), month) if m == month or m.end > venue.since]
    grid = [Partition(market, m) for m in dict.fromkeys(months) for market in venue.markets]
    lacking = [p for p in grid if _lacks(toolbox, venue, p)]
    if not lacking:
        return Refresh(
            venue.name, None, None, f"{venue.name}: no bar has closed since the last refresh"
        )
    if any(p.key in busy for p in grid):
        return Refresh(venue.name, None, None, f"{venue.name}: a run is under way")
    wanted = sorted({p.month for p in lacking})
    first, last = Partition(venue.markets[0], wanted[0]), Partition(venue.markets[-1], wanted[-1])
    return Refresh(
        venue.name, first, last, f"{venue.name}: {len(lacking)} partitions lack closed bars"
    )


def _lacks(toolbox: Toolbox, venue: Venue, partition: Partition) -> bool:
    """Whether a bar of any fetched timeframe has closed that was not asked for; or the object is
    gone.
    """
    for timeframe in venue.fetched:
        wanted = wanted_window(toolbox, timeframe, partition)
        state = toolbox.ledger.state(raw_table(timeframe), partition)
        if wanted and (
            state is None or state.bytes is None or state.through < wanted.end or state.error
        ):
            return True
        if wanted and state and toolbox.lake.size(raw_table(timeframe), partition) != state.bytes:
            return True
    return False

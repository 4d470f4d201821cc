"""Who is wired to whom: the one place where tools are put together."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar

from marketdata_assets.ledger.anomalies import Anomalies
from marketdata_assets.ledger.consolidations import Consolidations
from marketdata_assets.ledger.gaps import Gaps
from marketdata_assets.ledger.incidents import Incidents
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.ledger.receipts import Receipts
from marketdata_assets.model.market import Market
from marketdata_assets.settings.universe import Settings
from marketdata_assets.sources.base import Source
from marketdata_assets.sources.guards import Guarded, Policy
from marketdata_assets.storage.lake import Lake
from marketdata_assets.storage.warehouse import ConnectionFactory, Warehouse

T = TypeVar("T")

IN_FLIGHT = 8

Tell = Callable[[dict[str, Any]], None]
"""Hears of progress while work runs: `{"bars": n, "requests": n}`, `{"failed": partition, ...}`,
`{"check": ...}`.
"""


def tell_nobody(event: dict[str, Any]) -> None:
    """For whoever works alone."""


class _Loop:
    """One event loop in a thread of its own, so that requests run while the caller works on what has
    come.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(
                target=self._loop.run_forever, name="requests", daemon=True
            )
            self._thread.start()
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        if self._loop is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            self._loop = self._thread = None


@dataclass(slots=True)
class Toolbox:
    """The tools of one process. `tell` hears of every answer, from the requests' thread."""

    settings: Settings
    ledger: Ledger
    incidents: Incidents
    receipts: Receipts
    anomalies: Anomalies
    consolidations: Consolidations
    gaps: Gaps
    lake: Lake
    warehouse: Warehouse
    policy: Policy
    tell: Tell = tell_nobody
    _sources: dict[str, Source] = field(default_factory=dict)
    _turns: dict[str, asyncio.Semaphore] = field(default_factory=dict)
    _clocks: dict[str, datetime] = field(default_factory=dict)
    _loop: _Loop = field(default_factory=_Loop)

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start work on requests; its result is awaited from any thread."""
        return self._loop.submit(work)

    def source(self, market: Market) -> Source:
        """The guarded source of a market's venue."""
        if market.venue not in self._sources:
            self._sources[market.venue] = self._open_source(market.venue)
        return self._sources[market.venue]

    def turns(self, market: Market) -> asyncio.Semaphore:
        """How many pages of a venue this process has in flight at once."""
        return self._turns.setdefault(market.venue, asyncio.Semaphore(IN_FLIGHT))

    async def venue_now(self, market: Market, needed: datetime) -> datetime:
        """The venue's clock: at least `needed` from memory, otherwise asked again (it may stand
        still).
        """
        known = self._clocks.get(market.venue)
        if known is None or known < needed:
            known = self._clocks[market.venue] = await self.source(market).now()
        return known

    def breaker_open(self, venue: str) -> bool:
        """Whether a venue's circuit breaker lets nothing through now."""
        return self.ledger.venue_health(venue).broken_until > self.policy.clock()

    def close(self) -> None:
        """Close all connections and stop the requests' thread."""
        for source in self._sources.values():
            self.submit(source.close()).result(timeout=10)
        self._sources.clear()
        self._turns.clear()
        self._loop.close()

    def _open_source(self, name: str) -> Source:
        from marketdata_assets.sources.ccxt_rest import CcxtSource

        venue = self.settings.venues[name]
        return Guarded(CcxtSource(venue), name, self.ledger, venue.requests_per_minute, self.policy)


@contextmanager
def open_toolbox(
    settings: Settings,
    connect: ConnectionFactory | None = None,
    policy: Policy | None = None,
    tell: Tell = tell_nobody,
) -> Iterator[Toolbox]:
    """All tools for these settings. `connect` opens the DuckDB file (Dagster brings its own
    resource).
    """
    ledger = Ledger(settings.state, settings.database)
    warehouse = Warehouse(settings.duckdb, connect)
    toolbox = Toolbox(
        settings,
        ledger,
        Incidents(ledger),
        Receipts(ledger),
        Anomalies(ledger),
        Consolidations(ledger),
        Gaps(ledger),
        Lake(settings.lake, settings.cold.lake if settings.cold else None),
        warehouse,
        policy or Policy(),
        tell,
    )
    try:
        yield toolbox
    finally:
        toolbox.close()

"""The one place where settings, ledger, storage and venues are put together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TypeVar

from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.model.events import ProgressCallback, no_progress
from marketdata_assets.settings.fields import reveal_secret
from marketdata_assets.settings.universe import Settings
from marketdata_assets.sources.clients import VenueClients
from marketdata_assets.sources.guards import RetryPolicy
from marketdata_assets.storage.bars import BarStorage
from marketdata_assets.storage.lake import Lake
from marketdata_assets.storage.warehouse import ConnectionFactory, Warehouse

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Context:
    """What one process works with. Doors build it; a flow takes only the parts that it uses.

    `clock` returns seconds since 1970 by the machine's clock: limiters and breakers run on it,
    while `settings.now()` may be replaced for tests and replays.
    """

    settings: Settings
    ledger: Ledger
    storage: BarStorage
    venues: VenueClients
    clock: Callable[[], float]

    @property
    def lake(self) -> Lake:
        """Return the lake of the storage."""
        return self.storage.lake

    def bind(self, flow: Callable[..., T]) -> T:
        """Return a flow with the parts of this context that its dataclass fields name."""
        parts = {field.name: getattr(self, field.name) for field in fields(flow)}  # type: ignore[arg-type]
        return flow(**parts)


@contextmanager
def open_context(
    settings: Settings,
    connect: ConnectionFactory | None = None,
    policy: RetryPolicy | None = None,
    *,
    for_reading: bool = False,
    on_progress: ProgressCallback = no_progress,
) -> Iterator[Context]:
    """Open everything that these settings name, and close it at the end.

    `connect` opens the DuckDB file instead of ours (Dagster brings its own resource).
    With `for_reading`, a state folder that cannot be written is read from a copy. `on_progress`
    receives the answers of venues, from the thread of the requests.
    """
    policy = policy or RetryPolicy()
    ledger = Ledger(settings.state, reveal_secret(settings.database), for_reading=for_reading)
    cold = settings.cold.lake if settings.cold else None
    lake = Lake(settings.lake, cold, ledger.objects)
    warehouse = Warehouse(settings.duckdb, connect)
    storage = BarStorage(lake, warehouse, rollups_in_warehouse=settings.rollups == "duckdb")
    venues = VenueClients(settings.venues, ledger.venues, policy, on_progress=on_progress)
    try:
        yield Context(settings, ledger, storage, venues, policy.clock)
    finally:
        venues.close()
        ledger.close()

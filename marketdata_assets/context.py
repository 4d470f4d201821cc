"""The one place where settings, ledger, storage and venues are put together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from typing import TypeVar

from marketdata_assets.errors import MarketDataError
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
SAVED_AT_ONCE = 500
"""Of so many market-months each process saves the ledger's rows when it ends."""


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
        if not for_reading:
            with suppress(MarketDataError):  # the next process does it
                save_ledger_rows(ledger, lake, most=SAVED_AT_ONCE)
    finally:
        venues.close()
        ledger.close()


def save_ledger_rows(ledger: Ledger, lake: Lake, *, most: int | None = None) -> int:
    """Write what the ledger alone knows about the market-months that changed beside their objects,
    at most so many; return how many. Nothing, where another process does so.

    It is what brings coverage and proofs back from a lake whose ledger is lost.
    """
    waiting, saved = ledger.copies.unsaved(most), 0
    if not waiting:
        return 0
    with ledger.lock("ledger-files", wait=False) as is_free:
        for key, version in waiting.items() if is_free else ():
            lake.ledger_files.write(key, ledger.copies.rows(key))
            ledger.copies.note_saved(key, version)
            saved += 1
    return saved

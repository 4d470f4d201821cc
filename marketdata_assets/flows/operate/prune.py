"""Prune: delete old records from the ledger. Evidence, quarantine and everything open stays."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.settings.universe import Settings


def delete_old_records(
    settings: Settings,
    ledger: Ledger,
    clock: Callable[[], float],
    *,
    days: float,
    dry_run: bool = False,
) -> dict[str, int]:
    """Delete recovered incidents and rows of the fetch log older than `days`; return the counts."""
    age = timedelta(days=days)
    return {
        "incidents": ledger.incidents.delete_before(settings.now() - age, dry_run),
        "fetches": ledger.fetches.delete_before(clock() - age.total_seconds(), dry_run),
    }

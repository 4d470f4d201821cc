"""Upkeep: forget what is older than anybody needs. Evidence, quarantine and everything still open
stays.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.settings.universe import Settings


def forget(
    settings: Settings,
    ledger: Ledger,
    clock: Callable[[], float],
    *,
    days: float,
    dry_run: bool = False,
) -> dict[str, int]:
    """Delete incidents that recovered, and rows of the fetch log, from more than `days` ago; how many
    of each.
    """
    age = timedelta(days=days)
    return {
        "incidents": ledger.incidents.forget(settings.now() - age, dry_run),
        "fetches": ledger.forget_fetches(clock() - age.total_seconds(), dry_run),
    }

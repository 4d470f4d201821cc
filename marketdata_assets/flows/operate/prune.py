"""Upkeep: forget what is older than anybody needs. Evidence, quarantine and everything still open
stays.
"""

from __future__ import annotations

from datetime import timedelta

from marketdata_assets.context import Toolbox


def forget(toolbox: Toolbox, days: float, dry_run: bool = False) -> dict[str, int]:
    """Delete incidents that recovered, and rows of the fetch log, from more than `days` ago; how many
    of each.
    """
    age = timedelta(days=days)
    return {
        "incidents": toolbox.ledger.incidents.delete_before(toolbox.settings.now() - age, dry_run),
        "fetches": toolbox.ledger.fetches.delete_before(
            toolbox.policy.clock() - age.total_seconds(), dry_run
        ),
    }

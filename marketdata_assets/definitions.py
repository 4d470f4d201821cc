"""The code location: everything that Dagster shows, built from the universe."""

from __future__ import annotations

import dagster as dg

from marketdata_assets.defs.jobs import build_definitions
from marketdata_assets.flows.operate.universe import load_universe


@dg.definitions
def defs() -> dg.Definitions:
    """Return what `workspace.yaml` loads."""
    return build_definitions(load_universe())

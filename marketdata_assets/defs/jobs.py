"""All definitions of one universe, and the job that processes ranges of partitions."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import dagster as dg
from dagster_duckdb import DuckDBResource

from marketdata_assets.defs.assets import raw_asset, rollup_assets
from marketdata_assets.defs.checks import market_checks
from marketdata_assets.defs.consolidated import (
    consolidate_job,
    consolidated_assets,
    keep_consolidated,
)
from marketdata_assets.defs.delta import delta_assets, delta_job
from marketdata_assets.defs.maintenance import health_job, prune_job, retire_job, scrub_job
from marketdata_assets.defs.partitions import market_months
from marketdata_assets.defs.reference import REFERENCE_MARKETS, reference_markets
from marketdata_assets.defs.repair import repair_job
from marketdata_assets.defs.schedules import ScheduledJob, refetch_schedules, refresh_open
from marketdata_assets.defs.sensors import backfill_missed, watch_incidents, watch_markets
from marketdata_assets.model.events import ProgressCallback, no_progress
from marketdata_assets.model.table import raw_table, rollup_table
from marketdata_assets.settings.universe import Settings

INGEST = "ingest"
"""The name of the job."""


def build_definitions(
    settings: Settings, on_progress: ProgressCallback = no_progress
) -> dg.Definitions:
    """Return everything that Dagster shows of one universe.

    `on_progress` receives what runs of these definitions in this process report. Raises BadInput.
    """
    with warnings.catch_warnings():
        # We rely on partitioned checks (preview) and backfill policies (beta), and test them.
        for category in (dg.PreviewWarning, dg.BetaWarning):
            warnings.simplefilter("ignore", category)
        return _build_definitions(settings, on_progress)


def _build_definitions(settings: Settings, on_progress: ProgressCallback) -> dg.Definitions:
    grid = market_months(settings)
    consolidated = consolidated_assets(settings, grid, on_progress=on_progress)
    checks = _market_checks(settings)
    scheduled, reference = _scheduled_jobs(settings), reference_markets(settings)
    return dg.Definitions(
        assets=[*_build_assets(settings, grid, on_progress), *consolidated, reference.asset],
        asset_checks=checks,
        jobs=[
            _ingest_job(checks, consolidated),
            repair_job(settings),
            *(each.job for each in scheduled),
            *([consolidate_job(settings)] if consolidated else []),
        ],
        sensors=[
            backfill_missed(settings, INGEST, grid),
            watch_markets(settings),
            watch_incidents(settings),
            *([keep_consolidated(settings, grid)] if consolidated else []),
        ],
        schedules=[
            refresh_open(settings, INGEST, grid),
            *(each.schedule for each in scheduled),
            reference.schedule,
            *refetch_schedules(settings),
        ],
        resources={
            "warehouse": DuckDBResource(
                database=str(settings.duckdb),
                connection_config={"threads": 1, "memory_limit": "512MB"},
            )
        },
        executor=dg.in_process_executor,
    )


def _build_assets(
    settings: Settings, grid: dg.MultiPartitionsDefinition, on_progress: ProgressCallback
) -> list[dg.AssetsDefinition]:
    """Return the assets of the raw assets' grid."""
    assets = [
        raw_asset(settings, timeframe, grid, on_progress=on_progress)
        for timeframe in settings.raw_timeframes
    ]
    if settings.rollup_timeframes:
        assets.append(rollup_assets(settings, grid, on_progress=on_progress))
    return [*assets, *delta_assets(settings, grid, on_progress=on_progress)]


def _market_checks(settings: Settings) -> list[dg.AssetChecksDefinition]:
    tables = [
        *map(raw_table, settings.raw_timeframes),
        *map(rollup_table, settings.rollup_timeframes),
    ]
    return [check for table in tables for check in market_checks(settings, table)]


def _scheduled_jobs(settings: Settings) -> list[ScheduledJob]:
    jobs = [health_job(settings), prune_job(settings), scrub_job(settings)]
    jobs += [delta_job(settings)] if settings.delta else []
    jobs += [retire_job(settings)] if settings.retention or settings.cold else []
    return jobs


def _ingest_job(
    market_checks: Sequence[dg.AssetChecksDefinition], consolidated: Sequence[dg.AssetsDefinition]
) -> Any:
    """Return the job of all assets of one grid; what looks at all markets is not part of a run."""
    selection = (
        dg.AssetSelection.all()
        - dg.AssetSelection.checks(*market_checks)
        - dg.AssetSelection.assets(*consolidated, REFERENCE_MARKETS)
    )
    description = "Fetches, checks, rolls up and publishes partitions."
    return dg.define_asset_job(INGEST, selection=selection, description=description)

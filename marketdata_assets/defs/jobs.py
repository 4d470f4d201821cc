"""Everything together: assets, checks, and the job that does one range."""

from __future__ import annotations

import warnings

import dagster as dg
from dagster_duckdb import DuckDBResource

from marketdata_assets.context import Tell, tell_nobody
from marketdata_assets.defs.assets import raw_asset, rollup_assets
from marketdata_assets.defs.automation import (
    backfill_missed,
    refresh_open,
    watch_incidents,
    watch_markets,
)
from marketdata_assets.defs.checks import market_checks
from marketdata_assets.defs.consolidated import (
    consolidate_job,
    consolidated_assets,
    keep_consolidated,
)
from marketdata_assets.defs.delta import delta_assets, delta_job_and_schedule
from marketdata_assets.defs.maintenance import health_job, prune_job, retire_job
from marketdata_assets.defs.partitions import market_months
from marketdata_assets.defs.repair import repair_job, second_looks
from marketdata_assets.model.table import raw_table, rollup_table
from marketdata_assets.settings.universe import Settings

INGEST = "ingest"


def build_definitions(settings: Settings, tell: Tell = tell_nobody) -> dg.Definitions:
    """All assets, checks and jobs for one universe. `tell` hears of progress, failures and red
    checks.
    """
    with warnings.catch_warnings():
        # partitioned checks are in preview, backfill policies in beta: both are relied on and
        # tested here
        for category in (dg.PreviewWarning, dg.BetaWarning):
            warnings.simplefilter("ignore", category)
        grid = market_months(settings)
        assets = [
            raw_asset(settings, timeframe, grid, tell) for timeframe in settings.raw_timeframes
        ]
        if settings.rollup_timeframes:
            assets.append(rollup_assets(settings, grid, tell))
        assets += delta_assets(settings, grid, tell)
        consolidated = consolidated_assets(settings, grid, tell)
        tables = [
            *map(raw_table, settings.raw_timeframes),
            *map(rollup_table, settings.rollup_timeframes),
        ]
        checks = [check for table in tables for check in market_checks(settings, table)]
        partitioned = (
            dg.AssetSelection.all()
            - dg.AssetSelection.checks(*checks)
            - dg.AssetSelection.assets(*consolidated)
        )
        job = dg.define_asset_job(
            INGEST, selection=partitioned, description="Fetch, check and roll up partitions."
        )
        upkeep = [health_job(settings), prune_job(settings)]
        upkeep += [delta_job_and_schedule(settings)] if settings.delta else []
        upkeep += [retire_job(settings)] if settings.retention or settings.cold else []
        return dg.Definitions(
            assets=[*assets, *consolidated],
            asset_checks=checks,
            jobs=[
                job,
                repair_job(settings),
                *(job for job, _ in upkeep),
                *([consolidate_job(settings)] if consolidated else []),
            ],
            sensors=[
                *(
                    backfill_missed(settings, INGEST, grid),
                    watch_markets(settings),
                    watch_incidents(settings),
                ),
                *([keep_consolidated(settings, grid)] if consolidated else []),
            ],
            schedules=[
                refresh_open(settings, INGEST, grid),
                *(schedule for _, schedule in upkeep),
                *second_looks(settings),
            ],
            resources={
                "warehouse": DuckDBResource(
                    database=str(settings.duckdb),
                    connection_config={"threads": 1, "memory_limit": "512MB"},
                )
            },
            executor=dg.in_process_executor,
        )

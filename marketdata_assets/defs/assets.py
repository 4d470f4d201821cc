"""The assets of raw bars, one per fetched timeframe, and of rollups, all made in one step."""

# no postponed annotations here: Dagster reads them at definition time

from collections.abc import Iterator
from typing import Any

import dagster as dg
from dagster_duckdb import DuckDBResource

from marketdata_assets.context import Context, open_context
from marketdata_assets.defs.checks import check_specs
from marketdata_assets.defs.partitions import partitions_of_run
from marketdata_assets.defs.pipeline_results import PipelineResults
from marketdata_assets.defs.results import as_dagster_failure, publish
from marketdata_assets.defs.specs import asset_key, asset_spec, storage_kind
from marketdata_assets.defs.tags import KIND, RunKind
from marketdata_assets.flows.operate.pipeline import Pipeline
from marketdata_assets.flows.read.coverage import CoverageReporter
from marketdata_assets.model.events import ProgressCallback, no_progress
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import raw_table, rollup_table
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.settings.universe import Settings

WAREHOUSE_POOL = "warehouse"
"""The pool of runs that write rollups to DuckDB; dagster.yaml sets its size."""


def raw_asset(
    settings: Settings,
    timeframe: Timeframe,
    grid: dg.MultiPartitionsDefinition,
    *,
    on_progress: ProgressCallback = no_progress,
) -> dg.AssetsDefinition:
    """Return the asset of one fetched timeframe."""
    spec = _raw_spec(settings, timeframe)

    @dg.multi_asset(
        name=f"raw_ohlcv_{timeframe.label}",
        specs=[spec],
        partitions_def=grid,
        backfill_policy=dg.BackfillPolicy.single_run(),
        check_specs=check_specs(settings, raw_table(timeframe), grid),
    )
    def fetch(context: dg.AssetExecutionContext) -> Iterator[Any]:
        partitions = partitions_of_run(context)
        results = PipelineResults(
            context, on_progress, raws=[timeframe], skippable=bool(spec.skippable)
        )
        with (
            as_dagster_failure(partitions, on_progress),
            open_context(settings, on_progress=on_progress) as app,
        ):
            pipeline = app.bind(Pipeline)
            is_import = context.run.tags.get(KIND) == RunKind.IMPORT
            process = pipeline.audit_stored if is_import else pipeline.fetch
            for result in process(timeframe, partitions):
                results.add(result)
            results.add_coverage(app.bind(CoverageReporter))
            (raw_results,) = results.assets
            if raw_results.has_failures:
                stored = _with_base(settings, timeframe, raw_results.stored_partitions)
                _roll_up_now(context, app, stored, on_progress=on_progress)
        yield from publish(context, results.assets)

    return fetch


def rollup_assets(
    settings: Settings,
    grid: dg.MultiPartitionsDefinition,
    *,
    on_progress: ProgressCallback = no_progress,
) -> dg.AssetsDefinition:
    """Return the assets of all rollups: one step, which reads the raw bars once."""
    timeframes = settings.rollup_timeframes
    is_in_duckdb = settings.rollups == "duckdb"

    @dg.multi_asset(
        name="rollups",
        specs=[_rollup_spec(settings, timeframe) for timeframe in timeframes],
        partitions_def=grid,
        backfill_policy=dg.BackfillPolicy.single_run(),
        check_specs=[
            spec
            for timeframe in timeframes
            for spec in check_specs(settings, rollup_table(timeframe), grid)
        ],
        pool=WAREHOUSE_POOL if is_in_duckdb else None,
    )
    def roll_up(context: dg.AssetExecutionContext, warehouse: DuckDBResource) -> Iterator[Any]:
        partitions = partitions_of_run(context)
        results = PipelineResults(context, on_progress, rollups=timeframes, skippable=True)
        with (
            as_dagster_failure(partitions, on_progress),
            open_context(settings, warehouse.get_connection) as app,
        ):
            _roll_up(app, partitions, results)
        yield from publish(context, results.assets)

    return roll_up


def _roll_up(app: Context, partitions: list[Partition], results: PipelineResults) -> None:
    for result in app.bind(Pipeline).roll_up(partitions):
        results.add(result)
    results.add_coverage(app.bind(CoverageReporter))


def _roll_up_now(
    context: dg.AssetExecutionContext,
    app: Context,
    partitions: list[Partition],
    *,
    on_progress: ProgressCallback,
) -> None:
    """Roll up in a step that is going to fail.

    Dagster then skips the step of the rollups, and the partitions that are stored do not wait for
    those that failed.
    """
    timeframes = app.settings.rollup_timeframes
    if partitions and timeframes:
        results = PipelineResults(context, on_progress, rollups=timeframes)
        _roll_up(app, partitions, results)
        for asset in results.assets:
            asset.log_events()


def _with_base(
    settings: Settings, timeframe: Timeframe, partitions: list[Partition]
) -> list[Partition]:
    """Return the partitions whose venue has this base: those that rollups are made from."""
    return [p for p in partitions if settings.venues[p.market.venue].base == timeframe]


def _raw_spec(settings: Settings, timeframe: Timeframe) -> dg.AssetSpec:
    skippable, policy = _is_skippable(settings, timeframe), None
    if skippable:
        limits = settings.limits(timeframe)
        policy = dg.FreshnessPolicy.time_window(fail_window=limits.error, warn_window=limits.warn)
    description = (
        f"{timeframe.name} bars exactly as the venues sent them: one Parquet object per market and "
        "month.\n\n"
        "Materialize a partition to fetch the bars that it is missing; a complete partition costs "
        "no request. When a check is red, its description names the remedy. Rows that break a "
        "rule are in quarantine: `marketdata quarantine list` shows them."
    )
    return asset_spec(
        raw_table(timeframe),
        [],
        description,
        kinds={"polars", storage_kind(settings.lake), "pandera"},
        skippable=skippable,
        freshness_policy=policy,
    )


def _is_skippable(settings: Settings, timeframe: Timeframe) -> bool:
    """Whether a refresh without new bars writes no event, so that Dagster's badge shows the feed.

    A raw asset that is skipped makes Dagster skip what is made from it. So only the one base of
    all venues is skippable, and only while bars of today are wanted.
    """
    venues = settings.venues.values()
    is_open = any(venue.until is None or venue.until > settings.now() for venue in venues)
    return is_open and {venue.base for venue in venues} == {timeframe}


def _rollup_spec(settings: Settings, timeframe: Timeframe) -> dg.AssetSpec:
    description = (
        f"{timeframe.name} bars made from the raw base bars, with their VWAP and the number of "
        "base bars in each.\n\n"
        "Sums are exact decimals, and there is no bar where the base has none. When `complete` is "
        "red, materialize the raw partition again; when `matches_native` is red, its table names "
        "the bars and both values."
    )
    store = "duckdb" if settings.rollups == "duckdb" else "parquet"
    deps = [dg.AssetDep(asset_key(raw_table(source))) for source in settings.raw_timeframes]
    return asset_spec(rollup_table(timeframe), deps, description, kinds={"polars", store})

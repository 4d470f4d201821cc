"""Consolidated bars: an asset per base timeframe on a grid of its own, its job, and its sensor."""

# no postponed annotations here: Dagster reads them at definition time

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import dagster as dg

from marketdata_assets.charts.lines import draw_differences
from marketdata_assets.context import open_context
from marketdata_assets.defs.instance import (
    as_tick_failure,
    find_busy_partitions,
    find_materialized_partitions,
    get_unfinished_runs,
    wipe_lost_partitions,
)
from marketdata_assets.defs.partitions import partitions_of_run
from marketdata_assets.defs.results import (
    AssetResults,
    as_dagster_failure,
    bars_metadata,
    publish,
)
from marketdata_assets.defs.sensors import TICK_SECONDS
from marketdata_assets.defs.specs import asset_key, asset_spec, storage_kind
from marketdata_assets.defs.tags import RunKind, RunPriority, range_tags
from marketdata_assets.flows.derive.consolidate import (
    ConsolidationResult,
    Consolidator,
    OutdatedConsolidation,
)
from marketdata_assets.flows.operate.backfill import PARTITIONS_A_RUN, is_search_due
from marketdata_assets.flows.operate.blocks import Block, plan_blocks
from marketdata_assets.flows.prove.reconcile import RECONCILED, check_reconciled
from marketdata_assets.model.events import ProgressCallback, no_progress
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.partition_status import LOST_REASON
from marketdata_assets.model.table import Table, consolidated_table, raw_table
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import format_time, month_of
from marketdata_assets.quality.reconcile import FAIL_BASIS_POINTS, WARN_BASIS_POINTS
from marketdata_assets.settings.universe import Settings
from marketdata_assets.transforms.consolidate import find_venue_switches

CONSOLIDATE = "consolidate"
"""The name of the job."""
SWITCHES_SHOWN = 50
_RETRY_SECONDS = 600
"""A run that failed is launched again after this time, and sooner when the venues' bars change."""

OutdatedPartitions = Mapping[Partition, OutdatedConsolidation]


def consolidated_assets(
    settings: Settings,
    grid: dg.MultiPartitionsDefinition,
    *,
    on_progress: ProgressCallback = no_progress,
) -> list[dg.AssetsDefinition]:
    """Return `consolidated/ohlcv_<timeframe>` of every base timeframe of a consolidated market.

    `grid` is that of the raw assets.
    """
    return [
        _consolidated_asset(
            settings, timeframe, _consolidated_grid(settings, grid), on_progress=on_progress
        )
        for timeframe in settings.consolidated_timeframes
    ]


def consolidate_job(settings: Settings) -> Any:
    """Return the job of the consolidated partitions.

    The job `ingest` cannot make them: its raw partitions are another grid.
    """
    keys = [
        asset_key(consolidated_table(timeframe)) for timeframe in settings.consolidated_timeframes
    ]
    return dg.define_asset_job(
        CONSOLIDATE,
        selection=dg.AssetSelection.assets(*keys),
        description=(
            "Makes consolidated partitions from the raw bars that are stored. No request is sent."
        ),
    )


def _consolidated_grid(
    settings: Settings, grid: dg.MultiPartitionsDefinition
) -> dg.MultiPartitionsDefinition:
    """Return every consolidated market by every month of the raw assets' grid."""
    markets = dg.StaticPartitionsDefinition([market.key for market in settings.consolidate])
    months = grid.get_partitions_def_for_dimension("month")
    return dg.MultiPartitionsDefinition({"market": markets, "month": months})


# ------------------------------------------------------------------------------------- the asset
def _consolidated_asset(
    settings: Settings,
    timeframe: Timeframe,
    grid: dg.MultiPartitionsDefinition,
    *,
    on_progress: ProgressCallback,
) -> dg.AssetsDefinition:
    key = asset_key(consolidated_table(timeframe))
    check = dg.AssetCheckSpec(
        RECONCILED, asset=key, description=_reconciled_description(timeframe), partitions_def=grid
    )

    @dg.multi_asset(
        name=f"consolidated_ohlcv_{timeframe.label}",
        specs=[_consolidated_spec(settings, timeframe)],
        partitions_def=grid,
        backfill_policy=dg.BackfillPolicy.single_run(),
        check_specs=[check],
    )
    def consolidate(context: dg.AssetExecutionContext) -> Iterator[Any]:
        partitions = partitions_of_run(context)
        results = AssetResults(context, key, on_progress, skippable=True)
        with as_dagster_failure(partitions, on_progress), open_context(settings) as app:
            for result in app.bind(Consolidator).build(timeframe, partitions):
                if result.error is not None:
                    results.add_failure(result.partition, result.error)
                    continue
                finding = check_reconciled(settings, app.ledger, timeframe, result=result)
                details = {**finding.details, "differences": _draw_differences(result)}
                findings = [replace(finding, details=details)]
                results.add(result.partition, _metadata(result), findings, changed=result.changed)
        yield from publish(context, [results])

    return consolidate


def _consolidated_spec(settings: Settings, timeframe: Timeframe) -> dg.AssetSpec:
    dep = dg.AssetDep(
        asset_key(raw_table(timeframe)), partition_mapping=_partition_mapping(settings)
    )
    description = (
        f"{timeframe.name} bars of several venues as one series: at each time the bar of the first "
        "venue that was up, in the order of the universe. The column `venue` names the venue of "
        "each bar.\n\n"
        "A partition is made again when the raw bars of a venue change. A venue that was up and "
        "had no trade gives no bar; a venue that was down, halted or not fetched yet is replaced "
        "by the next one. The series of each venue stays as it is."
    )
    kinds = {"polars", storage_kind(settings.lake)}
    return asset_spec(consolidated_table(timeframe), [dep], description, kinds=kinds)


def _reconciled_description(timeframe: Timeframe) -> str:
    return (
        "Where two venues have a bar of the same time, their closes lie less than "
        f"{WARN_BASIS_POINTS} basis points apart (warning), or {FAIL_BASIS_POINTS} (error). "
        "If red: the table names the minutes; "
        f"`SELECT * FROM reconciled.ohlcv_{timeframe.label}` returns all of them."
    )


def _partition_mapping(settings: Settings) -> dg.MultiPartitionMapping:
    """Return the mapping of a consolidated market's month to that month of each of its venues."""
    consolidated_by_market = {
        market.key: whole.key
        for whole, markets in settings.consolidate.items()
        for market in markets
    }
    markets = dg.StaticPartitionMapping(consolidated_by_market)
    return dg.MultiPartitionMapping(
        {
            "market": dg.DimensionPartitionMapping("market", markets),
            "month": dg.DimensionPartitionMapping("month", dg.IdentityPartitionMapping()),
        }
    )


def _metadata(result: ConsolidationResult) -> dict[str, Any]:
    """Return the bars of each venue, where the series switches venues, and how far these differ."""
    bars = result.bars
    changes = find_venue_switches(bars)
    rows = [
        dg.TableRecord({"from": format_time(moment), "before": before, "venue": venue})
        for moment, before, venue in changes.head(SWITCHES_SHOWN).iter_rows()
    ]
    counts = bars["venue"].value_counts(sort=True).iter_rows()
    metadata: dict[str, Any] = {
        **bars_metadata(bars),
        "bytes": result.bytes,
        **{f"bars_{venue}": count for venue, count in counts},
        "switches": changes.height,
        "switched": dg.MetadataValue.table(rows) if rows else "never",
        "differences": _draw_differences(result),
    }
    return {**metadata, "note": result.note} if result.note else metadata


def _draw_differences(result: ConsolidationResult) -> dg.MarkdownMetadataValue:
    month = result.partition.month
    return dg.MetadataValue.md(
        draw_differences(result.pairs, month, WARN_BASIS_POINTS, FAIL_BASIS_POINTS)
    )


# ------------------------------------------------------------------------------------ the sensor
def keep_consolidated(
    settings: Settings, grid: dg.MultiPartitionsDefinition
) -> dg.SensorDefinition:
    """Return the sensor that launches runs for outdated consolidated partitions, the newest first.

    `grid` is that of the raw assets.
    """
    consolidated_grid = _consolidated_grid(settings, grid)
    tables = [consolidated_table(timeframe) for timeframe in settings.consolidated_timeframes]

    @dg.sensor(
        name="keep_consolidated",
        job_name=CONSOLIDATE,
        minimum_interval_seconds=TICK_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description=(
            "Finds consolidated partitions that were never made, have lost their object, or whose "
            "venues' raw bars have changed since, and launches runs for them, the newest months "
            "first. So the next venue replaces one that is down, and gives way again when its bars "
            "arrive."
        ),
    )
    def evaluate(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        runs = get_unfinished_runs(context.instance)
        with as_tick_failure(), open_context(settings) as app:
            outdated = app.bind(Consolidator).find_outdated(
                is_search_due(
                    app.ledger, app.storage, settings.now(), what="lost consolidated objects"
                ),
                find_busy_partitions(runs, consolidated_grid),
                find_materialized_partitions(context.instance, tables),
            )
        wipe_lost_partitions(context.instance, _find_lost(settings, outdated))
        launched = sum(run.job_name == CONSOLIDATE for run in runs)
        blocks = _plan_blocks(settings, outdated, room=settings.automation.runs - launched)
        message = "every consolidated partition is up to date"
        if outdated:
            message = f"{len(outdated)} partitions have to be made"
        context.log.info("; ".join([message, *map(str, blocks)]))
        requests = [_run_request(settings, block, outdated) for block in blocks]
        return dg.SensorResult(requests, skip_reason=None if requests else message)

    return evaluate


def _plan_blocks(settings: Settings, outdated: OutdatedPartitions, *, room: int) -> list[Block]:
    reasons = {partition.stored_key: state.reason for partition, state in outdated.items()}
    markets = list(settings.consolidate)
    return plan_blocks([markets], reasons, max(0, room), most=PARTITIONS_A_RUN)


def _find_lost(settings: Settings, outdated: OutdatedPartitions) -> dict[Table, list[Partition]]:
    lost: dict[Table, list[Partition]] = defaultdict(list)
    for partition, state in outdated.items():
        if state.reason == LOST_REASON:
            lost[consolidated_table(settings.base(partition.market))].append(partition)
    return lost


def _run_request(settings: Settings, block: Block, outdated: OutdatedPartitions) -> dg.RunRequest:
    """Return the request of one run.

    Its key stays until what it would be made of changes, or a while has passed: Dagster launches
    one run per key.
    """
    digests = "".join(outdated[partition].source_digest for partition in block.partitions)
    digest = hashlib.sha256(digests.encode()).hexdigest()[:16]
    period = int(settings.now().timestamp()) // _RETRY_SECONDS
    is_live = month_of(settings.now()) in block.months
    priority = RunPriority.LIVE if is_live else RunPriority.HISTORY
    return dg.RunRequest(
        run_key=f"{block.first.key}..{block.last.key}@{digest}@{period}",
        tags=range_tags(block.first, block.last, RunKind.CONSOLIDATE, priority=priority),
    )

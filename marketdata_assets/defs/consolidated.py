"""Consolidated bars: an asset per base timeframe behind the raw ones, its own grid, and the sensor
that keeps it up to date.
"""

# no postponed annotations here: Dagster reads them at definition time

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import dagster as dg

from marketdata_assets.charts.lines import draw_differences, draw_sparkline
from marketdata_assets.context import Tell, open_toolbox
from marketdata_assets.defs.assets import asset_key
from marketdata_assets.defs.automation import (
    HISTORY,
    LIVE,
    TICK_SECONDS,
    UNFINISHED,
    one_line,
    under_way,
    wipe,
)
from marketdata_assets.defs.checks import KIND, Results, failure_told, finished
from marketdata_assets.defs.partitions import RANGE_END, RANGE_START, partitions_of_run
from marketdata_assets.flows.derive.consolidate import (
    RECONCILED,
    Behind,
    Consolidated,
    audit_consolidated,
    behind,
    consolidate,
)
from marketdata_assets.flows.operate.backfill import LOST, Block, blocks, look_is_due
from marketdata_assets.flows.prove.audit import Finding
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import Table, consolidated_table, raw_table
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import format_time, month_of
from marketdata_assets.quality.reconcile import FAIL, WARN
from marketdata_assets.settings.universe import Settings
from marketdata_assets.storage.warehouse import duckdb_type
from marketdata_assets.transforms.consolidate import switches

CONSOLIDATE = "consolidate"
SHOWN = 50
AGAIN_SECONDS = 600
"""What failed is asked for again after this time, and sooner when its venues' bars change."""


def _grid(settings: Settings, grid: dg.MultiPartitionsDefinition) -> dg.MultiPartitionsDefinition:
    """Every consolidated market x every month of the raw assets' grid."""
    markets = dg.StaticPartitionsDefinition([market.key for market in settings.consolidate])
    return dg.MultiPartitionsDefinition(
        {"market": markets, "month": grid.get_partitions_def_for_dimension("month")}
    )


def consolidated_assets(
    settings: Settings, grid: dg.MultiPartitionsDefinition, tell: Tell
) -> list[dg.AssetsDefinition]:
    """`consolidated/ohlcv_<timeframe>` for every base timeframe of a consolidated market; `grid` is
    that of the raw assets.
    """
    return [
        _consolidated_asset(settings, tf, _grid(settings, grid), tell)
        for tf in settings.consolidated_timeframes
    ]


def _consolidated_asset(
    settings: Settings, timeframe: Timeframe, grid: dg.MultiPartitionsDefinition, tell: Tell
) -> dg.AssetsDefinition:
    table = consolidated_table(timeframe)
    key = asset_key(table)
    columns = [
        dg.TableColumn(
            c.name,
            duckdb_type(c.dtype),
            c.meaning,
            constraints=dg.TableColumnConstraints(nullable=c.optional),
        )
        for c in table.columns
    ]
    spec = dg.AssetSpec(
        key,
        deps=[dg.AssetDep(asset_key(raw_table(timeframe)), partition_mapping=_mapping(settings))],
        description=(
            f"{timeframe.name} bars of several venues as one series: at each time the bar of the first venue that was up, in the "
            "universe's order. The column `venue` says whose bar it is.\n\n"
            "It is made again by itself when the raw bars of a venue change. A venue that was up and had no trade gives no bar; "
            "one that was down, halted or not fetched yet is stood in for by the next. No venue's own series is touched."
        ),
        group_name=table.layer,
        kinds={"polars", "s3" if settings.lake.startswith("s3://") else "parquet"},
        owners=["team:marketdata"],
        skippable=True,
        metadata={
            "dagster/column_schema": dg.TableSchema(columns=columns),
            "dagster/table_name": table.name,
        },
    )
    check = dg.AssetCheckSpec(
        RECONCILED,
        asset=key,
        description=(
            f"Where two venues have a bar of the same time, their closes lie less than {WARN} basis points apart (warning; {FAIL}: error). "
            "If red: the table names the minutes; `SELECT * FROM reconciled.ohlcv_"
            + timeframe.name
            + "` has all of them."
        ),
        partitions_def=grid,
    )

    @dg.multi_asset(
        name=f"consolidated_ohlcv_{timeframe.name}",
        specs=[spec],
        partitions_def=grid,
        backfill_policy=dg.BackfillPolicy.single_run(),
        check_specs=[check],
    )
    def make_one_series(context: dg.AssetExecutionContext) -> Iterator[Any]:
        partitions = partitions_of_run(context)
        results = Results(context, key, tell, skippable=True)
        with failure_told(tell, partitions), open_toolbox(settings) as toolbox:
            for done in consolidate(toolbox, timeframe, partitions):
                findings = (
                    [_drawn(audit_consolidated(toolbox, timeframe, done), done)]
                    if done.error is None
                    else []
                )
                results.add(done.partition, _metadata(done), findings, done.error, done.changed)
        yield from finished([results])

    return make_one_series


def _mapping(settings: Settings) -> dg.MultiPartitionMapping:
    """From a consolidated market's month to the same month of each of its venues."""
    above = {
        market.key: whole.key
        for whole, markets in settings.consolidate.items()
        for market in markets
    }
    return dg.MultiPartitionMapping(
        {
            "market": dg.DimensionPartitionMapping("market", dg.StaticPartitionMapping(above)),
            "month": dg.DimensionPartitionMapping("month", dg.IdentityPartitionMapping()),
        }
    )


def _drawn(finding: Finding, done: Consolidated) -> Finding:
    picture = dg.MetadataValue.md(draw_differences(done.pairs, done.partition.month, WARN, FAIL))
    return replace(finding, shown={**finding.shown, "differences": picture})


def _metadata(done: Consolidated) -> dict[str, Any]:
    """Bars of each venue, where the series goes over to another, and how far apart the venues lie."""
    changes = switches(done.bars)
    counts = {
        f"bars_{venue}": count
        for venue, count in done.bars["venue"].value_counts(sort=True).iter_rows()
    }
    rows = [
        dg.TableRecord({"from": format_time(at), "before": before, "venue": venue})
        for at, before, venue in changes.head(SHOWN).iter_rows()
    ]
    metadata: dict[str, Any] = {
        "rows": done.bars.height,
        "bytes": done.bytes,
        **counts,
        "switches": changes.height,
        "switched": dg.MetadataValue.table(rows) if rows else "never",
        "closes": dg.MetadataValue.md(draw_sparkline(done.bars["close"])),
        "differences": dg.MetadataValue.md(
            draw_differences(done.pairs, done.partition.month, WARN, FAIL)
        ),
        "dagster/partition_row_count": done.bars.height,
    }
    if done.bars.height:
        metadata |= {
            "first_bar": format_time(done.bars["open_time"][0]),
            "last_bar": format_time(done.bars["open_time"][-1]),
        }
    return {**metadata, "note": done.note} if done.note else metadata


# --------------------------------------------------------------------------------- what keeps it up
def consolidate_job(settings: Settings) -> Any:
    """The job that makes consolidated partitions; the raw ones below them are another grid, so
    `ingest` cannot.
    """
    keys = [asset_key(consolidated_table(tf)) for tf in settings.consolidated_timeframes]
    return dg.define_asset_job(
        CONSOLIDATE,
        selection=dg.AssetSelection.assets(*keys),
        description="Make consolidated partitions from the raw bars that are stored; no request is sent.",
    )


def keep_consolidated(
    settings: Settings, grid: dg.MultiPartitionsDefinition
) -> dg.SensorDefinition:
    """Asks for consolidated partitions whose venues' bars have changed, the newest first; `grid` is
    that of the raw assets.
    """
    mine = _grid(settings, grid)

    @dg.sensor(
        name="keep_consolidated",
        job_name=CONSOLIDATE,
        minimum_interval_seconds=TICK_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description=(
            "Finds consolidated partitions that were never made, lost their object, or whose venues' raw bars have changed since, and "
            "asks for them, the newest months first. So the next venue stands in while one is down, and what it lent is taken back."
        ),
    )
    def evaluate(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        tables = [consolidated_table(tf) for tf in settings.consolidated_timeframes]
        with one_line(), open_toolbox(settings) as toolbox:
            busy, _ = under_way(context.instance, mine)
            shown = {
                table: context.instance.get_materialized_partitions(asset_key(table))
                for table in tables
            }
            late = behind(
                toolbox,
                look_is_due(toolbox, settings.now(), "lost consolidated objects"),
                busy,
                shown,
            )
        wipe(context.instance, _lost(settings, late))
        running = context.instance.get_runs_count(
            dg.RunsFilter(job_name=CONSOLIDATE, statuses=UNFINISHED)
        )
        wanted = {
            (partition.market.key, partition.month_key): why.reason
            for partition, why in late.items()
        }
        asked = blocks(
            [list(settings.consolidate)], wanted, wanted, max(0, settings.automation.runs - running)
        )
        says = (
            f"{len(late)} partitions have to be made"
            if late
            else "every consolidated partition is up to date"
        )
        context.log.info("; ".join([says, *map(str, asked)]))
        return dg.SensorResult(
            [_run(block, late, settings) for block in asked], skip_reason=None if asked else says
        )

    return evaluate


def _lost(settings: Settings, late: dict[Partition, Behind]) -> dict[Table, list[Partition]]:
    lost: dict[Table, list[Partition]] = {}
    for partition, why in late.items():
        if why.reason == LOST:
            lost.setdefault(consolidated_table(settings.base(partition.market)), []).append(
                partition
            )
    return lost


def _run(block: Block, late: dict[Partition, Behind], settings: Settings) -> dg.RunRequest:
    """One run; the same once more only when what it would be made of has changed, or after a while."""
    content = hashlib.sha256(
        "".join(late[partition].of for partition in block.partitions).encode()
    ).hexdigest()[:16]
    tags = {
        RANGE_START: block.first.key,
        RANGE_END: block.last.key,
        KIND: CONSOLIDATE,
        "dagster/priority": LIVE if month_of(settings.now()) in block.months else HISTORY,
    }
    moment = int(settings.now().timestamp()) // AGAIN_SECONDS
    return dg.RunRequest(
        run_key=f"{block.first.key}..{block.last.key}@{content}@{moment}", tags=tags
    )

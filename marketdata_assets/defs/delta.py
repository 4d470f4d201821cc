"""Delta Lake: an asset per published timeframe behind the raw and rolled-up ones, and the job that
looks after the tables.
"""

# no postponed annotations here: Dagster reads them at definition time

from collections.abc import Iterator
from typing import Any, cast

import dagster as dg
from pydantic import Field

from marketdata_assets.context import Tell, Toolbox, open_toolbox, tell_nobody
from marketdata_assets.defs.assets import asset_key
from marketdata_assets.defs.checks import Results, failure_told, finished, log_all
from marketdata_assets.defs.maintenance import schedule
from marketdata_assets.defs.partitions import partitions_of_run
from marketdata_assets.errors import BadInput
from marketdata_assets.flows.derive.publish import Published, maintain, publish
from marketdata_assets.model.table import Table, raw_table, rollup_table
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import Window
from marketdata_assets.settings.universe import Delta, Settings
from marketdata_assets.storage.delta import delta_column_types
from marketdata_assets.storage.delta_maintenance import DeltaMaintenance

MAINTAIN = "maintain_delta"


def delta_key(timeframe: Timeframe) -> dg.AssetKey:
    """`delta/ohlcv_1h`"""
    return dg.AssetKey(["delta", f"ohlcv_{timeframe.name}"])


def delta_assets(
    settings: Settings, grid: dg.MultiPartitionsDefinition, tell: Tell = tell_nobody
) -> list[dg.AssetsDefinition]:
    """`delta/ohlcv_<timeframe>` for each published timeframe; none without `delta:`. Raises BadInput
    for one that nobody makes.
    """
    delta = settings.delta
    return (
        [_delta_asset(settings, delta, tf, grid, tell) for tf in delta.timeframes] if delta else []
    )


def _delta_asset(
    settings: Settings,
    delta: Delta,
    timeframe: Timeframe,
    grid: dg.MultiPartitionsDefinition,
    tell: Tell,
) -> dg.AssetsDefinition:
    sources = _sources(settings, timeframe)
    key = delta_key(timeframe)
    store = "s3" if delta.location.startswith("s3://") else "parquet"
    columns = [dg.TableColumn(name, kind) for name, kind in delta_column_types(sources[-1]).items()]
    spec = dg.AssetSpec(
        key,
        deps=[asset_key(table) for table in sources],
        description=(
            f"{timeframe.name} bars as Delta Lake tables below {delta.location}: {', '.join(t.name for t in sources)}, "
            f"partitioned by market and month. Every version of the last {delta.history_days} days can be read.\n\n"
            "Materialize a partition to make it hold what is stored; the same rows make no new version."
        ),
        group_name="delta",
        kinds={"deltalake", store},
        owners=["team:marketdata"],
        skippable=True,
        metadata={
            "dagster/column_schema": dg.TableSchema(columns=columns),
            "dagster/uri": delta.location,
        },
    )

    @dg.multi_asset(
        name=f"delta_ohlcv_{timeframe.name}",
        specs=[spec],
        partitions_def=grid,
        backfill_policy=dg.BackfillPolicy.single_run(),
    )
    def publish_delta(context: dg.AssetExecutionContext) -> Iterator[Any]:
        partitions = partitions_of_run(context)
        results = Results(context, key, tell, skippable=True)
        with failure_told(tell, partitions), open_toolbox(settings) as toolbox:
            for done in publish(toolbox, timeframe, partitions):
                results.add(done.partition, _metadata(done), [], done.error, done.changed)
        yield from finished([results])

    return publish_delta


def _sources(settings: Settings, timeframe: Timeframe) -> list[Table]:
    """The tables that a timeframe is published from: the base of some markets, what is rolled up for
    others.
    """
    bases = {venue.base for venue in settings.venues.values()}
    found = [raw_table(timeframe)] if timeframe in bases else []
    found += [rollup_table(timeframe)] if timeframe in settings.rollup_timeframes else []
    if not found and timeframe in settings.raw_timeframes:
        found = [raw_table(timeframe)]
    if not found:
        known = " ".join(
            tf.name
            for tf in sorted(
                {*settings.raw_timeframes, *settings.rollup_timeframes}, key=lambda tf: tf.width
            )
        )
        raise BadInput(
            f"{settings.source}: `delta:` publishes {timeframe.name}, but there are no such bars; choose of {known}"
        )
    return found


def _metadata(done: Published) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "rows": done.rows,
        "bytes": done.bytes,
        "dagster/partition_row_count": done.rows,
    }
    return metadata if done.version is None else {**metadata, "version": done.version}


class MaintainConfig(dg.Config):
    """What to do."""

    dry_run: bool = Field(False, description="Only say what would be done; nothing is changed.")


def delta_job_and_schedule(settings: Settings) -> tuple[dg.JobDefinition, dg.ScheduleDefinition]:
    """`maintain_delta`, every night: nothing unpublished, one sorted file per partition, no file that
    no kept version needs.
    """

    @dg.op(
        description="Publishes what differs, makes each partition one sorted file, removes files of older versions; see its metadata."
    )
    def maintain_tables(context: dg.OpExecutionContext, config: MaintainConfig) -> None:
        with failure_told(tell_nobody, ()), open_toolbox(settings) as toolbox:
            late = [] if config.dry_run else _publish_late(context, toolbox)
            found = maintain(toolbox, config.dry_run)
        rows = [_row(name, done) for name, done in found.items()]
        totals = {
            name: sum(getattr(done, name) for done in found.values())
            for name in DeltaMaintenance._fields
            if name != "version"
        }
        totals["partitions_published"] = sum(len(results.good) for results in late)
        context.add_output_metadata(
            {
                "dry_run": config.dry_run,
                **totals,
                "tables": dg.MetadataValue.table(rows) if rows else "none",
            }
        )
        log_all(late)

    @dg.job(
        name=MAINTAIN,
        description="Looks after the Delta tables: what differs is published, files are sorted, old ones removed.",
    )
    def job() -> None:
        maintain_tables()

    return job, schedule("maintain_delta_every_night", job, "0 4 * * *")


def _publish_late(context: dg.OpExecutionContext, toolbox: Toolbox) -> list[Results]:
    """What repairs, runs that failed beside it, and weeks that end in the next month have left
    unpublished.
    """
    settings, found = toolbox.settings, []
    partitions = settings.partitions(settings.markets, Window(settings.since, settings.now()))
    for timeframe in settings.delta.timeframes if settings.delta else ():
        results = Results(
            cast(dg.AssetExecutionContext, context), delta_key(timeframe), tell_nobody
        )
        for done in publish(toolbox, timeframe, partitions):
            if done.changed or done.error:
                results.add(done.partition, _metadata(done), [], done.error)
        found += [results] if results.good or results.failed else []
    return found


def _row(name: str, done: DeltaMaintenance) -> dg.TableRecord:
    return dg.TableRecord({"table": name, **done._asdict()})

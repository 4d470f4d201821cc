"""Delta Lake: an asset per published timeframe, and the job that maintains the tables."""

# no postponed annotations here: Dagster reads them at definition time

from collections.abc import Iterator
from typing import Any

import dagster as dg
from pydantic import Field

from marketdata_assets.context import Context, open_context
from marketdata_assets.defs.partitions import partitions_of_run
from marketdata_assets.defs.results import (
    AssetResults,
    as_dagster_failure,
    log_and_raise,
    publish,
)
from marketdata_assets.defs.schedules import ScheduledJob, schedule_job
from marketdata_assets.defs.specs import OWNERS, asset_key, storage_kind
from marketdata_assets.errors import BadInput
from marketdata_assets.flows.derive.publish import DeltaPublisher, PublishResult, maintain
from marketdata_assets.model.events import ProgressCallback, no_progress
from marketdata_assets.model.table import Table, raw_table, rollup_table
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import Window
from marketdata_assets.settings.parts import DeltaSettings
from marketdata_assets.settings.universe import Settings
from marketdata_assets.storage.delta import delta_column_types
from marketdata_assets.storage.delta_maintenance import DeltaMaintenance

MAINTAIN = "maintain_delta"
"""The name of the job."""


def delta_key(timeframe: Timeframe) -> dg.AssetKey:
    """Return the key of a published timeframe's asset, such as `delta/ohlcv_1h`."""
    return dg.AssetKey(["delta", f"ohlcv_{timeframe.label}"])


def delta_assets(
    settings: Settings,
    grid: dg.MultiPartitionsDefinition,
    *,
    on_progress: ProgressCallback = no_progress,
) -> list[dg.AssetsDefinition]:
    """Return `delta/ohlcv_<timeframe>` of each published timeframe; none without `delta:`.

    Raises BadInput for a timeframe that is neither fetched nor rolled up.
    """
    delta = settings.delta
    if delta is None:
        return []
    return [
        _delta_asset(
            settings,
            timeframe,
            _delta_spec(settings, delta, timeframe),
            grid=grid,
            on_progress=on_progress,
        )
        for timeframe in delta.timeframes
    ]


def _delta_asset(
    settings: Settings,
    timeframe: Timeframe,
    spec: dg.AssetSpec,
    *,
    grid: dg.MultiPartitionsDefinition,
    on_progress: ProgressCallback,
) -> dg.AssetsDefinition:
    @dg.multi_asset(
        name=f"delta_ohlcv_{timeframe.label}",
        specs=[spec],
        partitions_def=grid,
        backfill_policy=dg.BackfillPolicy.single_run(),
    )
    def publish_delta(context: dg.AssetExecutionContext) -> Iterator[Any]:
        partitions = partitions_of_run(context)
        results = AssetResults(context, spec.key, on_progress, skippable=True)
        with as_dagster_failure(partitions, on_progress), open_context(settings) as app:
            for result in app.bind(DeltaPublisher).publish(timeframe, partitions):
                _add_result(results, result)
        yield from publish(context, [results])

    return publish_delta


def _add_result(results: AssetResults, result: PublishResult) -> None:
    if result.error is not None:
        results.add_failure(result.partition, result.error)
        return
    metadata: dict[str, Any] = {
        "rows": result.rows,
        "bytes": result.bytes,
        "dagster/partition_row_count": result.rows,
    }
    if result.version is not None:
        metadata["version"] = result.version
    results.add(result.partition, metadata, changed=result.changed)


def _delta_spec(settings: Settings, delta: DeltaSettings, timeframe: Timeframe) -> dg.AssetSpec:
    sources = _source_tables(settings, timeframe)
    names = ", ".join(table.name for table in sources)
    columns = [dg.TableColumn(name, kind) for name, kind in delta_column_types(sources[-1]).items()]
    return dg.AssetSpec(
        delta_key(timeframe),
        deps=[asset_key(table) for table in sources],
        description=(
            f"{timeframe.name} bars as Delta Lake tables below {delta.location}: {names}, "
            "partitioned by market and month. Every version of the last "
            f"{delta.history_days} days can be read.\n\n"
            "Materialize a partition to publish what is stored of it; where nothing has changed, "
            "no version is made."
        ),
        group_name="delta",
        kinds={"deltalake", storage_kind(delta.location)},
        owners=OWNERS,
        skippable=True,
        metadata={
            "dagster/column_schema": dg.TableSchema(columns=columns),
            "dagster/uri": delta.location,
        },
    )


def _source_tables(settings: Settings, timeframe: Timeframe) -> list[Table]:
    """Return the tables that a timeframe is published from.

    It may be the base of some markets and a rollup of others. A timeframe that is only a reference
    is published from its raw bars.
    """
    is_base = any(timeframe == venue.base for venue in settings.venues.values())
    tables = [raw_table(timeframe)] if is_base else []
    tables += [rollup_table(timeframe)] if timeframe in settings.rollup_timeframes else []
    if tables:
        return tables
    if timeframe in settings.raw_timeframes:
        return [raw_table(timeframe)]
    known = {*settings.raw_timeframes, *settings.rollup_timeframes}
    names = " ".join(tf.name for tf in sorted(known, key=lambda tf: tf.width))
    raise BadInput(
        f"{settings.source}: `delta:` publishes {timeframe.name}, but there are no such bars; "
        f"choose of {names}"
    )


class MaintainConfig(dg.Config):
    """What the job `maintain_delta` does."""

    dry_run: bool = Field(False, description="Only report what would be done; change nothing.")


def delta_job(settings: Settings) -> ScheduledJob:
    """Return the job that maintains the Delta tables, every night."""

    @dg.op(
        name="maintain_tables",
        description=(
            "Publishes what differs from the stored bars, makes one sorted file of each partition, "
            "and removes the files of versions that are older than `history_days`."
        ),
    )
    def maintain_tables(context: dg.OpExecutionContext, config: MaintainConfig) -> None:
        with as_dagster_failure(), open_context(settings) as app:
            late = [] if config.dry_run else _publish_late(context, app)
            tables = maintain(settings, config.dry_run)
        rows = [
            dg.TableRecord({"table": name, **counts._asdict()}) for name, counts in tables.items()
        ]
        context.add_output_metadata(
            {
                "dry_run": config.dry_run,
                **_sum_counts(list(tables.values())),
                "partitions_published": sum(len(results.stored_partitions) for results in late),
                "tables": dg.MetadataValue.table(rows) if rows else "none",
            }
        )
        log_and_raise(late)

    @dg.job(
        name=MAINTAIN,
        description=(
            "Maintains the Delta tables: publishes what differs from the stored bars, sorts files, "
            "and removes old ones."
        ),
    )
    def job() -> None:
        maintain_tables()

    return schedule_job("maintain_delta_every_night", job, "0 4 * * *")


def _sum_counts(tables: list[DeltaMaintenance]) -> dict[str, int]:
    names = [name for name in DeltaMaintenance._fields if name != "version"]
    return {name: sum(getattr(counts, name) for counts in tables) for name in names}


def _publish_late(context: dg.OpExecutionContext, app: Context) -> list[AssetResults]:
    """Publish the partitions that have changed without a run of their Delta asset.

    Repairs change bars, runs fail beside it, and a week that ends in the next month is built with
    that month.
    """
    settings, late = app.settings, []
    partitions = settings.partitions(settings.markets, Window(settings.since, settings.now()))
    for timeframe in settings.delta.timeframes if settings.delta else ():
        results = AssetResults(context, delta_key(timeframe))
        for result in app.bind(DeltaPublisher).publish(timeframe, partitions):
            if result.changed or result.error:
                _add_result(results, result)
        late.append(results)
    return late

"""The assets: one raw asset per fetched timeframe, and all rollups in one step from one read."""

# no postponed annotations here: Dagster reads them at definition time

from collections.abc import Iterator, Sequence
from typing import Any

import dagster as dg
from dagster_duckdb import DuckDBResource

from marketdata_assets.defs.checks import Results, check_specs, failure_told
from marketdata_assets.defs.partitions import partitions_of_run
from marketdata_assets.defs.pictures import sparkline
from marketdata_assets.flows.audit import audit_raw, audit_rollup
from marketdata_assets.flows.derive import Derived, derive
from marketdata_assets.flows.ingest import Ingested, ingest
from marketdata_assets.lake.tables import Table, raw, rollup
from marketdata_assets.model.bar import Column
from marketdata_assets.model.window import Timeframe, iso
from marketdata_assets.settings import Settings
from marketdata_assets.toolbox import Tell, open_toolbox

WAREHOUSE_POOL = "warehouse"
"""How many runs write rollups at once (dagster.yaml). Within them a lock lets one write; venues have a limiter."""


def asset_key(table: Table) -> dg.AssetKey:
    """`raw/ohlcv_1m`"""
    return dg.AssetKey(list(table.key))


def _spec(table: Table, settings: Settings, deps: Sequence[Table], description: str, kinds: set[str]) -> dg.AssetSpec:
    columns = [
        dg.TableColumn(c.name, _type_name(c), c.meaning, constraints=dg.TableColumnConstraints(nullable=c.optional)) for c in table.columns
    ]
    return dg.AssetSpec(
        asset_key(table),
        deps=[asset_key(t) for t in deps],
        description=description,
        group_name=table.layer,
        kinds=kinds,
        owners=["team:marketdata"],
        metadata={"dagster/column_schema": dg.TableSchema(columns=columns), "dagster/table_name": table.name},
    )


def _type_name(column: Column) -> str:
    if column.name == "open_time":
        return "timestamp UTC"
    return "bigint" if column.dtype.is_integer() else "decimal(38, 12)"


def raw_asset(settings: Settings, timeframe: Timeframe, grid: dg.MultiPartitionsDefinition, tell: Tell) -> dg.AssetsDefinition:
    """The asset of one fetched timeframe."""
    table = raw(timeframe)
    what = (
        f"{timeframe.name} bars exactly as the venues sent them, one Parquet object per market and month.\n\n"
        "Materialize a partition to fetch what it lacks; a complete one costs no request. When a check is red, its own "
        "text says what to do; rows refused by a rule are in `marketdata quarantine list`."
    )
    store = "s3" if settings.lake.startswith("s3://") else "parquet"

    @dg.multi_asset(
        name=f"raw_ohlcv_{timeframe.name}",
        specs=[_spec(table, settings, [], what, {"polars", store, "pandera"})],
        partitions_def=grid,
        backfill_policy=dg.BackfillPolicy.single_run(),
        check_specs=check_specs(table, settings, grid),
    )
    def fetch(context: dg.AssetExecutionContext) -> Iterator[Any]:
        partitions = partitions_of_run(context)
        results = Results(context, asset_key(table), tell)
        with failure_told(tell, partitions), open_toolbox(settings, tell=tell) as toolbox:
            for done in ingest(toolbox, timeframe, partitions):
                results.add(done.partition, _raw_metadata(done), audit_raw(done), done.error)
        yield from results.finish()

    return fetch


def rollup_assets(settings: Settings, grid: dg.MultiPartitionsDefinition, tell: Tell) -> dg.AssetsDefinition:
    """All rollups: one step, one read of the raw bars, an asset per timeframe."""
    tables = {tf: rollup(tf) for tf in settings.rollup_timeframes}
    deps = [raw(tf) for tf in settings.raw_timeframes]
    kinds = {"polars", "duckdb" if settings.rollups == "duckdb" else "parquet"}
    specs = [_spec(t, settings, deps, _rollup_words(tf), kinds) for tf, t in tables.items()]

    @dg.multi_asset(
        name="rollups",
        specs=specs,
        partitions_def=grid,
        backfill_policy=dg.BackfillPolicy.single_run(),
        check_specs=[spec for t in tables.values() for spec in check_specs(t, settings, grid)],
        pool=WAREHOUSE_POOL if settings.rollups == "duckdb" else None,
    )
    def roll_up(context: dg.AssetExecutionContext, warehouse: DuckDBResource) -> Iterator[Any]:
        partitions = partitions_of_run(context)
        results = {tf: Results(context, asset_key(t), tell) for tf, t in tables.items()}
        with failure_told(tell, partitions), open_toolbox(settings, warehouse.get_connection) as toolbox:
            for derived in derive(toolbox, partitions):
                for tf, result in results.items():
                    result.add(derived.partition, _rollup_metadata(derived, tf), audit_rollup(toolbox, derived, tf))
        for result in results.values():
            yield from result.finish()

    return roll_up


def _rollup_words(timeframe: Timeframe) -> str:
    return (
        f"{timeframe.name} bars made from the raw base bars, with VWAP and how many base bars each holds.\n\n"
        "Sums are exact decimals; no bar is made up where there is none. When `complete` is red, materialize the raw "
        "partition; when `matches_native` is red, the table names the bars and both values."
    )


def _raw_metadata(done: Ingested) -> dict[str, Any]:
    opens = done.bars["open_time"]
    metadata: dict[str, Any] = {
        "rows": done.bars.height,
        "bytes": done.bytes,
        "requests": done.requests,
        "retries": done.retries,
        "seconds_waited_for_limits": round(done.waited, 3),
        "rows_received": done.account.received,
        "rows_quarantined": done.account.quarantined,
        "closes": dg.MetadataValue.md(sparkline(done.bars["close"])),
        "dagster/partition_row_count": done.bars.height,
    }
    if done.bars.height:
        metadata |= {"first_bar": iso(opens[0]), "last_bar": iso(opens[-1])}
    if done.note:
        metadata["note"] = done.note
    return metadata


def _rollup_metadata(derived: Derived, timeframe: Timeframe) -> dict[str, Any]:
    frame = derived.frames.get(timeframe)
    if frame is None or frame.is_empty():
        return {"rows": 0, "dagster/partition_row_count": 0}
    return {
        "rows": frame.height,
        "rows_changed": derived.changed.get(timeframe, 0),
        "first_bar": iso(frame["open_time"][0]),
        "last_bar": iso(frame["open_time"][-1]),
        "closes": dg.MetadataValue.md(sparkline(frame["close"])),
        "dagster/partition_row_count": frame.height,
    }

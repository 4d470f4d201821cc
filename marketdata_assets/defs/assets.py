"""The assets: one raw asset per fetched timeframe, and all rollups in one step from one read."""

# no postponed annotations here: Dagster reads them at definition time

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import dagster as dg
from dagster_duckdb import DuckDBResource

from marketdata_assets.charts.candles import draw_candles
from marketdata_assets.charts.lines import draw_sparkline
from marketdata_assets.context import Tell, Toolbox, open_toolbox
from marketdata_assets.defs.checks import IMPORT, KIND, Results, check_specs, failure_told, finished
from marketdata_assets.defs.partitions import partitions_of_run
from marketdata_assets.errors import CheckFailed
from marketdata_assets.flows.derive.rollup import Derived, derive
from marketdata_assets.flows.fetch.imports import as_stored
from marketdata_assets.flows.fetch.ingest import Ingested, ingest
from marketdata_assets.flows.operate.repair import Told, told
from marketdata_assets.flows.prove.audit import audit_gaps, audit_raw, audit_rollup
from marketdata_assets.flows.prove.gaps import explain
from marketdata_assets.flows.read.coverage import daily_coverage
from marketdata_assets.model.bar import Column
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import Table, raw_table, rollup_table
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import Window, format_time
from marketdata_assets.settings.universe import Settings

WAREHOUSE_POOL = "warehouse"
"""How many runs write rollups at once (dagster.yaml). Within them a lock lets one write; venues have a
limiter.
"""


def asset_key(table: Table) -> dg.AssetKey:
    """`raw/ohlcv_1m`"""
    return dg.AssetKey(list(table.key))


def _spec(
    table: Table,
    deps: Sequence[Table],
    description: str,
    kinds: set[str],
    skippable: bool = True,
    freshness_policy: dg.FreshnessPolicy | None = None,
) -> dg.AssetSpec:
    columns = [
        dg.TableColumn(
            c.name,
            _type_name(c),
            c.meaning,
            constraints=dg.TableColumnConstraints(nullable=c.optional),
        )
        for c in table.columns
    ]
    return dg.AssetSpec(
        asset_key(table),
        deps=[asset_key(t) for t in deps],
        description=description,
        group_name=table.layer,
        kinds=kinds,
        owners=["team:marketdata"],
        skippable=skippable,
        freshness_policy=freshness_policy,
        metadata={
            "dagster/column_schema": dg.TableSchema(columns=columns),
            "dagster/table_name": table.name,
        },
    )


def _type_name(column: Column) -> str:
    if column.name == "open_time":
        return "timestamp UTC"
    return "bigint" if column.dtype.is_integer() else "decimal(38, 12)"


def raw_asset(
    settings: Settings, timeframe: Timeframe, grid: dg.MultiPartitionsDefinition, tell: Tell
) -> dg.AssetsDefinition:
    """The asset of one fetched timeframe."""
    table = raw_table(timeframe)
    what = (
        f"{timeframe.name} bars exactly as the venues sent them, one Parquet object per market and month.\n\n"
        "Materialize a partition to fetch what it lacks; a complete one costs no request. When a check is red, its own "
        "text says what to do; rows refused by a rule are in `marketdata quarantine list`."
    )
    quiet, limits = _keeps_quiet(settings, timeframe), settings.limits(timeframe)
    policy = (
        dg.FreshnessPolicy.time_window(fail_window=limits.error, warn_window=limits.warn)
        if quiet
        else None
    )
    store = "s3" if settings.lake.startswith("s3://") else "parquet"

    @dg.multi_asset(
        name=f"raw_ohlcv_{timeframe.name}",
        specs=[_spec(table, [], what, {"polars", store, "pandera"}, quiet, policy)],
        partitions_def=grid,
        backfill_policy=dg.BackfillPolicy.single_run(),
        check_specs=check_specs(table, settings, grid),
    )
    def fetch(context: dg.AssetExecutionContext) -> Iterator[Any]:
        partitions = partitions_of_run(context)
        results = Results(context, asset_key(table), tell, skippable=quiet)
        with failure_told(tell, partitions), open_toolbox(settings, tell=tell) as toolbox:
            fetch_into(
                results, toolbox, timeframe, partitions, asks=context.run.tags.get(KIND) != IMPORT
            )
            if results.failed and (
                good := [
                    p for p in results.good if settings.venues[p.market.venue].base == timeframe
                ]
            ):
                # this step fails and the next is skipped: those that are well must not wait for the
                # others
                rollups = {
                    tf: Results(context, asset_key(rollup_table(tf)), tell)
                    for tf in settings.rollup_timeframes
                }
                roll_up_into(rollups, toolbox, good)
                for rolled in rollups.values():
                    rolled.log_done()
        yield from finished([results])

    return fetch


def _keeps_quiet(settings: Settings, timeframe: Timeframe) -> bool:
    """Whether a refresh without new bars leaves no event here, so that Dagster's freshness badge tells
    the truth.

    What it leaves out, Dagster leaves out downstream too: only the one base may do so, never a
    reference beside it.
    """
    wanted_now = any(
        venue.until is None or venue.until > settings.now() for venue in settings.venues.values()
    )
    return wanted_now and {venue.base for venue in settings.venues.values()} == {timeframe}


def rollup_assets(
    settings: Settings, grid: dg.MultiPartitionsDefinition, tell: Tell
) -> dg.AssetsDefinition:
    """All rollups: one step, one read of the raw bars, an asset per timeframe."""
    tables = {tf: rollup_table(tf) for tf in settings.rollup_timeframes}
    deps = [raw_table(tf) for tf in settings.raw_timeframes]
    kinds = {"polars", "duckdb" if settings.rollups == "duckdb" else "parquet"}
    specs = [_spec(t, deps, _rollup_words(tf), kinds) for tf, t in tables.items()]

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
        results = {
            tf: Results(context, asset_key(t), tell, skippable=True) for tf, t in tables.items()
        }
        with (
            failure_told(tell, partitions),
            open_toolbox(settings, warehouse.get_connection) as toolbox,
        ):
            roll_up_into(results, toolbox, partitions)
        yield from finished(list(results.values()))

    return roll_up


def fetch_into(
    results: Results,
    toolbox: Toolbox,
    timeframe: Timeframe,
    partitions: Sequence[Partition],
    again: Window | None = None,
    asks: bool = True,
) -> list[Told]:
    """Ingest and audit the partitions of a raw asset, and what each brought; bars of `again` are asked
    for once more.

    `asks`: off after an import, when what files have told is audited and no venue is asked.
    """
    fetched, unexplained = [], []
    for done in (
        ingest(toolbox, timeframe, partitions, again)
        if asks
        else (as_stored(toolbox, timeframe, p) for p in partitions)
    ):
        fetched.append(told(done))
        findings = audit_raw(toolbox, done) if done.error is None else []
        results.add(
            done.partition,
            _raw_metadata(done),
            findings,
            done.error,
            changed=done.account.stored > 0,
        )
        if any(not gap.cause for gap in done.gaps):
            unexplained.append(replace(done, bars=done.bars.select("open_time")))
    explained = explain(
        toolbox, partitions, ask=asks
    )  # what one market lacks, the others tell apart
    for done in unexplained:
        if done.error is None and (raw_table(timeframe), done.partition) in explained:
            results.renew(done.partition, audit_gaps(toolbox, done))
    results.cover(*daily_coverage(toolbox, raw_table(timeframe)))
    return fetched


def roll_up_into(
    results: Mapping[Timeframe, Results], toolbox: Toolbox, partitions: Sequence[Partition]
) -> None:
    """Derive and audit the partitions of all rollups; one with a red blocking check fails alone."""
    if not results:
        return
    blocked = {check.partition: check for check in toolbox.ledger.red_checks() if check.blocking}
    for partition in partitions:
        if partition in blocked:
            check = blocked[partition]
            error = CheckFailed(
                f"{check.table} {check.name} is red: {check.says}; nothing is rolled up from it"
            )
            for result in results.values():
                result.add(partition, {}, [], error)
    for derived in derive(
        toolbox, [partition for partition in partitions if partition not in blocked]
    ):
        for tf, result in results.items():
            findings = audit_rollup(toolbox, derived, tf)
            result.add(
                derived.partition,
                _rollup_metadata(derived, tf),
                findings,
                changed=derived.changed.get(tf, 0) > 0,
            )
    covered = daily_coverage(toolbox, rollup_table(next(iter(results))))  # they are made together
    for result in results.values():
        result.cover(*covered)


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
        "bars_corrected": done.replaced.height,
        "closes": dg.MetadataValue.md(draw_sparkline(done.bars["close"])),
        "candles": dg.MetadataValue.md(draw_candles(done.bars)),
        "dagster/partition_row_count": done.bars.height,
    }
    if done.bars.height:
        metadata |= {"first_bar": format_time(opens[0]), "last_bar": format_time(opens[-1])}
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
        "first_bar": format_time(frame["open_time"][0]),
        "last_bar": format_time(frame["open_time"][-1]),
        "closes": dg.MetadataValue.md(draw_sparkline(frame["close"])),
        "dagster/partition_row_count": frame.height,
    }

"""Wiped partitions are missing everywhere; pruned runs leave every asset's page as it was.

All runs are real ones.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster._core.storage.partition_status_cache import AssetPartitionStatus, AssetStatusCacheValue
from dagster._core.test_utils import in_process_test_workspace
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin
from dagster_graphql.schema import create_schema

from marketdata_assets.cli.dagster_home import dagster_environment
from marketdata_assets.context import open_context
from marketdata_assets.dagster_ext import partition_wiping
from marketdata_assets.dagster_ext.event_log_sqlite import PooledSqliteEventLogStorage
from marketdata_assets.dagster_ext.prune import PruneSummary, prune_runs
from marketdata_assets.dagster_ext.runs import RUN_LOGS
from marketdata_assets.defs.jobs import INGEST, build_definitions
from marketdata_assets.defs.partitions import RANGE_END, RANGE_START, market_months
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import raw_table
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.settings.load import load_settings
from marketdata_assets.settings.universe import Settings
from marketdata_assets.sources.sandbox.server import SandboxExchange, serve_in_thread
from marketdata_tests.conftest import SANDBOX_NOW

pytestmark = pytest.mark.server

RAW, HOUR = dg.AssetKey(["raw", "ohlcv_1m"]), dg.AssetKey(["rollup", "ohlcv_1h"])
OHLC, COMPLETE = dg.AssetCheckKey(RAW, "ohlc"), dg.AssetCheckKey(HOUR, "complete")
BTC_NOV, BTC_DEC = "binance:BTC-USDT|2023-11-01", "binance:BTC-USDT|2023-12-01"
ETH_NOV, ETH_DEC = "binance:ETH-USDT|2023-11-01", "binance:ETH-USDT|2023-12-01"
KEYS = [BTC_NOV, BTC_DEC, ETH_NOV, ETH_DEC]
PLANNED = ("ASSET_MATERIALIZATION_PLANNED", "ASSET_CHECK_EVALUATION_PLANNED")
LATER = datetime.now(UTC) + timedelta(days=10)


def run(
    settings: Settings, instance: dg.DagsterInstance, start: str, end: str
) -> dg.ExecuteInProcessResult:
    job = build_definitions(settings).resolve_job_def(INGEST)
    return job.execute_in_process(
        instance=instance, tags={RANGE_START: start, RANGE_END: end}, raise_on_error=False
    )


def swap_high_and_low(settings: Settings, key: str) -> None:
    """Make the blocking check of stored bars red; a second call undoes it."""
    with open_context(settings) as context:
        table, partition = raw_table(TIMEFRAMES["1m"]), Partition.parse(key)
        bars = context.storage.lake.read(table, partition)
        assert bars is not None
        context.storage.lake.write(
            table, partition, bars.rename({"high": "low", "low": "high"}).select(bars.columns)
        )


def open_instance(
    monkeypatch: pytest.MonkeyPatch, home: Path
) -> tuple[Settings, AbstractContextManager[dg.DagsterInstance]]:
    monkeypatch.setenv("MARKETDATA_UNIVERSE", str(home / "universe.yaml"))
    monkeypatch.setenv("MARKETDATA_STATE", str(home / "state"))
    settings = load_settings()
    for name, value in dagster_environment(settings).items():
        monkeypatch.setenv(name, value)
    return settings, dg.DagsterInstance.get()


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home with six finished runs and one in progress; tests work on copies of it.

    All four partitions; BTC_DEC again; BTC_NOV fails and succeeds; ETH_NOV fails, so that its
    rollups are red; BTC_DEC again; BTC_DEC in progress.
    """
    home = tmp_path_factory.mktemp("history")
    exchange = SandboxExchange(now=lambda: SANDBOX_NOW, weight_limit=10**9)
    with serve_in_thread(exchange) as url, pytest.MonkeyPatch.context() as patch:
        venue = [
            "  binance:",
            "    symbols: [BTC/USDT, ETH/USDT]",
            "    since: 2023-11-30",
            "    until: 2023-12-02",
            "    reference: [1h]",
        ]
        lines = [
            "venues:",
            *venue,
            f"    base_url: {url}",
            f"lake: {home / 'lake'}",
            "rollups: parquet",
            "timeframes: [1h, 1d]",
        ]
        (home / "universe.yaml").write_text("\n".join(lines) + "\n")
        settings, opened = open_instance(patch, home)
        with opened as instance:
            assert run(settings, instance, BTC_NOV, ETH_DEC).success
            assert run(settings, instance, BTC_DEC, BTC_DEC).success
            swap_high_and_low(settings, BTC_NOV)
            assert not run(settings, instance, BTC_NOV, BTC_NOV).success
            swap_high_and_low(settings, BTC_NOV)
            assert run(settings, instance, BTC_NOV, BTC_NOV).success
            swap_high_and_low(settings, ETH_NOV)
            assert not run(settings, instance, ETH_NOV, ETH_NOV).success
            assert run(settings, instance, BTC_DEC, BTC_DEC).success
            job = build_definitions(settings).resolve_job_def(INGEST)
            tags = {RANGE_START: BTC_DEC, RANGE_END: BTC_DEC}
            instance.create_run_for_job(job, tags=tags, status=dg.DagsterRunStatus.STARTED)
        yield home


Home = tuple[Settings, dg.DagsterInstance]


@pytest.fixture
def home(history: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    """The settings and the instance of a copy of the history; the lake is shared."""
    shutil.copytree(history / "state", tmp_path / "state")
    shutil.copy(history / "universe.yaml", tmp_path)
    settings, opened = open_instance(monkeypatch, tmp_path)
    with opened as instance:
        yield settings, instance


def storage(instance: dg.DagsterInstance) -> PooledSqliteEventLogStorage:
    found = instance.event_log_storage
    assert isinstance(found, PooledSqliteEventLogStorage)
    return found


def index_of(instance: dg.DagsterInstance) -> sqlite3.Connection:
    return sqlite3.connect(storage(instance).path_for_shard("index"))


def statuses(home: Home, key: dg.AssetKey) -> dict[str, AssetPartitionStatus | None]:
    settings, instance = home
    return dict(
        instance.get_status_by_partition(key, KEYS, market_months(settings)) or dict.fromkeys(KEYS)
    )


def pages(home: Home) -> dict[str, Any]:
    """Compute anew all that the pages of all assets and checks show."""
    settings, instance = home
    grid, shown, log = market_months(settings), {}, instance.event_log_storage
    graph = build_definitions(settings).get_repository_def().asset_graph
    for key in graph.get_all_asset_keys():
        instance.wipe_asset_cached_status([key])
        name = key.to_user_string()
        shown[f"{name} statuses"] = statuses(home, key)
        shown[f"{name} statuses from the cache"] = statuses(home, key)
        shown[f"{name} materialized"] = instance.get_materialized_partitions(key)
        shown[f"{name} materializations"] = instance.fetch_materializations(key, limit=1000).records
        shown[f"{name} observations"] = instance.fetch_observations(key, limit=1000).records
        shown[f"{name} latest"] = instance.get_latest_materialization_event(key)
        shown[f"{name} record"] = instance.get_asset_records([key])
        shown[f"{name} tags"] = instance.get_event_tags_for_asset(key)
        shown[f"{name} latest runs"] = [
            instance.get_latest_planned_materialization_info(key, k) for k in (None, *KEYS)
        ]
    for check in graph.asset_check_keys:
        shown[f"{check} history"] = log.get_asset_check_execution_history(check, limit=1000)
        shown[f"{check} latest"] = (
            instance.event_log_storage.get_latest_asset_check_execution_by_key([check])
        )
        shown[f"{check} evaluation"] = instance.get_latest_asset_check_evaluation_record(check)
        shown[f"{check} grid"] = log.get_asset_check_state([(check, grid)])
        shown[f"{check} partitions"] = log.get_asset_check_partition_info([check])
    shown["runs"] = instance.get_runs()
    return shown


def checked(instance: dg.DagsterInstance, check: dg.AssetCheckKey) -> set[str | None]:
    return {
        r.partition
        for r in instance.event_log_storage.get_asset_check_execution_history(check, limit=1000)
    }


GOOD, RED = AssetPartitionStatus.MATERIALIZED, AssetPartitionStatus.FAILED


def test_the_history_is_what_these_tests_need(home: Home) -> None:
    assert statuses(home, RAW) == {
        BTC_NOV: GOOD,
        BTC_DEC: AssetPartitionStatus.IN_PROGRESS,
        ETH_NOV: GOOD,
        ETH_DEC: GOOD,
    }
    assert statuses(home, HOUR)[ETH_NOV] == RED
    assert checked(home[1], OHLC) == {None, *KEYS}
    assert sum(1 for name, value in pages(home).items() if value) > 50


# --- wiped partitions


def test_wiped_partitions_are_missing_everywhere_and_the_others_stay(home: Home) -> None:
    settings, instance = home
    statuses(home, HOUR)  # cached by now
    before = pages(home)
    instance.wipe_asset_partitions(HOUR, [BTC_NOV, ETH_NOV])
    assert statuses(home, HOUR) == {
        **before["rollup/ohlcv_1h statuses"],
        BTC_NOV: None,
        ETH_NOV: None,
    }
    assert instance.get_materialized_partitions(HOUR) == {BTC_DEC, ETH_DEC}
    kept = [
        r
        for r in before["rollup/ohlcv_1h materializations"]
        if r.partition_key in (BTC_DEC, ETH_DEC)
    ]
    assert instance.fetch_materializations(HOUR, limit=1000).records == kept
    assert len(instance.get_event_tags_for_asset(HOUR)) == len(kept)
    assert checked(instance, COMPLETE) == {None, BTC_DEC, ETH_DEC}
    assert {
        info.partition_key for info in storage(instance).get_asset_check_partition_info([COMPLETE])
    } == {None, BTC_DEC, ETH_DEC}
    assert [
        instance.get_latest_planned_materialization_info(HOUR, key) for key in (BTC_NOV, ETH_NOV)
    ] == [None, None]
    after = pages(home)
    assert {name for name in before if after[name] != before[name]} <= {
        n for n in before if n.startswith("rollup/ohlcv_1h")
    } | {f"{COMPLETE} {part}" for part in ("history", "partitions", "grid")} | {
        f"{dg.AssetCheckKey(HOUR, 'matches_native')} {part}"
        for part in ("history", "partitions", "grid")
    }
    assert run(settings, instance, BTC_NOV, BTC_NOV).success
    assert statuses(home, HOUR)[BTC_NOV] == GOOD
    assert checked(instance, COMPLETE) == {None, BTC_NOV, BTC_DEC, ETH_DEC}
    with closing(index_of(instance)) as index:
        assert index.execute(
            "SELECT cached_status_data FROM asset_keys WHERE asset_key LIKE '%ohlcv_1h%'"
        ).fetchone()[0]


def test_the_latest_materialization_is_the_newest_of_the_rest(home: Home) -> None:
    _, instance = home
    assert instance.fetch_materializations(HOUR, limit=1).records[0].partition_key == BTC_DEC
    instance.wipe_asset_partitions(HOUR, [BTC_DEC])
    other = instance.fetch_materializations(HOUR, limit=1).records[0]
    latest = instance.get_latest_materialization_event(HOUR)
    assert latest == other.event_log_entry
    assert (
        instance.get_asset_records([HOUR])[0].asset_entry.last_materialization_storage_id
        == other.storage_id
    )
    planned = instance.get_latest_planned_materialization_info(HOUR)
    assert planned is not None
    assert planned.storage_id > other.storage_id
    assert instance.get_asset_records([HOUR])[0].asset_entry.last_run_id == planned.run_id
    instance.wipe_asset_partitions(HOUR, KEYS)
    assert instance.get_latest_materialization_event(HOUR) is None
    assert statuses(home, HOUR) == dict.fromkeys(KEYS)


def test_events_of_wiped_checks_leave_the_index_and_run_logs_stay(home: Home) -> None:
    _, instance = home
    runs = {r.run_id: len(instance.all_logs(r.run_id)) for r in instance.get_runs()}
    instance.wipe_asset_partitions(RAW, [ETH_NOV])
    with closing(index_of(instance)) as index:
        events = index.execute(
            "SELECT event FROM event_logs WHERE dagster_event_type = 'ASSET_CHECK_EVALUATION'"
        )
        data = [json.loads(e)["dagster_event"]["event_specific_data"] for (e,) in events]
    found = Counter((tuple(d["asset_key"]["path"]), d["partition"]) for d in data)
    assert found["raw", "ohlcv_1m", ETH_NOV] == found[("raw", "ohlcv_1m"), ETH_NOV] == 0
    assert found[("raw", "ohlcv_1h"), ETH_NOV]
    assert found[("raw", "ohlcv_1m"), BTC_NOV]
    assert found[("raw", "ohlcv_1m"), None]
    assert {r.run_id: len(instance.all_logs(r.run_id)) for r in instance.get_runs()} == runs


def test_ids_are_not_used_again(home: Home) -> None:
    settings, instance = home
    with closing(index_of(instance)) as index:
        last = "SELECT max(id) FROM event_logs"
        index.execute(
            "DELETE FROM event_logs WHERE id >"
            " (SELECT max(id) FROM event_logs WHERE asset_key LIKE '%ohlcv_1h%')"
        )
        index.commit()
        before = index.execute(last).fetchone()[0]
        for key in (RAW, HOUR, dg.AssetKey(["raw", "ohlcv_1h"])):
            instance.wipe_asset_partitions(key, KEYS)
        assert index.execute(last).fetchone()[0] > before
    run(settings, instance, BTC_NOV, BTC_NOV)
    assert instance.fetch_materializations(HOUR, limit=1).records[0].storage_id > before


def test_a_status_computed_before_the_wipe_is_not_cached_after_it(home: Home) -> None:
    _, instance = home
    instance.wipe_asset_cached_status([HOUR])
    assert statuses(home, HOUR)[ETH_DEC] == GOOD
    stale = instance.get_asset_records([HOUR])[0].asset_entry.cached_status
    assert isinstance(stale, AssetStatusCacheValue)
    instance.wipe_asset_partitions(HOUR, [ETH_DEC])
    instance.update_asset_cached_status_data(HOUR, stale)  # by a web server that was just computing
    assert statuses(home, HOUR)[ETH_DEC] is None


def test_a_wipe_is_whole_or_not_at_all(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    _, instance = home
    before = pages(home)
    monkeypatch.setattr(partition_wiping, "_RESET_ASSET", "UPDATE nonsense SET x = :asset")
    with pytest.raises(Exception, match="nonsense"):
        instance.wipe_asset_partitions(HOUR, KEYS)
    assert pages(home) == before


def test_thousands_of_partitions_are_wiped_together(home: Home) -> None:
    instance = home[1]
    instance.wipe_asset_partitions(
        HOUR, [*KEYS, *(f"binance:X{i}-USDT|2023-11-01" for i in range(50_000))]
    )
    assert instance.get_materialized_partitions(HOUR) == set()


@contextmanager
def graphql(instance: dg.DagsterInstance) -> Iterator[Callable[..., Any]]:
    """Answer as the web server does."""
    origin = LoadableTargetOrigin(module_name="marketdata_assets.definitions")
    no_warnings = warnings.catch_warnings(
        action="ignore", category=DeprecationWarning
    )  # Dagster's own, about its own
    with no_warnings, in_process_test_workspace(instance, origin) as context:
        schema = create_schema()

        def query_ui(query: str, **variables: Any) -> Any:
            answer = asyncio.run(
                schema.execute_async(query, context_value=context, variable_values=variables)
            )
            assert answer.errors is None
            return answer.data

        yield query_ui


def test_the_buttons_mutation_wipes_a_range(home: Home) -> None:
    _, instance = home
    wipe = """mutation($wiped: [PartitionsByAssetSelector!]!) {
        wipeAssets(assetPartitionRanges: $wiped) {
            __typename ... on UnsupportedOperationError { message } } }"""
    grid = """query { assetNodeOrError(assetKey: {path: ["rollup", "ohlcv_1h"]}) {
        ... on AssetNode { partitionStats { numMaterialized numFailed } } } }"""
    with graphql(instance) as query_ui:
        assert query_ui(grid)["assetNodeOrError"]["partitionStats"] == {
            "numMaterialized": 2,
            "numFailed": 1,
        }
        span = {"start": ETH_NOV, "end": ETH_DEC}
        asked = [{"assetKey": {"path": ["rollup", "ohlcv_1h"]}, "partitions": {"range": span}}]
        assert query_ui(wipe, wiped=asked)["wipeAssets"] == {"__typename": "AssetWipeSuccess"}
    with graphql(instance) as query_ui:
        assert query_ui(grid)["assetNodeOrError"]["partitionStats"] == {
            "numMaterialized": 1,
            "numFailed": 0,
        }


# --- pruned runs


def files(home: Home) -> dict[str, int]:
    state = home[0].state / "dagster"
    return {
        str(f.relative_to(state)): f.stat().st_size
        for f in state.rglob("*")
        if f.is_file() and f.suffix not in (".db-wal", ".db-shm")
    }


def prune(home: Home, *, dry_run: bool = False) -> PruneSummary:
    return prune_runs(home[1], 7, now=LATER, dry_run=dry_run)


def test_pages_are_unchanged_and_old_runs_are_gone(home: Home) -> None:
    settings, instance = home
    before, sizes = pages(home), files(home)
    plan = prune(home, dry_run=True)
    assert files(home).keys() == sizes.keys()
    summary = prune(home)
    assert asdict(summary) == {**asdict(plan), "dry_run": False}
    after = pages(home)
    assert [name for name in before if after[name] != before[name]] == []
    left = files(home)
    assert summary.logs == summary.runs == summary.outputs == 6
    assert [name for name in left if name.endswith((".db", ".err"))] == [
        name
        for name in sizes
        if Path(name).stem in ("index", "runs", "schedules", "")
        or run_in_progress(instance) in name
    ]
    went = {name: size for name, size in sizes.items() if name not in left}
    assert (
        sum(size for name, size in went.items() if name.startswith("history")) == summary.log_bytes
    )
    assert (
        sum(size for name, size in went.items() if name.startswith("storage"))
        == summary.output_bytes
    )
    assert not list((settings.state / "dagster/storage").iterdir())
    assert asdict(prune(home)) == asdict(PruneSummary(dry_run=False))


def run_in_progress(instance: dg.DagsterInstance) -> str:
    return instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED]))[0].run_id


def test_the_output_of_old_runs_is_pruned(home: Home) -> None:
    _, instance = home
    finished, in_progress = (
        instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.FAILURE]))[0].run_id,
        run_in_progress(instance),
    )
    logs = Path(instance.root_directory, RUN_LOGS)
    logs.mkdir()
    for run_id in (finished, in_progress):
        (logs / f"{run_id}.log").write_text("its last words")
    assert prune(home, dry_run=True).output_bytes == prune(home).output_bytes
    assert [log.stem for log in logs.iterdir()] == [in_progress]


def test_plans_that_a_page_shows_stay(home: Home) -> None:
    _, instance = home
    with closing(index_of(instance)) as index:
        all_events = (
            "SELECT run_id, dagster_event_type, count(*) FROM event_logs"
            " GROUP BY 1, 2 ORDER BY 1, 2"
        )
        before = {(run_id, kind): count for run_id, kind, count in index.execute(all_events)}
        summary = prune(home)
        after = {(run_id, kind): count for run_id, kind, count in index.execute(all_events)}
    lost = {
        (run_id, kind): count - after.get((run_id, kind), 0)
        for (run_id, kind), count in before.items()
    }
    assert sum(lost.values()) == summary.plans > 0
    succeeded = {
        r.run_id for r in instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.SUCCESS]))
    }
    assert {run_id for (run_id, kind), count in lost.items() if count} == succeeded
    assert {kind for (run_id, kind), count in lost.items() if count} == set(PLANNED)


def test_recent_runs_stay(home: Home) -> None:
    sizes = files(home)
    assert prune_runs(home[1], 11, now=LATER).runs == 0
    assert files(home) == sizes


@pytest.mark.parametrize("left", ["plans", "outputs"])
def test_what_an_interrupted_prune_left_is_found_by_itself(home: Home, left: str) -> None:
    settings, instance = home
    plan = prune(home, dry_run=True)
    for run_id in storage(instance).get_all_run_ids():
        Path(storage(instance).path_for_shard(run_id)).unlink()
    if left == "plans":
        shutil.rmtree(settings.state / "dagster/storage")
        expected = PruneSummary(False, runs=4, plans=plan.plans, plan_bytes=plan.plan_bytes)
    else:
        with closing(index_of(instance)) as index:
            index.execute("DELETE FROM event_logs WHERE dagster_event_type LIKE '%PLANNED'")
            index.commit()
        expected = PruneSummary(False, runs=6, outputs=6, output_bytes=plan.output_bytes)
    assert asdict(prune(home)) == asdict(expected)


PAGE = """query($id: ID!) { runOrError(runId: $id) { ... on Run {
    status startTime endTime canTerminate
    stats { __typename ... on RunStatsSnapshot { materializations startTime endTime } }
    stepStats { stepKey status } assets { key { path } } assetChecks { name }
    assetMaterializations { partition stepStats { stepKey } runOrError { __typename } }
    eventConnection { events { __typename } cursor hasMore } } }
    logsForRun(runId: $id) { __typename ... on EventConnection { events { __typename } } } }"""


def test_the_page_of_a_pruned_run_shows_what_the_index_keeps(home: Home) -> None:
    _, instance = home
    first = instance.get_runs()[-1].run_id
    with graphql(instance) as query_ui:
        before = query_ui(PAGE, id=first)["runOrError"]
        prune(home)
        after = query_ui(PAGE, id=first)
    assert len(after["logsForRun"]["events"]) == len(
        after["runOrError"]["eventConnection"]["events"]
    )
    kinds = Counter(
        event["__typename"] for event in after["runOrError"]["eventConnection"]["events"]
    )
    assert {
        "RunStartEvent",
        "RunSuccessEvent",
        "MaterializationEvent",
        "AssetCheckEvaluationEvent",
    } <= set(kinds)
    assert "ExecutionStepStartEvent" not in kinds
    for same in ("status", "startTime", "endTime", "stats", "assetChecks", "assetMaterializations"):
        assert after["runOrError"][same] == before[same]
    assert instance.all_logs("never was") == []
    # a query across all runs opens every log
    assert (
        len(
            storage(instance).get_event_records(
                dg.EventRecordsFilter(dg.DagsterEventType.ASSET_CHECK_EVALUATION)
            )
        )
        > 50
    )
    assert {Path(name).stem for name in files(home) if name.startswith("history/runs/")} == {
        "index",
        run_in_progress(instance),
    }


def test_a_pruned_run_can_still_log_and_be_deleted(home: Home) -> None:
    _, instance = home
    prune(home)
    late, gone = instance.get_runs()[-2:]
    kept = len(instance.all_logs(gone.run_id))
    instance.report_engine_event("came late", late)
    assert [e.message for e in instance.all_logs(late.run_id)] == ["came late"]
    assert kept > 0
    assert prune(home).logs == 1
    assert len(instance.all_logs(late.run_id)) > 1
    instance.delete_run(gone.run_id)
    assert instance.all_logs(gone.run_id) == []


def test_a_log_with_events_that_are_not_in_the_index_stays(home: Home) -> None:
    _, instance = home
    victims = [r.run_id for r in instance.get_runs()[1:4]]
    kinds = ("ASSET_MATERIALIZATION", "ASSET_CHECK_EVALUATION")
    with closing(index_of(instance)) as index:
        for run_id, kind in zip(victims, kinds, strict=False):
            one = "SELECT max(id) FROM event_logs WHERE run_id = ? AND dagster_event_type = ?"
            index.execute(f"DELETE FROM event_logs WHERE id = ({one})", [run_id, kind])
        index.commit()
    summary = prune(home)
    assert (summary.logs, summary.logs_kept_unproven) == (4, 2)
    for run_id, there in zip(victims, (True, True, False), strict=True):
        assert Path(storage(instance).path_for_shard(run_id)).exists() is there


def test_a_log_that_is_open_anywhere_waits(home: Home) -> None:
    _, instance = home
    open_here = instance.get_runs()[1].run_id
    with dg.DagsterInstance.get() as other:  # a web server
        shown = len(other.all_logs(open_here))
        summary = prune(home)
        assert (summary.logs, summary.logs_kept_open) == (5, 1)
        assert len(other.all_logs(open_here)) == shown
        for run in instance.get_runs()[2:] * 2:  # it opens others and lets go of it
            other.all_logs(run.run_id)
        storage(other).close_shard(open_here)
        # Dagster never initializes a file again that it has opened once.
        storage(other)._initialized_dbs.add(open_here)
        assert prune(home).logs == 1
        assert 0 < len(other.all_logs(open_here)) < shown
        other.report_engine_event("came late", other.get_run_by_id(open_here))
        assert len(other.all_logs(open_here)) == 1


KILLED = """
import os, signal, sqlite3, sys
from datetime import datetime
import dagster as dg
from marketdata_assets.dagster_ext import prune, prune_sqlite
left = 0

def step(*_):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

class Counted(sqlite3.Connection):
    def execute(self, *arguments):
        step()
        return super().execute(*arguments)

sys.addaudithook(lambda name, _: step() if name in ("os.remove", "os.rmdir") else None)
for left in range(4, 10_000, 9):
    child = os.fork()
    if child == 0:
        with dg.DagsterInstance.get() as instance:
            instance.get_runs(limit=1)
            connect = sqlite3.connect
            prune_sqlite.sqlite3.connect = lambda *a, **k: connect(*a, factory=Counted, **k)
            prune.prune_runs(instance, 7, now=datetime.fromisoformat(sys.argv[1]))
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
    print("killed", flush=True)
"""


def test_killed_again_and_again_it_ends_the_same(home: Home) -> None:
    """Each process is killed nine steps (deletions and queries) later, until one finishes."""
    before, sizes = pages(home), files(home)
    plan = prune(home, dry_run=True)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, LATER.isoformat()],
        capture_output=True,
        text=True,
        env=dict(os.environ),
    )
    assert done.stdout.count("killed") >= 5, done.stderr
    after = pages(home)
    assert [name for name in before if after[name] != before[name]] == []
    assert len(sizes) - len(files(home)) == plan.logs + 3 * plan.outputs
    assert prune(home).runs == 0


def test_free_space_is_given_back_where_it_is_worth_it(home: Home) -> None:
    _, instance = home
    big = Path(storage(instance).path_for_shard("index"))
    with closing(index_of(instance)) as index:
        index.execute(
            "CREATE TABLE filler AS WITH RECURSIVE"
            " n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 2000)"
            " SELECT i, zeroblob(4000) AS hole FROM n"
        )
        index.execute("DROP TABLE filler")
        index.commit()
        index.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    before, size = pages(home), big.stat().st_size
    with closing(index_of(instance)) as reader:  # beside open connections
        reader.execute("SELECT max(id) FROM event_logs").fetchone()
        summary = prune(home)
    assert summary.reclaimed_bytes == size - big.stat().st_size > 8_000_000
    assert pages(home) == before
    assert prune(home).reclaimed_bytes == 0


def test_as_a_process_it_prints_one_object(home: Home) -> None:
    command = [
        sys.executable,
        "-m",
        "marketdata_assets.dagster_ext.prune",
        "--days",
        "0",
        "--dry-run",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ))
    summary = json.loads(done.stdout)
    assert summary == asdict(prune(home, dry_run=True))
    assert summary["dry_run"] is True
    assert summary["logs"] == 6


def test_what_ticks_logged_is_pruned_by_its_age(home: Home) -> None:
    """A day of `backfill_missed` leaves 2,880 files; what others keep beside them stays."""
    _, instance = home
    outputs = Path(instance.storage_directory())
    ticks, asset = outputs / "__repository__" / "backfill_missed", outputs / "raw" / "mine"
    for folder, name in ((ticks, "1.err"), (ticks, "2.complete"), (ticks, "3.err"), (asset, "7")):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("text")
        if name != "3.err":
            os.utime(folder / name, (1, 1))
    assert prune_runs(instance, 14, dry_run=True).tick_logs == 2
    summary = prune_runs(instance, 14)
    assert (summary.tick_logs, summary.tick_log_bytes) == (2, 8)
    assert [file.name for file in ticks.iterdir()] == ["3.err"]
    assert (asset / "7").exists()

"""The definitions in Dagster: the catalog, range runs and their results, and the real daemon."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from marketdata_assets.cli.dagster_home import dagster_environment
from marketdata_assets.context import open_context
from marketdata_assets.dagster_ext.runs import PROCESS_TAG, end_dead_runs
from marketdata_assets.defs.jobs import INGEST, build_definitions
from marketdata_assets.defs.partitions import RANGE_END, RANGE_START
from marketdata_assets.model.events import Event, PartitionFailed
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import raw_table
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.model.window import Window, parse_time
from marketdata_assets.settings.universe import Settings
from marketdata_assets.sources.sandbox.bars import generate_bars
from marketdata_assets.sources.sandbox.server import SandboxExchange
from marketdata_assets.system import process_id
from marketdata_tests.conftest import Universe

RAW = dg.AssetKey(["raw", "ohlcv_1m"])
HOUR = dg.AssetKey(["rollup", "ohlcv_1h"])
ROLLUPS = ("5m", "15m", "30m", "1h", "4h", "12h", "1d", "1w")
BTC_NOV, BTC_DEC = "binance:BTC-USDT|2023-11-01", "binance:BTC-USDT|2023-12-01"
ETH_NOV, ETH_DEC = "binance:ETH-USDT|2023-11-01", "binance:ETH-USDT|2023-12-01"


@pytest.fixture
def settings(sandbox: tuple[SandboxExchange, str], universe: Universe) -> Settings:
    """Two markets, six days of 2023-11 and two of 2023-12, with the venue's own hours."""
    return universe(
        sandbox[1],
        symbols="[BTC/USDT, ETH/USDT]",
        since="2023-11-25",
        until="2023-12-03",
        extra="reference: [1h]",
    )


def run(
    settings: Settings, instance: dg.DagsterInstance, start: str, end: str, **options: Any
) -> dg.ExecuteInProcessResult:
    job = build_definitions(settings).resolve_job_def(INGEST)
    return job.execute_in_process(
        instance=instance,
        tags={RANGE_START: start, RANGE_END: end},
        raise_on_error=False,
        **options,
    )


def latest(instance: dg.DagsterInstance, key: dg.AssetKey, partition: str) -> dict[str, Any]:
    wanted = dg.AssetRecordsFilter(asset_key=key, asset_partitions=[partition])
    records = instance.fetch_materializations(wanted, limit=1).records
    assert records, f"{key} {partition} was never materialized"
    materialization = records[0].asset_materialization
    assert materialization is not None
    return {name: value.value for name, value in materialization.metadata.items()}


def check_results(
    instance: dg.DagsterInstance, key: dg.AssetKey, check: str
) -> dict[str | None, bool]:
    records = instance.event_log_storage.get_asset_check_execution_history(
        dg.AssetCheckKey(key, check), limit=100
    )
    done = [
        r.event.dagster_event.asset_check_evaluation_data
        for r in records
        if r.event and r.event.dagster_event
    ]
    return {evaluation.partition: evaluation.passed for evaluation in reversed(done)}


def checked_partitions(
    settings: Settings, instance: dg.DagsterInstance, key: dg.AssetKey, check: str
) -> dict[str, set[str]]:
    """Return the partition keys by outcome, as the grid of the check shows them."""
    name, grid = (
        dg.AssetCheckKey(key, check),
        build_definitions(settings).get_repository_def().asset_graph.get(key).partitions_def,
    )
    state = instance.event_log_storage.get_asset_check_state([(name, grid)])[name]
    return {
        status.value: set(subset.subset_value.get_partition_keys())
        for status, subset in state.subsets.items()
    }


def test_the_catalog_describes_every_asset(settings: Settings) -> None:
    graph = build_definitions(settings).get_repository_def().asset_graph
    names = {key.to_user_string() for key in graph.get_all_asset_keys()}
    assert names == {"raw/ohlcv_1m", "raw/ohlcv_1h", *(f"rollup/ohlcv_{tf}" for tf in ROLLUPS)} | {
        "reference/markets"
    }
    checks = {key.to_user_string() for key in graph.asset_check_keys}
    assert {
        f"raw/ohlcv_1m:{c}" for c in ("ohlc", "duplicates", "gaps", "freshness", "accounting")
    } <= checks
    assert {
        "rollup/ohlcv_1h:complete",
        "rollup/ohlcv_1h:matches_native",
        "rollup/ohlcv_1w:complete",
    } <= checks
    assert "rollup/ohlcv_5m:matches_native" not in checks
    for key in graph.get_all_asset_keys():
        node = graph.get(key)
        assert node.group_name == key.path[0]
        assert node.kinds
        assert node.description
        if key.path[0] == "reference":
            continue
        assert node.metadata["dagster/column_schema"].columns[0].name == "open_time"
        assert node.partitions_def is not None
        assert set(node.partitions_def.get_partition_keys()) == {BTC_NOV, BTC_DEC, ETH_NOV, ETH_DEC}
    assert graph.get(HOUR).parent_keys == {RAW, dg.AssetKey(["raw", "ohlcv_1h"])}
    assert set(graph.get(RAW).pools or ()) == set()
    assert set(graph.get(HOUR).pools or ()) == {"warehouse"}


def test_a_range_run_gives_every_partition_its_own_results(
    settings: Settings, instance: dg.DagsterInstance
) -> None:
    assert run(settings, instance, BTC_NOV, ETH_DEC).success
    assert instance.get_materialized_partitions(RAW) == {BTC_NOV, BTC_DEC, ETH_NOV, ETH_DEC}
    assert instance.get_materialized_partitions(HOUR) == {BTC_NOV, BTC_DEC, ETH_NOV, ETH_DEC}
    for check in ("ohlc", "duplicates", "gaps", "accounting"):
        assert check_results(instance, RAW, check) == {
            None: True,
            BTC_NOV: True,
            BTC_DEC: True,
            ETH_NOV: True,
            ETH_DEC: True,
        }
    for check in ("complete", "matches_native"):
        assert check_results(instance, HOUR, check) == {
            None: True,
            BTC_NOV: True,
            BTC_DEC: True,
            ETH_NOV: True,
            ETH_DEC: True,
        }
    everything = {BTC_NOV, BTC_DEC, ETH_NOV, ETH_DEC}
    assert checked_partitions(settings, instance, RAW, "ohlc")["SUCCEEDED"] == everything
    assert checked_partitions(settings, instance, HOUR, "matches_native")["SUCCEEDED"] == everything
    expected = generate_bars(
        "ETHUSDT", "1m", Window(parse_time("2023-11-25"), parse_time("2023-12-01"))
    )
    metadata = latest(instance, RAW, ETH_NOV)
    assert metadata["rows"] == expected.height
    assert metadata["first_bar"] == "2023-11-25T00:00:00Z"
    assert metadata["last_bar"] == "2023-11-30T23:59:00Z"
    assert (
        metadata["bytes"]
        == next(
            settings_lake(settings).glob("raw/ohlcv_1m/market=binance%3AETH-USDT/month=2023-11/*")
        )
        .stat()
        .st_size
    )
    assert metadata["requests"] >= expected.height // 1000
    assert {"retries", "seconds_waited_for_limits", "rows_quarantined"} <= set(metadata)
    assert len(metadata["closes"]) < 1000
    assert metadata["closes"].startswith("![closes](data:image/svg+xml")
    assert latest(instance, HOUR, ETH_NOV)["rows"] == 144


def settings_lake(settings: Settings) -> Path:
    return Path(settings.lake)


def test_a_run_over_fewer_partitions_than_its_range_fails(
    settings: Settings, instance: dg.DagsterInstance
) -> None:
    swapped = run(settings, instance, BTC_DEC, ETH_NOV)
    assert not swapped.success
    assert instance.get_materialized_partitions(RAW) == set()
    # a job's backfill sends the range of four partitions with the tags of the first one
    first = {
        "dagster/partition/market": "binance:BTC-USDT",
        "dagster/partition/month": "2023-11-01",
    }
    job = build_definitions(settings).resolve_job_def(INGEST)
    tags = {RANGE_START: BTC_NOV, RANGE_END: ETH_DEC, **first}
    smaller = job.execute_in_process(instance=instance, tags=tags, raise_on_error=False)
    done = instance.get_materialized_partitions(RAW)
    assert done == {BTC_NOV, BTC_DEC, ETH_NOV, ETH_DEC} if smaller.success else done == set()


def test_one_failing_market_leaves_the_others_materialized(
    sandbox: tuple[SandboxExchange, str], universe: Universe, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = universe(
        sandbox[1], symbols="[BTC/USDT, NOPE/USDT]", since="2023-11-29", until="2023-12-02"
    )
    for name, value in dagster_environment(settings).items():
        monkeypatch.setenv(name, value)
    events: list[Event] = []
    with dg.DagsterInstance.get() as instance:
        job = build_definitions(settings, events.append).resolve_job_def(INGEST)
        tags = {RANGE_START: BTC_NOV, RANGE_END: "binance:NOPE-USDT|2023-12-01"}
        result = job.execute_in_process(instance=instance, tags=tags, raise_on_error=False)
        assert not result.success
        assert instance.get_materialized_partitions(RAW) == {BTC_NOV, BTC_DEC}
        assert instance.get_materialized_partitions(HOUR) == {BTC_NOV, BTC_DEC}
        assert checked_partitions(settings, instance, RAW, "ohlc")["SUCCEEDED"] == {
            BTC_NOV,
            BTC_DEC,
        }
        assert checked_partitions(settings, instance, HOUR, "complete")["SUCCEEDED"] == {
            BTC_NOV,
            BTC_DEC,
        }
    failures = [event for event in events if isinstance(event, PartitionFailed)]
    assert {failure.partition for failure in failures} == {
        "binance:NOPE-USDT|2023-11-01",
        "binance:NOPE-USDT|2023-12-01",
    }
    assert all("did you mean" in f.message and f.exit_code == 2 for f in failures)


def test_a_partition_with_a_failed_blocking_check_is_not_rolled_up(
    settings: Settings, instance: dg.DagsterInstance
) -> None:
    assert run(settings, instance, BTC_NOV, BTC_NOV).success
    before = latest(instance, HOUR, BTC_NOV)
    with open_context(settings) as context:
        table, partition = raw_table(TIMEFRAMES["1m"]), Partition.parse(BTC_NOV)
        bars = context.storage.lake.read(table, partition)
        assert bars is not None
        swapped = bars.rename({"high": "low", "low": "high"}).select(bars.columns)
        context.storage.lake.write(table, partition, swapped)
    result = run(settings, instance, BTC_NOV, BTC_NOV)
    assert not result.success
    assert check_results(instance, RAW, "ohlc")[BTC_NOV] is False
    assert check_results(instance, RAW, "duplicates")[BTC_NOV] is True
    assert checked_partitions(settings, instance, RAW, "ohlc")["FAILED"] == {BTC_NOV}
    assert latest(instance, HOUR, BTC_NOV) == before
    result = run(settings, instance, BTC_NOV, ETH_NOV)  # with a partition that passes
    assert not result.success
    assert latest(instance, HOUR, BTC_NOV) == before
    assert instance.get_materialized_partitions(HOUR) == {BTC_NOV, ETH_NOV}
    with open_context(settings) as context:
        assert [
            (check.name, check.partition.key, check.blocking)
            for check in context.ledger.checks.failed()
        ] == [("ohlc", BTC_NOV, True)]


def test_matches_native_names_the_bar_that_differs(
    settings: Settings, instance: dg.DagsterInstance
) -> None:
    assert run(settings, instance, BTC_NOV, BTC_NOV).success
    with open_context(settings) as context:
        table, partition = raw_table(TIMEFRAMES["1h"]), Partition.parse(BTC_NOV)
        hours = context.storage.lake.read(table, partition)
        assert hours is not None
        trades = hours["trades"].to_list()
        context.storage.lake.write(
            table, partition, hours.with_columns(trades=hours["trades"].scatter([5], trades[5] + 1))
        )
    run(settings, instance, BTC_NOV, BTC_NOV)
    assert check_results(instance, HOUR, "matches_native")[BTC_NOV] is False
    assert check_results(instance, HOUR, "complete")[BTC_NOV] is True


def test_runs_of_killed_processes_are_ended_and_free_their_slots(
    settings: Settings, instance: dg.DagsterInstance
) -> None:
    job = build_definitions(settings).resolve_job_def(INGEST)
    gone = process_id(os.getpid()).replace(f":{os.getpid()}:", ":1:")
    dead = instance.create_run_for_job(
        job, tags={PROCESS_TAG: gone}, status=dg.DagsterRunStatus.STARTED
    )
    mine = process_id(os.getpid())
    living = instance.create_run_for_job(
        job, tags={PROCESS_TAG: mine}, status=dg.DagsterRunStatus.STARTED
    )
    instance.event_log_storage.set_concurrency_slots("warehouse", 1)
    assert instance.event_log_storage.claim_concurrency_slot(
        "warehouse", dead.run_id, "rollups"
    ).is_claimed
    assert end_dead_runs(instance) == 1
    statuses = {run.run_id: run.status for run in instance.get_runs()}
    assert statuses == {
        dead.run_id: dg.DagsterRunStatus.FAILURE,
        living.run_id: dg.DagsterRunStatus.STARTED,
    }
    assert instance.event_log_storage.claim_concurrency_slot(
        "warehouse", living.run_id, "rollups"
    ).is_claimed


BACKFILL = """mutation($params: LaunchBackfillParams!) {
    launchPartitionBackfill(backfillParams: $params) {
    __typename ... on LaunchBackfillSuccess { backfillId } ... on PythonError { message } } }"""
STATUS = """query($id: String!) { partitionBackfillOrError(backfillId: $id) {
    ... on PartitionBackfill { status runs { status } } } }"""


def graphql(port: int, query: str, **variables: Any) -> Any:
    body = json.dumps({"query": query, "variables": variables}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/graphql", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["data"]


@pytest.mark.timeout(300)
def test_materialized_from_the_ui_through_the_real_daemon(
    settings: Settings, tmp_path: Path
) -> None:
    """The daemon of `marketdata dev` runs what the button of an asset's page sends.

    That is a backfill of four partitions.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path / "folder"
    folder.mkdir()
    command = [sys.executable, "-m", "marketdata_assets.cli.main", "dev", "--port", str(port)]
    server = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert server.stdout is not None
        assert any(line.startswith("UI ready") for line in server.stdout)
        selection = [{"path": ["raw", "ohlcv_1m"]}, {"path": ["raw", "ohlcv_1h"]}]
        selection += [{"path": ["rollup", f"ohlcv_{tf}"]} for tf in ROLLUPS]
        params = {
            "assetSelection": selection,
            "partitionNames": [BTC_NOV, BTC_DEC, ETH_NOV, ETH_DEC],
        }
        launched = graphql(port, BACKFILL, params=params)["launchPartitionBackfill"]
        assert launched["__typename"] == "LaunchBackfillSuccess", launched
        backfill = {"status": "REQUESTED"}
        for _ in range(240):
            backfill = graphql(port, STATUS, id=launched["backfillId"])["partitionBackfillOrError"]
            if backfill["status"] not in ("REQUESTED", "REQUESTED_PARTITIONS"):
                break
            threading.Event().wait(0.5)
        assert backfill["status"] == "COMPLETED_SUCCESS", backfill
        with open_context(settings) as context:
            for market in settings.markets:
                states = context.ledger.partitions.of_market(raw_table(TIMEFRAMES["1m"]), market)
                assert [state.is_complete for state in states.values()] == [True, True]
                assert all(s.rollup_source_digest == s.digest for s in states.values())
    finally:
        group = descendants(server.pid)
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=60)
    assert list(folder.iterdir()) == []
    for pid in group:
        for _ in range(100):
            if not Path(f"/proc/{pid}").exists():
                break
            threading.Event().wait(0.2)
        assert not Path(f"/proc/{pid}").exists(), Path(f"/proc/{pid}/cmdline").read_text()


def descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *descendants(int(child))]
    return found

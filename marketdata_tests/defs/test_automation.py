"""Sensors and schedules: the runs they launch, the checks they evaluate, and the job `repair`."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from marketdata_assets.context import open_context
from marketdata_assets.defs.jobs import INGEST, build_definitions
from marketdata_assets.defs.partitions import RANGE_END, RANGE_START
from marketdata_assets.defs.tags import KIND, PRIORITY, REASON, RunKind
from marketdata_assets.flows.read.bars import BarReader
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import raw_table
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.model.window import Window
from marketdata_assets.settings.universe import Settings
from marketdata_assets.sources.sandbox.bars import generate_bars
from marketdata_assets.sources.sandbox.server import SandboxExchange
from marketdata_tests.conftest import IMPATIENT, Universe
from marketdata_tests.defs.test_dagster import check_results
from marketdata_tests.flows.operate.test_missed import at_time, file_of
from marketdata_tests.steps import at

RAW, HOUR, WEEK = (
    dg.AssetKey(path.split("/")) for path in ("raw/ohlcv_1m", "rollup/ohlcv_1h", "rollup/ohlcv_1w")
)
DEC, JAN = "binance:BTC-USDT|2023-12-01", "binance:BTC-USDT|2024-01-01"


@pytest.fixture
def settings(sandbox: tuple[SandboxExchange, str], universe: Universe) -> Settings:
    """One market: two days of December and the open January, at noon of the 9th.

    The exchange's own clock is later: it is at midnight of the 10th.
    """
    return universe(
        sandbox[1], since="2023-12-30", now="2024-01-09T12:00:00Z", extra="reference: [1h]"
    )


def tick(
    settings: Settings, instance: dg.DagsterInstance, name: str, cursor: str | None = None
) -> Any:
    """Evaluate a sensor and store its asset events, as the daemon does."""
    repository = build_definitions(settings).get_repository_def()
    context = dg.build_sensor_context(instance=instance, cursor=cursor, repository_def=repository)
    result = repository.get_sensor_def(name)(context)
    for event in getattr(result, "asset_events", ()):
        instance.report_runless_asset_event(event)
    return result if isinstance(result, dg.SensorResult) else (result, context.cursor)


def refresh(settings: Settings, instance: dg.DagsterInstance) -> Any:
    repository = build_definitions(settings).get_repository_def()
    return repository.get_schedule_def("refresh_open")(
        dg.build_schedule_context(instance=instance, scheduled_execution_time=settings.now())
    )


def run(
    settings: Settings, instance: dg.DagsterInstance, tags: dict[str, str]
) -> dg.ExecuteInProcessResult:
    job = build_definitions(settings).resolve_job_def(INGEST)
    return job.execute_in_process(instance=instance, tags=tags, raise_on_error=False)


def run_requests(settings: Settings, instance: dg.DagsterInstance, requests: Any) -> None:
    for request in requests:
        assert run(settings, instance, dict(request.tags)).success


def fill_lake(settings: Settings, instance: dg.DagsterInstance) -> None:
    run_requests(settings, instance, tick(settings, instance, "backfill_missed").run_requests)
    run_requests(settings, instance, refresh(settings, instance))
    # the next tick clears the attempts, because everything is stored
    assert not tick(settings, instance, "backfill_missed").run_requests


def count_events(instance: dg.DagsterInstance, key: dg.AssetKey) -> int:
    return len(instance.fetch_materializations(key, limit=100).records)


def test_all_sensors_and_schedules_are_on_by_default(settings: Settings) -> None:
    definitions = build_definitions(settings)
    sensors = {sensor.name: sensor.default_status for sensor in definitions.sensors or ()}
    assert sensors == dict.fromkeys(
        ("backfill_missed", "watch_markets", "watch_incidents"), dg.DefaultSensorStatus.RUNNING
    )
    schedules = {
        s.name: s.default_status
        for s in definitions.schedules or ()
        if isinstance(s, dg.ScheduleDefinition)
    }
    expected = (
        "refresh_open",
        "health_every_six_hours",
        "prune_every_night",
        "scrub_every_night",
        "ask_again_every_night",
        "ask_again_every_month",
        "take_markets_every_day",
    )
    assert schedules == dict.fromkeys(expected, dg.DefaultScheduleStatus.RUNNING)
    assert all(sensor.description for sensor in definitions.sensors or ())


def test_an_empty_lake_is_filled_and_a_lost_object_is_fetched_again(
    settings: Settings, instance: dg.DagsterInstance
) -> None:
    first = tick(settings, instance, "backfill_missed")
    (request,) = first.run_requests
    assert (request.tags[RANGE_START], request.tags[RANGE_END]) == (DEC, DEC)
    assert request.tags[PRIORITY] == "-10"
    assert request.tags[REASON] == "1 never fetched"
    (live,) = refresh(settings, instance)
    assert (live.tags[RANGE_START], live.tags[RANGE_END], live.tags[PRIORITY]) == (
        JAN,
        JAN,
        "10",
    )
    run_requests(settings, instance, [request, live])
    assert (
        tick(settings, instance, "backfill_missed").skip_reason.skip_message == "nothing is missing"
    )
    assert instance.get_materialized_partitions(RAW) == {DEC, JAN}

    file_of(settings, DEC).unlink()
    again = tick(settings, instance, "backfill_missed")
    assert instance.get_materialized_partitions(RAW) == {JAN}
    run_requests(settings, instance, again.run_requests)
    assert instance.get_materialized_partitions(RAW) == {DEC, JAN}
    wanted = Window(at("2023-12-30"), at("2024-01-01"))
    with open_context(settings) as context:
        assert (
            context.bind(BarReader)
            .read(settings.markets[0], TIMEFRAMES["1m"], wanted)
            .equals(generate_bars("BTCUSDT", "1m", wanted))
        )


def test_a_partition_without_an_event_is_requested(
    settings: Settings, instance: dg.DagsterInstance
) -> None:
    fill_lake(settings, instance)
    instance.wipe_asset_partitions(RAW, [DEC])
    (request,) = tick(settings, instance, "backfill_missed").run_requests
    assert request.tags[REASON] == "1 Dagster does not show it"


def test_wiped_rollups_are_noticed_within_minutes_and_made_again(
    settings: Settings, instance: dg.DagsterInstance
) -> None:
    """Each rolled-up table is looked at in its minute; no bar is requested."""
    fill_lake(settings, instance)
    instance.wipe_assets([HOUR])
    first, reasons = at("2024-01-09T12:00"), list[str]()
    for minute in range(len(settings.rollup_timeframes)):
        later = at_time(settings, (first + minute * timedelta(minutes=1)).isoformat())
        for request in tick(later, instance, "backfill_missed").run_requests or ():
            reasons.append(request.tags[REASON])
            run_requests(later, instance, [request])
    assert reasons == ["1 Dagster does not show its rollups"]
    assert DEC in instance.get_materialized_partitions(HOUR)


def test_a_partition_of_an_unfinished_run_is_not_requested_again(
    settings: Settings, instance: dg.DagsterInstance
) -> None:
    (request,) = tick(settings, instance, "backfill_missed").run_requests
    job = build_definitions(settings).resolve_job_def(INGEST)
    instance.create_run_for_job(
        job, tags=dict(request.tags), status=dg.DagsterRunStatus.NOT_STARTED
    )
    later = at_time(settings, "2024-01-09T18:00:00Z")
    assert tick(later, instance, "backfill_missed").skip_reason.skip_message == "1 are under way"


def test_a_refresh_fetches_only_new_bars_and_writes_no_event_without_any(
    sandbox: tuple[SandboxExchange, str], settings: Settings, instance: dg.DagsterInstance
) -> None:
    fill_lake(settings, instance)
    exchange, _ = sandbox
    later = at_time(settings, "2024-01-09T12:10:00Z")
    exchange.requests.clear()
    before = {key: count_events(instance, key) for key in (RAW, HOUR, WEEK)}
    run_requests(later, instance, refresh(later, instance))
    assert (
        len([seen for seen in exchange.requests if seen.query.get("interval") == "1m"]) == 1
    )  # from the watermark
    assert count_events(instance, RAW) == before[RAW] + 1
    assert (count_events(instance, HOUR), count_events(instance, WEEK)) == (
        before[HOUR],
        before[WEEK],
    )  # no hour, no week has closed
    # a dead feed behind green runs: its answers end with the last stored bar
    dead = {KIND: RunKind.REFRESH.value, RANGE_START: JAN, RANGE_END: JAN}
    assert run(later, instance, dead).success
    assert count_events(instance, RAW) == before[RAW] + 1
    assert run(
        later, instance, {RANGE_START: JAN, RANGE_END: JAN}
    ).success  # a person launched it: it has an event
    assert count_events(instance, RAW) == before[RAW] + 2


def test_freshness_turns_red_without_runs_and_green_again(
    settings: Settings, instance: dg.DagsterInstance
) -> None:
    fill_lake(settings, instance)
    first = tick(settings, instance, "watch_markets")
    assert check_results(instance, RAW, "freshness") == {None: True}
    assert first.skip_reason.skip_message == "every market is fresh and whole"
    same = tick(settings, instance, "watch_markets", first.cursor)
    assert same.asset_events == []
    stale = at_time(settings, "2024-01-09T13:01:00Z")
    red = tick(stale, instance, "watch_markets", same.cursor)
    assert check_results(instance, RAW, "freshness") == {None: False}
    (event,) = [e for e in red.asset_events if e.check_name == "freshness" and e.asset_key == RAW]
    assert event.severity == dg.AssetCheckSeverity.ERROR
    assert event.metadata["most_minutes_behind"].value == 61
    (row,) = event.metadata["markets"].records
    assert (row.data["market"], row.data["state"], row.data["minutes behind"]) == (
        "binance:BTC-USDT",
        "stale",
        61,
    )
    run_requests(stale, instance, refresh(stale, instance))
    tick(stale, instance, "watch_markets", red.cursor)
    assert check_results(instance, RAW, "freshness") == {None: True}


def test_an_evaluation_follows_every_materialization(
    settings: Settings, instance: dg.DagsterInstance
) -> None:
    """Without it, the UI would show "not evaluated" after each run."""
    fill_lake(settings, instance)
    first = tick(settings, instance, "watch_markets")
    assert run(settings, instance, {RANGE_START: DEC, RANGE_END: DEC}).success
    assert {
        (e.asset_key, e.check_name)
        for e in tick(settings, instance, "watch_markets", first.cursor).asset_events
    } >= {
        (RAW, "freshness"),
        (RAW, "coverage"),
        (HOUR, "coverage"),
    }


def test_coverage_is_red_when_an_object_is_lost(
    settings: Settings, instance: dg.DagsterInstance
) -> None:
    fill_lake(settings, instance)
    file_of(settings, DEC).unlink()
    result = tick(settings, instance, "watch_markets")
    (event,) = [e for e in result.asset_events if e.check_name == "coverage" and e.asset_key == RAW]
    assert not event.passed
    assert event.metadata["days_not_whole"].value == 2
    assert event.metadata["market_by_day"].value.startswith("![coverage](data:image/svg+xml")
    assert not check_results(instance, HOUR, "coverage")[None]


def test_a_failed_run_is_one_incident_until_a_run_succeeds(
    settings: Settings, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("marketdata_assets.context.RetryPolicy", lambda: IMPATIENT)
    unreachable = {
        name: venue.model_copy(update={"base_url": "http://127.0.0.1:9"})
        for name, venue in settings.venues.items()
    }
    down = settings.model_copy(update={"venues": unreachable})
    for _ in range(2):
        assert not run(down, instance, {RANGE_START: DEC, RANGE_END: DEC}).success
    _, cursor = tick(settings, instance, "watch_incidents")
    assert alerts(settings) == [("opened", "A run of ingest at binance failed")]
    _, cursor = tick(settings, instance, "watch_incidents", cursor)
    assert len(alerts(settings)) == 1
    assert run(settings, instance, {RANGE_START: DEC, RANGE_END: DEC}).success
    tick(settings, instance, "watch_incidents", cursor)
    assert alerts(settings)[1:] == [("recovered", "Recovered: A run of ingest at binance failed")]


def alerts(settings: Settings) -> list[tuple[str, str]]:
    lines = Path(settings.state, "alerts.jsonl").read_text().splitlines()
    return [
        (line["event"], line["title"])
        for line in map(json.loads, lines)
        if line["incident"].startswith("run|")
    ]


def test_a_tick_that_fails_names_the_reason_and_the_next_one_works(
    settings: Settings, instance: dg.DagsterInstance
) -> None:
    broken = settings.model_copy(update={"state": Path("/proc/nowhere")})
    with pytest.raises(
        dg.DagsterInvariantViolationError,
        match=r"ledger\.db cannot be opened .*; mend the folder or set another `state:`",
    ):
        tick(broken, instance, "backfill_missed")
    assert tick(settings, instance, "backfill_missed").run_requests


def test_repair_from_the_launchpad(settings: Settings, instance: dg.DagsterInstance) -> None:
    fill_lake(settings, instance)
    file_of(settings, DEC).unlink()
    with open_context(settings) as context:
        context.ledger.attempts.add([(Partition.parse(DEC), "x")], settings.now())
        context.ledger.attempts.park([(Partition.parse(DEC), "x")], settings.now())
    job = build_definitions(settings).resolve_job_def("repair")
    config = {
        "ops": {
            "repair_span": {
                "config": {"market": "binance:BTC-USDT", "start": "2023-12-01", "end": "2024-01-01"}
            }
        }
    }
    before = count_events(instance, RAW)
    assert job.execute_in_process(config, instance=instance).success
    assert file_of(settings, DEC).exists()
    assert count_events(instance, RAW) == before + 1
    assert check_results(instance, RAW, "gaps")[DEC]
    with open_context(settings) as context:
        state = context.ledger.partitions.get(raw_table(TIMEFRAMES["1m"]), Partition.parse(DEC))
        assert state
        assert state.rollup_source_digest == state.digest
        assert context.ledger.attempts.all() == {}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"market": "binance:BTC-USD"},
            "market 'binance:BTC-USD' is not in .*; did you mean binance:BTC-USDT",
        ),
        ({"start": "yesterday"}, "'yesterday' is not a date"),
        ({"start": "2024-01-05", "end": "2024-01-01"}, "start must come before end"),
    ],
)
def test_a_mistake_in_the_launchpad_is_one_line(
    settings: Settings, instance: dg.DagsterInstance, config: Any, message: str
) -> None:
    job = build_definitions(settings).resolve_job_def("repair")
    with pytest.raises(dg.Failure, match=message):
        job.execute_in_process({"ops": {"repair_span": {"config": config}}}, instance=instance)


def test_health_and_prune_as_jobs(settings: Settings, instance: dg.DagsterInstance) -> None:
    fill_lake(settings, instance)
    definitions = build_definitions(settings)
    for name in ("health", "prune"):
        result = definitions.resolve_job_def(name).execute_in_process(instance=instance)
        assert result.success
        (output,) = [e.step_output_data for e in result.all_events if e.is_successful_output]
        assert {"health": "unhealthy", "prune": "fetches"}[name] in output.metadata

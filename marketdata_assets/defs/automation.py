"""What runs by itself: sensors, schedules, and the jobs they or a person start."""

# no postponed annotations here: Dagster reads them at definition time

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import dagster as dg

from marketdata_assets.context import open_toolbox
from marketdata_assets.defs.assets import asset_key
from marketdata_assets.defs.checks import (
    COVERAGE,
    FRESHNESS,
    KIND,
    MISSED,
    REFRESH,
    MarketResult,
    Target,
    coverage_result,
    freshness_result,
    newest_materialization,
)
from marketdata_assets.defs.partitions import RANGE_END, RANGE_START, partitions_between
from marketdata_assets.defs.repair import REPAIR_END, REPAIR_START
from marketdata_assets.errors import MarketDataError
from marketdata_assets.flows.operate.alerts import failed_runs_go_on, problems, run_problem, settle
from marketdata_assets.flows.operate.backfill import Block, missed
from marketdata_assets.flows.operate.health import DAEMON
from marketdata_assets.flows.operate.refresh import Refresh, refreshes
from marketdata_assets.ledger.incidents import Problem
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import Table, raw_table, rollup_table
from marketdata_assets.model.window import format_time
from marketdata_assets.settings.universe import Settings

TICK_SECONDS = 30
REPEAT = timedelta(minutes=10)
"""An evaluation that says the same as the last one is repeated after this time, so that it can be
plotted.
"""
LIVE, HISTORY = "10", "-10"
"""Priorities of runs in the queue: the open month goes before history."""
RUNS_A_TICK = 200
UNFINISHED = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


@contextmanager
def one_line() -> Iterator[None]:
    """An error of ours becomes one readable line of the tick."""
    try:
        yield
    except MarketDataError as error:
        raise dg.DagsterInvariantViolationError(str(error)) from None


# --------------------------------------------------------------------------------- what is under wa
def under_way(
    instance: dg.DagsterInstance, grid: dg.MultiPartitionsDefinition
) -> tuple[set[str], int]:
    """The partition keys that unfinished runs work on or wait for, and how many of the runs
    `backfill_missed` asked for.
    """
    busy: set[str] = set()
    runs = instance.get_runs(dg.RunsFilter(statuses=UNFINISHED))
    for run in runs:
        if REPAIR_START in run.tags:
            busy.update(partitions_between(grid, run.tags[REPAIR_START], run.tags[REPAIR_END]))
        elif RANGE_START in run.tags and RANGE_END in run.tags:
            busy.update(partitions_between(grid, run.tags[RANGE_START], run.tags[RANGE_END]))
        elif key := run.tags.get("dagster/partition"):
            busy.add(key)
    return busy, sum(run.tags.get(KIND) == MISSED for run in runs)


# --------------------------------------------------------------------------------- backfill_missed
def backfill_missed(
    settings: Settings, job: str, grid: dg.MultiPartitionsDefinition
) -> dg.SensorDefinition:
    """Asks for closed months that are missing, failed, lost or not whole; the newest first, a few runs
    at once.
    """

    @dg.sensor(
        name="backfill_missed",
        job_name=job,
        minimum_interval_seconds=TICK_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description=(
            "Finds partitions of closed months that were never fetched, failed, lost their object or hold a gap that may still be "
            "filled, and asks for them: newest months first, a few range runs at once, each partition a few times with growing "
            "pauses, then it is parked (see marketdata parked). Every tick says what it asked for and what it left alone, and why."
        ),
    )
    def evaluate(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        with one_line(), open_toolbox(settings) as toolbox:
            toolbox.ledger.beat(DAEMON, settings.now())
            toolbox.lake.remove_abandoned_uploads()
            busy, mine = under_way(context.instance, grid)
            bases = {raw_table(venue.base) for venue in settings.venues.values()}
            shown = {
                table: context.instance.get_materialized_partitions(asset_key(table))
                for table in bases
            }
            found = missed(toolbox, max(0, settings.automation.runs - mine), busy, shown)
            wipe(context.instance, found.lost)
            context.log.info(found.says)
            return dg.SensorResult(
                [_missed_run(block, settings) for block in found.blocks],
                skip_reason=None if found.blocks else found.says,
            )

    return evaluate


def _missed_run(block: Block, settings: Settings) -> dg.RunRequest:
    reason = ", ".join(f"{n} {why}" for why, n in block.reasons.items())
    tags = {
        RANGE_START: block.first.key,
        RANGE_END: block.last.key,
        KIND: MISSED,
        "marketdata/venue": block.first.market.venue,
        "marketdata/reason": reason[:200],
        "dagster/priority": HISTORY,
    }
    return dg.RunRequest(
        run_key=f"{block.first.key}..{block.last.key}@{format_time(settings.now())}", tags=tags
    )


def wipe(instance: dg.DagsterInstance, lost: dict[Table, list[Partition]]) -> None:
    """No grid shows what is not on disk: the events of lost partitions are taken back. None named
    means all of the table.
    """
    for table, partitions in lost.items():
        shown = instance.get_materialized_partitions(asset_key(table))
        gone = shown & {p.key for p in partitions} if partitions else shown
        if gone:
            instance.wipe_asset_partitions(asset_key(table), sorted(gone))


# --------------------------------------------------------------------------------- refresh_open
def refresh_open(
    settings: Settings, job: str, grid: dg.MultiPartitionsDefinition
) -> dg.ScheduleDefinition:
    """Brings the open month of every market to the last closed bar, one run a venue."""

    @dg.schedule(
        name="refresh_open",
        job_name=job,
        cron_schedule=f"*/{settings.automation.refresh_minutes} * * * *",
        execution_timezone="UTC",
        default_status=dg.DefaultScheduleStatus.RUNNING,
        description=(
            f"Every {settings.automation.refresh_minutes} minutes the open month of every market is brought to the last closed bar, "
            "one run a venue, before any history; in the first hour of a month the month before comes along."
        ),
    )
    def evaluate(context: dg.ScheduleEvaluationContext) -> list[dg.RunRequest] | dg.SkipReason:
        with one_line(), open_toolbox(settings) as toolbox:
            busy, _ = under_way(context.instance, grid)
            found = refreshes(toolbox, busy)
        says = "; ".join(refresh.says for refresh in found)
        context.log.info(says)
        requests = [_refresh_run(refresh) for refresh in found if refresh.first]
        return requests or dg.SkipReason(says)

    return evaluate


def _refresh_run(refresh: Refresh) -> dg.RunRequest:
    assert refresh.first is not None
    assert refresh.last is not None
    tags = {
        RANGE_START: refresh.first.key,
        RANGE_END: refresh.last.key,
        KIND: REFRESH,
        "marketdata/venue": refresh.venue,
        "dagster/priority": LIVE,
    }
    return dg.RunRequest(run_key=None, tags=tags)


# --------------------------------------------------------------------------------- watch_markets
def watch_markets(settings: Settings) -> dg.SensorDefinition:
    """Evaluates `freshness` and `coverage` without runs, when they change, when their asset changed,
    or after REPEAT.
    """
    raws, rollups = (
        [raw_table(tf) for tf in settings.raw_timeframes],
        [rollup_table(tf) for tf in settings.rollup_timeframes],
    )
    tables = [*raws, *rollups]
    looks: list[tuple[list[Table], str, MarketResult]] = [
        ([table], FRESHNESS, freshness_result) for table in raws
    ]
    looks += [([table], COVERAGE, coverage_result) for table in raws]
    looks += (
        [(rollups, COVERAGE, coverage_result)] if rollups else []
    )  # they are made together: one result for all

    @dg.sensor(
        name="watch_markets",
        asset_selection=dg.AssetSelection.assets(*(asset_key(table) for table in tables)),
        minimum_interval_seconds=TICK_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Evaluates the checks freshness (how far the newest bar of each market lies behind) and coverage, without runs.",
    )
    def evaluate(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        said: dict[str, Any] = json.loads(context.cursor or "{}")
        events, told = [], []
        with one_line(), open_toolbox(settings) as toolbox:
            for same, name, evaluate in looks:
                result = evaluate(toolbox, same[0])
                for table in same:
                    target = newest_materialization(context.instance, asset_key(table))
                    state = _Said(
                        f"{result.passed} {result.severity} {result.description}",
                        target.storage_id if target else 0,
                    )
                    if state.due(said.get(f"{table.name} {name}"), settings):
                        events.append(_evaluation(table, name, result, target))
                        said[f"{table.name} {name}"] = state.as_list(settings)
                if not result.passed:
                    told.append(f"{same[0].name} {name}: {result.description}")
        says = "; ".join(told) or "every market is fresh and whole"
        return dg.SensorResult(asset_events=events, cursor=json.dumps(said), skip_reason=says)

    return evaluate


class _Said:
    """What an evaluation said, and the materialization it judged: after a later one the UI would show
    "not evaluated".
    """

    def __init__(self, words: str, target: int) -> None:
        self._words, self._target = words, target

    def due(self, last: Sequence[Any] | None, settings: Settings) -> bool:
        return (
            last is None
            or last[:2] != [self._words, self._target]
            or settings.now().timestamp() - last[2] >= REPEAT.total_seconds()
        )

    def as_list(self, settings: Settings) -> list[Any]:
        return [self._words, self._target, settings.now().timestamp()]


def _evaluation(
    table: Table, name: str, result: dg.AssetCheckResult, target: Target | None
) -> dg.AssetCheckEvaluation:
    return dg.AssetCheckEvaluation(
        asset_key=asset_key(table),
        check_name=name,
        passed=result.passed,
        severity=result.severity,
        description=result.description,
        metadata=result.metadata,
        target_materialization_data=target,
    )


# --------------------------------------------------------------------------------- watch_incidents
def watch_incidents(settings: Settings) -> dg.SensorDefinition:
    """Opens and ends incidents, and tells every channel."""

    @dg.sensor(
        name="watch_incidents",
        minimum_interval_seconds=TICK_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description=(
            "Turns what is wrong (open breakers, stale markets, failed runs and checks, parked partitions) into incidents, one alert "
            "when it begins and one when it is over, to alerts.jsonl in the state folder and every URL under alerts in the universe."
        ),
    )
    def evaluate(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        with one_line(), open_toolbox(settings) as toolbox:
            failed, over, cursor = _ended_runs(context.instance, context.cursor)
            opened, recovered = settle(
                toolbox, [*problems(toolbox), *failed.values()], failed_runs_go_on(over)
            )
            still, waiting = len(toolbox.incidents.open()), toolbox.incidents.undelivered()
        context.update_cursor(cursor)
        says = f"{opened} incidents opened, {recovered} recovered, {still} are open"
        return dg.SkipReason(
            "; ".join([says, *(f"{c}: {n} alerts wait ({why})" for c, (n, why) in waiting.items())])
        )

    return evaluate


def _ended_runs(
    instance: dg.DagsterInstance, cursor: str | None
) -> tuple[dict[str, Problem], set[str], str]:
    """Runs that ended since the cursor: problems of those that failed for good, by key, and the keys
    that ended well.
    """
    after = float(cursor) if cursor else 0.0
    statuses = [dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.SUCCESS]
    records = instance.get_run_records(
        dg.RunsFilter(statuses=statuses), limit=RUNS_A_TICK, order_by="update_timestamp"
    )
    failed: dict[str, Problem] = {}
    over: set[str] = set()
    for record in reversed(records):
        run, ended = record.dagster_run, record.update_timestamp.timestamp()
        if ended <= after:
            continue
        after = ended
        problem = run_problem(run.job_name, _venue_of(run), f"Run {run.run_id[:8]}")
        if run.status == dg.DagsterRunStatus.SUCCESS:
            failed.pop(problem.key, None)
            over.add(problem.key)
        elif run.tags.get("dagster/will_retry") != "true":
            failed[problem.key] = problem
            over.discard(problem.key)
    return failed, over, repr(after)


def _venue_of(run: dg.DagsterRun) -> str:
    key = run.tags.get(RANGE_START) or run.tags.get("dagster/partition") or ""
    return key.partition(":")[0] if ":" in key else ""

"""The sensors: they launch what is missing, evaluate checks of all markets, and send alerts."""

# no postponed annotations here: Dagster reads them at definition time

import json
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import dagster as dg

from marketdata_assets.context import Context, open_context
from marketdata_assets.dagster_ext.materializations import CheckTarget, newest_materialization
from marketdata_assets.defs.checks import (
    COVERAGE,
    FRESHNESS,
    MarketCheck,
    check_coverage,
    check_freshness,
)
from marketdata_assets.defs.instance import (
    EndedRun,
    as_tick_failure,
    find_busy_partitions,
    find_ended_runs,
    find_materialized_partitions,
    get_unfinished_runs,
    wipe_lost_partitions,
)
from marketdata_assets.defs.specs import asset_key
from marketdata_assets.defs.tags import KIND, REASON, VENUE, RunKind, RunPriority, range_tags
from marketdata_assets.flows.operate.alerts import AlertCenter, run_problem, unknown_runs
from marketdata_assets.flows.operate.backfill import BacklogFinder
from marketdata_assets.flows.operate.blocks import Block, count_reasons
from marketdata_assets.flows.operate.health import DAEMON
from marketdata_assets.ledger.incidents import Problem
from marketdata_assets.model.table import Table, raw_table, rollup_table
from marketdata_assets.model.window import format_time
from marketdata_assets.settings.universe import Settings

TICK_SECONDS = 30
"""How often the daemon evaluates a sensor of ours."""
_REPEAT = timedelta(minutes=10)
"""An evaluation equal to the last one is stored again after this time, for plots."""
_TAG_LENGTH = 200


# ------------------------------------------------------------------------------ backfill_missed
def backfill_missed(
    settings: Settings, job: str, grid: dg.MultiPartitionsDefinition
) -> dg.SensorDefinition:
    """Return the sensor that launches runs for closed months with missing bars."""

    @dg.sensor(
        name="backfill_missed",
        job_name=job,
        minimum_interval_seconds=TICK_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description=(
            "Finds partitions of closed months that were never fetched, have failed, have lost "
            "their object, or have a gap that the venue may still fill, and launches runs for "
            "them: the newest months first, a few runs at once. Each partition is tried a few "
            "times with growing pauses; then it is parked (`marketdata parked`). Every tick lists "
            "what was launched, and what was not and why."
        ),
    )
    def evaluate(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        with as_tick_failure(), open_context(settings) as app:
            app.ledger.heartbeats.record(DAEMON, settings.now())
            app.lake.remove_abandoned_uploads()
            runs = get_unfinished_runs(context.instance)
            launched = sum(run.tags.get(KIND) == RunKind.MISSED for run in runs)
            finder = app.bind(BacklogFinder)
            plan = finder.plan_backfill(
                max(0, settings.automation.runs - launched),
                find_busy_partitions(runs, grid),
                find_materialized_partitions(context.instance, finder.shown_tables),
            )
            wipe_lost_partitions(context.instance, plan.lost)
        context.log.info(plan.message)
        requests = [_missed_run(block, settings) for block in plan.blocks]
        return dg.SensorResult(requests, skip_reason=None if requests else plan.message)

    return evaluate


def _missed_run(block: Block, settings: Settings) -> dg.RunRequest:
    tags = {
        **range_tags(block.first, block.last, RunKind.MISSED, priority=RunPriority.HISTORY),
        VENUE: block.first.market.venue,
        REASON: count_reasons(block.reasons)[:_TAG_LENGTH],
    }
    run_key = f"{block.first.key}..{block.last.key}@{format_time(settings.now())}"
    return dg.RunRequest(run_key, tags=tags)


# -------------------------------------------------------------------------------- watch_markets
class _Evaluation(NamedTuple):
    """One evaluation; the cursor holds it as a list in JSON, so the order of the fields stays.

    `judged` is the storage id of the asset's newest materialization: after a later one, the UI
    would show "not evaluated". `at` is our clock in seconds since 1970.
    """

    text: str
    judged: int
    at: float


class _Watch(NamedTuple):
    """A check, and the tables that have its result in common."""

    name: str
    tables: Sequence[Table]
    check: MarketCheck


def watch_markets(settings: Settings) -> dg.SensorDefinition:
    """Return the sensor that evaluates `freshness` and `coverage` without runs.

    A result is stored when it has changed, when its asset has changed, and after a while.
    """
    watches = _plan_watches(settings)
    tables = [table for watch in watches if watch.name == COVERAGE for table in watch.tables]

    @dg.sensor(
        name="watch_markets",
        asset_selection=dg.AssetSelection.assets(*map(asset_key, tables)),
        minimum_interval_seconds=TICK_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description=(
            "Evaluates two checks of all markets without a run: `freshness` (how far the newest "
            "bar of each market lies behind) and `coverage` (which days are stored or explained)."
        ),
    )
    def evaluate(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        cursor: dict[str, Any] = json.loads(context.cursor or "{}")
        events, messages = [], []
        with as_tick_failure(), open_context(settings) as app:
            for watch in watches:
                result = watch.check(app, watch.tables[0])
                events += _evaluate_tables(context.instance, app, watch, result=result, last=cursor)
                if not result.passed:
                    messages.append(f"{watch.tables[0].name} {watch.name}: {result.description}")
        message = "; ".join(messages) or "every market is fresh and whole"
        return dg.SensorResult(asset_events=events, cursor=json.dumps(cursor), skip_reason=message)

    return evaluate


def _plan_watches(settings: Settings) -> list[_Watch]:
    raws = [raw_table(timeframe) for timeframe in settings.raw_timeframes]
    rollups = [rollup_table(timeframe) for timeframe in settings.rollup_timeframes]
    watches = [_Watch(FRESHNESS, [table], check_freshness) for table in raws]
    watches += [_Watch(COVERAGE, [table], check_coverage) for table in raws]
    if rollups:  # they are built together: one result is that of all
        watches.append(_Watch(COVERAGE, rollups, check_coverage))
    return watches


def _evaluate_tables(
    instance: dg.DagsterInstance,
    app: Context,
    watch: _Watch,
    *,
    result: dg.AssetCheckResult,
    last: dict[str, Any],
) -> list[dg.AssetCheckEvaluation]:
    """Return the evaluations that are due, and record them in `last`."""
    events, now = [], app.settings.now().timestamp()
    text = f"{result.passed} {result.severity} {result.description}"
    for table in watch.tables:
        target = newest_materialization(instance, asset_key(table))
        current = _Evaluation(text, target.storage_id if target else 0, now)
        name = f"{table.name} {watch.name}"
        if _is_due(current, last.get(name)):
            events.append(_to_dagster(table, watch.name, result, target=target))
            last[name] = list(current)
    return events


def _is_due(current: _Evaluation, last: Sequence[Any] | None) -> bool:
    if last is None:
        return True
    previous = _Evaluation(*last)
    is_equal = (previous.text, previous.judged) == (current.text, current.judged)
    return not is_equal or current.at - previous.at >= _REPEAT.total_seconds()


def _to_dagster(
    table: Table, name: str, result: dg.AssetCheckResult, *, target: CheckTarget | None
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


# ------------------------------------------------------------------------------ watch_incidents
def watch_incidents(settings: Settings) -> dg.SensorDefinition:
    """Return the sensor that opens and ends incidents, and sends alerts to every channel."""

    @dg.sensor(
        name="watch_incidents",
        minimum_interval_seconds=TICK_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description=(
            "Turns open circuit breakers, stale markets, failed runs and checks, and parked "
            "partitions into incidents. One alert is sent when an incident begins and one when it "
            "is over: to `alerts.jsonl` in the state folder, and to every URL under `alerts:` in "
            "the universe."
        ),
    )
    def evaluate(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        with as_tick_failure(), open_context(settings) as app:
            ended, last_end = find_ended_runs(context.instance, float(context.cursor or 0))
            failed, succeeded = _judge_runs(ended)
            alerts = app.bind(AlertCenter)
            problems = [*alerts.find_problems(), *failed.values()]
            opened, recovered = alerts.update_incidents(problems, unknown_runs(succeeded))
            still_open = len(app.ledger.incidents.open())
            backlogs = app.ledger.incidents.backlogs()
        context.update_cursor(repr(last_end))
        messages = [f"{opened} incidents opened, {recovered} recovered, {still_open} are open"]
        messages += [
            f"{channel}: {backlog.waiting} alerts wait ({backlog.error})"
            for channel, backlog in backlogs.items()
        ]
        return dg.SkipReason("; ".join(messages))

    return evaluate


def _judge_runs(ended: Iterable[EndedRun]) -> tuple[dict[str, Problem], set[str]]:
    """Return the problems of failed runs by key, and the keys of those whose last run succeeded."""
    failed: dict[str, Problem] = {}
    succeeded: set[str] = set()
    for run in ended:
        problem = run_problem(run.job, run.venue, f"Run {run.run_id[:8]}")
        if run.has_succeeded:
            failed.pop(problem.key, None)
            succeeded.add(problem.key)
        else:
            failed[problem.key] = problem
            succeeded.discard(problem.key)
    return failed, succeeded

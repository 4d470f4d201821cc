"""The schedules: the refresh of the open month, the refetch of past days, and a helper for jobs."""

# no postponed annotations here: Dagster reads them at definition time

from datetime import timedelta
from typing import NamedTuple

import dagster as dg

from marketdata_assets.context import open_context
from marketdata_assets.defs.instance import (
    as_tick_failure,
    find_busy_partitions,
    get_unfinished_runs,
)
from marketdata_assets.defs.repair import REPAIR, repair_config
from marketdata_assets.defs.tags import VENUE, RunKind, RunPriority, range_tags
from marketdata_assets.flows.operate.refresh import Refresh, RefreshPlanner
from marketdata_assets.model.window import Window
from marketdata_assets.settings.universe import Settings


class ScheduledJob(NamedTuple):
    """A job and the schedule that launches it."""

    job: dg.JobDefinition
    schedule: dg.ScheduleDefinition


def schedule_job(name: str, job: dg.JobDefinition, cron: str) -> ScheduledJob:
    """Return a job with a schedule of that name, in UTC, which is on from the start."""
    schedule = dg.ScheduleDefinition(
        name=name,
        job=job,
        cron_schedule=cron,
        execution_timezone="UTC",
        default_status=dg.DefaultScheduleStatus.RUNNING,
    )
    return ScheduledJob(job, schedule)


def refresh_open(
    settings: Settings, job: str, grid: dg.MultiPartitionsDefinition
) -> dg.ScheduleDefinition:
    """Return the schedule that fetches the bars of every market that have closed since."""
    minutes = settings.automation.refresh_minutes

    @dg.schedule(
        name="refresh_open",
        job_name=job,
        cron_schedule=f"*/{minutes} * * * *",
        execution_timezone="UTC",
        default_status=dg.DefaultScheduleStatus.RUNNING,
        description=(
            f"Every {minutes} minutes, one run per venue fetches the open month of all its markets "
            "up to the last closed bar. These runs go before those of history. In the first hour "
            "of a month, the month before is refreshed as well."
        ),
    )
    def evaluate(context: dg.ScheduleEvaluationContext) -> list[dg.RunRequest] | dg.SkipReason:
        with as_tick_failure(), open_context(settings) as app:
            busy = find_busy_partitions(get_unfinished_runs(context.instance), grid)
            refreshes = app.bind(RefreshPlanner).plan(busy)
        message = "; ".join(refresh.message for refresh in refreshes)
        context.log.info(message)
        requests = [_refresh_run(refresh) for refresh in refreshes if refresh.corners]
        return requests or dg.SkipReason(message)

    return evaluate


def _refresh_run(refresh: Refresh) -> dg.RunRequest:
    assert refresh.corners is not None
    first, last = refresh.corners
    tags = range_tags(first, last, RunKind.REFRESH, priority=RunPriority.LIVE)
    return dg.RunRequest(tags={**tags, VENUE: refresh.venue})


def refetch_schedules(settings: Settings) -> list[dg.ScheduleDefinition]:
    """Return the schedules that fetch closed bars again, as `corrections:` of the universe sets."""
    corrections = settings.corrections
    schedules = {
        "ask_again_every_night": ("40 1 * * *", corrections.night_days),
        "ask_again_every_month": ("10 2 2 * *", corrections.month_days),
    }
    return [
        _refetch_schedule(settings, name, cron, days=days)
        for name, (cron, days) in schedules.items()
        if days
    ]


def _refetch_schedule(
    settings: Settings, name: str, cron: str, *, days: int
) -> dg.ScheduleDefinition:
    @dg.schedule(
        name=name,
        job_name=REPAIR,
        cron_schedule=cron,
        execution_timezone="UTC",
        default_status=dg.DefaultScheduleStatus.RUNNING,
        description=(
            f"Fetches the bars of the last {days} days once more; what a venue has corrected "
            "becomes a new revision."
        ),
    )
    def evaluate(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        now = settings.now()
        window = Window(max(settings.since, now - timedelta(days=days)), now)
        if not window or not settings.partitions(settings.markets, window):
            return dg.SkipReason("the universe wants nothing of these days")
        return dg.RunRequest(run_config=repair_config([], window, again=True))

    return evaluate

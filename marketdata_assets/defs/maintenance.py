"""Jobs that run by schedule: report health, delete old records, and retire old months."""

# no postponed annotations here: Dagster reads them at definition time

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict

import dagster as dg
from pydantic import Field

from marketdata_assets.context import open_context, save_ledger_rows
from marketdata_assets.dagster_ext.prune import prune_runs
from marketdata_assets.defs.results import as_dagster_failure
from marketdata_assets.defs.schedules import ScheduledJob, schedule_job
from marketdata_assets.defs.specs import asset_key
from marketdata_assets.flows.operate.health import Health, HealthInspector, HealthStatus
from marketdata_assets.flows.operate.prune import delete_old_records
from marketdata_assets.flows.operate.retire import Retirement, RetirementAction, Retirer
from marketdata_assets.flows.operate.scrub import Scrubber
from marketdata_assets.model.table import Table
from marketdata_assets.settings.universe import Settings

SCRUB_MINUTES = 60.0
"""For so long the nightly job `scrub` reads at the most; the next night goes on."""
MONTHS_SHOWN = 1000
"""How many months the table of the job `retire` has."""


def health_job(settings: Settings) -> ScheduledJob:
    """Return the job that reports what `marketdata health` does, every six hours."""

    @dg.op(
        name="look",
        description="Judges every market, every venue and the daemon, with reasons.",
    )
    def inspect_health(context: dg.OpExecutionContext) -> None:
        with as_dagster_failure(), open_context(settings) as app:
            subjects = app.bind(HealthInspector).inspect()
        counts = Counter(health.status for health in subjects)
        bad = [health for health in subjects if health.status != HealthStatus.HEALTHY]
        rows = [_health_row(health) for health in bad]
        context.add_output_metadata(
            {
                **{status.value: counts[status] for status in HealthStatus},
                "not_healthy": dg.MetadataValue.table(rows) if rows else "none",
            }
        )
        for health in bad:
            context.log.warning(f"{health.subject} is {health.status}: {'; '.join(health.reasons)}")

    @dg.job(
        name="health",
        description=(
            "Reports every market, every venue and the daemon as healthy, degraded or unhealthy. "
            "The metadata of its one step has the reasons."
        ),
    )
    def job() -> None:
        inspect_health()

    return schedule_job("health_every_six_hours", job, "0 */6 * * *")


def _health_row(health: Health) -> dg.TableRecord:
    reasons = "; ".join(health.reasons)
    return dg.TableRecord(
        {"subject": health.subject, "status": health.status.value, "reasons": reasons}
    )


def prune_job(settings: Settings) -> ScheduledJob:
    """Return the job that does what `marketdata prune` does, every night."""
    days = settings.retention_days

    @dg.op(
        name="remove",
        description=(
            f"Deletes the logs of runs that ended more than {days} days ago, and alerts and rows "
            "of the fetch log as old as that."
        ),
    )
    def delete_old(context: dg.OpExecutionContext) -> None:
        with as_dagster_failure(), open_context(settings) as app:
            runs = prune_runs(context.instance, days)
            records = delete_old_records(settings, app.ledger, app.clock, days=days)
        context.add_output_metadata({**asdict(runs), **records})

    @dg.job(
        name="prune",
        description=(
            "Deletes logs that nobody needs any more. Materializations and results of checks stay."
        ),
    )
    def job() -> None:
        delete_old()

    return schedule_job("prune_every_night", job, "30 3 * * *")


def scrub_job(settings: Settings) -> ScheduledJob:
    """Return the job that does what `marketdata scrub` does, every night for SCRUB_MINUTES at the
    most, and saves what the ledger alone knows beside the lake.
    """

    @dg.op(
        name="read_all",
        description=(
            "Reads the objects of the lake that were not read whole for a week, and compares them "
            "with what was stored."
        ),
    )
    def read_all(context: dg.OpExecutionContext) -> None:
        with as_dagster_failure(), open_context(settings) as app:
            found = app.bind(Scrubber).scrub(minutes=SCRUB_MINUTES)
            saved = save_ledger_rows(app.ledger, app.lake)
        rows = [dg.TableRecord(problem.as_dict()) for problem in found.problems]
        context.add_output_metadata(
            {
                **found.counts(),
                "market_months_saved": saved,
                "problems": dg.MetadataValue.table(rows) if rows else "none",
            }
        )
        for problem in found.problems:
            context.log.error(f"{problem.table} {problem.partition}: {problem.message}")

    @dg.job(
        name="scrub",
        description="Reads everything that is stored once a week, and finds what decayed.",
    )
    def job() -> None:
        read_all()

    return schedule_job("scrub_every_night", job, "30 4 * * *")


class RetireConfig(dg.Config):
    """What the job `retire` does."""

    dry_run: bool = Field(
        False, description="Only list the months that are due, and where they would go."
    )


def retire_job(settings: Settings) -> ScheduledJob:
    """Return the job that does what `marketdata retire` does, every night.

    Removed months are shown as missing afterwards, because they are.
    """

    @dg.op(
        name="let_go",
        description=(
            "Removes months that are older than `retention:` keeps, and moves months that are "
            "older than `cold:` allows."
        ),
    )
    def retire_months(context: dg.OpExecutionContext, config: RetireConfig) -> None:
        with as_dagster_failure(), open_context(settings) as app:
            months = list(app.bind(Retirer).retire(config.dry_run))
        if not config.dry_run:
            _wipe_removed(context.instance, months)
        counts = Counter(month.action for month in months)
        rows = [dg.TableRecord(month.as_dict()) for month in months[:MONTHS_SHOWN]]
        context.add_output_metadata(
            {
                "dry_run": config.dry_run,
                **{f"months_{action.value}": counts[action] for action in RetirementAction},
                "months": dg.MetadataValue.table(rows) if rows else "none",
            }
        )

    @dg.job(
        name="retire",
        description=(
            "Removes and moves old months by `retention:` and `cold:` of the universe; with "
            "`dry_run` it only lists them."
        ),
    )
    def job() -> None:
        retire_months()

    return schedule_job("retire_every_night", job, "0 3 * * *")


def _wipe_removed(instance: dg.DagsterInstance, months: Iterable[Retirement]) -> None:
    removed: dict[Table, list[str]] = defaultdict(list)
    for month in months:
        if month.action == RetirementAction.REMOVED and month.partition:
            removed[month.table].append(month.partition.key)
    for table, keys in removed.items():
        instance.wipe_asset_partitions(asset_key(table), keys)

"""Jobs that look after everything: report health, prune what nobody needs, let old months go."""

# no postponed annotations here: Dagster reads them at definition time

from collections import defaultdict
from dataclasses import asdict

import dagster as dg
from pydantic import Field

from marketdata_assets.context import open_context, tell_nobody
from marketdata_assets.dagster_ext.prune import prune_runs
from marketdata_assets.defs.assets import asset_key
from marketdata_assets.defs.checks import failure_told
from marketdata_assets.flows.operate.health import Health, HealthInspector, Status
from marketdata_assets.flows.operate.prune import forget
from marketdata_assets.flows.operate.retire import KEPT, MOVED, REMOVED, Retirer
from marketdata_assets.model.table import Table
from marketdata_assets.settings.universe import Settings


def health_job(settings: Settings) -> tuple[dg.JobDefinition, dg.ScheduleDefinition]:
    """`marketdata health`, every six hours in the UI; what is not healthy stands in its metadata and
    its log.
    """

    @dg.op(description="Looks at every market, every venue and the daemon.")
    def look(context: dg.OpExecutionContext) -> None:
        with failure_told(tell_nobody, ()), open_context(settings) as app:
            found = app.bind(HealthInspector).inspect()
        counts = {status.value: sum(h.status == status for h in found) for status in Status}
        bad = [_row(h) for h in found if h.status != Status.HEALTHY]
        context.add_output_metadata(
            {**counts, "not_healthy": dg.MetadataValue.table(bad) if bad else "none"}
        )
        for h in found:
            if h.status != Status.HEALTHY:
                context.log.warning(f"{h.subject} is {h.status}: {'; '.join(h.reasons)}")

    @dg.job(
        name="health",
        description="Healthy, degraded or unhealthy, with reasons: see the metadata of its one step.",
    )
    def job() -> None:
        look()

    return job, schedule("health_every_six_hours", job, "0 */6 * * *")


def _row(found: Health) -> dg.TableRecord:
    return dg.TableRecord(
        {
            "subject": found.subject,
            "status": found.status.value,
            "reasons": "; ".join(found.reasons),
        }
    )


def prune_job(settings: Settings) -> tuple[dg.JobDefinition, dg.ScheduleDefinition]:
    """`marketdata prune`, every night."""

    @dg.op(
        description=f"Removes logs of runs that ended more than {settings.retention_days} days ago, and old alerts and fetch logs."
    )
    def remove(context: dg.OpExecutionContext) -> None:
        with failure_told(tell_nobody, ()), open_context(settings) as app:
            gone = prune_runs(context.instance, settings.retention_days)
            context.add_output_metadata(
                {
                    **asdict(gone),
                    **forget(app.settings, app.ledger, app.clock, days=settings.retention_days),
                }
            )

    @dg.job(
        name="prune",
        description="Removes what nobody needs any more; materializations and check results stay for ever.",
    )
    def job() -> None:
        remove()

    return job, schedule("prune_every_night", job, "30 3 * * *")


class RetireConfig(dg.Config):
    """What to do."""

    dry_run: bool = Field(
        False, description="Only say what would go, and where to; nothing is changed."
    )


def retire_job(settings: Settings) -> tuple[dg.JobDefinition, dg.ScheduleDefinition]:
    """`marketdata retire`, every night; what is removed is shown as missing afterwards, because it
    is.
    """

    @dg.op(
        description="Removes months that are older than `retention:` keeps, and moves those that are older than `cold:` says."
    )
    def let_go(context: dg.OpExecutionContext, config: RetireConfig) -> None:
        with failure_told(tell_nobody, ()), open_context(settings) as app:
            found = list(app.bind(Retirer).retire(config.dry_run))
        removed: dict[Table, list[str]] = defaultdict(list)
        for one in found:
            if one.what == REMOVED and one.partition:
                removed[one.table].append(one.partition.key)
        for table, keys in removed.items() if not config.dry_run else ():
            context.instance.wipe_asset_partitions(asset_key(table), keys)
        counts = {
            f"months_{what}": sum(one.what == what for one in found)
            for what in (REMOVED, MOVED, KEPT)
        }
        rows = [dg.TableRecord(one.as_dict()) for one in found[:1000]]
        context.add_output_metadata(
            {
                "dry_run": config.dry_run,
                **counts,
                "months": dg.MetadataValue.table(rows) if rows else "none",
            }
        )

    @dg.job(
        name="retire",
        description="Lets old months go, by `retention:` and `cold:` of the universe; with dry_run it only says which.",
    )
    def job() -> None:
        let_go()

    return job, schedule("retire_every_night", job, "0 3 * * *")


def schedule(name: str, job: dg.JobDefinition, cron: str) -> dg.ScheduleDefinition:
    """A schedule in UTC that is on from the start."""
    return dg.ScheduleDefinition(
        name=name,
        job=job,
        cron_schedule=cron,
        execution_timezone="UTC",
        default_status=dg.DefaultScheduleStatus.RUNNING,
    )

"""Jobs that look after everything: repair a market or a span, report health, prune what nobody needs."""

# no postponed annotations here: Dagster reads them at definition time

from collections import defaultdict
from dataclasses import asdict
from typing import cast

import dagster as dg
from dagster._time import get_current_datetime
from pydantic import Field

from marketdata_assets.defs.assets import asset_key, fetch_into, roll_up_into
from marketdata_assets.defs.checks import Results, failure_told, log_all
from marketdata_assets.defs.prune import prune
from marketdata_assets.flows.health import Health, Status, health
from marketdata_assets.flows.retire import KEPT, MOVED, REMOVED, retire
from marketdata_assets.flows.upkeep import forget
from marketdata_assets.lake.tables import Table, raw, rollup
from marketdata_assets.model.window import Partition, Window, parse_time
from marketdata_assets.settings import Settings
from marketdata_assets.toolbox import open_toolbox, tell_nobody

REPAIR_START, REPAIR_END = "marketdata/repair_start", "marketdata/repair_end"
"""Tags of a repair: the corners of the grid that it works on, for whoever must not work on them too."""


class RepairConfig(dg.Config):
    """What to repair. Everything of that span that is missing, failed, parked or not rolled up is done again."""

    market: str = Field("", description="One market such as `binance:BTC-USDT`. Empty: every market of the universe.")
    start: str = Field("", description="First day, UTC, inclusive, such as `2024-03-01`. Empty: the universe's first day.")
    end: str = Field("", description="Last day, UTC, exclusive, such as `2024-04-01`. Empty: until now.")


def repair_job(settings: Settings) -> dg.JobDefinition:
    """Whole months of a market or a span: fetched where bars lack, checked, rolled up again, unparked."""

    @dg.op(description="Fetches what the months of the span lack, checks them, rolls them up again, and unparks them.")
    def repair_span(context: dg.OpExecutionContext, config: RepairConfig) -> None:
        with failure_told(tell_nobody, ()), open_toolbox(settings) as toolbox:
            partitions = _wanted(settings, config)
            tags = {REPAIR_START: partitions[0].key, REPAIR_END: partitions[-1].key}
            context.instance.add_run_tags(context.run_id, tags)
            unparked = toolbox.ledger.forget_asks(partitions)
            log = cast(dg.AssetExecutionContext, context)  # an op's context takes the same events
            raws = {tf: Results(log, asset_key(raw(tf)), tell_nobody) for tf in settings.raw_timeframes}
            for tf, results in raws.items():
                fetch_into(results, toolbox, tf, partitions)
            rollups = {tf: Results(log, asset_key(rollup(tf)), tell_nobody) for tf in settings.rollup_timeframes}
            roll_up_into(rollups, toolbox, partitions)
        context.add_output_metadata({"partitions": len(partitions), "unparked": unparked})
        log_all([*raws.values(), *rollups.values()])

    @dg.job(
        name="repair",
        description=(
            "Repairs a market, a span, or all: fetches what is missing, checks and rolls up again, and unparks. "
            "Open the launchpad, fill in `market`, `start` and `end` (each may stay empty), and launch."
        ),
    )
    def repair() -> None:
        repair_span()

    return repair


def _wanted(settings: Settings, config: RepairConfig) -> list[Partition]:
    markets = [settings.market(config.market)] if config.market else list(settings.markets)
    window = Window(parse_time(config.start) if config.start else settings.since, parse_time(config.end) if config.end else settings.now())
    partitions = settings.partitions(markets, window)
    if not partitions:
        raise dg.Failure(f"nothing of {window} is wanted by the universe; start must come before end", allow_retries=False)
    return partitions


def health_job(settings: Settings) -> tuple[dg.JobDefinition, dg.ScheduleDefinition]:
    """`marketdata health`, every six hours in the UI; what is not healthy stands in its metadata and its log."""

    @dg.op(description="Looks at every market, every venue and the daemon.")
    def look(context: dg.OpExecutionContext) -> None:
        with failure_told(tell_nobody, ()), open_toolbox(settings) as toolbox:
            found = health(toolbox)
        counts = {status.value: sum(h.status == status for h in found) for status in Status}
        bad = [_row(h) for h in found if h.status != Status.HEALTHY]
        context.add_output_metadata({**counts, "not_healthy": dg.MetadataValue.table(bad) if bad else "none"})
        for h in found:
            if h.status != Status.HEALTHY:
                context.log.warning(f"{h.subject} is {h.status}: {'; '.join(h.reasons)}")

    @dg.job(name="health", description="Healthy, degraded or unhealthy, with reasons: see the metadata of its one step.")
    def job() -> None:
        look()

    return job, schedule("health_every_six_hours", job, "0 */6 * * *")


def _row(found: Health) -> dg.TableRecord:
    return dg.TableRecord({"subject": found.subject, "status": found.status.value, "reasons": "; ".join(found.reasons)})


def prune_job(settings: Settings) -> tuple[dg.JobDefinition, dg.ScheduleDefinition]:
    """`marketdata prune`, every night."""

    @dg.op(description=f"Removes logs of runs that ended more than {settings.retention_days} days ago, and old alerts and fetch logs.")
    def remove(context: dg.OpExecutionContext) -> None:
        with failure_told(tell_nobody, ()), open_toolbox(settings) as toolbox:
            gone = prune(context.instance, settings.retention_days, get_current_datetime())
            context.add_output_metadata({**asdict(gone), **forget(toolbox, settings.retention_days)})

    @dg.job(name="prune", description="Removes what nobody needs any more; materializations and check results stay for ever.")
    def job() -> None:
        remove()

    return job, schedule("prune_every_night", job, "30 3 * * *")


class RetireConfig(dg.Config):
    """What to do."""

    dry_run: bool = Field(False, description="Only say what would go, and where to; nothing is changed.")


def retire_job(settings: Settings) -> tuple[dg.JobDefinition, dg.ScheduleDefinition]:
    """`marketdata retire`, every night; what is removed is shown as missing afterwards, because it is."""

    @dg.op(description="Removes months that are older than `retention:` keeps, and moves those that are older than `cold:` says.")
    def let_go(context: dg.OpExecutionContext, config: RetireConfig) -> None:
        with failure_told(tell_nobody, ()), open_toolbox(settings) as toolbox:
            found = list(retire(toolbox, config.dry_run))
        removed: dict[Table, list[str]] = defaultdict(list)
        for one in found:
            if one.what == REMOVED and one.partition:
                removed[one.table].append(one.partition.key)
        for table, keys in removed.items() if not config.dry_run else ():
            context.instance.wipe_asset_partitions(asset_key(table), keys)
        counts = {f"months_{what}": sum(one.what == what for one in found) for what in (REMOVED, MOVED, KEPT)}
        rows = [dg.TableRecord(one.as_dict()) for one in found[:1000]]
        context.add_output_metadata({"dry_run": config.dry_run, **counts, "months": dg.MetadataValue.table(rows) if rows else "none"})

    @dg.job(name="retire", description="Lets old months go, by `retention:` and `cold:` of the universe; with dry_run it only says which.")
    def job() -> None:
        let_go()

    return job, schedule("retire_every_night", job, "0 3 * * *")


def schedule(name: str, job: dg.JobDefinition, cron: str) -> dg.ScheduleDefinition:
    """A schedule in UTC that is on from the start."""
    return dg.ScheduleDefinition(
        name=name, job=job, cron_schedule=cron, execution_timezone="UTC", default_status=dg.DefaultScheduleStatus.RUNNING
    )

"""Repair and second looks, through Dagster: a span is cleaned, fetched, asked again, checked and
rolled up, with a receipt.

    python -m marketdata_assets.defs.repair '{"markets": [...], "start": ..., "end": ..., "again": true}'

does it in this process for `marketdata repair` and prints one JSON object.
"""

# no postponed annotations here: Dagster reads them at definition time

import json
import os
import sys
import warnings
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, cast

import dagster as dg
from pydantic import Field

from marketdata_assets.context import open_toolbox, tell_nobody
from marketdata_assets.dagster_ext.launcher import (
    PROCESS_TAG,
    open_instance,
    process_id,
    why_failed,
)
from marketdata_assets.defs.assets import asset_key, fetch_into, roll_up_into
from marketdata_assets.defs.checks import Results, failure_told, log_all
from marketdata_assets.flows.operate.repair import clean_up, contents, span_of, write_receipt
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import raw_table, rollup_table
from marketdata_assets.model.window import Window, format_time, parse_time
from marketdata_assets.settings.universe import Settings, load_settings

REPAIR, OP = "repair", "repair_span"
REPAIR_START, REPAIR_END = "marketdata/repair_start", "marketdata/repair_end"
"""Tags of a repair: the corners of the grid that it works on, for whoever must not work on them
too.
"""
RECEIPT_TAG = "marketdata/receipt"


class RepairConfig(dg.Config):
    """What to repair. Everything of that span that is missing, failed, parked, broken or not rolled up
    is done again.
    """

    market: str = Field(
        "",
        description="Markets such as `binance:BTC-USDT`, separated by spaces. Empty: every market of the universe.",
    )
    start: str = Field(
        "",
        description="First day, UTC, inclusive, such as `2024-03-01`. Empty: the universe's first day.",
    )
    end: str = Field(
        "", description="Last day, UTC, exclusive, such as `2024-04-01`. Empty: until now."
    )
    again: bool = Field(
        False, description="Ask the venue also for what is stored of the span, to find corrections."
    )


def repair_job(settings: Settings) -> dg.JobDefinition:
    """A market or a span: cleaned, fetched where bars lack, asked again if wanted, checked, rolled up
    again, unparked.
    """

    @dg.op(
        name=OP,
        description="Fetches what the months of the span lack, checks them, rolls them up again, and unparks them.",
    )
    def repair_span(context: dg.OpExecutionContext, config: RepairConfig) -> None:
        with failure_told(tell_nobody, ()), open_toolbox(settings) as toolbox:
            window, partitions = _wanted(settings, config)
            tags = {REPAIR_START: partitions[0].key, REPAIR_END: partitions[-1].key}
            context.instance.add_run_tags(context.run_id, tags)
            unparked = toolbox.ledger.forget_asks(partitions)
            before = contents(toolbox, partitions)
            cleaned = clean_up(toolbox, partitions)
            log = cast(dg.AssetExecutionContext, context)  # an op's context takes the same events
            raws = {
                tf: Results(log, asset_key(raw_table(tf)), tell_nobody)
                for tf in settings.raw_timeframes
            }
            again = window if config.again else None
            fetched = [
                told
                for tf, results in raws.items()
                for told in fetch_into(results, toolbox, tf, partitions, again)
            ]
            rollups = {
                tf: Results(log, asset_key(rollup_table(tf)), tell_nobody)
                for tf in settings.rollup_timeframes
            }
            roll_up_into(rollups, toolbox, partitions)
            asked = {**span_of(partitions, window), "again": config.again, "run": context.run_id}
            receipt = write_receipt(
                toolbox, asked, before, contents(toolbox, partitions), fetched, cleaned
            )
        context.instance.add_run_tags(context.run_id, {RECEIPT_TAG: str(receipt.id)})
        numbers = {
            name: receipt.body[name] for name in ("requests", "stored", "corrected", "refused")
        }
        told = {
            "partitions": len(partitions),
            "unparked": unparked,
            "receipt": receipt.id,
            "says": receipt.says,
        }
        context.add_output_metadata({**told, **numbers})
        log_all([*raws.values(), *rollups.values()])

    @dg.job(
        name=REPAIR,
        description=(
            "Repairs a market, a span, or all: takes out what must not be there, fetches what is missing, checks and rolls up again, "
            "and unparks; with `again` it finds corrections. Open the launchpad, fill in `market`, `start` and `end` (each may stay "
            "empty), and launch. What it did stands in its receipt (`marketdata receipts`)."
        ),
    )
    def repair() -> None:
        repair_span()

    return repair


def _wanted(settings: Settings, config: RepairConfig) -> tuple[Window, list[Partition]]:
    markets = [settings.market(key) for key in config.market.split()] or list(settings.markets)
    window = Window(
        parse_time(config.start) if config.start else settings.since,
        parse_time(config.end) if config.end else settings.now(),
    )
    partitions = settings.partitions(markets, window)
    if not partitions:
        raise dg.Failure(
            f"nothing of {window} is wanted by the universe; start must come before end",
            allow_retries=False,
        )
    return window, partitions


def run_config(markets: Sequence[str], window: Window, again: bool) -> dict[str, Any]:
    """The job's configuration for a span; no markets are all."""
    config = {
        "market": " ".join(markets),
        "start": format_time(window.start),
        "end": format_time(window.end),
        "again": again,
    }
    return {"ops": {OP: {"config": config}}}


def second_looks(settings: Settings) -> list[dg.ScheduleDefinition]:
    """The last days every night, and the last month every month: closed bars are asked again, as
    `corrections:` says.
    """
    looks = (
        ("ask_again_every_night", "40 1 * * *", settings.corrections.night_days),
        ("ask_again_every_month", "10 2 2 * *", settings.corrections.month_days),
    )
    return [_second_look(settings, name, cron, days) for name, cron, days in looks if days]


def _second_look(settings: Settings, name: str, cron: str, days: int) -> dg.ScheduleDefinition:
    @dg.schedule(
        name=name,
        job_name=REPAIR,
        cron_schedule=cron,
        execution_timezone="UTC",
        default_status=dg.DefaultScheduleStatus.RUNNING,
        description=f"Asks the venues again for the bars of the last {days} days; what they corrected becomes a new revision.",
    )
    def look(context: dg.ScheduleEvaluationContext) -> Any:
        now = settings.now()
        window = Window(max(settings.since, now - timedelta(days=days)), now)
        if not window or not settings.partitions(settings.markets, window):
            return dg.SkipReason("nothing of these days is wanted by the universe")
        return dg.RunRequest(run_key=None, run_config=run_config([], window, again=True))

    return look


def main() -> None:
    """Repair in this process what the first argument asks for."""
    from marketdata_assets.defs.jobs import build_definitions

    asked = json.loads(sys.argv[1])
    settings = load_settings()
    window = Window(parse_time(asked["start"]), parse_time(asked["end"]))
    with warnings.catch_warnings(action="ignore"), open_instance() as instance:
        job = build_definitions(settings).resolve_job_def(REPAIR)
        result = job.execute_in_process(
            run_config(asked["markets"], window, asked["again"]),
            instance=instance,
            tags={PROCESS_TAG: process_id(os.getpid())},
            raise_on_error=False,
        )
        run = instance.get_run_by_id(result.run_id)
    receipt = run.tags.get(RECEIPT_TAG) if run else None
    sys.stdout.write(
        json.dumps(
            {
                "success": result.success,
                "receipt": receipt and int(receipt),
                "says": why_failed(result),
            }
        )
        + "\n"
    )


if __name__ == "__main__":
    main()

"""The job `repair`: markets and a span are cleaned, fetched, checked and rolled up, with a receipt.

    python -m marketdata_assets.defs.repair REQUEST

executes it in this process for `marketdata repair`. REQUEST is a JSON object with `markets` (keys;
none means all), `start` and `end` (UTC, exclusive), and `again`. The answer is one JSON object with
`success`, `receipt` (its number, or null), and `message` (why the run failed, or empty).
"""

# no postponed annotations here: Dagster reads them at definition time

import json
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import dagster as dg
from pydantic import Field

from marketdata_assets.context import open_context
from marketdata_assets.dagster_ext.runs import PROCESS_TAG, failure_message, open_instance
from marketdata_assets.defs.pipeline_results import PipelineResults
from marketdata_assets.defs.results import as_dagster_failure, log_and_raise
from marketdata_assets.defs.tags import RECEIPT, REPAIR_END, REPAIR_START
from marketdata_assets.flows.operate.pipeline import Pipeline
from marketdata_assets.flows.operate.repair import (
    Repairer,
    RepairRequest,
    RepairResult,
    repair_partitions,
)
from marketdata_assets.flows.operate.universe import load_universe
from marketdata_assets.flows.read.coverage import CoverageReporter
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.window import Window, format_time, parse_time
from marketdata_assets.settings.universe import Settings
from marketdata_assets.system import process_id

REPAIR, OP = "repair", "repair_span"


class RepairConfig(dg.Config):
    """What to repair: everything in the span that is missing, invalid, parked or not rolled up."""

    market: str = Field(
        "",
        description=(
            "Markets such as `binance:BTC-USDT`, separated by spaces. Empty: every market of the "
            "universe."
        ),
    )
    start: str = Field(
        "",
        description=(
            "The first day, UTC, inclusive, such as `2024-03-01`. Empty: the first day of the "
            "universe."
        ),
    )
    end: str = Field(
        "",
        description="The last day, UTC, exclusive, such as `2024-04-01`. Empty: until now.",
    )
    again: bool = Field(
        False,
        description=(
            "Also fetch the bars of the span that are stored, to find what the venue has corrected."
        ),
    )


class _Target(NamedTuple):
    """The partitions that a configuration means, and its window."""

    partitions: list[Partition]
    window: Window


def repair_job(settings: Settings) -> dg.JobDefinition:
    """Return the job that repairs markets, a span of time, or everything."""

    @dg.op(
        name=OP,
        description=(
            "Removes invalid rows from the months of the span, fetches what is missing, checks the "
            "months, rolls them up again, and lets the automation try parked ones again."
        ),
    )
    def repair_span(context: dg.OpExecutionContext, config: RepairConfig) -> None:
        results = PipelineResults(
            context, raws=settings.raw_timeframes, rollups=settings.rollup_timeframes
        )
        with as_dagster_failure(), open_context(settings) as app:
            partitions, window = _find_target(settings, config)
            tags = {REPAIR_START: partitions[0].key, REPAIR_END: partitions[-1].key}
            context.instance.add_run_tags(context.run_id, tags)
            request = RepairRequest(partitions, window, config.again, context.run_id)
            result = repair_partitions(
                app.bind(Repairer), app.bind(Pipeline), request, on_result=results.add
            )
            results.add_coverage(app.bind(CoverageReporter))
        context.instance.add_run_tags(context.run_id, {RECEIPT: str(result.receipt.id)})
        context.add_output_metadata({"partitions": len(partitions), **_metadata(result)})
        log_and_raise(results.assets)

    @dg.job(
        name=REPAIR,
        description=(
            "Repairs some markets, a span of time, or everything: removes rows that must not be "
            "stored, fetches what is missing, checks and rolls up again, and lets the automation "
            "try parked partitions again. With `again` it also finds corrections. Open the "
            "launchpad, fill in `market`, `start` and `end` (each may stay empty), and launch. "
            "The receipt records what was done (`marketdata receipts`)."
        ),
    )
    def repair() -> None:
        repair_span()

    return repair


def repair_config(markets: Sequence[str], window: Window, *, again: bool) -> dict[str, Any]:
    """Return the run configuration of the job for a span; no markets means all of them."""
    config = {
        "market": " ".join(markets),
        "start": format_time(window.start),
        "end": format_time(window.end),
        "again": again,
    }
    return {"ops": {OP: {"config": config}}}


def _find_target(settings: Settings, config: RepairConfig) -> _Target:
    markets = [settings.market(key) for key in config.market.split()] or list(settings.markets)
    start = parse_time(config.start) if config.start else settings.since
    end = parse_time(config.end) if config.end else settings.now()
    window = Window(start, end)
    partitions = settings.partitions(markets, window)
    if not partitions:
        raise dg.Failure(
            f"the universe wants nothing of {window}; start must come before end",
            allow_retries=False,
        )
    return _Target(partitions, window)


def _metadata(result: RepairResult) -> dict[str, Any]:
    receipt = result.receipt
    counts = {name: receipt.body[name] for name in ("requests", "stored", "corrected", "refused")}
    return {
        "unparked": result.unparked,
        "receipt": receipt.id,
        "message": receipt.message,
        **counts,
    }


def main() -> None:
    """Execute the job in this process, for the span that the first argument names."""
    request = json.loads(sys.argv[1])
    window = Window(parse_time(request["start"]), parse_time(request["end"]))
    with warnings.catch_warnings(action="ignore"), open_instance() as instance:
        result = repair_job(load_universe()).execute_in_process(
            repair_config(request["markets"], window, again=request["again"]),
            instance=instance,
            tags={PROCESS_TAG: process_id(os.getpid())},
            raise_on_error=False,
        )
        run = instance.get_run_by_id(result.run_id)
    number = run.tags.get(RECEIPT) if run else None
    answer = {
        "success": result.success,
        "receipt": int(number) if number else None,
        "message": failure_message(result),
    }
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()

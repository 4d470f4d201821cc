"""`marketdata plan` and `marketdata backfill`: what is missing, what that costs, and getting it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import typer

from marketdata_assets.cli.options import End, Format, ListFormat, Markets, Start
from marketdata_assets.cli.output import out, print_line, print_problem, progress_bar, show
from marketdata_assets.cli.selection import load_context, select_partitions

if TYPE_CHECKING:
    from rich.console import Console

    from marketdata_assets.cli.worker_pool import BackfillOutcome
    from marketdata_assets.flows.fetch.plan import PlannedPartition
    from marketdata_assets.settings.universe import Settings

OFFERS_SHOWN = 20

commands = typer.Typer()


@commands.command()
def plan(
    *,
    market: Markets = None,
    start: Start = None,
    end: End = None,
    format: Format = ListFormat.TABLE,
) -> None:
    """Print what a backfill would do: partitions, requests and minutes. Nothing is requested."""
    from marketdata_assets.flows.fetch.plan import BackfillPlanner, minutes_needed

    with load_context(for_reading=True) as context:
        settings = context.settings
        partitions = select_partitions(settings, market, start=start, end=end)
        planned = context.bind(BackfillPlanner).plan(partitions)
    totals = {
        "partitions": len(planned),
        "bars": sum(each.bars for each in planned),
        "requests": sum(each.requests for each in planned),
        "minutes": round(sum(minutes_needed(planned, v) for v in settings.venues.values()), 2),
    }
    rows = [
        {"partition": p.partition.key, "bars": p.bars, "requests": p.requests, "reason": p.reason}
        for p in planned
    ]
    offers = list(_offer_rows(settings, planned))
    summary = (
        "{partitions} partitions, {bars} bars, {requests} requests, at least {minutes} minutes"
    )
    show(
        rows,
        format,
        document={**totals, "tasks": rows, "archives": offers},
        closing="\n".join([summary.format(**totals), *_describe_offers(offers)]),
    )


@commands.command()
def backfill(market: Markets = None, start: Start = None, end: End = None) -> None:
    """Fetch, check and roll up what is missing or may still be filled. Dagster shows the runs.

    A second call over closed months requests no bars.
    """
    from marketdata_assets.flows.derive.consolidate import Consolidator
    from marketdata_assets.flows.fetch.plan import BackfillPlanner

    with load_context() as context:
        settings, storage = context.settings, context.storage
        storage.lake.remove_abandoned_uploads()
        if storage.rollups_in_warehouse and not storage.warehouse.exists:
            context.ledger.partitions.clear_rollup_sources()
        partitions = select_partitions(settings, market, start=start, end=end)
        planned = context.bind(BackfillPlanner).plan(partitions)
        code = run_backfill(settings, planned)
        consolidations = context.bind(Consolidator).plan(partitions)
        code = max(code, run_backfill(settings, consolidations))
    if not planned and not consolidations:
        print_line(f"nothing to do: all {len(partitions)} partitions are complete")
    raise typer.Exit(code)


def run_backfill(
    settings: Settings, planned: Sequence[PlannedPartition], console: Console = out
) -> int:
    """Bring these partitions up to date through Dagster, with a progress bar; return the exit code.

    Problems are printed on standard error, a summary on `console`. An empty plan does nothing.
    """
    from marketdata_assets.cli.worker_pool import execute_ranges, split_into_ranges

    if not planned:
        return 0
    total, count = sum(each.bars for each in planned), f"{len(planned)} partitions"
    with progress_bar("bars") as update:
        update(total=total, description=count)

        def on_change(outcome: BackfillOutcome) -> None:
            description = f"{count}, {outcome.requests} requests"
            update(completed=min(outcome.bars, total), description=description)

        ranges = split_into_ranges([each.partition for each in planned])
        outcome = execute_ranges(settings, ranges, on_change)
    print_problems(outcome)
    received = f"{outcome.bars} bars received in {outcome.requests} requests, "
    has_fetched = total or outcome.requests
    print_line(f"{received if has_fetched else ''}{count} in {outcome.runs} runs", console)
    return outcome.exit_code


def print_problems(outcome: BackfillOutcome) -> None:
    """Print a line for every partition that failed, check that did not pass, and broken run."""
    for failure in outcome.failures:
        print_problem("failed", f"{failure.partition}: {failure.message}")
    for check in outcome.checks:
        text = f"{check.check} {check.partition}: {check.message}"
        print_problem("check", text, style="yellow")
    for run in outcome.broken_runs:
        print_problem("run failed", run)


# --------------------------------------------------------------------------------- archives
def _offer_rows(
    settings: Settings, planned: Sequence[PlannedPartition]
) -> Iterator[dict[str, Any]]:
    """Yield the archives that provide a plan's bars for less, as rows."""
    from marketdata_assets.flows.fetch.plan import requests_per_minute

    for each in planned:
        rate = requests_per_minute(settings.venues[each.partition.market.venue])
        for offer in each.offers:
            minutes = None if offer.requests is None else round(offer.requests / rate, 3)
            yield {
                "partition": each.partition.key,
                "timeframe": offer.timeframe.name,
                "bars": offer.bars,
                "saves_requests": offer.requests,
                "saves_minutes": minutes,
                "url": offer.url,
            }


def _describe_offers(offers: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield lines about the archives that save most, and what all of them save."""
    if not offers:
        return
    yield ""
    for offer in sorted(offers, key=lambda row: -(row["saves_requests"] or 10**9))[:OFFERS_SHOWN]:
        saves = f"saves {offer['saves_requests']} requests"
        if offer["saves_requests"] is None:
            saves = "not in the API any more"
        bars = f"{offer['bars']} bars, {saves}"
        yield f"{offer['partition']} {offer['timeframe']}: {bars}: {offer['url']}"
    requests = sum(offer["saves_requests"] or 0 for offer in offers)
    minutes = sum(offer["saves_minutes"] or 0 for offer in offers)
    unserved = sum(offer["bars"] for offer in offers if offer["saves_requests"] is None)
    more = f" ({OFFERS_SHOWN} are shown; --format json has all)"
    yield (
        f"{len(offers)} tables cost less from archives{more if len(offers) > OFFERS_SHOWN else ''}:"
        f" {requests} requests and {minutes:.1f} minutes less; {unserved} bars exist only there."
    )
    yield (
        "Download the files and their CHECKSUM files, and `marketdata import` them before the "
        "backfill."
    )

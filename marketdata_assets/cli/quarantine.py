"""`marketdata quarantine`: the rows that a rule rejected, and judging them again."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from marketdata_assets.cli.options import DryRun, End, Format, ListFormat, Markets, Start
from marketdata_assets.cli.output import err, show
from marketdata_assets.cli.selection import load_context, select_markets, select_window

commands = typer.Typer(
    name="quarantine",
    no_args_is_help=True,
    help="List the rows that a rule rejected, with the reasons, or judge them again.",
)


@commands.command("list")
def list_rows(
    *,
    market: Annotated[
        str | None, typer.Option("--market", "-m", help="Take only this market.")
    ] = None,
    start: Start = None,
    end: End = None,
    limit: Annotated[int, typer.Option(min=1, help="Print at most this many rows.")] = 100,
    format: Format = ListFormat.TABLE,
) -> None:
    """List rejected rows: the fields as sent, the rules they break, and the request behind them."""
    with load_context(for_reading=True) as context:
        settings, window = context.settings, select_window(context.settings, start, end)
        only_market = settings.market(market) if market else None
        rows = context.ledger.quarantine.rows(only_market, window, limit)
    show(
        rows,
        format,
        columns=["market", "table", "open_time", "reasons", "fetch_id", "seen", "fields"],
        cells={"fields": json.dumps},
        closing=f"{len(rows)} rejected rows",
    )


@commands.command("replay")
def replay_rows(
    *,
    market: Markets = None,
    start: Start = None,
    end: End = None,
    dry_run: DryRun = False,
    format: Format = ListFormat.TABLE,
) -> None:
    """Judge rejected rows again, after a rule was changed: what passes becomes bars and rollups."""
    from marketdata_assets.cli.backfill import run_backfill
    from marketdata_assets.flows.fetch.plan import BackfillPlanner
    from marketdata_assets.flows.fetch.replay import QuarantineReplayer

    with load_context() as context:
        settings, code = context.settings, 0
        markets, window = select_markets(settings, market), select_window(settings, start, end)
        found = context.bind(QuarantineReplayer).replay(markets, window, dry_run)
        stored = [row for row in found if row.outcome == "stored"]
        if not dry_run:
            planned = context.bind(BackfillPlanner).plan(sorted({row.partition for row in stored}))
            code = run_backfill(settings, planned, err)
    rows = [
        {**asdict(row), "partition": row.partition.key, "timeframe": row.timeframe.name}
        for row in found
    ]
    show(
        rows,
        format,
        columns=["id", "partition", "open_time", "reasons", "outcome"],
        closing=f"{len(rows)} rows were judged again, {len(stored)} of them become bars",
    )
    raise typer.Exit(code)

"""`marketdata repair`, `receipts` and `corrections`: stored bars are repaired, with a proof."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from marketdata_assets.cli.options import DryRun, End, Format, ListFormat, Markets, Start
from marketdata_assets.cli.output import print_json, print_problem, show
from marketdata_assets.cli.selection import load_context, select_markets, select_window
from marketdata_assets.errors import BadInput
from marketdata_assets.model.window import format_time, parse_time

if TYPE_CHECKING:
    from decimal import Decimal

    from marketdata_assets.flows.operate.repair import RepairStep
    from marketdata_assets.flows.prove.corrections import Correction
    from marketdata_assets.ledger.receipts import Receipt
    from marketdata_assets.settings.universe import Settings

commands = typer.Typer()


@commands.command()
def repair(
    *,
    market: Markets = None,
    start: Start = None,
    end: End = None,
    missing: Annotated[
        bool,
        typer.Option(
            "--missing", help="Do not request stored bars again, although a span is given."
        ),
    ] = False,
    dry_run: DryRun = False,
    format: Format = ListFormat.TABLE,
) -> None:
    """Clean, fetch what is missing, check and roll up again, through Dagster; print a receipt.

    With --start or --end, every bar of the span is requested again, to find corrections.
    """
    from marketdata_assets.cli.dagster_home import run_for_json
    from marketdata_assets.flows.operate.repair import Repairer

    with load_context() as context:
        settings = context.settings
        markets, window = select_markets(settings, market), select_window(settings, start, end)
        again = window if (start or end) and not missing else None
        steps = context.bind(Repairer).plan(settings.partitions(markets, window), again)
        if dry_run or not steps:
            _show_steps(settings, steps, format)
            return
        request = {
            "markets": [market.key for market in markets],
            "start": format_time(window.start),
            "end": format_time(window.end),
            "again": again is not None,
        }
        run = run_for_json(["marketdata_assets.defs.repair", json.dumps(request)], settings)
        receipt = context.ledger.receipts.find(run["receipt"]) if run["receipt"] else None
    if receipt:
        _show_receipt(receipt, format)
    if not run["success"]:
        lines = run["message"].strip().splitlines() or ["see the run in the UI"]
        print_problem("failed", lines[-1])
        raise typer.Exit(1)


def _show_steps(settings: Settings, steps: Sequence[RepairStep], format: ListFormat) -> None:
    from marketdata_assets.flows.fetch.plan import requests_per_minute
    from marketdata_assets.model.partition import Partition

    requests, minutes = sum(step.requests for step in steps), 0.0
    for step in steps:
        venue = settings.venues[Partition.parse(step.partition).market.venue]
        minutes += step.requests / requests_per_minute(venue)
    rows = [asdict(step) for step in steps]
    totals = {"requests": requests, "minutes": round(minutes, 2)}
    show(
        rows,
        format,
        columns=["partition", "table", "what", "why", "bars", "requests"],
        document={**totals, "steps": rows},
        closing=f"{len(rows)} steps, about {requests} requests, at least {totals['minutes']} "
        "minutes; nothing was changed",
    )


def _show_receipt(receipt: Receipt, format: ListFormat) -> None:
    body = receipt.body
    message = f"receipt {receipt.id}: {body['requests']} requests; {receipt.message}"
    show(
        body["tables"],
        format,
        columns=["table", "partition", "rows_before", "rows_after", "hash_before", "hash_after"],
        document={
            "receipt": receipt.id,
            "at": format_time(receipt.at),
            "says": receipt.message,
            **body,
        },
        closing="\n".join([*_describe_cleaned(body["cleaned"]), message]),
    )
    if format == ListFormat.TABLE:
        for failed in body["failed"]:
            print_problem("failed", f"{failed['table']} {failed['partition']}: {failed['says']}")


def _describe_cleaned(cleaned: Sequence[dict[str, str]]) -> Iterator[str]:
    for each in cleaned:
        yield f"cleaned {each['table']} {each['partition']}: {each['says']}"


@commands.command()
def receipts(
    number: Annotated[
        int | None, typer.Argument(metavar="NUMBER", help="Print all of this receipt, as JSON.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Print at most this many, the newest.")] = 50,
    format: Format = ListFormat.TABLE,
) -> None:
    """List what repairs, imports and replays did, the newest first, or print one receipt."""
    with load_context(for_reading=True) as context:
        if number is not None:
            receipt = context.ledger.receipts.find(number)
            if receipt is None:
                raise BadInput(f"there is no receipt {number}; `marketdata receipts` lists them")
            print_json(receipt.as_dict())
            return
        found = context.ledger.receipts.list(limit=limit)
    rows = [
        {"receipt": r.id, "kind": r.kind, "at": format_time(r.at), "says": r.message} for r in found
    ]
    show(rows, format, closing=f"{len(rows)} receipts")


@commands.command()
def corrections(
    *,
    market: Markets = None,
    start: Start = None,
    end: End = None,
    since: Annotated[
        datetime | None,
        typer.Option(
            "--since",
            parser=parse_time,
            metavar="TIME",
            help="List only corrections recorded at or after this moment (UTC, our clock).",
        ),
    ] = None,
    format: Format = ListFormat.TABLE,
) -> None:
    """List corrected bars: what they were, what they became, by how much, and since when."""
    from marketdata_assets.flows.prove.corrections import list_corrections

    with load_context(for_reading=True) as context:
        settings = context.settings
        markets, window = select_markets(settings, market), select_window(settings, start, end)
        found = list_corrections(settings, context.lake, markets, window=window, since=since)
        rows = [_correction_row(correction) for correction in found]
    show(
        rows,
        format,
        columns=["market", "table", "open_time", "corrected", "changes"],
        cells={"changes": _describe_changes},
        closing=f"{len(rows)} corrections",
    )


def _correction_row(correction: Correction) -> dict[str, Any]:
    changes = correction.changes.items()
    return {
        "market": correction.market.key,
        "table": correction.table.name,
        "open_time": format_time(correction.open_time),
        "known": format_time(correction.known_at) if correction.known_at else None,
        "corrected": format_time(correction.corrected_at),
        "source": correction.source,
        "changes": {name: _change(before, after) for name, (before, after) in changes},
    }


def _change(before: Decimal | int | None, after: Decimal | int | None) -> dict[str, str | None]:
    """Return a value before and after, None where it was not given, and how much it changed."""
    from marketdata_assets.model.bar import format_number

    was, became = (None if value is None else format_number(value) for value in (before, after))
    return {"was": was, "is": became, "by": _relative_change(before, after)}


def _relative_change(before: Decimal | int | None, after: Decimal | int | None) -> str:
    """Return a change in percent of the value before."""
    if before is None:
        return "new"
    if after is None:
        return "gone"
    return f"{(after - before) / before:+.4%}" if before else "from 0"


def _describe_changes(changes: dict[str, dict[str, str | None]]) -> str:
    parts = (f"{name} {c['was']} -> {c['is']} ({c['by']})" for name, c in changes.items())
    return ", ".join(parts)

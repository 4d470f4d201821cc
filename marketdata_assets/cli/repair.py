"""`marketdata repair`, `corrections`, `receipts` and `quarantine replay`: what is mended, and the
proof of it.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from marketdata_assets.cli.common import (
    End,
    Format,
    Markets,
    Start,
    app,
    chosen,
    err,
    one_of,
    opened,
    out,
    plain,
    print_json,
    print_table,
    quarantine,
    window_of,
)
from marketdata_assets.model.bar import format_number
from marketdata_assets.model.window import format_time, parse_time

DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")]


@app.command()
def repair(
    market: Markets = None,
    start: Start = None,
    end: End = None,
    missing: Annotated[
        bool,
        typer.Option(
            "--missing", help="Do not ask again for what is stored, although a span is given."
        ),
    ] = False,
    dry_run: DryRun = False,
    format: Format = "table",
) -> None:
    """Clean, fetch what is missing, check and roll up again, through Dagster; with a receipt.

    With --start or --end, the venue is asked again for every bar of the span: what it corrected
    becomes a new revision.
    """
    from marketdata_assets.cli.processes import answer_of
    from marketdata_assets.flows.fetch.plan import per_minute
    from marketdata_assets.flows.operate.repair import plan_repair
    from marketdata_assets.model.partition import Partition

    one_of(format, "table", "json")
    with opened() as (settings, toolbox):
        markets, window = chosen(settings, market), window_of(settings, start, end)
        again = window if (start or end) and not missing else None
        partitions = settings.partitions(markets, window)
        steps = plan_repair(toolbox, partitions, again)
        rates = {
            step.partition: per_minute(
                settings.venues[Partition.parse(step.partition).market.venue]
            )
            for step in steps
        }
        minutes = round(sum(step.requests / rates[step.partition] for step in steps), 2)
        if dry_run or not steps:
            _show_plan([asdict(step) for step in steps], minutes, format)
            return
        asked = {
            "markets": [m.key for m in markets],
            "start": format_time(window.start),
            "end": format_time(window.end),
            "again": again is not None,
        }
        done = answer_of(["marketdata_assets.defs.repair", json.dumps(asked)], settings)
        receipt = toolbox.receipts.find(done["receipt"]) if done["receipt"] else None
    if receipt:
        body = {
            "receipt": receipt.id,
            "at": format_time(receipt.at),
            "says": receipt.says,
            **receipt.body,
        }
        print_json(body) if format == "json" else _show_receipt(body)
    if not done["success"]:
        err.print(
            f"[red]failed[/red] {plain(done['says'].strip().splitlines()[-1] if done['says'].strip() else 'see the run in the UI')}",
            highlight=False,
        )
        raise typer.Exit(1)


def _show_plan(steps: list[dict[str, Any]], minutes: float, format: str) -> None:
    requests = sum(step["requests"] for step in steps)
    if format == "json":
        print_json({"requests": requests, "minutes": minutes, "steps": steps})
        return
    print_table(steps, ["partition", "table", "what", "why", "bars", "requests"])
    out.print(
        f"{len(steps)} steps, about {requests} requests, at least {minutes} minutes; nothing was changed",
        highlight=False,
    )


def _show_receipt(body: dict[str, Any]) -> None:
    print_table(
        body["tables"],
        ["table", "partition", "rows_before", "rows_after", "hash_before", "hash_after"],
    )
    for cleaned in body["cleaned"]:
        out.print(
            f"cleaned {cleaned['table']} {cleaned['partition']}: {plain(cleaned['says'])}",
            highlight=False,
        )
    for failed in body["failed"]:
        err.print(
            f"[red]failed[/red] {failed['table']} {failed['partition']}: {plain(failed['says'])}",
            highlight=False,
        )
    out.print(
        f"receipt {body['receipt']}: {body['requests']} requests; {plain(body['says'])}",
        highlight=False,
    )


@app.command()
def receipts(
    number: Annotated[
        int | None, typer.Argument(metavar="NUMBER", help="Show the whole of this one.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, the newest.")] = 50,
    format: Format = "table",
) -> None:
    """What repairs, imports and replays have done, the newest first."""
    from marketdata_assets.errors import BadInput

    one_of(format, "table", "json")
    with opened() as (_, toolbox):
        one = toolbox.receipts.find(number) if number is not None else None
        found = toolbox.receipts.list(limit=limit)
    if number is not None:
        if one is None:
            raise BadInput(f"there is no receipt {number}; `marketdata receipts` lists them")
        print_json({**one._asdict(), "at": format_time(one.at)})
        return
    rows = [
        {"receipt": r.id, "kind": r.kind, "at": format_time(r.at), "says": r.says} for r in found
    ]
    print_json(rows) if format == "json" else print_table(rows, ["receipt", "kind", "at", "says"])


@app.command()
def corrections(
    market: Markets = None,
    start: Start = None,
    end: End = None,
    since: Annotated[
        str | None,
        typer.Option("--since", help="Only those made at or after this moment, by our clock."),
    ] = None,
    format: Format = "table",
) -> None:
    """Which bars were corrected: what they were, what they became, by how much, and since when."""
    from marketdata_assets.flows.prove.corrections import corrections as corrections_flow

    one_of(format, "table", "json")
    with opened() as (settings, toolbox):
        found = list(
            corrections_flow(
                toolbox,
                chosen(settings, market),
                window_of(settings, start, end),
                parse_time(since) if since else None,
            )
        )
    rows: list[dict[str, Any]] = [
        {
            "market": c.market.key,
            "table": c.table.name,
            "open_time": format_time(c.open_time),
            "known": format_time(c.known_at) if c.known_at else None,
            "corrected": format_time(c.corrected_at),
            "source": c.source,
            "changes": {name: _change(was, became) for name, (was, became) in c.changes.items()},
        }
        for c in found
    ]
    if format == "json":
        print_json(rows)
        return
    for row in rows:
        row["changes"] = ", ".join(
            f"{n} {c['was']} -> {c['is']} ({c['by']})" for n, c in row["changes"].items()
        )
    print_table(rows, ["market", "table", "open_time", "corrected", "changes"])
    out.print(f"{len(rows)} corrections", highlight=False)


def _change(was: Any, became: Any) -> dict[str, str | None]:
    """A value before and after, null where it was not given, and by how much it changed."""
    before, after = (None if value is None else format_number(value) for value in (was, became))
    return {"was": before, "is": after, "by": _by(was, became)}


def _by(was: Any, became: Any) -> str:
    """How much it changed, relative to what it was."""
    return (
        f"{(became - was) / was:+.4%}"
        if was and became is not None
        else "new"
        if was is None
        else "gone"
        if became is None
        else "from 0"
    )


@quarantine.command("replay")
def quarantine_replay(
    market: Markets = None,
    start: Start = None,
    end: End = None,
    dry_run: DryRun = False,
    format: Format = "table",
) -> None:
    """Judge refused rows again, after a rule was mended: those that pass become bars, and are rolled
    up.
    """
    from marketdata_assets.cli.backfill import backfill_tasks
    from marketdata_assets.flows.fetch.plan import plan
    from marketdata_assets.flows.fetch.replay import replay

    one_of(format, "table", "json")
    with opened() as (settings, toolbox):
        found = replay(toolbox, chosen(settings, market), window_of(settings, start, end), dry_run)
        touched = (
            sorted({one.partition for one in found if one.outcome == "stored"})
            if not dry_run
            else []
        )
        code = backfill_tasks(settings, tasks, err) if (tasks := plan(toolbox, touched)) else 0
    rows = [
        {**asdict(one), "partition": one.partition.key, "timeframe": one.timeframe.name}
        for one in found
    ]
    print_json(rows) if format == "json" else print_table(
        rows, ["id", "partition", "open_time", "reasons", "outcome"]
    )
    raise typer.Exit(code)

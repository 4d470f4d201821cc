"""`marketdata health`, `alerts`, `parked`, `prune`, `retire`, `rewrite`: care for the platform."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from marketdata_assets.cli.options import DryRun, End, Format, ListFormat, Markets, Start
from marketdata_assets.cli.output import print_json, print_problem, show
from marketdata_assets.cli.selection import load_context, select_partitions
from marketdata_assets.model.window import format_time

if TYPE_CHECKING:
    from marketdata_assets.ledger.attempts import BackfillAttempt
    from marketdata_assets.ledger.incidents import Incident

commands = typer.Typer()


@commands.command()
def health(format: Format = ListFormat.TABLE) -> None:
    """Print how the daemon, every venue and every market are, with the reasons.

    Exits with 1 unless all of them are healthy.
    """
    from marketdata_assets.flows.operate.health import HealthInspector, HealthStatus

    with load_context(for_reading=True) as context:
        found = context.bind(HealthInspector).inspect()
    show([health.as_dict() for health in found], format, cells={"reasons": "; ".join})
    is_healthy = all(health.status == HealthStatus.HEALTHY for health in found)
    raise typer.Exit(0 if is_healthy else 1)


@commands.command()
def alerts(
    open_only: Annotated[
        bool, typer.Option("--open", help="List only incidents that are not over.")
    ] = False,
    limit: Annotated[int, typer.Option(min=1, help="Print at most this many, the newest.")] = 50,
    format: Format = ListFormat.TABLE,
) -> None:
    """List incidents, with the times when they opened and recovered, and alerts not sent yet."""
    with load_context(for_reading=True) as context:
        incidents = context.ledger.incidents
        backlogs = incidents.backlogs()
        newest = incidents.history(limit)
        found = list(incidents.open().values())[-limit:] if open_only else newest
    count = sum(incident.recovered_at is None for incident in found)
    show(
        [_incident_row(incident) for incident in found],
        format,
        columns=["severity", "opened", "recovered", "title"],
        closing=f"{len(found)} incidents, {count} of them open",
    )
    if format == ListFormat.TABLE:
        for channel, backlog in backlogs.items():
            label = f"{backlog.waiting} alerts wait"
            print_problem(label, f"for {channel}: {backlog.error}", style="yellow")


def _incident_row(incident: Incident) -> dict[str, Any]:
    problem = incident.problem
    return {
        "severity": problem.severity,
        "opened": format_time(incident.opened_at),
        "recovered": format_time(incident.recovered_at) if incident.recovered_at else None,
        "title": problem.title,
        "body": problem.body,
        "incident": problem.key,
    }


@commands.command()
def parked(
    *,
    market: Markets = None,
    start: Start = None,
    end: End = None,
    unpark: Annotated[
        bool, typer.Option("--unpark", help="Let the sensor `backfill_missed` try them again.")
    ] = False,
    format: Format = ListFormat.TABLE,
) -> None:
    """List partitions that the sensor `backfill_missed` has given up, with the last reason."""
    with load_context(for_reading=not unpark) as context:
        attempts = context.ledger.attempts
        partitions = set(select_partitions(context.settings, market, start=start, end=end))
        found = [a for a in attempts.all().values() if a.parked_at and a.partition in partitions]
        if unpark:
            attempts.clear([attempt.partition for attempt in found])
    rows = [_attempt_row(attempt) for attempt in found]
    closing = f"{len(rows)} partitions {'unparked' if unpark else 'are parked'}"
    show(rows, format, closing=closing)


def _attempt_row(attempt: BackfillAttempt) -> dict[str, Any]:
    return {
        "partition": attempt.partition.key,
        "attempts": attempt.attempts,
        "parked": format_time(attempt.parked_at) if attempt.parked_at else None,
        "reason": attempt.reason,
    }


@commands.command()
def prune(
    days: Annotated[
        float | None,
        typer.Option(min=0, help="Keep this many days. Default: `retention_days` of the universe."),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Delete logs of old runs, recovered incidents and old fetch logs.

    Materializations and check results always stay. The counts are printed as JSON.
    """
    from marketdata_assets.cli.dagster_home import run_for_json
    from marketdata_assets.flows.operate.prune import delete_old_records

    with load_context() as context:
        settings, ledger = context.settings, context.ledger
        keep = settings.retention_days if days is None else days
        flags = ["--days", str(keep), *(["--dry-run"] if dry_run else [])]
        deleted = run_for_json(["marketdata_assets.dagster_ext.prune", *flags], settings)
        deleted |= delete_old_records(settings, ledger, context.clock, days=keep, dry_run=dry_run)
    print_json(deleted)


@commands.command()
def retire(dry_run: DryRun = False, format: Format = ListFormat.TABLE) -> None:
    """Remove months older than `retention:` of the universe, and move those older than `cold:`."""
    from marketdata_assets.flows.operate.retire import Retirer

    with load_context() as context:
        rows = [retirement.as_dict() for retirement in context.bind(Retirer).retire(dry_run)]
    closing = f"{len(rows)} months" + (", nothing was changed" if dry_run else "")
    show(rows, format, closing=closing)


@commands.command()
def rewrite(format: Format = ListFormat.TABLE) -> None:
    """Give all objects of each table of the lake the same columns and types.

    Objects of earlier releases each have types of their own. Nothing is requested, and all digits
    stay.
    """
    from marketdata_assets.model.table import every_table

    rows, total = [], 0
    with load_context() as context:
        for table in every_table():
            if objects := len(context.lake.list_sizes(table)):
                rewritten = context.lake.rewrite(table)
                rows.append({"table": table.name, "objects": objects, "rewritten": rewritten})
                total += rewritten
    show(rows, format, closing=f"{total} objects rewritten")

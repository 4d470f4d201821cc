"""The `marketdata` command. Exit codes: 0 done, 1 a check failed or something is missing, 2 bad input,
3 unreachable.
"""

from __future__ import annotations

import json
import signal
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import marketdata_assets.cli.anomalies
import marketdata_assets.cli.gaps
import marketdata_assets.cli.lock
import marketdata_assets.cli.repair
import marketdata_assets.cli.schema  # noqa: F401 - registers its commands
from marketdata_assets.cli.common import (
    End,
    FileFormat,
    Format,
    Markets,
    Out,
    Start,
    app,
    check_format,
    chosen,
    err,
    one_of,
    opened,
    out,
    plain,
    print_json,
    print_table,
    quarantine,
    say,
    window_of,
    write_bars,
)
from marketdata_assets.cli.importing import offer_rows, print_offers
from marketdata_assets.errors import BadInput, MarketDataError
from marketdata_assets.model.timeframe import timeframe
from marketdata_assets.model.window import iso, parse_time

if TYPE_CHECKING:
    from marketdata_assets.ledger.incidents import Incident
    from marketdata_assets.settings.universe import Settings


def main() -> None:
    """Run the command; a person's mistake or an unreachable venue is one line, never a traceback."""
    signal.signal(
        signal.SIGTERM, _interrupt
    )  # whoever ends us politely gets the same clean-up as Ctrl-C
    try:
        app()
    except MarketDataError as error:
        err.print(f"[red]error:[/red] {plain(str(error))}", highlight=False)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        err.print("stopped; run it again to go on")
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


# --------------------------------------------------------------------------------- backfill, plan
@app.command()
def backfill(market: Markets = None, start: Start = None, end: End = None) -> None:
    """Fetch, check and roll up what is missing or open in that span, through Dagster."""
    from marketdata_assets.cli.backfill import backfill_tasks
    from marketdata_assets.flows.derive.consolidate import consolidations
    from marketdata_assets.flows.fetch.plan import plan as plan_flow

    with opened() as (settings, toolbox):
        toolbox.lake.sweep()
        if settings.rollups == "duckdb" and not toolbox.warehouse.exists:
            toolbox.ledger.forget_rollups()
        partitions = settings.partitions(chosen(settings, market), window_of(settings, start, end))
        tasks = plan_flow(toolbox, partitions)
        code = backfill_tasks(settings, tasks) if tasks else 0
        above = consolidations(toolbox, partitions)
        if above:
            code = max(code, backfill_tasks(settings, above))
        if not tasks and not above:
            out.print(f"nothing to do: all {len(partitions)} partitions are complete")
    raise typer.Exit(code)


@app.command()
def plan(
    market: Markets = None, start: Start = None, end: End = None, format: Format = "table"
) -> None:
    """What a backfill would do: partitions, requests and minutes, before anything runs."""
    from marketdata_assets.flows.fetch.plan import minutes
    from marketdata_assets.flows.fetch.plan import plan as plan_flow

    one_of(format, "table", "json")
    with opened() as (settings, toolbox):
        tasks = plan_flow(
            toolbox, settings.partitions(chosen(settings, market), window_of(settings, start, end))
        )
        needed = sum(minutes(tasks, venue) for venue in settings.venues.values())
    total = {
        "partitions": len(tasks),
        "bars": sum(t.bars for t in tasks),
        "requests": sum(t.requests for t in tasks),
        "minutes": round(needed, 2),
    }
    rows = [
        {"partition": t.partition.key, "bars": t.bars, "requests": t.requests, "reason": t.reason}
        for t in tasks
    ]
    offers = offer_rows(settings, tasks)
    if format == "json":
        print_json({**total, "tasks": rows, "archives": offers})
        return
    print_table(rows, ["partition", "bars", "requests", "reason"])
    out.print(
        "{partitions} partitions, {bars} bars, {requests} requests, at least {minutes} minutes".format(
            **total
        )
    )
    print_offers(offers)


# --------------------------------------------------------------------------------- bars, coverage,
@app.command()
def bars(
    market: Annotated[str, typer.Argument(help="A market such as binance:BTC-USDT")],
    timeframe_: Annotated[
        str, typer.Argument(metavar="TIMEFRAME", help="1m 5m 15m 30m 1h 4h 12h 1d 1w")
    ],
    start: Start = None,
    end: End = None,
    as_of: Annotated[
        str | None,
        typer.Option(
            "--as-of",
            help="As they were known at this moment, UTC, by our clock; or at that of this lock file.",
        ),
    ] = None,
    format: FileFormat = "table",
    file: Out = None,
) -> None:
    """Print the stored bars of a market: as they are known now, or as they were known at a moment."""
    from marketdata_assets.flows.read.as_of import read_as_of
    from marketdata_assets.flows.read.bars import known_market, read_bars

    check_format(format, file)
    with opened() as (settings, toolbox):
        asked = (
            toolbox,
            known_market(toolbox, market),
            timeframe(timeframe_),
            window_of(settings, start, end),
        )
        found = read_as_of(*asked, _moment(as_of)) if as_of else read_bars(*asked)
    write_bars(found, format, file)


def _moment(text: str) -> datetime:
    """A time, or that of the dataset that a lock file pins."""
    from marketdata_assets.flows.read.lock import pinned_moment

    return pinned_moment(Path(text)) if Path(text).is_file() else parse_time(text)


@app.command()
def sql(
    query: Annotated[
        str,
        typer.Argument(
            help="SQL of DuckDB over raw.ohlcv_1m, rollup.ohlcv_1h, ...; `SHOW ALL TABLES` lists them."
        ),
    ],
    market: Markets = None,
    start: Start = None,
    end: End = None,
    format: FileFormat = "table",
    file: Out = None,
) -> None:
    """Query all tables with SQL. Naming markets and a span opens fewer files."""
    from marketdata_assets.flows.read.sql import connected
    from marketdata_assets.storage.views import answer

    check_format(format, file)
    with (
        opened() as (settings, toolbox),
        connected(toolbox, market, window_of(settings, start, end)) as connection,
    ):
        found = answer(connection, query)
    write_bars(found, format, file)


@app.command()
def coverage(
    market: Markets = None, start: Start = None, end: End = None, format: Format = "table"
) -> None:
    """Explain every expected bar of each market, in 1m bars: the parts sum to what is expected."""
    from marketdata_assets.flows.prove.gaps import explain_new
    from marketdata_assets.flows.read.coverage import coverage as coverage_flow

    one_of(format, "table", "json")
    with opened() as (settings, toolbox):
        window = window_of(settings, start, end) if start or end else None
        markets = chosen(settings, market)
        explain_new(toolbox, markets)
        rows = [c.as_dict() for c in coverage_flow(toolbox, markets, window)]
    print_json(rows) if format == "json" else print_table(rows, list(rows[0]))


@quarantine.command("list")
def quarantine_list(
    market: Annotated[str | None, typer.Option("--market", "-m", help="Only this market.")] = None,
    start: Start = None,
    end: End = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many rows.")] = 100,
    format: Format = "table",
) -> None:
    """Rejected rows: all fields as they were sent, the rules they broke, and the request that brought
    them.
    """
    one_of(format, "table", "json")
    with opened() as (settings, toolbox):
        rows = toolbox.ledger.quarantined(
            settings.market(market) if market else None, window_of(settings, start, end), limit
        )
    if format == "json":
        print_json(rows)
        return
    names = ["market", "table", "open_time", "reasons", "fetch_id", "seen", "fields"]
    print_table([{**row, "fields": json.dumps(row["fields"])} for row in rows], names)


# --------------------------------------------------------------------------------- health, alerts,
@app.command()
def health(format: Format = "table") -> None:
    """How every market, every venue and the daemon is, with the reasons. Exit code 1 unless all are
    healthy.
    """
    from marketdata_assets.flows.operate.health import Status
    from marketdata_assets.flows.operate.health import health as health_flow

    one_of(format, "table", "json")
    with opened() as (_, toolbox):
        found = health_flow(toolbox)
    rows: list[dict[str, Any]] = [h.as_dict() for h in found]
    if format == "json":
        print_json(rows)
    else:
        print_table(
            [{**row, "reasons": "; ".join(row["reasons"])} for row in rows],
            ["kind", "subject", "status", "reasons"],
        )
    raise typer.Exit(0 if all(h.status == Status.HEALTHY for h in found) else 1)


@app.command()
def alerts(
    open_only: Annotated[bool, typer.Option("--open", help="Only what is not over.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, the newest.")] = 50,
    format: Format = "table",
) -> None:
    """What went wrong, since when and until when, and whether everybody was told."""
    one_of(format, "table", "json")
    with opened() as (_, toolbox):
        waiting = toolbox.incidents.undelivered()
        history = (
            list(toolbox.incidents.open().values())[-limit:]
            if open_only
            else toolbox.incidents.history(limit)
        )
    rows = [_incident_row(incident) for incident in history]
    if format == "json":
        print_json(rows)
        return
    print_table(rows, ["severity", "opened", "recovered", "title"])
    still = sum(row["recovered"] is None for row in rows)
    out.print(f"{len(rows)} incidents, {still} of them open", highlight=False)
    for channel, (count, why) in waiting.items():
        err.print(
            f"[yellow]{count} alerts wait[/yellow] for {channel}: {plain(why)}", highlight=False
        )


def _incident_row(incident: Incident) -> dict[str, Any]:
    problem = incident.problem
    recovered = iso(incident.recovered_at) if incident.recovered_at else None
    return {
        "severity": problem.severity,
        "opened": iso(incident.opened_at),
        "recovered": recovered,
        "title": problem.title,
        "body": problem.body,
        "incident": problem.key,
    }


@app.command()
def parked(
    market: Markets = None,
    start: Start = None,
    end: End = None,
    unpark: Annotated[
        bool, typer.Option("--unpark", help="Let `backfill_missed` ask for them again.")
    ] = False,
    format: Format = "table",
) -> None:
    """Partitions that `backfill_missed` has given up, with the reason of the last attempt."""
    one_of(format, "table", "json")
    with opened() as (settings, toolbox):
        wanted = {
            p.key
            for p in settings.partitions(chosen(settings, market), window_of(settings, start, end))
        }
        found = [
            ask
            for ask in toolbox.ledger.asks().values()
            if ask.parked_at and ask.partition.key in wanted
        ]
        if unpark:
            toolbox.ledger.forget_asks([ask.partition for ask in found])
    rows = [
        {
            "partition": ask.partition.key,
            "attempts": ask.attempts,
            "parked": iso(ask.parked_at),
            "reason": ask.reason,
        }
        for ask in found
        if ask.parked_at
    ]
    print_json(rows) if format == "json" else print_table(
        rows, ["partition", "attempts", "parked", "reason"]
    )
    if format == "table":
        out.print(
            f"{len(rows)} partitions {'unparked' if unpark else 'are parked'}", highlight=False
        )


@app.command()
def prune(
    days: Annotated[
        float | None,
        typer.Option(min=0, help="Keep so many days. Default: `retention_days` of the universe."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Remove logs of old runs, recovered alerts and old fetch logs; never a materialization or a check
    result.
    """
    from marketdata_assets.cli.processes import answer_of
    from marketdata_assets.flows.operate.prune import forget

    with opened() as (settings, toolbox):
        keep = settings.retention_days if days is None else days
        flags = ["--days", str(keep), *(["--dry-run"] if dry_run else [])]
        gone = answer_of(["marketdata_assets.dagster_ext.prune", *flags], settings) | forget(
            toolbox, keep, dry_run
        )
    print_json(gone)


@app.command()
def retire(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would go, and where to.")
    ] = False,
    format: Format = "table",
) -> None:
    """Remove months that are older than `retention:` keeps, and move those that are older than `cold:`
    says.
    """
    from marketdata_assets.flows.operate.retire import retire as retire_flow

    one_of(format, "table", "json")
    with opened() as (_, toolbox):
        rows: list[dict[str, Any]] = [
            {
                "table": r.table.name,
                "partition": r.partition.key if r.partition else "all",
                "what": r.what,
                "bytes": r.bytes,
                "says": r.says,
            }
            for r in retire_flow(toolbox, dry_run)
        ]
    print_json(rows) if format == "json" else print_table(
        rows, ["table", "partition", "what", "bytes", "says"]
    )
    if format == "table":
        out.print(
            f"{len(rows)} months" + (", nothing was changed" if dry_run else ""), highlight=False
        )


# --------------------------------------------------------------------------------- servers
Port = Annotated[int, typer.Option(min=0, max=65535, help="TCP port on 127.0.0.1.")]


@app.command()
def sandbox(port: Port = 18081) -> None:
    """Run the sandbox exchange until Ctrl-C: synthetic markets in Binance's wire format."""
    from marketdata_assets.sources.sandbox.server import SandboxExchange, serve

    serve(
        SandboxExchange(),
        port,
        ready=lambda url: out.print(
            f"sandbox exchange at {url}  (base_url: {url})", highlight=False
        ),
    )


@app.command()
def dev(port: Port = 3000) -> None:
    """Serve the Dagster UI and run its daemon on your universe, until Ctrl-C."""
    from marketdata_assets.cli.serve import serve_ui
    from marketdata_assets.notify import open_channels
    from marketdata_assets.settings.load import load_settings

    settings = load_settings()
    # a wrong URL is reported now, not when something burns
    open_channels(settings.state, [url.get_secret_value() for url in settings.alerts])
    serve_ui(settings, port, say=say)


@app.command()
def serve(
    role: Annotated[str, typer.Argument(help="web, daemon or worker")],
    host: Annotated[str, typer.Option(help="The address on which `web` listens.")] = "127.0.0.1",
    port: Port = 3000,
    processes: Annotated[
        int, typer.Option(min=1, help="How many runs a `worker` does at once.")
    ] = 2,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Only say, by the exit code, whether it is alive on this machine."
        ),
    ] = False,
) -> None:
    """One role of an instance that many machines share (`database:` and `broker:` of the universe),
    until it is ended.
    """
    from marketdata_assets.cli.serve import ROLES, check_role, serve_role
    from marketdata_assets.settings.load import load_settings

    if role not in ROLES:
        raise BadInput(f"{role} is not one of {', '.join(ROLES)}")
    settings = load_settings()
    if check:
        raise typer.Exit(0 if check_role(settings, role, host, port) else 1)
    serve_role(settings, role, host, port, processes, say=say)


@app.command()
def demo(
    ui: Annotated[
        bool, typer.Option("--ui/--no-ui", help="Serve the UI afterwards, until Ctrl-C.")
    ] = True,
    port: Port = 3000,
    folder: Annotated[
        Path, typer.Option(help="Where the demo keeps its universe, lake and state.")
    ] = Path("data/demo"),
) -> None:
    """The main job on the sandbox exchange: two markets fetched through ccxt, checked and rolled up,
    then the UI.
    """
    from marketdata_assets.cli.serve import demo_universe, run_sandbox, serve_ui

    with run_sandbox() as url:
        settings = demo_universe(folder, url)
        say(f"sandbox exchange at {url}, universe in {settings.source}")
        code = _demo(settings)
        if ui:
            serve_ui(settings, port, say=say)
    raise typer.Exit(code)


def _demo(settings: Settings) -> int:
    from marketdata_assets.cli.backfill import backfill_tasks
    from marketdata_assets.context import open_toolbox
    from marketdata_assets.flows.fetch.plan import plan as plan_flow
    from marketdata_assets.flows.read.coverage import coverage as coverage_flow

    with open_toolbox(settings) as toolbox:
        window = window_of(settings, None, None)
        tasks = plan_flow(toolbox, settings.partitions(settings.markets, window))
        code = backfill_tasks(settings, tasks) if tasks else 0
        rows = [c.as_dict() for c in coverage_flow(toolbox, settings.markets)]
        print_table(rows, list(rows[0]))
        say(
            f"{len(toolbox.ledger.quarantined(None, window))} rows in quarantine; every check result stands in the UI"
        )
    return code


if __name__ == "__main__":
    main()

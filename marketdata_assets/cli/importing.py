"""`marketdata import`: bars out of archives and CSV files, then the checks and rollups of what they
touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from marketdata_assets.cli.common import Format, app, err, one_of, out, print_json, print_table, say
from marketdata_assets.errors import BadInput
from marketdata_assets.model.timeframe import parse_timeframe
from marketdata_assets.settings.universe import Settings, load_settings

if TYPE_CHECKING:
    from marketdata_assets.cli.backfill import Span
    from marketdata_assets.flows.fetch.imports import Imported
    from marketdata_assets.flows.fetch.plan import Task
    from marketdata_assets.sources.archive import Told

SHOWN = 20
_PER_FILE = [
    "file",
    "market",
    "timeframe",
    "rows",
    "stored",
    "identical",
    "refused",
    "disagree",
    "conflict",
    "unwanted",
    "lacking",
]
_APART = ["market", "timeframe", "open_time", "column", "value", "of", "other_value", "other"]

Files = Annotated[
    list[Path],
    typer.Argument(metavar="FILE...", help="Archives (.zip), CSV files, or folders of them."),
]
OneMarket = Annotated[
    str | None,
    typer.Option("--market", "-m", help="Whose bars they are, where their names do not tell."),
]
OneTimeframe = Annotated[
    str | None,
    typer.Option("--timeframe", help="Of which timeframe, where their names do not tell."),
]
Columns = Annotated[
    str | None,
    typer.Option(
        help="Of a plain CSV: open_time=ts,open=o,... (names in its header, or places counted from 1)."
    ),
]
Unit = Annotated[
    str | None,
    typer.Option(help="s, ms, us, ns or iso: refuse files whose open times are in another unit."),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Read and judge everything, store nothing.")
]


@app.command(name="import")
def import_(
    files: Files,
    market: OneMarket = None,
    timeframe_: OneTimeframe = None,
    columns: Columns = None,
    unit: Unit = None,
    dry_run: DryRun = False,
    format: Format = "table",
) -> None:
    """Take bars out of Binance's archives, Kraken's OHLCVT files or plain CSV. Asks no venue; doing it
    again changes nothing.
    """
    from marketdata_assets.sources.archive import ISO, UNITS, Told, parse_columns

    one_of(format, "table", "json")
    if unit not in (None, ISO, *UNITS):
        raise BadInput(f"--unit {unit} is not one of {', '.join((*UNITS, ISO))}")
    settings = load_settings()
    told = Told(
        settings.market(market) if market else None,
        parse_timeframe(timeframe_) if timeframe_ else None,
        parse_columns(columns) if columns else None,
        unit,
    )
    done, spans = _import(settings, files, told, dry_run)
    code = 0 if dry_run else _show(settings, spans)
    _print(done, format, dry_run)
    raise typer.Exit(max(code, int(done.disputed > 0)))


def _import(
    settings: Settings, files: Sequence[Path], told: Told, dry_run: bool
) -> tuple[Imported, list[Span]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from marketdata_assets.cli.backfill import ranges
    from marketdata_assets.context import open_toolbox
    from marketdata_assets.flows.fetch.imports import import_files, look, to_show
    from marketdata_assets.flows.fetch.plan import Task

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rows"),
        TimeElapsedColumn(),
    )
    with open_toolbox(settings) as toolbox, Progress(*columns, console=err) as progress:
        bar = progress.add_task("reading", total=None)
        found = look(toolbox, files, told, lambda event: progress.advance(bar, event["rows"]))
        progress.reset(
            bar, total=sum(facts.rows for facts in found), description=f"{len(found)} files"
        )
        done = import_files(
            toolbox, found, told, dry_run, lambda event: progress.advance(bar, event["rows"])
        )
        groups = {} if dry_run else to_show(toolbox, done)
    return done, [
        s
        for tables, months in groups.items()
        for s in ranges([Task(p, 0, 0, "imported") for p in months], tables)
    ]


def _show(settings: Settings, spans: Sequence[Span]) -> int:
    """Check and roll up what was told, through Dagster, so that the UI shows it; the exit code of
    that.
    """
    from marketdata_assets.cli.backfill import print_trouble, run_ranges

    with err.status(f"checks and rollups in {len(spans)} runs"):
        outcome = run_ranges(settings, spans, lambda _: None)
    # what is not whole yet is for a backfill to fetch; every other red check, and every failure,
    # counts
    outcome.checks = [
        check
        for check in outcome.checks
        if check["check"].rpartition(" ")[2] not in ("gaps", "complete")
    ]
    print_trouble(outcome)
    return outcome.exit_code


def _print(done: Imported, format: str, dry_run: bool) -> None:
    rows: list[dict[str, Any]] = [tally.as_dict() for tally in done.files]
    apart: list[dict[str, Any]] = [difference._asdict() for difference in done.differences]
    if format == "json":
        print_json({"files": rows, "differences": apart, "dry_run": dry_run})
        return
    print_table(rows, _PER_FILE)
    if apart:
        say(
            f"{len(apart)} values differ, {min(SHOWN, len(apart))} of them here; no bar of them was changed or stored:"
        )
        print_table(apart[:SHOWN], _APART)
    say(done.says() + (", nothing was stored" if dry_run else ""))
    if any(row["lacking"] for row in rows):
        say(
            "`lacking` bars are in no row of their file; `marketdata plan` says what is still to be asked for"
        )


# --------------------------------------------------------------------------------- where files beat
def offer_rows(settings: Settings, tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """The files that a plan's partitions come cheaper from, as rows of a table."""
    from marketdata_assets.flows.fetch.plan import per_minute

    return [
        {
            "partition": task.partition.key,
            "timeframe": offer.timeframe.name,
            "bars": offer.bars,
            "saves_requests": offer.requests,
            "saves_minutes": None
            if offer.requests is None
            else round(
                offer.requests / per_minute(settings.venues[task.partition.market.venue]), 3
            ),
            "url": offer.url,
        }
        for task in tasks
        for offer in task.offers
    ]


def print_offers(offers: Sequence[dict[str, Any]]) -> None:
    """Where to get them, and what that saves; the first ones only."""
    if not offers:
        return
    saved, minutes = (
        sum(offer[name] or 0 for offer in offers) for name in ("saves_requests", "saves_minutes")
    )
    only = sum(offer["bars"] for offer in offers if offer["saves_requests"] is None)
    say("")
    for offer in sorted(offers, key=lambda offer: -(offer["saves_requests"] or 10**9))[:SHOWN]:
        says = (
            "not in the API any more"
            if offer["saves_requests"] is None
            else f"saves {offer['saves_requests']} requests"
        )
        line = f"{offer['partition']} {offer['timeframe']}: {offer['bars']} bars, {says}: {offer['url']}"
        out.print(line, highlight=False, soft_wrap=True)  # nobody can copy a URL that is cut
    more = f" (here {SHOWN} of them; --format json has all)" if len(offers) > SHOWN else ""
    say(
        f"{len(offers)} tables come cheaper from files{more}: {saved} requests and {minutes:.1f} minutes less; {only} bars are only there."
    )
    say(
        "Download them yourself, with their CHECKSUM files, and `marketdata import` them before the backfill."
    )

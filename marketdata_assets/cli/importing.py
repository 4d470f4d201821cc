"""`marketdata import`: bars out of files, then checks and rollups of what they changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from marketdata_assets.cli.backfill import print_problems
from marketdata_assets.cli.options import DryRun, Format, ListFormat, choice_parser
from marketdata_assets.cli.output import err, progress_bar, show
from marketdata_assets.cli.selection import load_context
from marketdata_assets.model.events import Event, FileInspected, RangeRequest, RowsProcessed
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.timeframe import parse_timeframe as parse_timeframe

if TYPE_CHECKING:
    from marketdata_assets.context import Context
    from marketdata_assets.flows.fetch.import_result import FileTally, ImportResult
    from marketdata_assets.settings.universe import Settings
    from marketdata_assets.sources.archive.options import ImportOptions

DIFFERENCES_SHOWN = 20
_FILE_COLUMNS = [
    *("file", "market", "timeframe", "rows", "stored", "identical", "refused"),
    *("disagree", "conflict", "unwanted", "lacking"),
]
_INCOMPLETE_CHECKS = ("gaps", "complete")
"""Checks that fail for bars that are in no file: a backfill fetches them."""

commands = typer.Typer()


def _parse_unit(text: str) -> str:
    from marketdata_assets.sources.archive.times import ISO, UNITS

    return choice_parser("--unit", (*UNITS, ISO))(text)


def _parse_columns(text: str) -> dict[str, str]:
    from marketdata_assets.sources.archive.options import parse_columns

    return parse_columns(text)


_Files = Annotated[
    list[Path],
    typer.Argument(
        metavar="FILE...",
        help="Archives (.zip), CSV files, packed (.gz, .bz2, .zst) or not, or folders of them.",
    ),
]
_Market = Annotated[
    str | None,
    typer.Option(
        "--market", "-m", help="The market of the bars, where the files' names do not have it."
    ),
]
_Timeframe = Annotated[
    Timeframe | None,
    typer.Option(
        "--timeframe",
        parser=parse_timeframe,
        metavar="TIMEFRAME",
        help="The timeframe of the bars, where the files' names do not have it.",
    ),
]
_Columns = Annotated[
    dict[str, str] | None,
    typer.Option(
        "--columns",
        parser=_parse_columns,
        metavar="COLUMNS",
        help="The columns of a plain CSV, as open_time=ts,open=o,...: names in its header, or "
        "places counted from 1; open_time=Date+Time where it is two.",
    ),
]
_Unit = Annotated[
    str | None,
    typer.Option(
        "--unit",
        parser=_parse_unit,
        metavar="UNIT",
        help="Reject files whose open times have another unit: s, ms, us, ns or iso.",
    ),
]


def _parse_delimiter(text: str) -> str:
    from marketdata_assets.sources.archive.options import parse_delimiter

    return parse_delimiter(text)


def _parse_decimal(text: str) -> str:
    from marketdata_assets.sources.archive.options import parse_decimal

    return parse_decimal(text)


def _parse_time_zone(text: str) -> str:
    from marketdata_assets.sources.archive.options import parse_time_zone

    return parse_time_zone(text)


_Delimiter = Annotated[
    str,
    typer.Option(
        "--delimiter",
        parser=_parse_delimiter,
        metavar="CHARACTER",
        help="What stands between the cells: a character such as ';', or tab.",
    ),
]
_Decimal = Annotated[
    str,
    typer.Option(
        "--decimal",
        parser=_parse_decimal,
        metavar="CHARACTER",
        help="What stands before the fraction of a number: '.' or ','.",
    ),
]
_TimeZone = Annotated[
    str,
    typer.Option(
        "--time-zone",
        parser=_parse_time_zone,
        metavar="ZONE",
        help="The zone of times that name none, such as EST (which has no summer time) or "
        "Europe/Berlin.",
    ),
]


@commands.command("import")
def import_files(
    files: _Files,
    *,
    market: _Market = None,
    timeframe: _Timeframe = None,
    columns: _Columns = None,
    unit: _Unit = None,
    delimiter: _Delimiter = ",",
    decimal: _Decimal = ".",
    time_zone: _TimeZone = "UTC",
    dry_run: DryRun = False,
    format: Format = ListFormat.TABLE,
) -> None:
    """Import bars from Binance's archives, Kraken's OHLCVT files or plain CSV.

    Sends no request to a venue; importing again changes nothing. Exits with 1 for disputed rows.
    """
    from marketdata_assets.sources.archive.options import ImportOptions

    with load_context() as context:
        settings = context.settings
        only_market = settings.market(market) if market else None
        options = ImportOptions(
            only_market,
            timeframe,
            columns,
            unit=unit,
            delimiter=delimiter,
            decimal=decimal,
            time_zone=time_zone,
        )
        result = _import(context, files, options, dry_run=dry_run)
        ranges = [] if dry_run else _ranges_to_check(context, result)
    code = _check_and_roll_up(settings, ranges)
    _show_result(result, format, dry_run)
    raise typer.Exit(max(code, int(result.disputed > 0)))


def _import(
    context: Context, files: Sequence[Path], options: ImportOptions, *, dry_run: bool
) -> ImportResult:
    from marketdata_assets.flows.fetch.imports import FileImporter, inspect_files

    with progress_bar("rows") as update:
        update(description="reading")

        def on_progress(event: Event) -> None:
            if isinstance(event, FileInspected | RowsProcessed):
                update(advance=event.rows)

        found = inspect_files(context.settings, files, options, on_progress=on_progress)
        total = sum(file.rows for file in found)
        update(completed=0, total=total, description=f"{len(found)} files")
        importer = context.bind(FileImporter)
        return importer.import_files(found, options, dry_run, on_progress=on_progress)


def _ranges_to_check(context: Context, result: ImportResult) -> list[RangeRequest]:
    """Return the ranges of the imported partitions, with the tables to check in each."""
    from marketdata_assets.cli.worker_pool import split_into_ranges
    from marketdata_assets.flows.fetch.imports import FileImporter

    groups = context.bind(FileImporter).tables_to_check(result)
    return [
        request
        for tables, partitions in groups.items()
        for request in split_into_ranges(partitions, tables)
    ]


def _check_and_roll_up(settings: Settings, ranges: Sequence[RangeRequest]) -> int:
    """Check and roll up what was imported, through Dagster, so that the UI shows it.

    Returns the exit code. Missing bars do not count: a backfill fetches them.
    """
    from marketdata_assets.cli.worker_pool import execute_ranges

    if not ranges:
        return 0
    with err.status(f"checks and rollups in {len(ranges)} runs"):
        outcome = execute_ranges(settings, ranges, lambda _: None)
    outcome.checks = [
        check
        for check in outcome.checks
        if check.check.rpartition(" ")[2] not in _INCOMPLETE_CHECKS
    ]
    print_problems(outcome)
    return outcome.exit_code


def _reasons_line(tally: FileTally) -> str:
    reasons = ", ".join(f"{count} {name}" for name, count in tally.reasons.most_common())
    return f"{tally.file.path.name}: refused for {reasons}; the first one: {tally.example}"


def _show_result(result: ImportResult, format: ListFormat, dry_run: bool) -> None:
    rows: list[dict[str, Any]] = [tally.as_dict() for tally in result.files]
    differences: list[dict[str, Any]] = [each._asdict() for each in result.differences]
    closing = [result.message + (", nothing was stored" if dry_run else "")]
    closing += [_reasons_line(tally) for tally in result.files if tally.reasons]
    if any(row["lacking"] for row in rows):
        closing.append(
            "`lacking` bars are in no row of their file; `marketdata plan` counts what is still "
            "to be requested"
        )
    document = {"files": rows, "differences": differences, "dry_run": dry_run}
    show(rows, format, columns=_FILE_COLUMNS, document=document, closing="\n".join(closing))
    if differences and format == ListFormat.TABLE:
        count = min(DIFFERENCES_SHOWN, len(differences))
        summary = f"{len(differences)} values differ, {count} of them are shown; none was changed"
        show(differences[:DIFFERENCES_SHOWN], format, closing=summary)

"""`marketdata lock` and `verify`: a dataset as one number, and the proof of a copy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from marketdata_assets.cli.options import End, Format, ListFormat, Markets, Start
from marketdata_assets.cli.output import print_line, progress_bar, show
from marketdata_assets.cli.selection import load_context, select_markets, select_window
from marketdata_assets.model.events import Event, PartitionsRead, ProgressCallback
from marketdata_assets.model.window import format_time

if TYPE_CHECKING:
    from marketdata_assets.flows.read.verify import Verification

_Name = Annotated[
    str | None,
    typer.Option("--name", help="Name the dataset. Default: the name of the universe's file."),
]
_Tables = Annotated[
    list[str] | None,
    typer.Option(
        "--table",
        help="Take only this table, such as raw/ohlcv_1m; repeat the option for more. "
        "Default: all tables.",
    ),
]
_File = Annotated[
    Path | None,
    typer.Option("--out", help="Write this file. Default: <name>.lock.json in this folder."),
]

commands = typer.Typer()


@commands.command()
def lock(
    *,
    name: _Name = None,
    market: Markets = None,
    start: Start = None,
    end: End = None,
    table: _Tables = None,
    file: _File = None,
) -> None:
    """Write a lock file: the hash of every partition whose month touches the span, and of all."""
    from marketdata_assets.flows.read.lock import DatasetLocker
    from marketdata_assets.storage.lockfile import write_lock

    with load_context(for_reading=True) as context, _show_progress("lock") as on_progress:
        settings = context.settings
        name = name or Path(settings.source).stem
        markets, window = select_markets(settings, market), select_window(settings, start, end)
        found = context.bind(DatasetLocker).lock(
            name, markets, window, tables=table, on_progress=on_progress
        )
    target = file or Path(f"{name}.lock.json")
    write_lock(target, found)
    count = sum(partition.is_open for partition in found.partitions)
    of_open_months = f", {count} of them of a month that is not over" if count else ""
    contents = f"{len(found.partitions)} partitions{of_open_months}, {found.bars} bars"
    print_line(f"{target}: {contents} as of {format_time(found.as_of)}")
    print_line(found.dataset_digest)


@commands.command()
def verify(
    file: Annotated[Path, typer.Option("--lock", help="Verify against this lock file.")],
    format: Format = ListFormat.TABLE,
) -> None:
    """Prove that what is stored equals what was locked, or list each partition that differs.

    Exits with 1 when a partition differs.
    """
    from marketdata_assets.flows.read.verify import DatasetVerifier
    from marketdata_assets.storage.lockfile import read_lock

    lock = read_lock(file)
    with load_context(for_reading=True) as context, _show_progress("verify") as on_progress:
        found = context.bind(DatasetVerifier).verify(lock, on_progress)
    rows = [difference.as_dict() for difference in found.differences]
    show(rows, format, document=found.as_dict(), closing=_summarize(found))
    raise typer.Exit(1 if rows else 0)


@commands.command()
def scrub(
    *,
    days: Annotated[
        float, typer.Option(min=0, help="Read what was not read whole for so many days; 0: all.")
    ] = 7,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Stop after so many minutes. Default: no limit.")
    ] = None,
    format: Format = ListFormat.TABLE,
) -> None:
    """Read everything that is stored, and list what decayed, was changed from outside or is lost.

    The next backfill fetches it or makes it again. Exits with 1 when something is wrong.
    """
    from marketdata_assets.flows.operate.scrub import Scrubber

    with load_context() as context, _show_progress("scrub") as on_progress:
        found = context.bind(Scrubber).scrub(days=days, minutes=minutes, on_progress=on_progress)
    left = f", {found.left} are left for the next time" if found.left else ""
    closing = f"{found.objects} objects with {found.rows} rows are as they were stored{left}"
    rows = [problem.as_dict() for problem in found.problems]
    show(rows, format, document=found.as_dict(), closing=closing)
    raise typer.Exit(int(bool(rows)))


def _summarize(found: Verification) -> str:
    """Return what was proved, and the dataset's number when all of it was."""
    lock, count = found.lock, len(found.differences)
    past = f", {found.from_history} of them from history" if found.from_history else ""
    proved = f"{found.proved} of {len(lock.partitions)} partitions proved{past}"
    summary = (
        f"{lock.name} as of {format_time(lock.as_of)}: {proved}, {found.bars} bars, {count} differ"
    )
    return summary if count else f"{summary}\n{lock.dataset_digest}"


@contextmanager
def _show_progress(verb: str) -> Iterator[ProgressCallback]:
    """Show on standard error how many partitions were read; the bar disappears at the end."""
    with progress_bar("partitions", transient=True) as update:
        update(description=verb)

        def on_progress(event: Event) -> None:
            if isinstance(event, PartitionsRead):
                update(completed=event.done, total=event.total)

        yield on_progress

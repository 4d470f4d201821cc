"""`marketdata lock` and `marketdata verify`: a dataset as one number, and the proof of a copy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    print_json,
    print_table,
    window_of,
)
from marketdata_assets.model.window import format_time

if TYPE_CHECKING:
    from marketdata_assets.context import Tell


@app.command()
def lock(
    name: Annotated[
        str | None,
        typer.Option("--name", help="The dataset's name. Default: that of the universe's file."),
    ] = None,
    market: Markets = None,
    start: Start = None,
    end: End = None,
    table: Annotated[
        list[str] | None,
        typer.Option("--table", help="A table such as raw/ohlcv_1m; again for more. Default: all."),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--out", help="The lock file. Default: <name>.lock.json in this folder."),
    ] = None,
) -> None:
    """Write the content hash of every partition whose month touches the span, and one hash of them
    all.
    """
    from marketdata_assets.flows.read.lock import lock as lock_flow
    from marketdata_assets.storage.lockfile import write_lock

    with opened() as (settings, toolbox), _progress("lock") as tell:
        name = name or Path(settings.source).stem
        found = lock_flow(
            toolbox, name, chosen(settings, market), window_of(settings, start, end), table, tell
        )
    target = file or Path(f"{name}.lock.json")
    write_lock(target, found)
    still = sum(pinned.is_open for pinned in found.partitions)
    words = f", {still} of them of a month that is not over" if still else ""
    out.print(
        f"{target}: {len(found.partitions)} partitions{words}, {found.bars} bars as of {format_time(found.as_of)}",
        highlight=False,
    )
    out.print(f"{found.dataset_digest}", highlight=False, soft_wrap=True)


@app.command()
def verify(
    file: Annotated[Path, typer.Option("--lock", help="The lock file.")],
    format: Format = "table",
) -> None:
    """Prove that what is stored is what was locked, or list each partition that differs. Exit code 1
    where one does.
    """
    from marketdata_assets.flows.read.lock import verify as verify_flow
    from marketdata_assets.storage.lockfile import read_lock

    one_of(format, "table", "json")
    locked = read_lock(file)
    with opened() as (_, toolbox), _progress("verify") as tell:
        found = verify_flow(toolbox, locked, tell)
    if format == "json":
        print_json(found.as_dict())
        raise typer.Exit(1 if found.differences else 0)
    if found.differences:
        print_table(
            [d.as_dict() for d in found.differences],
            ["table", "market", "month", "what", "locked", "stored", "says"],
        )
    past = f", {found.from_history} of them from history" if found.from_history else ""
    words = f"{found.proved} of {len(locked.partitions)} partitions proved{past}, {found.bars} bars, {len(found.differences)} differ"
    out.print(f"{locked.name} as of {format_time(locked.as_of)}: {words}", highlight=False)
    if not found.differences:
        out.print(f"{locked.dataset_digest}", highlight=False, soft_wrap=True)
    raise typer.Exit(1 if found.differences else 0)


@contextmanager
def _progress(verb: str) -> Iterator[Tell]:
    """How many partitions are read, on stderr; gone when it is done."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("partitions"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task(verb, total=None)

        def tell(event: dict[str, Any]) -> None:
            progress.update(task, completed=event["done"], total=event["partitions"])

        yield tell

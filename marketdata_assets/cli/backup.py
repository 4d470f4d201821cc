"""`marketdata backup`, `restore` and `adopt`: the ledger in a file, and from the lake."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from marketdata_assets.cli.options import Format, ListFormat
from marketdata_assets.cli.output import print_json, print_line, print_problem
from marketdata_assets.cli.selection import load_context

commands = typer.Typer()


@commands.command()
def backup(
    out: Annotated[
        Path, typer.Option(help="Write this file; an earlier one is replaced at the end.")
    ] = Path("ledger.backup"),
) -> None:
    """Write the whole ledger to a file: coverage, proofs of gaps, acknowledgements and receipts.

    Bars lie in the lake and are not in it; other processes may go on.
    """
    with load_context(for_reading=True) as context:
        rows = context.ledger.copies.back_up(out)
    print_line(f"{rows} rows in {out}")


@commands.command()
def restore(
    file: Annotated[Path, typer.Argument(help="A file that `marketdata backup` wrote.")],
    *,
    replace: Annotated[
        bool, typer.Option("--replace", help="Put it in the place of all that the ledger holds.")
    ] = False,
) -> None:
    """Read the whole ledger from a backup, into SQLite or PostgreSQL.

    What the lake got since is adopted by the next backfill.
    """
    with load_context() as context:
        rows = context.ledger.copies.restore(file, replace=replace)
    print_line(f"{rows} rows restored from {file}")


@commands.command()
def adopt(format: Format = ListFormat.TABLE) -> None:
    """Bring a lost ledger back from the lake alone. Nothing is requested.

    Coverage, proofs of gaps, acknowledgements and receipts lie beside the bars.
    """
    from marketdata_assets.flows.operate.adopt import Adopter

    with load_context() as context:
        found = context.bind(Adopter).adopt()
    if format == ListFormat.JSON:
        print_json(found.as_dict())
    else:
        for name, problem in found.refused.items():
            print_problem("refused", f"{name}: {problem}")
        print_line(
            f"{found.with_proofs} market-months adopted with all that was known about them, "
            f"{found.bars_only} partitions by their bars alone"
        )
    raise typer.Exit(int(bool(found.refused)))

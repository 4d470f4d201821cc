"""The `marketdata` command: puts the families of commands together and turns errors into lines."""

from __future__ import annotations

import signal
import sys
from typing import Any

import typer

from marketdata_assets.cli import (
    anomalies,
    backfill,
    backup,
    bars,
    gaps,
    importing,
    lock,
    markets,
    operations,
    quarantine,
    repair,
    schema,
    servers,
)
from marketdata_assets.cli.output import err, print_line, print_problem
from marketdata_assets.errors import MarketDataError

INTERRUPTED = 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Exact OHLCV market data. Exit codes: 0 done, 1 a check failed or something is missing, "
    "2 bad input, 3 a venue or a store could not be reached.",
)
for family in (
    *(backfill, importing, bars, markets, gaps, quarantine, anomalies),
    *(repair, lock, operations, backup, servers, schema),
):
    app.add_typer(family.commands)


def main() -> None:
    """Run the command of `sys.argv` and exit; every expected error is one line, no traceback."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = app(prog_name="marketdata", standalone_mode=False) or 0
    except MarketDataError as error:
        print_problem("error:", str(error))
        code = error.exit_code
    except typer.TyperException as error:
        _print_usage_error(error)
        code = error.exit_code
    if code == INTERRUPTED:
        print_line("interrupted; everything that was stored is kept", err)
    sys.exit(code)


def _interrupt(number: int, frame: object) -> None:
    """Let SIGTERM clean up as Ctrl-C does."""
    raise KeyboardInterrupt


def _print_usage_error(error: typer.TyperException) -> None:
    """Print a mistake in the arguments on one line, with the command whose help to read."""
    message = " ".join(error.format_message().replace("Value error, ", "").split())
    context: Any = getattr(error, "ctx", None)
    if message:  # there is none where the help itself was printed
        hint = f" (see `{context.command_path} --help`)" if context else ""
        print_problem("error:", message + hint)


if __name__ == "__main__":
    main()

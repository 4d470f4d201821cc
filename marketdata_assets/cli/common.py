"""What every command shares: the app, its options, the toolbox it opens, and how it prints."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from marketdata_assets.errors import BadInput, StoreFailed
from marketdata_assets.model.window import Window, format_time, parse_time
from marketdata_assets.settings.universe import Settings, load_settings

if TYPE_CHECKING:
    import polars as pl

    from marketdata_assets.context import Toolbox
    from marketdata_assets.model.market import Market

HELP = "The `marketdata` command. Exit codes: 0 done, 1 a check failed or something is missing, 2 bad input, 3 unreachable."
app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=HELP
)
quarantine = typer.Typer(no_args_is_help=True, help="Rows that a rule refused, with their reasons.")
app.add_typer(quarantine, name="quarantine")
out = Console()
err = Console(stderr=True)

Markets = Annotated[
    list[str] | None,
    typer.Option(
        "--market", "-m", help="A market such as binance:BTC-USDT; again for more. Default: all."
    ),
]
Start = Annotated[str | None, typer.Option("--start", help="First day or moment, UTC, inclusive.")]
End = Annotated[str | None, typer.Option("--end", help="Last day or moment, UTC, exclusive.")]
Format = Annotated[str, typer.Option("--format", help="table or json")]
FileFormat = Annotated[str, typer.Option("--format", help="table, csv, json or parquet")]
Out = Annotated[
    Path | None, typer.Option("--out", help="Write to this file instead of the terminal.")
]


@contextmanager
def opened() -> Iterator[tuple[Settings, Toolbox]]:
    """The universe of this command and its tools."""
    from marketdata_assets.context import open_toolbox

    settings = load_settings()
    with open_toolbox(settings) as toolbox:
        yield settings, toolbox


def chosen(settings: Settings, keys: list[str] | None) -> list[Market]:
    """The markets that `--market` names, or all of the universe. Raises BadInput."""
    return [settings.market(key) for key in keys] if keys else list(settings.markets)


def window_of(settings: Settings, start: str | None, end: str | None) -> Window:
    """The window of `--start` and `--end`; by default since the universe's first day, until our now.
    Raises BadInput.
    """
    window = Window(
        parse_time(start) if start else settings.since, parse_time(end) if end else settings.now()
    )
    if start and window.start > settings.now():
        raise BadInput(
            f"--start {start} lies in the future; it is now {format_time(settings.now())}"
        )
    if not window:
        raise BadInput(
            f"the window {format_time(window.start)} .. {format_time(window.end)} is empty; --start must come before --end"
        )
    return window


def one_of(value: str, *allowed: str) -> str:
    """A format that the command knows. Raises BadInput."""
    if value not in allowed:
        raise BadInput(f"--format {value} is not one of {', '.join(allowed)}")
    return value


# --------------------------------------------------------------------------------- printing
def plain(text: str) -> str:
    """Text whose brackets are no markup."""
    return text.replace("[", r"\[")


def say(text: str) -> None:
    """One line, as it is."""
    out.print(text, highlight=False)


def print_json(value: Any) -> None:
    """A value as JSON, whatever the terminal's width."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def print_table(rows: list[dict[str, Any]], names: list[str]) -> None:
    """Rows as a table with these columns."""
    table = Table(*names, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*("" if row[name] is None else plain(str(row[name])) for name in names))
    (out if out.is_terminal else Console(width=max(80, 24 * len(names)))).print(table)


def check_format(format: str, file: Path | None) -> None:
    """A format for bars that can be written there. Raises BadInput."""
    one_of(format, "table", "csv", "json", "parquet")
    if format == "parquet" and file is None:
        raise BadInput("--format parquet needs --out FILE")


def write_bars(found: pl.DataFrame, format: str, file: Path | None) -> None:
    """A frame to the terminal or to a file. Raises StoreFailed."""
    if format == "table":
        print_table(as_text(found).to_dicts(), found.columns)
        return
    if format == "parquet":
        from marketdata_assets.storage.parquet import encode

        content = encode(found)
    elif format == "csv":
        content = as_text(found).write_csv().encode()
    else:
        content = (json.dumps(as_text(found).to_dicts()) + "\n").encode()
    if file is None:
        sys.stdout.buffer.write(content)
        sys.stdout.flush()
        return
    try:
        file.write_bytes(content)
    except OSError as error:
        raise StoreFailed(
            f"{file} cannot be written: {error.strerror}; choose another --out"
        ) from None


def as_text(found: pl.DataFrame) -> pl.DataFrame:
    """Times as ISO, decimals as their exact digits; counts stay numbers, null stays null."""
    import polars as pl

    from marketdata_assets.model.bar import format_decimals

    times = [name for name, dtype in found.schema.items() if isinstance(dtype, pl.Datetime)]
    return found.with_columns(
        pl.col(times).dt.strftime("%Y-%m-%dT%H:%M:%SZ"),
        *(
            format_decimals(name)
            for name, dtype in found.schema.items()
            if isinstance(dtype, pl.Decimal)
        ),
    )

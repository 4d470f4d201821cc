"""What commands print: lists as tables or JSON, bars, single lines, problems and progress."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from marketdata_assets.cli.options import BarFormat, ListFormat
from marketdata_assets.errors import BadInput, StoreFailed, without_controls

if TYPE_CHECKING:
    from pathlib import Path

    import polars as pl

COLUMN_WIDTH = 24
"""How many characters wide a column is on average, where the output is no terminal."""

out = Console()
err = Console(stderr=True)


def show(
    rows: Sequence[Mapping[str, Any]],
    format: ListFormat,
    *,
    columns: Sequence[str] | None = None,
    cells: Mapping[str, Callable[[Any], str]] | None = None,
    document: Any = None,
    closing: str = "",
) -> None:
    """Print rows as a table or as JSON.

    The table has `columns`, by default all of the first row; `cells` has functions that write the
    values of a column as text, which is `str` for the others and nothing for None. The lines
    `closing` follow it. JSON is `document`, by default the rows with all their keys.
    """
    if format == ListFormat.JSON:
        print_json(rows if document is None else document)
        return
    if rows:
        _print_table(rows, columns or list(rows[0]), cells or {})
    if closing:
        print_line(closing)


def _print_table(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    cells: Mapping[str, Callable[[Any], str]],
) -> None:
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        texts = ("" if row[name] is None else cells.get(name, str)(row[name]) for name in columns)
        table.add_row(*(Text(without_controls(text)) for text in texts))
    console = out if out.is_terminal else Console(width=max(80, COLUMN_WIDTH * len(columns)))
    console.print(table)


def print_json(value: Any) -> None:
    """Print a value as JSON, whatever the width of the terminal."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def print_line(text: str, console: Console = out) -> None:
    """Print text as it is: nothing is colored, and no line is broken."""
    console.print(Text(without_controls(text)), soft_wrap=True)


def print_problem(label: str, message: str, *, style: str = "red") -> None:
    """Print one line about a problem on standard error, with a colored label."""
    err.print(Text.assemble((label, style), " ", without_controls(message)), soft_wrap=True)


@contextmanager
def progress_bar(unit: str, *, transient: bool = False) -> Iterator[Callable[..., None]]:
    """Show a progress bar that counts in `unit` on standard error.

    Yields the function that updates it; it takes `description`, `total`, `completed` and `advance`.
    A transient bar disappears at the end.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=transient) as progress:
        yield partial(progress.update, progress.add_task("", total=None))


# --------------------------------------------------------------------------------- bars
def check_bar_format(format: BarFormat, file: Path | None) -> None:
    """Raise BadInput for a format that a terminal cannot show."""
    if format == BarFormat.PARQUET and file is None:
        raise BadInput("--format parquet needs --out FILE")


def write_bars(bars: pl.DataFrame, format: BarFormat, file: Path | None) -> None:
    """Write bars to a file or the terminal. Raises StoreFailed when the file cannot be written."""
    if format == BarFormat.TABLE:
        closing = f"{bars.height} rows"
        show(format_values(bars).to_dicts(), ListFormat.TABLE, closing=closing)
        return
    content = _encode(bars, format)
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


def _encode(bars: pl.DataFrame, format: BarFormat) -> bytes:
    if format == BarFormat.PARQUET:
        from marketdata_assets.storage.parquet import encode, to_arrow

        return encode(to_arrow(bars, {}))
    texts = format_values(bars)
    if format == BarFormat.CSV:
        if nested := [name for name, dtype in texts.schema.items() if dtype.is_nested()]:
            raise BadInput(f"CSV holds no lists: column {nested[0]}; choose --format json")
        return texts.write_csv().encode()
    return (json.dumps(texts.to_dicts()) + "\n").encode()


def format_values(bars: pl.DataFrame) -> pl.DataFrame:
    """Return bars with times as `2024-03-01T00:00:00Z` and decimals as their exact digits.

    Both are strings then; counts stay numbers, and null stays null.
    """
    import polars as pl

    from marketdata_assets.model.bar import format_decimals

    times = [name for name, dtype in bars.schema.items() if isinstance(dtype, pl.Datetime)]
    decimals = [name for name, dtype in bars.schema.items() if isinstance(dtype, pl.Decimal)]
    return bars.with_columns(
        pl.col(times).dt.strftime("%Y-%m-%dT%H:%M:%SZ"), *map(format_decimals, decimals)
    )

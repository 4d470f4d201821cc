"""The options that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from marketdata_assets.errors import BadInput
from marketdata_assets.model.window import parse_time


class ListFormat(StrEnum):
    """How a list is printed."""

    TABLE = "table"
    JSON = "json"


class BarFormat(StrEnum):
    """How bars, or the rows that a query finds, are printed or written to a file."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"
    PARQUET = "parquet"


Markets = Annotated[
    list[str] | None,
    typer.Option(
        "--market",
        "-m",
        help="Take only this market, such as binance:BTC-USDT; repeat the option for more. "
        "Default: all markets of the universe.",
    ),
]
Start = Annotated[
    datetime | None,
    typer.Option(
        "--start",
        parser=parse_time,
        metavar="TIME",
        help="Begin at this day or moment (UTC, inclusive). Default: the universe's first day.",
    ),
]
End = Annotated[
    datetime | None,
    typer.Option(
        "--end",
        parser=parse_time,
        metavar="TIME",
        help="End at this day or moment (UTC, exclusive). Default: now.",
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Change nothing; only print what would be done.")
]
Format = Annotated[ListFormat, typer.Option("--format", help="Print a table or JSON.")]
FileFormat = Annotated[
    BarFormat, typer.Option("--format", help="Write in this format. Parquet needs --out.")
]
Out = Annotated[
    Path | None, typer.Option("--out", help="Write to this file instead of the terminal.")
]


def choice_parser(option: str, values: Sequence[str]) -> Callable[[str], str]:
    """Return a parser for the option `option` that accepts only `values`.

    The parser raises BadInput. It is for words that another room defines; words of the command
    line itself are a StrEnum, which Typer parses.
    """

    def parse(text: str) -> str:
        if text not in values:
            raise BadInput(f"{option} {text} is not one of {', '.join(values)}")
        return text

    return parse

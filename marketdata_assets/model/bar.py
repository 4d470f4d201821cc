"""The bar: its columns, their types, and how a number is written as text."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

import polars as pl

SCALE = 12
DECIMAL = pl.Decimal(38, SCALE)
TIME = pl.Datetime("us", "UTC")


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a bar. `optional` ones are null where the venue does not give them; nothing else
    may be null.
    """

    name: str
    dtype: pl.DataType
    meaning: str
    optional: bool = False


COLUMNS: tuple[Column, ...] = (
    Column("open_time", TIME, "first moment of the bar, UTC, inclusive; its label"),
    Column("open", DECIMAL, "first price, in quote currency"),
    Column("high", DECIMAL, "highest price"),
    Column("low", DECIMAL, "lowest price"),
    Column("close", DECIMAL, "last price"),
    Column("volume", DECIMAL, "traded amount, in base currency"),
    Column("quote_volume", DECIMAL, "traded amount, in quote currency", optional=True),
    Column("trades", pl.Int64(), "number of trades", optional=True),
    Column("taker_buy_volume", DECIMAL, "base amount bought by takers", optional=True),
    Column("taker_buy_quote_volume", DECIMAL, "quote amount bought by takers", optional=True),
)
ROLLUP_COLUMNS: tuple[Column, ...] = (
    *COLUMNS,
    Column(
        "vwap",
        DECIMAL,
        "quote_volume / volume, rounded to 12 decimals; null without volume",
        optional=True,
    ),
    Column("bars_expected", pl.Int64(), "base bars a full bar of this timeframe holds"),
    Column("bars_present", pl.Int64(), "base bars this one was made of"),
)
PROVENANCE: tuple[Column, ...] = (
    Column(
        "known_at",
        TIME,
        "since when this bar is known, by our clock; null: since before revisions were kept",
        optional=True,
    ),
    Column(
        "source",
        pl.String(),
        "what told it: `rest`, or the name of an imported file",
        optional=True,
    ),
)
"""What is stored beside every raw bar; a reader of bars does not see it."""
HISTORY_COLUMNS: tuple[Column, ...] = (
    *COLUMNS,
    *PROVENANCE,
    Column("replaced_at", TIME, "since when another bar is known in its place, by our clock"),
)
CONSOLIDATED_COLUMNS: tuple[Column, ...] = (
    *COLUMNS,
    Column("venue", pl.String(), "the venue that told this bar"),
)
RECONCILED_COLUMNS: tuple[Column, ...] = (
    COLUMNS[0],
    Column("venue", pl.String(), "the preferred venue of the two"),
    Column("other", pl.String(), "the venue beside it"),
    Column(
        "close_bp",
        DECIMAL,
        "venue's close above the other's, in basis points of the other's, to 0.0001",
    ),
    Column(
        "return_bp",
        DECIMAL,
        "venue's return since the bar before above the other's; null where one has no bar before",
        optional=True,
    ),
)
NAMES: tuple[str, ...] = tuple(column.name for column in COLUMNS)
APART = "_apart"
"""After a column's name: by how much a value of ours is more than the venue's own."""
PARITY_COLUMNS: tuple[Column, ...] = (
    COLUMNS[0],
    Column(
        "outcome",
        pl.String(),
        "`equal`, `within_tolerance`, `differs`, `only_ours` or `only_native`",
    ),
    Column("columns", pl.String(), "the columns that make it so, with spaces between"),
    *(
        Column(
            c.name + APART,
            c.dtype,
            f"our {c.name} less the venue's own; null where not compared",
            optional=True,
        )
        for c in COLUMNS[1:]
    ),
    Column(
        "cause", pl.String(), "what the difference comes from, in words; empty where there is none"
    ),
    Column(
        "minutes",
        pl.String(),
        "the base bars behind it: open times, or `start/end` of a window, with spaces between",
    ),
)
"""What came of a rolled-up bar beside the venue's own."""
PRICES: tuple[str, ...] = ("open", "high", "low", "close")
SCHEMA: dict[str, pl.DataType] = {column.name: column.dtype for column in COLUMNS}
RECONCILED_SCHEMA: dict[str, pl.DataType] = {
    column.name: column.dtype for column in RECONCILED_COLUMNS
}
ROLLUP_SCHEMA: dict[str, pl.DataType] = {column.name: column.dtype for column in ROLLUP_COLUMNS}
TOLD_SCHEMA: dict[str, pl.DataType] = {
    column.name: column.dtype for column in (*COLUMNS, *PROVENANCE)
}
"""A bar with its provenance, as raw objects hold it."""


def empty_bars() -> pl.DataFrame:
    """No bars, in the right columns."""
    return pl.DataFrame(schema=SCHEMA)


def decimal_text(column: str) -> pl.Expr:
    """A decimal column as text without exponent or trailing zeros: `100`, `0.5`, `-1.25`."""
    return pl.col(column).cast(pl.String).str.strip_chars_end("0").str.strip_chars_end(".")


def number_text(value: Decimal | int) -> str:
    """One number as text, all its digits, without exponent or trailing zeros."""
    text = f"{value:f}" if isinstance(value, Decimal) else str(value)
    return text.rstrip("0").rstrip(".") if "." in text else text

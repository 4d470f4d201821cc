"""The bar: its columns and their types in each kind of table, and how a number is written."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

import polars as pl

SCALE = 12
"""Decimals behind the point of every price and volume."""
DECIMAL = pl.Decimal(38, SCALE)
TIME = pl.Datetime("us", "UTC")


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table. Only an `optional` column may hold nulls, where the venue does not
    provide the value.
    """

    name: str
    dtype: pl.DataType
    meaning: str
    optional: bool = False


BAR_COLUMNS: tuple[Column, ...] = (
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
COLUMN_NAMES: tuple[str, ...] = tuple(column.name for column in BAR_COLUMNS)
PRICES: tuple[str, ...] = ("open", "high", "low", "close")
"""The names of the price columns."""
ROLLUP_COLUMNS: tuple[Column, ...] = (
    *BAR_COLUMNS,
    Column(
        "vwap",
        DECIMAL,
        "quote_volume / volume, rounded to 12 decimals; null without volume",
        optional=True,
    ),
    Column("bars_expected", pl.Int64(), "base bars a full bar of this timeframe holds"),
    Column("bars_present", pl.Int64(), "base bars this one was made of"),
)
PROVENANCE_COLUMNS: tuple[Column, ...] = (
    Column(
        "known_at",
        TIME,
        "moment of our clock at which this bar became known; null: before revisions were kept",
        optional=True,
    ),
    Column(
        "source",
        pl.String(),
        "where the bar came from: `rest`, or the name of an imported file",
        optional=True,
    ),
)
"""Stored with every raw bar, and hidden from a reader of bars."""
HISTORY_COLUMNS: tuple[Column, ...] = (
    *BAR_COLUMNS,
    *PROVENANCE_COLUMNS,
    Column("replaced_at", TIME, "moment of our clock at which another bar replaced this one"),
)
CONSOLIDATED_COLUMNS: tuple[Column, ...] = (
    *BAR_COLUMNS,
    Column("venue", pl.String(), "the venue that this bar was taken from"),
)
RECONCILED_COLUMNS: tuple[Column, ...] = (
    BAR_COLUMNS[0],
    Column("venue", pl.String(), "the preferred venue of the two"),
    Column("other", pl.String(), "the venue that it is compared with"),
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
DIFFERENCE_SUFFIX = "_apart"
"""Follows a column's name in the parity tables: our value less the venue's own."""
PARITY_COLUMNS: tuple[Column, ...] = (
    BAR_COLUMNS[0],
    Column(
        "outcome",
        pl.String(),
        "`equal`, `within_tolerance`, `differs`, `only_ours` or `only_native`",
    ),
    Column("columns", pl.String(), "the columns that decide the outcome, with spaces between"),
    *(
        Column(
            column.name + DIFFERENCE_SUFFIX,
            column.dtype,
            f"our {column.name} less the venue's own; null where not compared",
            optional=True,
        )
        for column in BAR_COLUMNS[1:]
    ),
    Column("cause", pl.String(), "the cause of the difference, in words; empty without one"),
    Column(
        "minutes",
        pl.String(),
        "the base bars behind it: open times, or `start/end` of a window, with spaces between",
    ),
)
"""The outcome of comparing one rolled-up bar with the venue's own bar."""

BAR_SCHEMA: dict[str, pl.DataType] = {column.name: column.dtype for column in BAR_COLUMNS}
ROLLUP_SCHEMA: dict[str, pl.DataType] = {column.name: column.dtype for column in ROLLUP_COLUMNS}
RECONCILED_SCHEMA: dict[str, pl.DataType] = {
    column.name: column.dtype for column in RECONCILED_COLUMNS
}
STORED_RAW_SCHEMA: dict[str, pl.DataType] = {
    column.name: column.dtype for column in (*BAR_COLUMNS, *PROVENANCE_COLUMNS)
}
"""A bar with its provenance, as raw objects hold it."""


def empty_bars() -> pl.DataFrame:
    """Return a frame of BAR_SCHEMA without rows."""
    return pl.DataFrame(schema=BAR_SCHEMA)


def format_decimals(column: str) -> pl.Expr:
    """Write a decimal column as text without exponent or trailing zeros: `100`, `0.5`, `-1.25`."""
    return pl.col(column).cast(pl.String).str.strip_chars_end("0").str.strip_chars_end(".")


def format_number(value: Decimal | int) -> str:
    """Write one number with all its digits, without exponent or trailing zeros."""
    text = f"{value:f}" if isinstance(value, Decimal) else str(value)
    return text.rstrip("0").rstrip(".") if "." in text else text

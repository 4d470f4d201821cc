"""The times of a file: their unit, and whether they are those of the timeframe's bars."""

from __future__ import annotations

import math
from datetime import timedelta

import polars as pl

from marketdata_assets.errors import BadInput
from marketdata_assets.model.intervals import close_lengths
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.sources.archive.csv_table import CsvTable
from marketdata_assets.sources.archive.written_times import read_written_times

UNITS = ("s", "ms", "us", "ns")
"""Units of times that are numbers since 1970."""
ISO = "iso"
"""The unit of times that are text such as 2024-03-01T12:00:00Z."""
_UNIT_LIMITS = (10**11, 10**14, 10**17)
"""From each number on, a time is in the next finer unit: 10**11 s is the year 5138."""
_PER_MS = {"s": (1000, 1), "ms": (1, 1), "us": (1, 1000), "ns": (1, 1_000_000)}
"""Times the first number, divided by the second, a time is in milliseconds."""
_COMPACT_DATE = (
    r"^(19|20)\d\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])"
    r"(([01]\d|2[0-3])[0-5]\d([0-5]\d)?)?$"
)
"""20240301, 202403011200 and 20240301120000: as a number each would be decades off."""
_MIN_STEPS = 9
"""Fewer steps between bars than this say nothing about their timeframe."""


def read_times(
    table: CsvTable,
    texts: pl.Series,
    *,
    skipped: int,
    unit: str | None,
    time_zone: str = "UTC",
) -> tuple[pl.Series, str]:
    """Return a column of times as milliseconds since 1970, and their unit, by their size.

    Numbers such as 20240101 or 20240101000000 are dates, unless `unit` says otherwise. `time_zone`
    is that of written times that name none. `skipped` lines precede the column. Raises BadInput
    where a text is no time, where the units differ, and where they are not in `unit`, if given.
    """
    column, numbers = texts.name, _whole_numbers(texts)
    unread = numbers.is_null().arg_true()
    is_written = len(unread) == len(texts) or (unit is None and _are_dates(texts))
    if is_written and unit in (None, ISO):
        return read_written_times(table, texts, skipped=skipped, time_zone=time_zone), ISO
    if len(unread):
        row = unread[0]
        other = texts[int(row == 0)]
        raise table.error_at(
            skipped + row, f"{texts[row]!r} is no {column} like the others ({other!r})"
        )
    found = _find_unit(table, numbers, skipped=skipped)
    if unit and unit != found:
        raise table.error_at(
            skipped, f"{column} {texts[0]} is in {found}, and not in {unit} as --unit says"
        )
    times, parts = _PER_MS[found]
    between = ((numbers % parts) != 0).arg_true()
    if len(between) and column == "open_time":
        row = between[0]
        raise table.error_at(
            skipped + row,
            f"{column} {texts[row]} lies between two milliseconds: no bar opens there",
        )
    return numbers * times // parts, found


def _whole_numbers(texts: pl.Series) -> pl.Series:
    """Return the whole numbers among texts, also those written like 1704067200.0; else null."""
    return texts.str.replace(r"\.0*$", "").cast(pl.Int64, strict=False)


def _are_dates(texts: pl.Series) -> bool:
    """Return whether digits are written dates, YYYYMMDD with or without a time behind it."""
    known = texts.drop_nulls()
    return known.len() > 0 and bool(known.str.contains(_COMPACT_DATE).all())


def check_lengths(
    table: CsvTable, opens: pl.Series, closes: pl.Series, *, timeframe: Timeframe, skipped: int
) -> None:
    """Refuse bars of another timeframe by their close times. Raises BadInput.

    A halt may cut a bar short, but no bar is longer than its timeframe, and not all are shorter.
    """
    width, lengths = close_lengths(opens, timeframe), closes - opens + 1
    longer = (lengths > width).arg_true()
    all_shorter = len(lengths) > 2 and not (lengths == width).any()
    if len(longer) or all_shorter:
        row = longer[0] if len(longer) else 0
        length = timedelta(milliseconds=lengths[row])
        raise table.error_at(skipped + row, f"this is no {timeframe.name} bar: it lasts {length}")


def check_spacing(table: CsvTable, opens: pl.Series, timeframe: Timeframe) -> None:
    """Refuse bars of another timeframe by the distance between them. Raises BadInput.

    They are of another one when most are nearer to each other, or all lie on a coarser grid.
    """
    steps = opens.unique().sort().diff().drop_nulls()
    if len(steps) < _MIN_STEPS:
        return
    shortest, longest = (
        w // timedelta(milliseconds=1) for w in (timeframe.shortest, timeframe.width)
    )
    usual, grid = min(steps.mode().to_list()), math.gcd(*steps.unique())
    if usual < shortest or grid > longest:
        distance = timedelta(milliseconds=min(usual, grid) if usual < shortest else grid)
        raise BadInput(
            f"{table.path}: these are no {timeframe.name} bars, they are {distance} apart; "
            "see --timeframe"
        )


def _find_unit(table: CsvTable, numbers: pl.Series, *, skipped: int) -> str:
    """Return the unit of times by their size. Raises BadInput where they are in several."""
    column = numbers.name
    size = pl.sum_horizontal((pl.col(column).abs() >= n).cast(pl.Int8) for n in _UNIT_LIMITS)
    sizes = numbers.to_frame().select(size.alias("size"))["size"]
    if len(other := (sizes != sizes[0]).arg_true()):
        row = other[0]
        raise table.error_at(
            skipped + row,
            f"mixed units: {column} {numbers[row]} is in {UNITS[sizes[row]]}, and those before in "
            f"{UNITS[sizes[0]]}",
        )
    return UNITS[sizes[0]]

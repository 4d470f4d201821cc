"""Times that are written as dates: their shapes, offsets and time zones."""

from __future__ import annotations

import polars as pl

from marketdata_assets.sources.archive.csv_table import CsvTable

_DATES = ("%Y-%m-%d", "%Y.%m.%d", "%Y/%m/%d", "%Y%m%d")
_CLOCKS = ("%H:%M:%S%.f", "%H:%M", "%H%M%S", "%H%M")
_SHAPES = (
    *_DATES,
    *(f"{date}T{clock}" for date in _DATES for clock in _CLOCKS),
    "%Y%m%d%H%M%S",
    "%Y%m%d%H%M",
)
_OFFSET = r"^(.*[T ]\d\d:?\d\d.*?) ?([+-])(\d\d):?(\d\d)?$"
"""A time with an offset from UTC: the time, the sign, hours and minutes."""


def read_written_times(
    table: CsvTable, texts: pl.Series, *, skipped: int, time_zone: str
) -> pl.Series:
    """Return written times as milliseconds since 1970.

    Dates as in 2024-03-01, 2024.03.01, 2024/03/01 and 20240301, alone or before a time such as
    12:00, 12:00:00.000 or 120000, then Z, an offset such as +05:30, or neither: such times are of
    `time_zone`. Raises BadInput for other shapes, for a mixture of times with and without a zone,
    and for times that the time zone's clock skipped or showed twice.
    """
    column = texts.name
    text = pl.col(column)
    times = texts.to_frame().select(
        text.str.ends_with("Z").alias("is_utc"),
        text.str.extract(_OFFSET, 2).alias("sign"),
        _ahead_of_utc(text).alias("ahead"),
        pl.coalesce(text.str.extract(_OFFSET, 1), text.str.strip_suffix("Z"))
        .str.strip_chars()
        .str.replace(" ", "T", literal=True)
        .alias("plain"),
    )
    plain = pl.col("plain")
    parsed = pl.coalesce(
        plain.str.to_datetime(shape, strict=False, time_unit="us") for shape in _SHAPES
    )
    local = times.select(parsed)["plain"]
    _refuse(
        table,
        texts,
        local.is_null() | (local.dt.nanosecond() % 1_000_000 != 0),
        f"is no {column}, which is a number, or a time such as 2024-03-01T12:00Z, "
        "2024-03-01 12:00:00+05:30, 2024.03.01 12:00 or 20240301 120000",
        skipped=skipped,
    )
    has_zone = times["is_utc"] | times["sign"].is_not_null()
    _refuse(
        table,
        texts,
        has_zone != has_zone[0],
        f"is no {column} like the others: some name their zone, and others do not",
        skipped=skipped,
    )
    if has_zone[0]:
        ahead = times["ahead"].fill_null(0).cast(pl.Duration("us"))
        return (local - ahead).dt.epoch("ms").alias(column)
    moments = local.dt.replace_time_zone(time_zone, ambiguous="null", non_existent="null")
    _refuse(
        table,
        texts,
        moments.is_null(),
        f"is no moment of {time_zone}: its clock skipped it, or showed it twice; convert the file "
        "to UTC",
        skipped=skipped,
    )
    return moments.dt.epoch("ms").alias(column)


def _ahead_of_utc(text: pl.Expr) -> pl.Expr:
    """Return how far a written offset is ahead of UTC, in microseconds."""
    hours = text.str.extract(_OFFSET, 3).cast(pl.Int64)
    minutes = text.str.extract(_OFFSET, 4).cast(pl.Int64).fill_null(0)
    sign = pl.when(text.str.extract(_OFFSET, 2) == "-").then(-1).otherwise(1)
    return sign * (hours * 60 + minutes) * 60_000_000


def _refuse(
    table: CsvTable, texts: pl.Series, wrong: pl.Series, problem: str, *, skipped: int
) -> None:
    rows = wrong.fill_null(True).arg_true()
    if len(rows):
        raise table.error_at(skipped + rows[0], f"{texts[rows[0]]!r} {problem}")

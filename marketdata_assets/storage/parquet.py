"""The Parquet format of the lake's objects: small, equal for equal rows, and read exactly."""

from __future__ import annotations

import io
import math
from datetime import datetime
from typing import Any

import polars as pl

from marketdata_assets.errors import Damaged
from marketdata_assets.model.bar import DECIMAL, PROVENANCE_COLUMNS, SCALE
from marketdata_assets.model.table import Table

OBJECT_VERSION, VERSION_KEY = 3, "marketdata_version"
"""The version of new objects. Objects without the key are of version 1 and encoded otherwise; raw
objects of version 2 hold no provenance. Every version is read.
"""
ROWS_PER_GROUP = 10_080
"""A week of minutes: reading one day reads a fourth of a month, for 2 % more bytes."""
_INTEGER_DIGITS = 18
_SLOWLY_CHANGING = ("open_time", "open", "high", "low", "close", "known_at", "replaced_at")


def encode(frame: pl.DataFrame) -> bytes:
    """Write a frame as Parquet: a row group for each week of minutes, zstd, and each decimal column
    as integers at the smallest scale that holds its digits.

    Times and prices change little from row to row, so their differences are packed. The bytes of
    other numbers are grouped by significance, so that zstd finds the high ones alike. Numbers of
    more than 18 digits stay as they are.
    """
    import pyarrow.parquet as pq

    slim = frame.with_columns(_narrow(column) for column in frame if column.dtype == DECIMAL)
    encodings = {
        name: "DELTA_BINARY_PACKED" if name in _SLOWLY_CHANGING else "BYTE_STREAM_SPLIT"
        for name, dtype in slim.schema.items()
        if _is_packed(dtype)
    }
    texts = [name for name, dtype in slim.schema.items() if dtype == pl.String]
    table = slim.to_arrow()
    sink = io.BytesIO()
    with pq.ParquetWriter(
        sink,
        table.schema,
        compression="zstd",
        compression_level=3,
        max_rows_per_page=ROWS_PER_GROUP,
        use_dictionary=texts or False,
        store_decimal_as_integer=True,
        write_page_checksum=True,
        column_encoding=encodings,
        write_statistics=["open_time"],
        store_schema=False,
    ) as writer:
        writer.write_table(table, ROWS_PER_GROUP)
        writer.add_key_value_metadata({VERSION_KEY: str(OBJECT_VERSION)})
    return sink.getvalue()


def decode(
    content: bytes,
    table: Table,
    *,
    name: str,
    since: datetime | None = None,
    with_provenance: bool = False,
) -> pl.DataFrame:
    """Return the frame of an object, with checksums verified, columns bound by name and cast to the
    table's types. Raises Damaged, which calls the object `name`.

    `since`: only row groups with bars at or after that moment are read, each completely. With
    provenance, its columns are null where the object holds none.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(io.BytesIO(content), page_checksum_verification=True)
        columns = [*table.columns, *(PROVENANCE_COLUMNS if with_provenance else ())]
        stored = [column.name for column in columns if column.name in file.schema_arrow.names]
        groups = range(file.metadata.num_row_groups) if since is None else _groups(file, since)
        frame = pl.DataFrame(file.read_row_groups(groups, columns=stored))
        absent = [
            pl.lit(None, column.dtype).alias(column.name)
            for column in PROVENANCE_COLUMNS
            if with_provenance and column.name not in stored
        ]
        return frame.with_columns(absent).select(pl.col(c.name).cast(c.dtype) for c in columns)
    except (
        pl.exceptions.PolarsError,
        pl.exceptions.PanicException,
        pa.ArrowException,
        OSError,
        ValueError,
    ) as error:
        raise Damaged(
            f"{name} is damaged ({type(error).__name__}); `marketdata backfill` fetches it again"
        ) from None


def _groups(file: Any, since: datetime) -> list[int]:
    """Return the row groups that may hold bars at or after `since`."""
    found = []
    for index in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(index)
        columns = (group.column(number) for number in range(group.num_columns))
        statistics = next((c.statistics for c in columns if c.path_in_schema == "open_time"), None)
        if statistics is None or not statistics.has_min_max or statistics.max >= since:
            found.append(index)
    return found


def _is_packed(dtype: pl.DataType) -> bool:
    if isinstance(dtype, pl.Decimal):
        return dtype.precision <= _INTEGER_DIGITS
    return dtype.is_integer() or isinstance(dtype, pl.Datetime)


def _narrow(column: pl.Series) -> pl.Series:
    """Return decimals at the smallest scale that holds all their digits, in 18 digits; unchanged
    where these do not suffice.

    A sample of the values suggests the scale, and all of them prove it. A column that is too wide
    keeps its scale, because DuckDB's union of objects takes 38 digits from a wide column and would
    cut decimals of the others.
    """
    sample = column.gather_every(max(1, len(column) // 32)).drop_nulls().to_physical().to_list()
    divisor = math.gcd(*sample)
    first = next(scale for scale in range(SCALE + 1) if divisor % 10 ** (SCALE - scale) == 0)
    for scale in range(first, SCALE + 1):
        narrow = column.cast(pl.Decimal(_INTEGER_DIGITS, scale), strict=False)
        if narrow.null_count() > column.null_count():  # too wide, at any larger scale as well
            return column
        if narrow.cast(DECIMAL).equals(column):
            return narrow
    return column

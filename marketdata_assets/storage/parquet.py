"""The Parquet format of the lake's objects: small, equal for equal rows, and read exactly."""

from __future__ import annotations

import io
from collections.abc import Collection
from typing import Any

import polars as pl

from marketdata_assets.errors import Damaged
from marketdata_assets.model.bar import DECIMAL, PROVENANCE_COLUMNS
from marketdata_assets.model.table import Table
from marketdata_assets.model.window import Window, to_us

OBJECT_VERSION, VERSION_KEY = 3, "marketdata_version"
"""The version of new objects. Objects without the key are of version 1 and encoded otherwise; raw
objects of version 2 hold no provenance. Every version is read.
"""
ROWS_PER_GROUP = 10_080
"""A week of minutes: reading one day reads a fourth of a month, for 2 % more bytes."""
_UNIT = "timeUnit=microseconds"
_SLOWLY_CHANGING = ("open_time", "open", "high", "low", "close", "known_at", "replaced_at")


def encode(frame: pl.DataFrame) -> bytes:
    """Write a frame as Parquet: a row group for each week of minutes, zstd, and each decimal column
    as integers at the smallest scale that holds its digits.

    Times and prices change little from row to row, so their differences are packed. The bytes of
    other numbers are grouped by significance, so that zstd finds the high ones alike. Numbers of
    more than 18 digits stay as they are.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from marketdata_assets.storage.narrow import DIGITS, narrow_decimals

    arrays = [
        narrow_decimals(column) if column.dtype == DECIMAL else column.rechunk().to_arrow()
        for column in frame
    ]
    table = pa.Table.from_arrays(arrays, names=frame.columns)
    encodings, texts = {}, []
    for field in table.schema:
        if pa.types.is_large_string(field.type) or pa.types.is_string(field.type):
            texts.append(field.name)
        elif not pa.types.is_decimal(field.type) or field.type.precision <= DIGITS:
            is_slow = field.name in _SLOWLY_CHANGING
            encodings[field.name] = "DELTA_BINARY_PACKED" if is_slow else "BYTE_STREAM_SPLIT"
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
    inside: Window | None = None,
    columns: Collection[str] | None = None,
    with_provenance: bool = False,
) -> pl.DataFrame:
    """Return the frame of an object, with checksums verified, columns bound by name and cast to the
    table's types. Raises Damaged, which calls the object `name`.

    `inside`: only row groups with bars that open in this window are read, each completely. With
    `columns`, only these of the table's. With provenance, its columns are null where the object
    holds none.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(io.BytesIO(content), page_checksum_verification=True)
        wanted = [c for c in table.columns if columns is None or c.name in columns]
        wanted += PROVENANCE_COLUMNS if with_provenance else ()
        stored = [column.name for column in wanted if column.name in file.schema_arrow.names]
        groups = range(file.metadata.num_row_groups) if inside is None else _groups(file, inside)
        frame = pl.DataFrame(file.read_row_groups(groups, columns=stored))
        absent = [
            pl.lit(None, column.dtype).alias(column.name)
            for column in PROVENANCE_COLUMNS
            if with_provenance and column.name not in stored
        ]
        return frame.with_columns(absent).select(pl.col(c.name).cast(c.dtype) for c in wanted)
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


def _groups(file: Any, window: Window) -> list[int]:
    """Return the row groups that may hold bars that open inside the window."""
    found = []
    for index in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(index)
        columns = (group.column(number) for number in range(group.num_columns))
        known = next((c.statistics for c in columns if c.path_in_schema == "open_time"), None)
        if known is None or _may_touch(known, window):
            found.append(index)
    return found


def _may_touch(known: Any, window: Window) -> bool:
    """Return whether statistics of open times allow one inside the window.

    They are read as raw numbers, because pyarrow imports pandas to make moments of them.
    """
    if not known.has_min_max or _UNIT not in str(known.logical_type):
        return True
    return bool(known.min_raw < to_us(window.end) and known.max_raw >= to_us(window.start))

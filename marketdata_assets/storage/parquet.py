"""The Parquet format of the lake's objects: small, equal for equal rows, and read exactly."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import polars as pl

from marketdata_assets.errors import Damaged
from marketdata_assets.model.bar import DECIMAL, PROVENANCE_COLUMNS, Column
from marketdata_assets.model.table import Table
from marketdata_assets.model.window import Window, to_us
from marketdata_assets.storage.column_types import NARROW, DecimalType, type_of

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

OBJECT_VERSION, VERSION_KEY = 4, "marketdata_version"
"""The version of new objects. Those of versions 1 to 3 each have the decimal scale of their digits;
those without the key are of version 1, and raw ones of version 2 hold no provenance. Every version
is read.
"""
IDENTITY_KEY = "marketdata_object"
"""An object without it, of an earlier release, is taken for what its path says."""
REVISION_KEY, PAGES_KEY = "marketdata_revision", "marketdata_pages"
"""How many objects its partition has had, and the SHA-256 of all bytes before the footer, which
whoever writes the same metadata around other rows does not have.
"""
ROWS_PER_GROUP = 10_080
"""A week of minutes: reading one day reads a fourth of a month, for 2 % more bytes."""
_UNIT = "timeUnit=microseconds"
_SLOWLY_CHANGING = ("open_time", "open", "high", "low", "close", "known_at", "replaced_at")


def with_absent(frame: pl.DataFrame, columns: Sequence[Column]) -> pl.DataFrame:
    """Return the frame with these columns, those that it does not have null."""
    absent = [c for c in columns if c.name not in frame.columns]
    nulls = [pl.lit(None, c.dtype).alias(c.name) for c in absent]
    return frame.with_columns(nulls) if nulls else frame


def to_arrow(frame: pl.DataFrame, types: Mapping[str, DecimalType]) -> pa.Table:
    """Return a frame with the types of its object. Decimals have these types, by default
    those of column_types.first_type, or wider ones where a value needs it.
    """
    import pyarrow as pa

    from marketdata_assets.storage.decimals import store_decimals

    arrays = [
        store_decimals(column, type_of(column.name, types))
        if column.dtype == DECIMAL
        else column.rechunk().to_arrow()
        for column in frame
    ]
    return pa.Table.from_arrays(arrays, names=frame.columns)


def decimal_types(schema: pa.Schema) -> dict[str, DecimalType]:
    """Return the type of each decimal column, by name."""
    import pyarrow as pa

    return {
        field.name: DecimalType(field.type.precision, field.type.scale)
        for field in schema
        if pa.types.is_decimal(field.type)
    }


def encode(table: pa.Table, identity: str | None = None, revision: int = 1) -> bytes:
    """Write a frame of `to_arrow` as Parquet: a row group for each week of minutes, zstd.

    An object of the lake holds its `Table.identity` and its revision.

    Times and prices change little from row to row, so their differences are packed. The bytes of
    other numbers are grouped by significance, so that zstd finds the high ones alike. Decimals of
    more than 64 bits are stored plainly: DuckDB and Polars read them in no other way.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    encodings, texts = {}, []
    for field in table.schema:
        if pa.types.is_large_string(field.type) or pa.types.is_string(field.type):
            texts.append(field.name)
        elif not pa.types.is_decimal(field.type) or field.type.precision <= NARROW.precision:
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
        keys = {VERSION_KEY: str(OBJECT_VERSION)}
        if identity:
            pages = hashlib.sha256(sink.getbuffer()).hexdigest()
            keys |= {IDENTITY_KEY: identity, REVISION_KEY: str(revision), PAGES_KEY: pages}
        writer.add_key_value_metadata(keys)
    return sink.getvalue()


def split_pages(content: bytes) -> int:
    """Return how many bytes of a Parquet file come before its footer."""
    return len(content) - 8 - int.from_bytes(content[-8:-4], "little")


def read_footer(content: bytes) -> pq.FileMetaData | None:
    """Return the footer of a Parquet file; None where it cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_metadata(io.BytesIO(content))
    except (pa.ArrowException, OSError, ValueError):
        return None


def intact_revision(content: bytes) -> int | None:
    """Return the revision of an object, 0 for one of an earlier release; None where it cannot be
    read, or its pages are not those that were written with it.
    """
    footer = read_footer(content)
    if footer is None:
        return None
    found = footer.metadata or {}
    pages = hashlib.sha256(memoryview(content)[: split_pages(content)]).hexdigest().encode()
    if found.get(PAGES_KEY.encode(), pages) != pages:
        return None
    return int(found.get(REVISION_KEY.encode(), b"0"))


def is_same_but_revision(one: bytes, other: bytes) -> bool:
    """Return whether two objects hold the same rows in the same columns and types."""
    end = split_pages(one)
    if end != split_pages(other) or one[:end] != other[:end]:
        return False
    first, second = read_footer(one), read_footer(other)
    version = VERSION_KEY.encode()
    return bool(
        first
        and second
        and first.schema.equals(second.schema)
        and (first.metadata or {}).get(version) == (second.metadata or {}).get(version)
    )


def has_columns(content: bytes, names: list[str], types: Mapping[str, DecimalType]) -> bool:
    """Return whether an object is of this version and has these columns and types of decimals."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(io.BytesIO(content))
    except (pa.ArrowException, OSError, ValueError):
        return False
    version = (file.metadata.metadata or {}).get(VERSION_KEY.encode())
    found = file.schema_arrow
    return (
        version == str(OBJECT_VERSION).encode()
        and found.names == names
        and decimal_types(found) == types
    )


def decode(
    content: bytes,
    table: Table,
    *,
    name: str,
    identity: str | None = None,
    inside: Window | None = None,
    columns: Collection[str] | None = None,
    with_provenance: bool = False,
) -> pl.DataFrame:
    """Return the frame of an object, with checksums verified, columns bound by name and cast to the
    table's types. Raises Damaged, which calls the object `name`, also where the object says that
    it is another one than `identity`.

    `inside`: only row groups with bars that open in this window are read, each completely. With
    `columns`, only these of the table's. With provenance, its columns are null where the object
    holds none.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(io.BytesIO(content), page_checksum_verification=True)
        _check_identity(file.metadata, table, identity, name)
        wanted = [c for c in table.columns if columns is None or c.name in columns]
        wanted += PROVENANCE_COLUMNS if with_provenance else ()
        stored = [column.name for column in wanted if column.name in file.schema_arrow.names]
        groups = range(file.metadata.num_row_groups) if inside is None else _groups(file, inside)
        frame = pl.DataFrame(file.read_row_groups(groups, columns=stored))
        frame = with_absent(frame, PROVENANCE_COLUMNS if with_provenance else ())
        return frame.select(pl.col(c.name).cast(c.dtype) for c in wanted)
    except (
        pl.exceptions.PolarsError,
        pl.exceptions.PanicException,
        pa.ArrowException,
        OSError,
        ValueError,
    ) as error:
        raise Damaged(f"{name} is damaged ({type(error).__name__}); {remedy(table)}") from None


def check_identity(content: bytes, table: Table, identity: str, name: str) -> None:
    """Raise Damaged where a readable object says that it is another one."""
    if footer := read_footer(content):
        _check_identity(footer, table, identity, name)


def remedy(table: Table) -> str:
    """Return what a person does about an object that cannot be believed."""
    if table.layer == "raw":
        return "`marketdata backfill` fetches it again"
    if table.layer == "history":
        return "the next correction sets it aside"
    return "`marketdata backfill` makes it again"


def _check_identity(footer: pq.FileMetaData, table: Table, identity: str | None, name: str) -> None:
    found = (footer.metadata or {}).get(IDENTITY_KEY.encode())
    if identity and found not in (None, identity.encode()):
        raise Damaged(f"{name} holds {found.decode(errors='replace')}; {remedy(table)}")


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

"""The lake: one Parquet object per table and partition, on a local disk or in S3, replaced whole or not at all."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import numpy as np
import polars as pl

from marketdata_assets.errors import Damaged, StoreFailed
from marketdata_assets.lake.objects import OBJECT, open_objects, storage_options
from marketdata_assets.lake.tables import Table, keys_of
from marketdata_assets.model.bar import SCALE
from marketdata_assets.model.window import Partition

VERSION, VERSION_KEY = 2, "marketdata_version"
"""Of the objects; one without the key is of version 1, packed otherwise. Both are read, and what is written is of this one."""
_INT64_DIGITS = 18
_IN_SMALL_STEPS = ("open_time", "open", "high", "low", "close")


class Stored(NamedTuple):
    """One object as it lies there."""

    bytes: int
    digest: str


class Lake:
    """Frames in and out of objects. A decimal column takes the smallest scale that holds its digits, as integers.

    With a second, cold place, older objects may lie there; whatever lies in the first one is the newer.
    """

    def __init__(self, location: str, cold: str | None = None) -> None:
        self.location, self.cold = location, cold
        self._hot = open_objects(location)
        self._places = [self._hot, open_objects(cold)] if cold else [self._hot]

    def write(self, table: Table, partition: Partition, frame: pl.DataFrame) -> Stored:
        """Replace a partition's object atomically; the same rows always give the same bytes."""
        content = encode(frame)
        self._hot.write(table.path(partition), content)
        return Stored(len(content), hashlib.sha256(content).hexdigest())

    def read(self, table: Table, partition: Partition) -> pl.DataFrame | None:
        """The partition's rows, sorted by open_time, or None where there is no object. Raises Damaged."""
        path = table.path(partition)
        content = next((found for place in self._places if (found := place.read(path)) is not None), None)
        return None if content is None else decode(content, table, f"{self.location}/{path}")

    def scan(self, table: Table, partitions: Sequence[Partition], known: bool = False) -> list[pl.LazyFrame]:
        """The rows of these partitions in the table's types, in order, read when they are collected; what is not there is left out.

        `known`: the ledger has all of them, so that S3 is not asked which are there.
        """
        uris = self.uris(table, partitions, known)
        groups = groupby(uris, key=_schema_of)  # a scan of many files wants them alike: months of one market mostly are
        return [_scan(table, list(group)) for _, group in groups]

    def uris(self, table: Table, partitions: Sequence[Partition], known: bool = False) -> list[str]:
        """Where the objects of these partitions lie, those that are there, in order."""
        paths = [table.path(partition) for partition in partitions]
        found: dict[str, str] = {}
        for place in reversed(self._places):
            found |= place.uris(paths, known and len(self._places) == 1)
        return [found[path] for path in paths if path in found]

    def size(self, table: Table, partition: Partition) -> int | None:
        """The object's size in bytes, or None where there is none."""
        path = table.path(partition)
        return next((size for place in self._places if (size := place.size(path)) is not None), None)

    def sizes(self, table: Table) -> dict[tuple[str, str], int]:
        """The size of every object of a table, by market key and month key: one walk, or one listing in S3."""
        return {keys_of(market, month): size for place in reversed(self._places) for market, month, size in place.sizes(table.name)}

    def hot(self, table: Table) -> dict[str, int]:
        """The size of every object of a table that does not lie in the cold place, by path."""
        return {f"{table.name}/{market}/{month}/{OBJECT}": size for market, month, size in self._hot.sizes(table.name)}

    def delete(self, table: Table, partition: Partition) -> None:
        """Remove the object wherever it lies."""
        for place in self._places:
            place.delete(table.path(partition))

    def chill(self, table: Table, partition: Partition) -> int:
        """Move the object to the cold place; its size, 0 where it lies there already. It can be read all the time."""
        assert self.cold is not None, "there is a cold place"
        cold, path = self._places[1], table.path(partition)
        content = self._hot.read(path)
        if content is None:
            return 0
        cold.read(path)
        cold.write(path, content)
        if cold.read(path) != content:
            raise StoreFailed(f"{self.cold}/{path} does not hold what was written there; the object stays in {self.location}")
        self._hot.delete(path)
        return len(content)

    def set_aside(self, table: Table, partition: Partition) -> str:
        """Move a damaged object out of the way and return its new name."""
        path = table.path(partition)
        place = next((place for place in self._places if place.size(path) is not None), self._hot)
        return place.set_aside(path)

    def sweep(self) -> int:
        """Remove what writers that died have left behind; how many files or uploads."""
        return sum(place.sweep() for place in self._places)

    def set_class(self, table: Table, partition: Partition, storage_class: str) -> None:
        """Give an object in S3 another storage class."""
        self._hot.set_class(table.path(partition), storage_class)

    def classes(self, table: Table) -> dict[str, str]:
        """The storage class of every object of a table in S3, by path; nothing for a folder."""
        return self._hot.classes(table.name)


def encode(frame: pl.DataFrame) -> bytes:
    """A frame as Parquet: one row group, zstd, decimals as integers at the scale their digits need.

    Times and prices move in small steps, so their differences are packed; the bytes of everything else lie apart by
    place, so that zstd finds the high ones alike. Numbers wider than 18 digits stay as they are.
    """
    import pyarrow.parquet as pq

    slim = frame.with_columns(_slim(frame, name) for name, dtype in frame.schema.items() if isinstance(dtype, pl.Decimal))
    packed = [name for name, dtype in slim.schema.items() if _packs(dtype)]
    sink, rows = io.BytesIO(), max(1, frame.height)
    with pq.ParquetWriter(
        sink,
        slim.to_arrow().schema,
        compression="zstd",
        compression_level=3,
        max_rows_per_page=rows,
        use_dictionary=False,
        store_decimal_as_integer=True,
        write_page_checksum=True,
        column_encoding={name: "DELTA_BINARY_PACKED" if name in _IN_SMALL_STEPS else "BYTE_STREAM_SPLIT" for name in packed},
        write_statistics=["open_time"],
        store_schema=False,
    ) as writer:
        writer.write_table(slim.to_arrow(), rows)
        writer.add_key_value_metadata({VERSION_KEY: str(VERSION)})
    return sink.getvalue()


def decode(content: bytes, table: Table, name: str) -> pl.DataFrame:
    """The frame of an object, checksums verified, columns bound by name and in the table's types. Raises Damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        frame = pl.DataFrame(pq.ParquetFile(io.BytesIO(content), page_checksum_verification=True).read())
        return frame.select(pl.col(column.name).cast(column.dtype) for column in table.columns)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, pa.ArrowException, OSError, ValueError) as error:
        raise Damaged(f"{name} is damaged ({type(error).__name__}); `marketdata backfill` fetches it again") from None


def _scan(table: Table, uris: list[str]) -> pl.LazyFrame:
    options = storage_options() if uris[0].startswith("s3://") else None
    found = pl.scan_parquet(uris, hive_partitioning=False, storage_options=options)
    return found.select(pl.col(column.name).cast(column.dtype) for column in table.columns)


def _schema_of(uri: str) -> object:
    """What tells objects of one scan from those of another: their schema where it costs no request, else the object itself."""
    return uri if uri.startswith("s3://") else _read_schema(uri, os.stat(uri).st_mtime_ns)  # noqa: PTH116 - on a hot path


@lru_cache(maxsize=65536)
def _read_schema(uri: str, changed: int) -> object:
    return tuple(pl.read_parquet_schema(uri).items())


def _slim(frame: pl.DataFrame, name: str) -> pl.Series:
    """The column at the smallest decimal scale that holds all its digits, where they fit in 18; else as it is.

    A wide column keeps its scale: DuckDB's union of objects takes 38 digits from a wide one and would cut the others' decimals.
    """
    digits = pl.col(name).to_physical()
    fraction = frame.select((digits % pl.lit(10**SCALE, pl.Int128)).cast(pl.Int64)).to_series().drop_nulls()
    shared = int(np.gcd.reduce(fraction.to_numpy(), initial=10**SCALE))
    scale = next(s for s in range(SCALE + 1) if shared % 10 ** (SCALE - s) == 0)
    largest = max((abs(v) for v in frame.select(digits.min().alias("a"), digits.max().alias("b")).row(0) if v is not None), default=0)
    fits = largest < 10 ** (_INT64_DIGITS + SCALE - scale)
    return frame[name].cast(pl.Decimal(_INT64_DIGITS, scale)) if fits else frame[name]


def _packs(dtype: pl.DataType) -> bool:
    if isinstance(dtype, pl.Decimal):
        return dtype.precision <= _INT64_DIGITS
    return dtype.is_integer() or dtype.is_temporal()

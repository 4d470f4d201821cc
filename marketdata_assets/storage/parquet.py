"""The lake: one Parquet object per table and partition, on a local disk or in S3, replaced whole or
not at all.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import polars as pl

from marketdata_assets.errors import Damaged, StoreFailed
from marketdata_assets.model.bar import DECIMAL, PROVENANCE, SCALE
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import Table, keys_of
from marketdata_assets.storage.fingerprint import fingerprint
from marketdata_assets.storage.objects import Objects, open_objects, storage_options

VERSION, VERSION_KEY = 3, "marketdata_version"
"""Of the objects; one without the key is of version 1, packed otherwise, and raw ones of version 2
know no provenance. All are read, and what is written is of this one.
"""
ROWS_A_GROUP = 10_080
"""A week of minutes: whoever wants a day reads a fourth of a month, for 2 % more bytes."""
_DIGITS = 18
_TOLD = [column.name for column in PROVENANCE]
_IN_SMALL_STEPS = ("open_time", "open", "high", "low", "close", "known_at", "replaced_at")


class Stored(NamedTuple):
    """One object as it lies there; `digest` is the fingerprint of its rows without their
    provenance.
    """

    bytes: int
    digest: str


class Lake:
    """Frames in and out of objects. A decimal column takes the smallest scale that holds its digits,
    as integers.

    With a second, cold place, older objects may lie there; whatever lies in the first one is the
    newer.
    """

    def __init__(self, location: str, cold: str | None = None) -> None:
        self.location, self.cold = location, cold
        self._hot = open_objects(location)
        self._places = [self._hot, open_objects(cold)] if cold else [self._hot]

    @property
    def local(self) -> bool:
        """Whether all of it lies on a disk, where listing costs nothing and writing does not wait; not
        in S3.
        """
        return not any(place.startswith("s3://") for place in (self.location, self.cold or ""))

    def write(self, table: Table, partition: Partition, frame: pl.DataFrame) -> Stored:
        """Replace a partition's object atomically; the same rows always give the same bytes."""
        content = encode(frame)
        self._hot.write(table.path(partition), content)
        return Stored(len(content), fingerprint(frame.drop(*_TOLD, strict=False)))

    def write_changed(self, table: Table, partition: Partition, frame: pl.DataFrame) -> bool:
        """Replace a partition's object where it holds something else; whether it did."""
        content, path = encode(frame), table.path(partition)
        changed = self._read(path) != content
        if changed:
            self._hot.write(path, content)
        return changed

    def read(
        self,
        table: Table,
        partition: Partition,
        since: datetime | None = None,
        provenance: bool = False,
    ) -> pl.DataFrame | None:
        """The partition's rows, sorted by open_time, or None where there is no object. Raises Damaged.

        `since`: rows of before that moment may be left out. `provenance`: with the columns of
        model.bar.PROVENANCE.
        """
        path = table.path(partition)
        content = self._read(path)
        return (
            None
            if content is None
            else decode(content, table, f"{self.location}/{path}", since, provenance)
        )

    def _read(self, path: str) -> bytes | None:
        return next(
            (found for place in self._places if (found := place.read(path)) is not None), None
        )

    def scan(
        self, table: Table, partitions: Sequence[Partition], known: bool = False
    ) -> list[pl.LazyFrame]:
        """The rows of these partitions in the table's types, in order, read when they are collected;
        what is not there is left out.

        `known`: the ledger has all of them, so that S3 is not asked which are there.
        """
        uris = self.uris(table, partitions, known)
        groups = groupby(
            uris, key=_schema_of
        )  # a scan of many files wants them alike: months of one market mostly are
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
        return next(
            (size for place in self._places if (size := place.size(path)) is not None), None
        )

    def sizes(self, table: Table) -> dict[tuple[str, str], int]:
        """The size of every object of a table, by market key and month key: one walk, or one listing
        in S3.
        """
        return {
            key: size for place in reversed(self._places) for key, size in _sizes_in(place, table)
        }

    def hot(self, table: Table) -> dict[tuple[str, str], int]:
        """The same without what lies in the cold place."""
        return dict(_sizes_in(self._hot, table))

    def delete(self, table: Table, partition: Partition) -> None:
        """Remove the object wherever it lies."""
        for place in self._places:
            place.delete(table.path(partition))

    def chill(self, table: Table, partition: Partition) -> int:
        """Move the object to the cold place; its size, 0 where it lies there already. It can be read
        all the time.
        """
        assert self.cold is not None, "there is a cold place"
        cold, path = self._places[1], table.path(partition)
        content = self._hot.read(path)
        if content is None:
            return 0
        cold.read(path)
        cold.write(path, content)
        if cold.read(path) != content:
            raise StoreFailed(
                f"{self.cold}/{path} does not hold what was written there; the object stays in {self.location}"
            )
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


def _sizes_in(place: Objects, table: Table) -> Iterator[tuple[tuple[str, str], int]]:
    return ((keys_of(market, month), size) for market, month, size in place.sizes(table.name))


def encode(frame: pl.DataFrame) -> bytes:
    """A frame as Parquet: a row group per week of minutes, zstd, decimals as integers at the scale
    their digits need.

    Times and prices move in small steps, so their differences are packed; the bytes of everything
    else lie apart by place, so that zstd finds the high ones alike. Numbers wider than 18 digits
    stay as they are.
    """
    import pyarrow.parquet as pq

    slim = frame.with_columns(_narrow(column) for column in frame if column.dtype == DECIMAL)
    packed = [name for name, dtype in slim.schema.items() if _packs(dtype)]
    table = slim.to_arrow()
    sink = io.BytesIO()
    with pq.ParquetWriter(
        sink,
        table.schema,
        compression="zstd",
        compression_level=3,
        max_rows_per_page=ROWS_A_GROUP,
        use_dictionary=[name for name, dtype in slim.schema.items() if dtype == pl.String] or False,
        store_decimal_as_integer=True,
        write_page_checksum=True,
        column_encoding={
            name: "DELTA_BINARY_PACKED" if name in _IN_SMALL_STEPS else "BYTE_STREAM_SPLIT"
            for name in packed
        },
        write_statistics=["open_time"],
        store_schema=False,
    ) as writer:
        writer.write_table(table, ROWS_A_GROUP)
        writer.add_key_value_metadata({VERSION_KEY: str(VERSION)})
    return sink.getvalue()


def decode(
    content: bytes, table: Table, name: str, since: datetime | None = None, provenance: bool = False
) -> pl.DataFrame:
    """The frame of an object, checksums verified, columns bound by name and in the table's types.
    Raises Damaged.

    `since`: only row groups that reach this moment are read, whole. `provenance` is null where an
    object holds none.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(io.BytesIO(content), page_checksum_verification=True)
        told = [*table.columns, *(PROVENANCE if provenance else ())]
        names = [c.name for c in told if c.name in file.schema_arrow.names]
        groups = range(file.metadata.num_row_groups) if since is None else _reaching(file, since)
        found = pl.DataFrame(file.read_row_groups(groups, columns=names))
        absent = [
            pl.lit(None, c.dtype).alias(c.name)
            for c in PROVENANCE
            if provenance and c.name not in names
        ]
        return found.with_columns(absent).select(pl.col(c.name).cast(c.dtype) for c in told)
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


def _reaching(file: Any, since: datetime) -> list[int]:
    groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    newest = [
        next(
            g.column(c).statistics
            for c in range(g.num_columns)
            if g.column(c).path_in_schema == "open_time"
        )
        for g in groups
    ]
    return [
        i
        for i, statistics in enumerate(newest)
        if statistics is None or not statistics.has_min_max or statistics.max >= since
    ]


def _scan(table: Table, uris: list[str]) -> pl.LazyFrame:
    options = storage_options() if uris[0].startswith("s3://") else None
    found = pl.scan_parquet(uris, hive_partitioning=False, storage_options=options)
    return found.select(table.typed)


def _schema_of(uri: str) -> object:
    """What tells objects of one scan from those of another: their schema where it costs no request,
    else the object itself.
    """
    return uri if uri.startswith("s3://") else _read_schema(uri, os.stat(uri).st_mtime_ns)  # noqa: PTH116 - on a hot path


@lru_cache(maxsize=65536)
def _read_schema(uri: str, changed: int) -> object:
    return tuple(pl.read_parquet_schema(uri).items())


def _packs(dtype: pl.DataType) -> bool:
    if isinstance(dtype, pl.Decimal):
        return dtype.precision <= _DIGITS
    return dtype.is_integer() or isinstance(dtype, pl.Datetime)


def _narrow(column: pl.Series) -> pl.Series:
    """Decimals at the smallest scale that holds all their digits, in 18 digits where they fit; else as
    they are.

    The scale is guessed from a few and proved on all. A wide column keeps its scale: DuckDB's union
    of objects takes 38 digits from a wide one and would cut the others' decimals.
    """
    few = math.gcd(
        *column.gather_every(max(1, len(column) // 32)).drop_nulls().to_physical().to_list()
    )
    guess = next(scale for scale in range(SCALE + 1) if few % 10 ** (SCALE - scale) == 0)
    for scale in range(guess, SCALE + 1):
        narrow = column.cast(pl.Decimal(_DIGITS, scale), strict=False)
        if narrow.null_count() > column.null_count():  # too wide, and the more so at the next scale
            return column
        if narrow.cast(DECIMAL).equals(column):
            return narrow
    return column

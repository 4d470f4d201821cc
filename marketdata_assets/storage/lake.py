"""The lake: one Parquet object per table and partition, in a folder or in S3."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
from polars.io.plugins import register_io_source

from marketdata_assets.errors import Damaged, StoreFailed
from marketdata_assets.model.bar import PROVENANCE_COLUMNS
from marketdata_assets.model.intervals import opens_inside, slice_inside
from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import Partition, PartitionKey
from marketdata_assets.model.table import StoredObject, Table
from marketdata_assets.model.window import Window
from marketdata_assets.storage.cache import FrameCache, Stamp, file_stamp
from marketdata_assets.storage.fingerprint import fingerprint
from marketdata_assets.storage.objects import open_object_store
from marketdata_assets.storage.parquet import (
    decimal_types,
    decode,
    encode,
    to_arrow,
    with_absent,
)
from marketdata_assets.storage.s3_client import polars_storage_options
from marketdata_assets.storage.table_types import TableTypes, types_path

_ROWS_AT_ONCE = 100_000
"""Partitions are passed to Polars together up to so many rows: each batch costs some 0.3 ms."""


class Lake:
    """Frames in and out of objects.

    New objects are written to the hot location. Older ones may be in a second, cold location; an
    object in the hot location is the newer one. `on_resized` receives an object that was written
    again with the same rows, and its size in bytes; `on_damaged` one that cannot be read as what it
    should be.
    """

    def __init__(
        self,
        location: str,
        cold_location: str | None = None,
        on_resized: Callable[[Table, Partition, int], None] = lambda *resized: None,
        on_damaged: Callable[[Table, Partition], None] = lambda *damaged: None,
    ) -> None:
        self.location, self.cold_location = location, cold_location
        self._hot = open_object_store(location)
        self._cold = open_object_store(cold_location) if cold_location else None
        self._stores = [self._hot, self._cold] if self._cold else [self._hot]
        self._types = TableTypes(location, self._stores, on_resized)
        self._on_damaged = on_damaged
        self._locations = [place for place in (location, cold_location) if place]
        self._cache = FrameCache()

    @property
    def is_local(self) -> bool:
        """Whether both locations are on disks, where a listing costs little and a write needs no
        network.
        """
        return not any(location.startswith("s3://") for location in self._locations)

    def write(self, table: Table, partition: Partition, frame: pl.DataFrame) -> StoredObject:
        """Replace a partition's object. Equal rows become equal bytes while the table's types stay
        as they are.
        """
        size = self._write(table, partition, frame)
        provenance = [column.name for column in PROVENANCE_COLUMNS]
        return StoredObject(size, fingerprint(frame.drop(provenance, strict=False)))

    def write_if_changed(self, table: Table, partition: Partition, frame: pl.DataFrame) -> bool:
        """Replace a partition's object unless it holds these rows in the table's types. Return
        whether it was replaced.
        """
        return self._write(table, partition, frame, self._read(table.path(partition))) > 0

    def _write(
        self, table: Table, partition: Partition, frame: pl.DataFrame, stored: bytes | None = None
    ) -> int:
        """Replace a partition's object, and return its size in bytes; 0 where `stored` equals it.

        The table's types are widened first where they do not hold the frame.
        """
        path, frame = table.path(partition), with_absent(frame, table.stored_columns)
        while True:
            types = self._types.get(table)
            arranged = to_arrow(frame, types.written)
            needed = decimal_types(arranged.schema)
            if types.written != types.everywhere:
                needed = decimal_types(to_arrow(frame, types.everywhere).schema)
            if not types.hold_everywhere(needed):
                self._types.rewrite(table, needed)
                continue
            content = encode(arranged, table.identity(partition))
            if content == stored:
                return 0
            if self._hot.write_while({types_path(table): types.content}, path, content):
                return len(content)
            self._types.forget(table)

    def rewrite(self, table: Table) -> int:
        """Give all objects of a table the same columns and types; return how many were rewritten.
        Damaged objects stay as they are.
        """
        return self._types.rewrite(table)

    def read(
        self,
        table: Table,
        partition: Partition,
        *,
        inside: Window | None = None,
        columns: Collection[str] | None = None,
        with_provenance: bool = False,
        with_foreign: bool = False,
    ) -> pl.DataFrame | None:
        """Return the partition's rows, sorted by open_time; None where there is no object.

        `inside`: rows that open outside this window may be left out. `columns`: only these of the
        table's. `with_provenance`: with the columns of model.bar.PROVENANCE_COLUMNS.
        `with_foreign`: rows of another month as well, for whoever removes them. Raises Damaged.
        """
        path = table.path(partition)
        content = self._read(path)
        if content is None:
            return None
        name = f"{self.location}/{path}"
        try:
            frame = decode(
                content,
                table,
                name=name,
                identity=table.identity(partition),
                inside=inside,
                columns=columns,
                with_provenance=with_provenance,
            )
            if not with_foreign:
                _raise_if_foreign(frame, partition.open_times(table.timeframe), name)
        except Damaged:
            self._on_damaged(table, partition)
            raise
        return frame

    def _read(self, path: str) -> bytes | None:
        contents = (store.read(path) for store in self._stores)
        return next((content for content in contents if content is not None), None)

    def read_inside(
        self,
        table: Table,
        partition: Partition,
        window: Window,
        columns: Collection[str] | None = None,
    ) -> pl.DataFrame | None:
        """Return the partition's rows that open inside the window; None where there is no object.

        An object on a disk that is read a second time is kept in memory until it changes; then more
        than these columns may be returned. `columns` contains `open_time`. Raises Damaged.
        """
        path = table.path(partition)
        stamp = self._stamp(path)
        bars = self._cache.get(path, stamp) if stamp else None
        if bars is None and stamp and self._cache.is_known(path, stamp):
            bars = self.read(table, partition)
            if bars is not None:
                self._cache.put(path, stamp, bars)
        elif bars is None:
            bars = self.read(table, partition, inside=window, columns=columns)
        return None if bars is None else slice_inside(bars, window)

    def _stamp(self, path: str) -> Stamp | None:
        """Return what changes with an object on a disk; None in S3 and where there is none."""
        if not self.is_local:
            return None
        stamps = (file_stamp(f"{place}/{path}") for place in self._locations)
        return next((stamp for stamp in stamps if stamp), None)

    def scan(
        self,
        table: Table,
        partitions: Sequence[Partition],
        window: Window,
        *,
        all_exist: bool = False,
        with_market: bool = False,
    ) -> pl.LazyFrame:
        """Return the rows of these partitions that open inside the window, in the table's types and
        in the order of the partitions. They are read when the frame is collected; a partition
        without an object is left out.

        `all_exist`: the caller knows that all objects exist, so that S3 need not be asked.
        `with_market`: with the market's key as the first column. From a disk, collecting raises
        Damaged.
        """
        schema = {"market": pl.String(), **table.schema} if with_market else table.schema
        if self.is_local:
            reading = _Reading(self, table, partitions, window=window, names=[*schema])
            return register_io_source(reading, schema=schema)
        frames = [pl.LazyFrame(schema=schema)]
        for partition, uri in self.find_uris(table, partitions, all_exist=all_exist).items():
            frame = pl.scan_parquet(
                uri, hive_partitioning=False, storage_options=polars_storage_options()
            )
            bars = frame.select(table.typed_columns).filter(opens_inside(window))
            frames.append(bars.with_columns(market=pl.lit(partition.market.key)).select(*schema))
        return pl.concat(frames)

    def find_uris(
        self, table: Table, partitions: Sequence[Partition], *, all_exist: bool = False
    ) -> dict[Partition, str]:
        """Return the URIs of these partitions' objects, of those that exist, in order."""
        paths = {partition: table.path(partition) for partition in partitions}
        uris: dict[str, str] = {}
        for store in reversed(self._stores):
            uris |= store.find_uris([*paths.values()], all_exist=all_exist and self._cold is None)
        return {partition: uris[path] for partition, path in paths.items() if path in uris}

    def size(self, table: Table, partition: Partition) -> int | None:
        """Return the object's size in bytes; None where there is no object."""
        sizes = (store.size(table.path(partition)) for store in self._stores)
        return next((size for size in sizes if size is not None), None)

    def list_sizes(self, table: Table) -> dict[PartitionKey, int]:
        """Return the size in bytes of every object of a table, from one walk through the folders or
        one listing in S3.
        """
        stores = reversed(self._stores)
        return {key: size for store in stores for key, size in store.list_sizes(table.name)}

    def list_hot_sizes(self, table: Table) -> dict[PartitionKey, int]:
        """Return the size in bytes of every object of a table in the hot location."""
        return dict(self._hot.list_sizes(table.name))

    def delete(self, table: Table, partition: Partition) -> None:
        """Remove the object from both locations."""
        for store in self._stores:
            store.delete(table.path(partition))

    def move_to_cold(self, table: Table, partition: Partition) -> int:
        """Move the object to the cold location, so that it can be read at any moment. Return its
        size in bytes, or 0 where the hot location holds no object.
        """
        assert self._cold is not None, "the lake has a cold location"
        path, types = table.path(partition), self._types.read(table)
        content = self._hot.read(path)
        if content is None:
            return 0
        self._cold.read(path)
        self._cold.write(path, content)
        if self._cold.read(path) != content:
            raise StoreFailed(
                f"{self.cold_location}/{path} does not hold what was written to it; "
                f"the object stays in {self.location}"
            )
        self._hot.delete(path)
        if self._types.read(table) != types:
            self.rewrite(table)
        return len(content)

    def quarantine_object(self, table: Table, partition: Partition) -> str:
        """Rename a damaged object, so that it is read no more. Return the new name."""
        path = table.path(partition)
        holders = (store for store in self._stores if store.size(path) is not None)
        return next(holders, self._hot).quarantine_object(path)

    def remove_abandoned_uploads(self) -> int:
        """Remove what writers that died have left behind. Return how many files or uploads."""
        return sum(store.remove_abandoned_uploads() for store in self._stores)

    def set_storage_class(self, table: Table, partition: Partition, storage_class: str) -> None:
        """Change the storage class of an object in S3. Raises StoreFailed for a folder."""
        self._hot.set_storage_class(table.path(partition), storage_class)

    def list_storage_classes(self, table: Table) -> dict[str, str]:
        """Return the storage class of every object of a table in S3, by path; none in a folder."""
        return self._hot.list_storage_classes(table.name)


@dataclass(frozen=True, slots=True)
class _Reading:
    """Reads partitions one after the other when Polars collects them."""

    lake: Lake
    table: Table
    partitions: Sequence[Partition]
    window: Window
    names: Sequence[str]

    def __call__(self, *wanted: Any) -> Iterator[pl.DataFrame]:
        """Yield the rows of the partitions. Polars passes the columns that it wants, a predicate on
        rows, a number of rows, each of them or None, and the size of a batch.
        """
        columns, predicate, limit, _ = wanted
        for bars in self._batches(columns, predicate):
            part = bars if predicate is None else bars.filter(predicate)
            if limit is not None:
                part = part.head(limit)
                limit -= part.height
            yield part if columns is None else part.select(columns)

    def _batches(
        self, columns: Sequence[str] | None, predicate: pl.Expr | None
    ) -> Iterator[pl.DataFrame]:
        needed = None
        if columns is not None:
            tested = [] if predicate is None else predicate.meta.root_names()
            needed = {"open_time", *columns, *tested}
        parts, rows = [], 0
        for partition in self.partitions:
            bars = self.lake.read_inside(self.table, partition, self.window, needed)
            if bars is None:
                continue
            if needed is not None:  # an object that is kept has all columns
                bars = bars.select(name for name in self.table.schema if name in needed)
            if "market" in self.names:
                bars = with_market_column(bars, partition.market)
            parts.append(bars)
            rows += bars.height
            if rows >= _ROWS_AT_ONCE:
                yield pl.concat(parts)
                parts, rows = [], 0
        if parts:
            yield pl.concat(parts)


def with_market_column(bars: pl.DataFrame, market: Market) -> pl.DataFrame:
    """Return the bars with the market's key as the first column, `market`."""
    return bars.clone().insert_column(
        0, pl.Series("market", [market.key]).new_from_index(0, bars.height)
    )


def _raise_if_foreign(frame: pl.DataFrame, owned: Window, name: str) -> None:
    """Raise Damaged for an object with rows that open in another month than its own."""
    if "open_time" not in frame.columns or frame.is_empty():
        return
    opens = frame["open_time"]
    if opens.null_count() or not opens.is_between(owned.start, owned.end, closed="left").all():
        raise Damaged(
            f"{name} holds rows of another month; `marketdata backfill` sets it aside and "
            "fetches the month again"
        )

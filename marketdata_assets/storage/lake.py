"""The lake: one Parquet object per table and partition, in a folder or in S3."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from itertools import groupby

import polars as pl

from marketdata_assets.errors import StoreFailed
from marketdata_assets.model.bar import PROVENANCE_COLUMNS
from marketdata_assets.model.partition import Partition, PartitionKey
from marketdata_assets.model.table import StoredObject, Table
from marketdata_assets.storage.fingerprint import fingerprint
from marketdata_assets.storage.objects import open_object_store
from marketdata_assets.storage.parquet import decode, encode
from marketdata_assets.storage.s3_client import polars_storage_options


class Lake:
    """Frames in and out of objects.

    New objects are written to the hot location. Older ones may be in a second, cold location; an
    object in the hot location is the newer one.
    """

    def __init__(self, location: str, cold_location: str | None = None) -> None:
        self.location, self.cold_location = location, cold_location
        self._hot = open_object_store(location)
        self._cold = open_object_store(cold_location) if cold_location else None
        self._stores = [self._hot, self._cold] if self._cold else [self._hot]

    @property
    def is_local(self) -> bool:
        """Whether both locations are on disks, where a listing costs little and a write needs no
        network.
        """
        return not any(
            location.startswith("s3://") for location in (self.location, self.cold_location or "")
        )

    def write(self, table: Table, partition: Partition, frame: pl.DataFrame) -> StoredObject:
        """Replace a partition's object. Equal rows always become equal bytes."""
        content = encode(frame)
        self._hot.write(table.path(partition), content)
        provenance = [column.name for column in PROVENANCE_COLUMNS]
        return StoredObject(len(content), fingerprint(frame.drop(provenance, strict=False)))

    def write_if_changed(self, table: Table, partition: Partition, frame: pl.DataFrame) -> bool:
        """Replace a partition's object unless it holds these rows. Return whether it was
        replaced.
        """
        content, path = encode(frame), table.path(partition)
        changed = self._read(path) != content
        if changed:
            self._hot.write(path, content)
        return changed

    def read(
        self,
        table: Table,
        partition: Partition,
        *,
        since: datetime | None = None,
        with_provenance: bool = False,
    ) -> pl.DataFrame | None:
        """Return the partition's rows, sorted by open_time; None where there is no object.

        `since`: rows that open before that moment may be left out. `with_provenance`: with the
        columns of model.bar.PROVENANCE_COLUMNS. Raises Damaged.
        """
        path = table.path(partition)
        content = self._read(path)
        if content is None:
            return None
        name = f"{self.location}/{path}"
        return decode(content, table, name=name, since=since, with_provenance=with_provenance)

    def _read(self, path: str) -> bytes | None:
        contents = (store.read(path) for store in self._stores)
        return next((content for content in contents if content is not None), None)

    def scan(
        self, table: Table, partitions: Sequence[Partition], *, all_exist: bool = False
    ) -> list[pl.LazyFrame]:
        """Return the rows of these partitions in the table's types, in order. They are read when
        the frames are collected; a partition without an object is left out.

        `all_exist`: the caller knows that all objects exist, so that S3 need not be asked.
        """
        uris = self.find_uris(table, partitions, all_exist=all_exist)
        # one scan of many files needs files of one schema, and months of one market mostly have it
        return [_scan(table, list(group)) for _, group in groupby(uris, key=_schema_of)]

    def find_uris(
        self, table: Table, partitions: Sequence[Partition], *, all_exist: bool = False
    ) -> list[str]:
        """Return the URIs of these partitions' objects, those that exist, in order."""
        paths = [table.path(partition) for partition in partitions]
        uris: dict[str, str] = {}
        for store in reversed(self._stores):
            uris |= store.find_uris(paths, all_exist=all_exist and self._cold is None)
        return [uris[path] for path in paths if path in uris]

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
        path = table.path(partition)
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


def _scan(table: Table, uris: list[str]) -> pl.LazyFrame:
    options = polars_storage_options() if uris[0].startswith("s3://") else None
    frame = pl.scan_parquet(uris, hive_partitioning=False, storage_options=options)
    return frame.select(table.typed_columns)


def _schema_of(uri: str) -> object:
    """Return what the files of one scan have in common: their schema where reading it costs no
    request, else the URI, so that each is scanned alone.
    """
    if uri.startswith("s3://"):
        return uri
    return _read_schema(uri, os.stat(uri).st_mtime_ns)  # noqa: PTH116 - on the path of every read


@lru_cache(maxsize=65536)
def _read_schema(uri: str, modified: int) -> object:
    """Read the schema of a file; `modified` is part of the cache's key."""
    return tuple(pl.read_parquet_schema(uri).items())

"""The lake: one Parquet object per table and partition, in a folder or in S3."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import polars as pl
from polars.io.plugins import register_io_source

from marketdata_assets.errors import BarsMissing, Damaged, StoreFailed
from marketdata_assets.model.bar import PROVENANCE_COLUMNS
from marketdata_assets.model.intervals import slice_inside
from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import Partition, PartitionKey
from marketdata_assets.model.table import ObjectRecord, StoredObject, Table
from marketdata_assets.model.window import Window
from marketdata_assets.storage.cache import FrameCache, Stamp, file_stamp
from marketdata_assets.storage.fingerprint import fingerprint
from marketdata_assets.storage.ledger_files import LedgerFiles
from marketdata_assets.storage.object_proof import (
    LakeBook,
    Listed,
    NoBook,
    ObjectProof,
    StoredContent,
)
from marketdata_assets.storage.objects import open_object_store
from marketdata_assets.storage.parquet import (
    check_identity,
    decimal_types,
    decode,
    encode,
    is_same_but_revision,
    remedy,
    to_arrow,
    with_absent,
)
from marketdata_assets.storage.table_types import TableTypes, types_path

T = TypeVar("T")
V = TypeVar("V")
_READ_AT_ONCE = 8
"""How many objects in S3 are read at once."""
_ROWS_AT_ONCE = 100_000
"""Partitions are passed to Polars together up to so many rows: each batch costs some 0.3 ms."""


class Lake:
    """Frames in and out of objects.

    New objects are written to the hot location. Older ones may be in a second, cold location; an
    object in the hot location is the newer one. `book` keeps the records that tell an object that
    was stored here from one that something else has put in its place.
    """

    def __init__(
        self,
        location: str,
        cold_location: str | None = None,
        book: LakeBook | None = None,
    ) -> None:
        self.location, self.cold_location = location, cold_location
        self._hot = open_object_store(location)
        self._cold = open_object_store(cold_location) if cold_location else None
        self._stores = [self._hot, self._cold] if self._cold else [self._hot]
        self._book = book or NoBook()
        self._proof = ObjectProof(self._book)
        self._types = TableTypes(
            location, self._stores, is_proven=self._proof.accepts, on_rewritten=self._note_rewritten
        )
        self._locations = [place for place in (location, cold_location) if place]
        self._cache = FrameCache()

    def without_records(self) -> Lake:
        """Return the lake for a reader that proves the rows by other means."""
        return Lake(self.location, self.cold_location)

    @property
    def is_local(self) -> bool:
        """Whether both locations are on disks, where a listing costs little and a write needs no
        network.
        """
        return not any(location.startswith("s3://") for location in self._locations)

    @property
    def ledger_files(self) -> LedgerFiles:
        """The copies of the ledger's rows beside the objects."""
        return LedgerFiles(self._hot)

    def write(self, table: Table, partition: Partition, frame: pl.DataFrame) -> StoredObject:
        """Replace a partition's object. Equal rows become equal bytes, up to the revision in the
        footer, while the table's types stay as they are.
        """
        size = self._write(table, partition, frame, None)
        provenance = [column.name for column in PROVENANCE_COLUMNS]
        return StoredObject(size, fingerprint(frame.drop(provenance, strict=False)))

    def write_if_changed(self, table: Table, partition: Partition, frame: pl.DataFrame) -> bool:
        """Replace a partition's object unless it holds these rows in the table's types. Return
        whether it was replaced.
        """
        stored = self._read(table.path(partition))
        if stored and not self._proof.accepts(table, partition, stored):
            stored = None
        return self._write(table, partition, frame, stored) > 0

    def _write(
        self, table: Table, partition: Partition, frame: pl.DataFrame, stored: StoredContent | None
    ) -> int:
        """Replace a partition's object, and return its size in bytes; 0 where `stored` holds the
        same.

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
            revision = self._proof.next_revision(table, partition)
            content = encode(arranged, table.identity(partition), revision)
            if stored and is_same_but_revision(content, stored.content):
                return 0
            held = {types_path(table): types.content}
            if stamp := self._hot.write_while(held, path, content):
                self._proof.record(table, partition, revision, StoredContent(content, stamp))
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
        known: Mapping[PartitionKey, ObjectRecord] | None = None,
    ) -> pl.DataFrame | None:
        """Return the partition's rows, sorted by open_time; None where there is no object.

        `inside`: rows that open outside this window may be left out. `columns`: only these of the
        table's. `with_provenance`: with the columns of model.bar.PROVENANCE_COLUMNS.
        `with_foreign`: rows of another month as well, for whoever removes them. `known`: records
        of the book that were read a moment ago. Raises Damaged, also where something else than this
        software has replaced the object.
        """
        name = f"{self.location}/{table.path(partition)}"
        try:
            content = self._read_proven(table, partition, name, known=known)
            if content is None:
                return None
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
            self._book.note_damage(table, partition)
            raise
        return frame

    def prove(self, table: Table, partition: Partition, digest: str | None = None) -> int | None:
        """Read an object whole, whatever is known of it: compare its content with what was stored
        last, decode every page, and return its number of rows; None where there is no object.

        `digest`: of the rows that an object without a record should hold. Raises Damaged.
        """
        path = table.path(partition)
        name, found = f"{self.location}/{path}", self._read(path)
        if found is None:
            return None
        try:
            is_known = self._book.get(table, partition) is not None
            if not self._proof.accepts(table, partition, found, again=True):
                raise Damaged(f"{name} is damaged or changed from outside; {remedy(table)}")
            identity = table.identity(partition)
            frame = decode(found.content, table, name=name, identity=identity)
            _raise_if_foreign(frame, partition.open_times(table.timeframe), name)
            if not is_known and digest and fingerprint(frame) != digest:
                raise Damaged(f"{name} holds other rows than the ledger counts; {remedy(table)}")
        except Damaged:
            self._book.note_damage(table, partition)
            raise
        return frame.height

    def _read(self, path: str) -> StoredContent | None:
        return next(filter(None, (store.read_stamped(path) for store in self._stores)), None)

    def _read_proven(
        self,
        table: Table,
        partition: Partition,
        name: str,
        *,
        known: Mapping[PartitionKey, ObjectRecord] | None = None,
    ) -> bytes | None:
        """Return an object's content; raises Damaged where it is not what was stored last."""
        refused = ""
        while found := self._read(table.path(partition)):
            if self._proof.accepts(table, partition, found, known):
                return found.content
            if found.stamp == refused:  # not a newer one that was stored meanwhile
                check_identity(found.content, table, table.identity(partition), name)
                raise Damaged(
                    f"{name} is damaged or changed from outside, or older than what was stored "
                    f"last; {remedy(table)}"
                )
            refused = found.stamp
        return None

    def _note_rewritten(
        self, table: Table, partition: Partition, revision: int, content: StoredContent
    ) -> None:
        self._proof.record(table, partition, revision, content)
        self._book.note_rewritten(table, partition, len(content.content))

    def read_inside(
        self,
        table: Table,
        partition: Partition,
        window: Window,
        columns: Collection[str] | None = None,
        known: Mapping[PartitionKey, ObjectRecord] | None = None,
    ) -> pl.DataFrame | None:
        """Return the partition's rows that open inside the window; None where there is no object.

        An object on a disk that is read a second time is kept in memory until it changes; then more
        than these columns may be returned. `columns` contains `open_time`. Raises Damaged.
        """
        path = table.path(partition)
        stamp = self._stamp(path)
        bars = self._cache.get(path, stamp) if stamp else None
        if bars is None and stamp and self._cache.is_known(path, stamp):
            bars = self.read(table, partition, known=known)
            if bars is not None:
                self._cache.put(path, stamp, bars)
        elif bars is None:
            bars = self.read(table, partition, inside=window, columns=columns, known=known)
        return None if bars is None else slice_inside(bars, window)

    def read_stored(
        self,
        table: Table,
        partition: Partition,
        window: Window,
        columns: Collection[str] | None = None,
        known: Mapping[PartitionKey, ObjectRecord] | None = None,
    ) -> pl.DataFrame | None:
        """Return what `read_inside` returns, and None only where nothing was ever stored, or
        retention has removed it. Raises BarsMissing for an object that is lost, Damaged.
        """
        bars = self.read_inside(table, partition, window, columns, known)
        if bars is None:
            key = partition.stored_key
            get = self._book.get
            if known.get(key) if known is not None else get(table, partition):
                raise BarsMissing(
                    f"{self.location}/{table.path(partition)} is not there any more; "
                    f"{remedy(table)}"
                )
        return bars

    def records(
        self, table: Table, partitions: Collection[Partition]
    ) -> Mapping[PartitionKey, ObjectRecord] | None:
        """Return the book's records for `read_stored` of many partitions, from one query; None
        where this process has read all of these objects before.
        """
        if all(self._proof.was_proven(table.path(partition)) for partition in partitions):
            return None
        return self._book.of_table(table, frozenset(p.market.key for p in partitions))

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
        with_market: bool = False,
    ) -> pl.LazyFrame:
        """Return the rows of these partitions that open inside the window, in the table's types and
        in the order of the partitions. They are read when the frame is collected; a partition
        without an object is left out. `with_market`: with the market's key as the first column.
        Collecting raises Damaged.
        """
        schema = {"market": pl.String(), **table.schema} if with_market else table.schema
        reading = _Reading(self, table, partitions, window=window, names=[*schema])
        return register_io_source(reading, schema=schema)

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
        found = self._find(table.path(partition))
        return found.size if found else None

    def _find(self, path: str) -> Listed | None:
        return next(filter(None, (store.find(path) for store in self._stores)), None)

    def proven_size(self, table: Table, partition: Partition) -> int | None:
        """Return the object's size in bytes; None where there is no object, and where it is not
        what was stored last. It is read where something has touched it.
        """
        path = table.path(partition)
        listed = self._find(path)
        if listed is None or self._proof.is_proven(path, listed.stamp):
            return listed.size if listed else None
        record = self._book.get(table, partition)
        key = partition.stored_key
        return listed.size if self._is_as_recorded(table, key, listed, record) else None

    def list_proven_sizes(self, table: Table) -> dict[PartitionKey, int | None]:
        """Return `proven_size` of every object of a table, from one listing and one query."""
        records = self._book.of_table(table)
        return {
            key: listed.size if self._is_as_recorded(table, key, listed, records.get(key)) else None
            for key, listed in self._list(table).items()
        }

    def _is_as_recorded(
        self, table: Table, key: PartitionKey, listed: Listed, record: ObjectRecord | None
    ) -> bool:
        """Return whether a listed object is what was stored last; one without a record counts."""
        if record is None or record.stamp == listed.stamp:
            return True
        partition = Partition.from_stored_key(key)
        try:
            return self._read_proven(table, partition, self.location) is not None
        except Damaged:
            self._book.note_damage(table, partition)
            return False

    def list_sizes(self, table: Table) -> dict[PartitionKey, int]:
        """Return the size in bytes of every object of a table, from one walk through the folders or
        one listing in S3.
        """
        return {key: listed.size for key, listed in self._list(table).items()}

    def _list(self, table: Table) -> dict[PartitionKey, Listed]:
        stores = reversed(self._stores)
        return {key: listed for store in stores for key, listed in store.list(table.name)}

    def list_hot_sizes(self, table: Table) -> dict[PartitionKey, int]:
        """Return the size in bytes of every object of a table in the hot location."""
        return {key: listed.size for key, listed in self._hot.list(table.name)}

    def delete(self, table: Table, partition: Partition) -> None:
        """Remove the object from both locations."""
        for store in self._stores:
            store.delete(table.path(partition))
        self._book.remove(table, partition)

    def move_to_cold(self, table: Table, partition: Partition) -> int:
        """Move the object to the cold location, so that it can be read at any moment. Return its
        size in bytes, or 0 where the hot location holds no object.
        """
        assert self._cold is not None, "the lake has a cold location"
        path, types = table.path(partition), self._types.read(table)
        if self._hot.find(path) is None:
            return 0
        content = self._read_proven(table, partition, f"{self.location}/{path}")
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
        holders = (store for store in self._stores if store.find(path) is not None)
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
        for bars, partition in self._read_all(needed):
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

    def _read_all(
        self, columns: Collection[str] | None
    ) -> Iterator[tuple[pl.DataFrame, Partition]]:
        """Yield the rows of the partitions that have an object; S3 is asked for several at once."""
        known = self.lake.records(self.table, self.partitions)

        def read(partition: Partition) -> tuple[pl.DataFrame | None, Partition]:
            bars = self.lake.read_stored(self.table, partition, self.window, columns, known=known)
            return bars, partition

        for bars, partition in _map_ahead(
            read, self.partitions, 0 if self.lake.is_local else _READ_AT_ONCE
        ):
            if bars is not None:
                yield bars, partition


def _map_ahead(function: Callable[[T], V], items: Iterable[T], at_once: int) -> Iterator[V]:
    """Yield the results in order, while so many later ones are worked on; 0: none is."""
    if not at_once:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(at_once) as pool:
        pending: deque[Future[V]] = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > at_once:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


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

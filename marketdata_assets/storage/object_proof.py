"""Whether an object of the lake is the one that was stored last, or a newer one of our own."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from typing import NamedTuple, Protocol

from marketdata_assets.model.partition import Partition, PartitionKey
from marketdata_assets.model.table import ObjectRecord, Table
from marketdata_assets.storage.parquet import intact_revision, read_footer

_REMEMBERED = 65_536
"""How many proven objects a process remembers."""


class LakeBook(Protocol):
    """Who keeps the records of a lake's objects."""

    def get(self, table: Table, partition: Partition) -> ObjectRecord | None:
        """Return what was stored last; None where nothing is known of it."""
        ...

    def of_table(
        self, table: Table, market_keys: frozenset[str] | None = None
    ) -> Mapping[PartitionKey, ObjectRecord]:
        """Return what was stored last of every partition of a table, or of these markets'."""
        ...

    def put(self, table: Table, partition: Partition, record: ObjectRecord) -> None:
        """Remember what was stored or proven."""
        ...

    def note_rewritten(self, table: Table, partition: Partition, size: int) -> None:
        """Remember the size in bytes of an object that was written again with the same rows."""
        ...

    def note_damage(self, table: Table, partition: Partition) -> None:
        """Remember that an object is not what it should be, so that it is made again."""
        ...

    def remove(self, table: Table, partition: Partition) -> None:
        """Forget an object that was removed for good."""
        ...


class NoBook:
    """Keeps no records: nothing is known of any object."""

    def get(self, table: Table, partition: Partition) -> None:
        """Return None."""

    def of_table(
        self, table: Table, market_keys: frozenset[str] | None = None
    ) -> Mapping[PartitionKey, ObjectRecord]:
        """Return nothing."""
        return {}

    def put(self, table: Table, partition: Partition, record: ObjectRecord) -> None:
        """Do nothing."""

    def note_rewritten(self, table: Table, partition: Partition, size: int) -> None:
        """Do nothing."""

    def note_damage(self, table: Table, partition: Partition) -> None:
        """Do nothing."""

    def remove(self, table: Table, partition: Partition) -> None:
        """Do nothing."""


class StoredContent(NamedTuple):
    """An object's content, and a text that changes with it: size and time of change of a file, the
    ETag in S3.
    """

    content: bytes
    stamp: str


class Listed(NamedTuple):
    """An object as a listing shows it: its size in bytes and its stamp."""

    size: int
    stamp: str


class ObjectProof:
    """Compares objects with the records of a book. What was proven once is not hashed again while
    its stamp stays. Threads may share it.
    """

    def __init__(self, book: LakeBook) -> None:
        self._book = book
        self._proven: OrderedDict[str, str] = OrderedDict()

    def is_proven(self, path: str, stamp: str) -> bool:
        """Return whether this process has proven the object as it is now."""
        return self._proven.get(path) == stamp

    def was_proven(self, path: str) -> bool:
        """Return whether this process has proven the object, perhaps as it was earlier."""
        return path in self._proven

    def accepts(
        self,
        table: Table,
        partition: Partition,
        found: StoredContent,
        known: Mapping[PartitionKey, ObjectRecord] | None = None,
        *,
        again: bool = False,
    ) -> bool:
        """Return whether an object is what was stored last, or was written later by this software.

        `known`: records that were read a moment ago. `again`: its content is compared although its
        stamp is known. An object without a record, of another host or
        an earlier release, is believed where it does not contradict itself, and left to whoever
        decodes it where it cannot be read.
        """
        path = table.path(partition)
        if again:
            self._proven.pop(path, None)
        elif self.is_proven(path, found.stamp):
            return True
        record = known.get(partition.stored_key) if known else None
        if record is None or record.stamp != found.stamp:
            record = self._book.get(table, partition)
        if again or record is None or record.stamp != found.stamp:
            if record is None and read_footer(found.content) is None:
                return True
            proven = self._prove(found, record)
            if proven is None:
                return False
            if proven != record:
                self._book.put(table, partition, proven)
        self._remember(path, found.stamp)
        return True

    def _prove(self, found: StoredContent, record: ObjectRecord | None) -> ObjectRecord | None:
        """Return the record of an object's content; None where it cannot be believed."""
        checksum = hashlib.sha256(found.content).hexdigest()
        if record and record.checksum == checksum:
            return record._replace(stamp=found.stamp)
        revision = intact_revision(found.content)
        if revision is None or (record and revision <= record.revision):
            return None
        return ObjectRecord(revision, checksum, found.stamp)

    def next_revision(self, table: Table, partition: Partition) -> int:
        """Return the revision of a partition's next object."""
        record = self._book.get(table, partition)
        return record.revision + 1 if record else 1

    def record(
        self, table: Table, partition: Partition, revision: int, found: StoredContent
    ) -> None:
        """Remember an object that was written here."""
        checksum = hashlib.sha256(found.content).hexdigest()
        self._book.put(table, partition, ObjectRecord(revision, checksum, found.stamp))
        self._remember(table.path(partition), found.stamp)

    def _remember(self, path: str, stamp: str) -> None:
        self._proven[path] = stamp
        if len(self._proven) > _REMEMBERED:
            self._proven.popitem(last=False)

"""The types of each table in one lake: where they are recorded, and how all objects get them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from marketdata_assets.errors import BadInput, Damaged
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import Table
from marketdata_assets.storage.column_types import NO_TYPES, ColumnTypes, DecimalType
from marketdata_assets.storage.object_proof import StoredContent
from marketdata_assets.storage.objects import ObjectStore
from marketdata_assets.storage.parquet import (
    decimal_types,
    decode,
    encode,
    has_columns,
    intact_revision,
    to_arrow,
)


class _BeginAgainError(Exception):
    """All objects have to be visited again, with the recorded types widened to hold these ones."""

    def __init__(self, needed: Mapping[str, DecimalType] = NO_TYPES) -> None:
        super().__init__(needed)
        self.needed = needed


def types_path(table: Table) -> str:
    """Return the path of the file with a table's types, relative to the lake."""
    return f".types/{table.name}.json"


class TableTypes:
    """The types of the tables of a lake, in the first of its stores; an object there is the newer
    one. `is_proven` says whether an object may be written again, and `on_rewritten` receives its
    new revision and content.
    """

    def __init__(
        self,
        location: str,
        stores: Sequence[ObjectStore],
        *,
        is_proven: Callable[[Table, Partition, StoredContent], bool],
        on_rewritten: Callable[[Table, Partition, int, StoredContent], None],
    ) -> None:
        self._location, self._stores = location, stores
        self._is_proven, self._on_rewritten = is_proven, on_rewritten
        self._known: dict[Table, ColumnTypes] = {}

    def get(self, table: Table) -> ColumnTypes:
        """Return the types as they were read last; another writer may have changed them since."""
        types = self._known[table] = self._known.get(table) or self.read(table)
        return types

    def forget(self, table: Table) -> None:
        """Have `get` read the types again."""
        self._known.pop(table, None)

    def read(self, table: Table) -> ColumnTypes:
        """Return the types that are recorded. Raises Damaged."""
        path = types_path(table)
        return ColumnTypes.parse(self._stores[0].read(path), f"{self._location}/{path}")

    def rewrite(self, table: Table, needed: Mapping[str, DecimalType] = NO_TYPES) -> int:
        """Give all objects of a table the same columns and types, which hold values of the types
        `needed`. Return how many were rewritten.

        The types are recorded first, so that other writers' new objects have them, too. Damaged
        objects stay as they are.
        """
        types = self._record(table, lambda recorded: recorded.widened(needed))
        rewritten = 0
        for store in self._stores:  # objects are moved from the first to the second
            for key in [key for key, _ in store.list(table.name)]:
                try:
                    partition = Partition.from_stored_key(key)
                    rewritten += self._rewrite_object(store, table, partition, types)
                except _BeginAgainError as error:
                    return rewritten + self.rewrite(table, error.needed)
                except (Damaged, BadInput):
                    continue
        self._record(table, lambda recorded: recorded.rewritten(types.written))
        return rewritten

    def _rewrite_object(
        self, store: ObjectStore, table: Table, partition: Partition, types: ColumnTypes
    ) -> bool:
        """Write an object again unless it has the table's columns and these types; return whether
        it was written. Raises Damaged.

        Raises _BeginAgainError where another writer has changed the types, who may have rewritten
        this object before, and where an object of an earlier release does not fit.
        """
        path, columns = table.path(partition), table.stored_columns
        recorded = {types_path(table): types.content} if store is self._stores[0] else {}
        expected = types.of(columns)
        names = [column.name for column in columns]
        while (found := store.read_stamped(path)) and not has_columns(
            found.content, names, expected
        ):
            content = found.content
            if not self._is_proven(table, partition, found):
                return False
            bars = decode(content, table, name=path, with_provenance=table.layer == "raw")
            arranged = to_arrow(bars, types.written)
            if (needed := decimal_types(arranged.schema)) != expected:
                raise _BeginAgainError(needed)
            revision = (intact_revision(content) or 0) + 1
            new = encode(arranged, table.identity(partition), revision)
            stamp = store.write_while({path: content, **recorded}, path, new)
            if self.read(table) != types:
                raise _BeginAgainError
            if stamp:
                if not any(place.find(path) for place in self._stores[: self._stores.index(store)]):
                    written = StoredContent(new, stamp)
                    self._on_rewritten(table, partition, revision, written)
                return True
        return False

    def _record(self, table: Table, change: Callable[[ColumnTypes], ColumnTypes]) -> ColumnTypes:
        """Replace the types of a table by others, which other writers may do at the same time."""
        path = types_path(table)
        self.forget(table)
        while True:
            types = self.read(table)
            changed = change(types)
            if changed == types:
                return types
            content = changed.to_json()
            if self._stores[0].write_while({path: types.content}, path, content):
                return changed._replace(content=content)

"""The types of a table's decimals: every object of a table has the same ones, so that any reader of
any of its objects, in any order, is exact.

They stand beside the table in the lake. A value that needs more digits widens its column: the new
type is recorded, then every object is rewritten, and only then the value is written. A reader of
old and new objects at once therefore never meets a value that the old type would cut.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from marketdata_assets.errors import Damaged
from marketdata_assets.model.bar import DECIMAL, SCALE, Column


class DecimalType(NamedTuple):
    """A decimal of Parquet: its digits, and those of them behind the point."""

    precision: int
    scale: int


NARROW, WIDE = DecimalType(18, 8), DecimalType(38, SCALE)
DECIMAL_TYPES = (NARROW, DecimalType(38, 8), WIDE)
"""From the narrowest to the widest. 18 digits take 64 bits, which are stored in half the bytes."""
_TYPE_OF = {(kind.precision, kind.scale): kind for kind in DECIMAL_TYPES}
_ALWAYS_WIDE = ("vwap",)
"""Quotients, which have digits without end."""


NO_TYPES: Mapping[str, DecimalType] = {}


class ColumnTypes(NamedTuple):
    """The types of a table's decimals, where they are not `first_type`.

    New objects have the types `written`. Every object has at least the types `everywhere`, which
    fall behind `written` while objects are rewritten. `content` is that of the file they stand in;
    None without one.
    """

    written: Mapping[str, DecimalType] = NO_TYPES
    everywhere: Mapping[str, DecimalType] = NO_TYPES
    content: bytes | None = None

    @classmethod
    def parse(cls, content: bytes | None, path: str) -> ColumnTypes:
        """Return the types of a file; the narrowest where there is none. Raises Damaged."""
        if content is None:
            return cls()
        try:
            parts = json.loads(content)
            written, everywhere = (
                {name: _TYPE_OF[tuple(kind)] for name, kind in parts[part].items()}
                for part in ("written", "everywhere")
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            raise Damaged(f"{path} is damaged; remove it, then run `marketdata rewrite`") from None
        return cls(written, everywhere, content)

    def of(self, columns: Sequence[Column]) -> dict[str, DecimalType]:
        """Return the types of the decimals among these columns in new objects."""
        names = [column.name for column in columns if column.dtype == DECIMAL]
        return {name: type_of(name, self.written) for name in names}

    def hold_everywhere(self, needed: Mapping[str, DecimalType]) -> bool:
        """Return whether values of these types may be written now."""
        return all(type_of(name, self.everywhere) >= kind for name, kind in needed.items())

    def widened(self, needed: Mapping[str, DecimalType]) -> ColumnTypes:
        """Return the types where new objects hold values of these types, too."""
        return self._replace(written=_widest(self.written, needed))

    def rewritten(self, types: Mapping[str, DecimalType]) -> ColumnTypes:
        """Return the types where every object has at least these ones."""
        return self._replace(everywhere=_widest(self.everywhere, types))

    def to_json(self) -> bytes:
        """Return the content of the file that says this."""
        parts = {"written": self.written, "everywhere": self.everywhere}
        return json.dumps(parts, indent=2).encode()


def first_type(name: str) -> DecimalType:
    """Return the type of a column that was never widened."""
    return WIDE if name in _ALWAYS_WIDE else NARROW


def type_of(name: str, types: Mapping[str, DecimalType]) -> DecimalType:
    """Return a column's type among the types of a table."""
    return types.get(name, first_type(name))


def _widest(*types: Mapping[str, DecimalType]) -> dict[str, DecimalType]:
    names = sorted({name for each in types for name in each})
    widest = {name: max(type_of(name, each) for each in types) for name in names}
    return {name: kind for name, kind in widest.items() if kind != first_type(name)}

"""Columns of whole numbers and decimals as numpy arrays of 64 bits, without a copy where possible.

A decimal of Polars is a whole number of 128 bits at its column's scale.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import polars as pl

from marketdata_assets.model.bar import DECIMAL, SCALE

_TOO_LARGE = 10**38

Array = Any


class Int128(NamedTuple):
    """Whole numbers: high * 2**64 + low. `high` is None where it is zero throughout."""

    low: Array
    high: Array | None = None


def read_int128(column: pl.Series) -> Int128:
    """Return the numbers of a column of decimals or of Int64; a null may be any number."""
    if column.dtype != DECIMAL:
        return Int128(column.to_numpy().view(np.uint64))
    array = column.rechunk().to_arrow()
    halves = np.frombuffer(array.buffers()[1], np.uint64).reshape(-1, 2)[
        array.offset : array.offset + len(array)
    ]
    high = halves[:, 1]
    return Int128(
        np.ascontiguousarray(halves[:, 0]), np.ascontiguousarray(high) if high.any() else None
    )


def to_decimals(numbers: Int128) -> pl.Series:
    """Return the numbers as model.bar.DECIMAL. Raises OverflowError for more than 38 digits."""
    import pyarrow as pa

    halves = np.zeros((numbers.low.size, 2), np.uint64)
    halves[:, 0] = numbers.low
    if numbers.high is not None:
        halves[:, 1] = numbers.high
        if numbers.high.size and int(np.abs(numbers.high.view(np.int64)).max()) >= _TOO_LARGE >> 64:
            raise OverflowError("a sum has more than 38 digits")
    return pl.Series(
        pa.Decimal128Array.from_buffers(
            pa.decimal128(38, SCALE), numbers.low.size, [None, pa.py_buffer(halves)]
        )
    )

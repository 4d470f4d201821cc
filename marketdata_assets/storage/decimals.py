"""Decimals as the lake stores them: at one of a few types, digit for digit."""

from __future__ import annotations

import numpy as np
import polars as pl
import pyarrow as pa

from marketdata_assets.model.bar import DECIMAL, SCALE
from marketdata_assets.model.int128 import Array, Int128, read_int128
from marketdata_assets.storage.column_types import DECIMAL_TYPES, NARROW, WIDE, DecimalType


def store_decimals(column: pl.Series, at_least: DecimalType) -> pa.Array:
    """Return a column of model.bar.DECIMAL at the first of DECIMAL_TYPES, from `at_least` on, that
    holds all its digits.
    """
    for wanted in DECIMAL_TYPES[DECIMAL_TYPES.index(at_least) :]:
        stored = _narrowed(column) if wanted == NARROW else _cut(column, wanted)
        if stored is not None:
            return stored
    raise AssertionError(f"{WIDE} holds every {DECIMAL}")


def _cut(column: pl.Series, wanted: DecimalType) -> pa.Array | None:
    """Return the column at a smaller scale; None where a digit would be lost."""
    cut = column.cast(pl.Decimal(*wanted), strict=False)
    is_exact = wanted.scale == SCALE or cut.cast(DECIMAL, strict=False).equals(column)
    return cut.rechunk().to_arrow() if is_exact else None


def _narrowed(column: pl.Series) -> pa.Array | None:
    """Return the column in 64 bits; None where a value has more digits."""
    nulls = column.null_count()
    values = _divide(read_int128(column.fill_null(0) if nulls else column), SCALE - NARROW.scale)
    if values is None:
        return None
    bits = np.packbits(column.is_not_null().to_numpy(), bitorder="little") if nulls else None
    buffers = [None if bits is None else pa.py_buffer(bits), pa.py_buffer(values)]
    return pa.Array.from_buffers(pa.decimal64(*NARROW), len(column), buffers)


def _divide(numbers: Int128, zeros: int) -> Array | None:
    """Return the numbers divided by 10**zeros as signed 64 bits; None where one leaves a remainder
    or a quotient of more digits than NARROW has.

    A quotient without remainder is a shift by the factor 2**zeros and a product with the inverse of
    5**zeros modulo 2**64. The product with 10**zeros proves it: exactly modulo 2**64, and in
    floats, which err by far less than 2**63.
    """
    divisor, inverse = np.uint64(10**zeros), np.uint64(pow(5**zeros, -1, 2**64))
    low, high = numbers
    shifted = low >> np.uint64(zeros)
    if high is not None:
        shifted |= high << np.uint64(64 - zeros)
    with np.errstate(over="ignore"):
        quotients = (shifted * inverse).view(np.int64)
        is_exact = np.array_equal(quotients.view(np.uint64) * divisor, low)
    if not is_exact or np.abs(quotients).max(initial=0) >= 10**NARROW.precision:
        return None
    wanted = low.astype(np.float64)
    if high is not None:
        wanted += high.view(np.int64).astype(np.float64) * 2.0**64
    apart = np.abs(quotients * float(10**zeros) - wanted).max(initial=0.0)
    return quotients if apart < 2.0**63 else None

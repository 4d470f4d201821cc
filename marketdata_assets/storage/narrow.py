"""Decimals of 128 bits as the narrowest decimals of 64 bits that hold them, in one pass."""

from __future__ import annotations

import math

import numpy as np
import polars as pl
import pyarrow as pa

from marketdata_assets.model.bar import SCALE
from marketdata_assets.model.int128 import Array, Int128, read_int128

DIGITS = 18
"""The digits that every decimal of 64 bits can have."""
_SAMPLES = 32


def narrow_decimals(column: pl.Series) -> pa.Array:
    """Return a column of model.bar.DECIMAL at the smallest scale that holds all its digits, in
    DIGITS digits; unchanged where these do not suffice.

    A sample of the values suggests the scale, and all of them prove it. A column that is too wide
    keeps its scale, because DuckDB's union of objects takes 38 digits from a wide column and would
    cut decimals of the others.
    """
    nulls = column.null_count()
    numbers = read_int128(column.fill_null(0) if nulls else column)
    for scale in range(_sampled_scale(numbers), SCALE + 1):
        values = _divide(numbers, SCALE - scale)
        if values is not None:
            is_valid = column.is_not_null().to_numpy() if nulls else None
            bits = None if is_valid is None else np.packbits(is_valid, bitorder="little")
            buffers = [None if bits is None else pa.py_buffer(bits), pa.py_buffer(values)]
            return pa.Array.from_buffers(pa.decimal64(DIGITS, scale), len(column), buffers)
    return column.rechunk().to_arrow()


def _sampled_scale(numbers: Int128) -> int:
    """Return the smallest scale that holds the digits of some of the numbers."""
    step = max(1, numbers.low.size // _SAMPLES)
    sample = [int(low) for low in numbers.low[::step]]
    if numbers.high is not None:
        high = numbers.high.view(np.int64)[::step]
        sample = [low + (int(high) << 64) for low, high in zip(sample, high, strict=True)]
    divisor = math.gcd(*sample)
    return next(scale for scale in range(SCALE + 1) if divisor % 10 ** (SCALE - scale) == 0)


def _divide(numbers: Int128, zeros: int) -> Array | None:
    """Return the numbers divided by 10**zeros as signed 64 bits; None where one leaves a remainder
    or a quotient of more than DIGITS digits.

    A quotient without remainder is a shift by the factor 2**zeros and a product with the inverse of
    5**zeros modulo 2**64. The product with 10**zeros proves it: exactly modulo 2**64, and in
    floats, which err by far less than 2**63.
    """
    divisor, inverse = np.uint64(10**zeros), np.uint64(pow(5**zeros, -1, 2**64))
    low, high = numbers
    shifted = low >> np.uint64(zeros)
    if high is not None and zeros:
        shifted |= high << np.uint64(64 - zeros)
    with np.errstate(over="ignore"):
        quotients = (shifted * inverse).view(np.int64)
        is_exact = np.array_equal(quotients.view(np.uint64) * divisor, low)
    if not is_exact or np.abs(quotients).max(initial=0) >= 10**DIGITS:
        return None
    wanted = low.astype(np.float64)
    if high is not None:
        wanted += high.view(np.int64).astype(np.float64) * 2.0**64
    apart = np.abs(quotients * float(10**zeros) - wanted).max(initial=0.0)
    return quotients if apart < 2.0**63 else None

"""The fingerprint of rows: a digest of their values, whatever file or engine stores them."""

from __future__ import annotations

import hashlib

import polars as pl


def fingerprint(frame: pl.DataFrame) -> str:
    """Return the SHA-256 of the rows in their order, as hexadecimal digits: equal for equal rows in
    equal columns and types, and for nothing else.

    It covers, column by column, name and type, which rows are null (a byte each), and the values:
    whole numbers in their own width, times as microseconds since 1970, decimals as 128 bits at
    their scale, all little-endian; texts as their lengths, then UTF-8. A null counts as zero or as
    the empty text.
    """
    digest = hashlib.sha256(f"{frame.height}\n".encode())
    no_nulls = bytes(frame.height)
    for column in frame:
        digest.update(f"{column.name} {column.dtype}\n".encode())
        if column.null_count():
            digest.update(column.is_null().cast(pl.UInt8).to_numpy().tobytes())
            values = column if column.dtype.is_decimal() else column.to_physical()
            column = values.fill_null("" if column.dtype == pl.String else 0)
        else:
            digest.update(no_nulls)
        if column.dtype == pl.String:
            digest.update(column.str.len_bytes().cast(pl.UInt32).to_numpy().tobytes())
            digest.update("".join(column).encode())
        else:
            digest.update(_value_bytes(column))
    return digest.hexdigest()


def _value_bytes(column: pl.Series) -> memoryview:
    array = column.rechunk().to_arrow()
    width = array.type.bit_width // 8
    start, end = array.offset * width, (array.offset + len(array)) * width
    return memoryview(array.buffers()[1])[start:end]

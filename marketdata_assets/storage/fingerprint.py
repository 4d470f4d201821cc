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
    for column in frame:
        digest.update(f"{column.name} {column.dtype}\n".encode())
        digest.update(column.is_null().cast(pl.UInt8).to_numpy().tobytes())
        if column.dtype == pl.String:
            text = column.fill_null("")
            digest.update(text.str.len_bytes().cast(pl.UInt32).to_numpy().tobytes())
            digest.update("".join(text).encode())
        else:
            digest.update(_value_bytes(column))
    return digest.hexdigest()


def _value_bytes(column: pl.Series) -> memoryview:
    values = column if column.dtype.is_decimal() else column.to_physical()
    array = values.fill_null(0).rechunk().to_arrow()
    width = array.type.bit_width // 8
    start, end = array.offset * width, (array.offset + len(array)) * width
    return memoryview(array.buffers()[1])[start:end]

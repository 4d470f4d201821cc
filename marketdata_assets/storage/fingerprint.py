"""The fingerprint of rows: what they say, whatever file or engine they lie in."""

from __future__ import annotations

import hashlib

import polars as pl


def fingerprint(frame: pl.DataFrame) -> str:
    """SHA-256 over the rows in their order: equal for equal rows in equal columns and types, and for
    nothing else.

    Of each column it takes name and type, which rows are null (a byte each), and the values: whole
    numbers in their own width, times as microseconds since 1970, decimals as 128 bits at their
    scale, all little-endian; texts as UTF-8 with their lengths before them. A null counts as zero
    or as the empty text.
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
            digest.update(_numbers(column))
    return digest.hexdigest()


def _numbers(column: pl.Series) -> memoryview:
    array = (
        column.to_physical().fill_null(0).rechunk().to_arrow()
        if not column.dtype.is_decimal()
        else column.fill_null(0).rechunk().to_arrow()
    )
    width = array.type.bit_width // 8
    return memoryview(array.buffers()[1])[
        array.offset * width : (array.offset + len(array)) * width
    ]

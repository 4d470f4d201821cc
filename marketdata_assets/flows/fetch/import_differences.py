"""The values in which imported files differ from the stored bars and from each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from itertools import groupby
from typing import Any, NamedTuple

import polars as pl

from marketdata_assets.model.bar import NAMES, decimal_text
from marketdata_assets.model.market import Market
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import iso


class ValueDifference(NamedTuple):
    """One value that differs: in `of` (`stored`, or the name of a file) and in the file `other`."""

    market: str
    timeframe: str
    open_time: str
    column: str
    value: str
    of: str
    other_value: str
    other: str


def with_stored(
    market: Market, timeframe: Timeframe, different: pl.DataFrame, *, sources: Sequence[str]
) -> Iterator[ValueDifference]:
    """Yield how the bars of files differ from stored ones.

    `different` holds both (quality.agreement.StoredComparison.different).
    """
    for row in _as_text(different).iter_rows(named=True):
        stored = {name: row[name + "_stored"] for name in NAMES[1:]}
        values = _differing_values(stored, row)
        for column, value, other in values:
            yield ValueDifference(
                market.key,
                timeframe.name,
                _open_time(row),
                column=column,
                value=value,
                of="stored",
                other_value=other,
                other=sources[row["answer"]],
            )


def between_files(
    market: Market, timeframe: Timeframe, disputed: pl.DataFrame, *, sources: Sequence[str]
) -> Iterator[ValueDifference]:
    """Yield how the bars of one file differ from those of others."""
    rows = _as_text(disputed.sort("open_time", "answer")).iter_rows(named=True)
    for _, variants in groupby(rows, key=lambda row: row["open_time"]):
        first, *others = variants
        for other in others:
            for column, value, other_value in _differing_values(first, other):
                yield ValueDifference(
                    market.key,
                    timeframe.name,
                    _open_time(first),
                    column=column,
                    value=value,
                    of=sources[first["answer"]],
                    other_value=other_value,
                    other=sources[other["answer"]],
                )


def _differing_values(
    one: Mapping[str, Any], other: Mapping[str, Any]
) -> Iterator[tuple[str, str, str]]:
    """Yield column and both values; a value that one does not give is no difference."""
    for column in NAMES[1:]:
        values = one[column], other[column]
        if None not in values and values[0] != values[1]:
            yield column, *values


def _open_time(row: Mapping[str, Any]) -> str:
    moment: datetime = row["open_time"]
    return iso(moment)


def _as_text(bars: pl.DataFrame) -> pl.DataFrame:
    """Return the bars with numbers as their exact digits."""
    decimals = [name for name, dtype in bars.schema.items() if isinstance(dtype, pl.Decimal)]
    counts = [name for name in bars.columns if name.startswith("trades")]
    texts = (decimal_text(name) for name in decimals)
    return bars.with_columns(*texts, pl.col(counts).cast(pl.String))

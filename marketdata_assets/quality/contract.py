"""The contract of a frame of bars, as a pandera schema that is made from the table of columns."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import polars as pl

from marketdata_assets.model.bar import COLUMNS, PRICES, SCHEMA

if TYPE_CHECKING:
    import pandera.polars as pa


def check_bars(bars: pl.DataFrame) -> pl.DataFrame:
    """Return the frame unchanged, or raise pandera's SchemaErrors.

    Checked are columns, types, nulls, positive prices, amounts that are not negative, and ascending
    open times. One pass decides; pandera, which costs seconds to import and milliseconds a frame,
    only describes what is wrong.
    """
    return bars if _is_valid(bars) else bar_schema().validate(bars, lazy=True)


def _is_valid(bars: pl.DataFrame) -> bool:
    if list(bars.schema.items()) != list(SCHEMA.items()):
        return False
    given = [pl.col(column.name).null_count() == 0 for column in COLUMNS if not column.optional]
    prices = [(pl.col(name) > 0).all() for name in PRICES]
    amounts = [(pl.col(c.name) >= 0).all() for c in COLUMNS if c.name not in ("open_time", *PRICES)]
    ascends = (pl.col("open_time").diff() > pl.duration()).all()
    return bool(bars.select(pl.all_horizontal(*given, *prices, *amounts, ascends)).item())


@lru_cache(maxsize=1)
def bar_schema() -> pa.DataFrameSchema:
    """Return the schema that every stored frame of bars keeps."""
    import pandera.polars as pa

    def checks(name: str) -> list[pa.Check]:
        if name == "open_time":
            return []
        return [pa.Check.gt(0) if name in PRICES else pa.Check.ge(0)]

    columns = {
        column.name: pa.Column(
            column.dtype,
            nullable=column.optional,
            checks=checks(column.name),
            description=column.meaning,
        )
        for column in COLUMNS
    }
    ascends = pa.Check(_ascends, name="ascending", error="open_time ascends without duplicates")
    return pa.DataFrameSchema(columns, checks=[ascends], strict=True, ordered=True, name="bars")


def _ascends(data: pa.PolarsData) -> pl.LazyFrame:
    step = pl.col("open_time").diff()
    return data.lazyframe.select((step.is_null() | (step > pl.duration())).alias("ascending"))

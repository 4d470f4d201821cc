"""The contract of a bar frame, as a pandera schema made from the table of columns."""

from __future__ import annotations

import pandera.polars as pa
import polars as pl

from marketdata_assets.model.bar import COLUMNS, PRICES


def _ascending(data: pa.PolarsData) -> pl.LazyFrame:
    step = pl.col("open_time").diff()
    return data.lazyframe.select((step.is_null() | (step > pl.duration())).alias("ascending"))


BARS = pa.DataFrameSchema(
    {
        column.name: pa.Column(
            column.dtype,
            nullable=column.optional,
            checks=[pa.Check.gt(0)] if column.name in PRICES else [pa.Check.ge(0)] if column.name != "open_time" else [],
            description=column.meaning,
        )
        for column in COLUMNS
    },
    checks=[pa.Check(_ascending, name="ascending", error="open_time ascends without duplicates")],
    strict=True,
    ordered=True,
    name="bars",
)


def check_bars(bars: pl.DataFrame) -> pl.DataFrame:
    """The same frame, or pandera's SchemaErrors: columns, types, nulls, positive prices, ascending open_time."""
    return BARS.validate(bars, lazy=True)

"""The contract of a bar frame, as a pandera schema made from the table of columns."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import polars as pl

from marketdata_assets.model.bar import BAR_COLUMNS, BAR_SCHEMA, PRICES

if TYPE_CHECKING:
    import pandera.polars as pa


def check_bars(bars: pl.DataFrame) -> pl.DataFrame:
    """The same frame, or pandera's SchemaErrors: columns, types, nulls, positive prices, ascending
    open_time.

    Whether it keeps the contract takes one pass; pandera, which costs seconds to import and
    milliseconds a frame, is asked what is wrong where it does not.
    """
    return bars if _keeps(bars) else contract().validate(bars, lazy=True)


def _keeps(bars: pl.DataFrame) -> bool:
    if list(bars.schema.items()) != list(BAR_SCHEMA.items()):
        return False
    whole = [pl.col(column.name).null_count() == 0 for column in BAR_COLUMNS if not column.optional]
    prices = [(pl.col(name) > 0).all() for name in PRICES]
    amounts = [
        (pl.col(c.name) >= 0).all() for c in BAR_COLUMNS if c.name not in ("open_time", *PRICES)
    ]
    return bool(
        bars.select(
            pl.all_horizontal(
                *whole, *prices, *amounts, (pl.col("open_time").diff() > pl.duration()).all()
            )
        ).item()
    )


@lru_cache(maxsize=1)
def contract() -> pa.DataFrameSchema:
    """The schema: what every stored frame of bars keeps."""
    import pandera.polars as pa

    columns = {
        column.name: pa.Column(
            column.dtype,
            nullable=column.optional,
            checks=[pa.Check.gt(0)]
            if column.name in PRICES
            else [pa.Check.ge(0)]
            if column.name != "open_time"
            else [],
            description=column.meaning,
        )
        for column in BAR_COLUMNS
    }
    ascends = pa.Check(_ascending, name="ascending", error="open_time ascends without duplicates")
    return pa.DataFrameSchema(columns, checks=[ascends], strict=True, ordered=True, name="bars")


def _ascending(data: pa.PolarsData) -> pl.LazyFrame:
    step = pl.col("open_time").diff()
    return data.lazyframe.select((step.is_null() | (step > pl.duration())).alias("ascending"))

"""The registry of tables: one name is the asset key, the folder, the DuckDB table and the view."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import quote, unquote

import polars as pl

from marketdata_assets.model.bar import (
    COLUMNS,
    CONSOLIDATED_COLUMNS,
    HISTORY_COLUMNS,
    PARITY_COLUMNS,
    RECONCILED_COLUMNS,
    ROLLUP_COLUMNS,
    Column,
)
from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.timeframe import Timeframe

OBJECT = "data.parquet"
"""The name of every object; its folders say which it is."""

LAYERS: dict[str, tuple[Column, ...]] = {
    "raw": COLUMNS,
    "rollup": ROLLUP_COLUMNS,
    "history": HISTORY_COLUMNS,
    "parity": PARITY_COLUMNS,
    "consolidated": CONSOLIDATED_COLUMNS,
    "reconciled": RECONCILED_COLUMNS,
}
"""The columns of each layer's tables."""


@dataclass(frozen=True, slots=True)
class Table:
    """`raw` tables hold what a venue sent, `rollup` tables what was made of it, `history` tables raw
    bars that were replaced, `parity` tables what came of rolled-up bars beside the venue's own.

    `consolidated` tables hold one series of several venues' raw bars, `reconciled` tables how far
    these lie apart.
    """

    layer: str
    timeframe: Timeframe

    @property
    def key(self) -> tuple[str, str]:
        """Dagster's asset key: `raw`, `ohlcv_1m`; in DuckDB the schema and the table."""
        return self.layer, f"ohlcv_{self.timeframe.name}"

    @property
    def name(self) -> str:
        """`raw/ohlcv_1m`"""
        return "/".join(self.key)

    @property
    def columns(self) -> tuple[Column, ...]:
        """Its columns, in order."""
        return LAYERS[self.layer]

    @property
    def schema(self) -> dict[str, pl.DataType]:
        """The type of each column, in order."""
        return {column.name: column.dtype for column in self.columns}

    @property
    def typed(self) -> list[pl.Expr]:
        """Its columns out of any frame that has them: bound by name, in order, in the table's
        types.
        """
        return [pl.col(name).cast(dtype) for name, dtype in self.schema.items()]

    def path(self, partition: Partition) -> str:
        """The object of one partition, in Hive folders that DuckDB, Polars and pandas read unaided."""
        return f"{self.name}/{folder(partition.market)}/month={partition.month_key[:7]}/{OBJECT}"


def raw(timeframe: Timeframe) -> Table:
    """The table of a fetched timeframe."""
    return Table("raw", timeframe)


def rollup(timeframe: Timeframe) -> Table:
    """The table of a rolled-up timeframe."""
    return Table("rollup", timeframe)


def history(timeframe: Timeframe) -> Table:
    """The table of the bars that corrections replaced."""
    return Table("history", timeframe)


def parity(timeframe: Timeframe) -> Table:
    """The table of what came of a rolled-up timeframe beside the venue's own bars."""
    return Table("parity", timeframe)


def consolidated(timeframe: Timeframe) -> Table:
    """The table of the bars of several venues as one series."""
    return Table("consolidated", timeframe)


def reconciled(timeframe: Timeframe) -> Table:
    """The table of the differences between these venues."""
    return Table("reconciled", timeframe)


def folder(market: Market) -> str:
    """A market as a Hive folder: percent-escaped, so that S3, Windows and every reader take it (`%3A`
    for `:`).
    """
    return "market=" + quote(market.key, safe="")


def keys_of(market_folder: str, month_folder: str) -> tuple[str, str]:
    """The market key and the month key of two Hive folders: the inverse of `Table.path`."""
    return _value(market_folder), month_folder.partition("=")[2] + "-01"


@lru_cache(maxsize=4096)
def _value(folder: str) -> str:
    return unquote(folder.partition("=")[2])

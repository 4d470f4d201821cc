"""The registry of tables: one name is the asset key, the folder, the DuckDB table and the view."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import quote, unquote

import polars as pl

from marketdata_assets.model.bar import (
    BAR_COLUMNS,
    CONSOLIDATED_COLUMNS,
    HISTORY_COLUMNS,
    PARITY_COLUMNS,
    PROVENANCE_COLUMNS,
    RECONCILED_COLUMNS,
    ROLLUP_COLUMNS,
    Column,
)
from marketdata_assets.model.partition import Partition, PartitionKey
from marketdata_assets.model.timeframe import TIMEFRAMES, Timeframe

OBJECT_NAME = "data.parquet"
"""The file name of every object of the lake; its folders name table, market and month."""

LAYER_COLUMNS: dict[str, tuple[Column, ...]] = {
    "raw": BAR_COLUMNS,
    "rollup": ROLLUP_COLUMNS,
    "history": HISTORY_COLUMNS,
    "parity": PARITY_COLUMNS,
    "consolidated": CONSOLIDATED_COLUMNS,
    "reconciled": RECONCILED_COLUMNS,
}
"""The columns of each layer's tables."""


class StoredObject(NamedTuple):
    """One stored object: its size in bytes, and the fingerprint of its rows without provenance."""

    bytes: int
    digest: str


class ObjectRecord(NamedTuple):
    """What was stored last of one object.

    `revision` counts the objects of its partition, `checksum` is the SHA-256 of its bytes, and
    `stamp` a text that changes when something replaces it.
    """

    revision: int
    checksum: str
    stamp: str


@dataclass(frozen=True, slots=True)
class Table:
    """One layer at one timeframe.

    `raw` holds the bars that a venue sent, `rollup` the bars that we made of them, `history` the
    raw bars that a correction replaced, and `parity` the comparison of rolled-up bars with the
    venue's own. `consolidated` holds one series made of several venues' raw bars, and `reconciled`
    the differences between these venues.
    """

    layer: str
    timeframe: Timeframe

    @property
    def key(self) -> tuple[str, str]:
        """Dagster's asset key, `("raw", "ohlcv_1m")`; in DuckDB the schema and the table."""
        return self.layer, f"ohlcv_{self.timeframe.label}"

    @property
    def name(self) -> str:
        """The key as a path: `raw/ohlcv_1m`."""
        return "/".join(self.key)

    @property
    def columns(self) -> tuple[Column, ...]:
        """Its columns, in order."""
        return LAYER_COLUMNS[self.layer]

    @property
    def stored_columns(self) -> tuple[Column, ...]:
        """The columns of its objects, in order."""
        return self.columns + PROVENANCE_COLUMNS * (self.layer == "raw")

    @property
    def schema(self) -> dict[str, pl.DataType]:
        """The type of each column, in order."""
        return {column.name: column.dtype for column in self.columns}

    @property
    def typed_columns(self) -> list[pl.Expr]:
        """Expressions that select its columns from any frame: by name, in order, cast to the
        table's types.
        """
        return [pl.col(name).cast(dtype) for name, dtype in self.schema.items()]

    def identity(self, partition: Partition) -> str:
        """What the object of a partition calls itself, wherever it lies."""
        return f"{self.name} {partition.market.key} {partition.month_key[:7]}"

    def path(self, partition: Partition) -> str:
        """The object of a partition, in Hive folders that DuckDB, Polars and pandas understand."""
        month = partition.month_key[:7]
        return f"{self.name}/{market_folder(partition.market.key)}/month={month}/{OBJECT_NAME}"


def every_table() -> list[Table]:
    """Return each layer at each timeframe, whether a universe has it or not."""
    return [Table(layer, timeframe) for layer in LAYER_COLUMNS for timeframe in TIMEFRAMES.values()]


def raw_table(timeframe: Timeframe) -> Table:
    """Return the table of a fetched timeframe."""
    return Table("raw", timeframe)


def rollup_table(timeframe: Timeframe) -> Table:
    """Return the table of a rolled-up timeframe."""
    return Table("rollup", timeframe)


def history_table(timeframe: Timeframe) -> Table:
    """Return the table of the raw bars that corrections replaced."""
    return Table("history", timeframe)


def parity_table(timeframe: Timeframe) -> Table:
    """Return the table that compares a rolled-up timeframe with the venue's own bars."""
    return Table("parity", timeframe)


def consolidated_table(timeframe: Timeframe) -> Table:
    """Return the table that holds one series made of several venues' bars."""
    return Table("consolidated", timeframe)


def reconciled_table(timeframe: Timeframe) -> Table:
    """Return the table of the differences between these venues."""
    return Table("reconciled", timeframe)


def market_folder(market_key: str) -> str:
    """Return the Hive folder of a market's key, percent-escaped (`%3A` for `:`), because S3,
    Windows and every reader accept that.
    """
    return "market=" + quote(market_key, safe="")


def parse_folders(market_folder: str, month_folder: str) -> PartitionKey:
    """Return the market key and the month key of two Hive folders: the inverse of `Table.path`."""
    return _unescape(market_folder), month_folder.partition("=")[2] + "-01"


@lru_cache(maxsize=4096)
def _unescape(folder: str) -> str:
    return unquote(folder.partition("=")[2])

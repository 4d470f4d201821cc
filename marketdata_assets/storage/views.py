"""Views for SQL users: a DuckDB connection in memory that sees the lake's tables, on disk or in S3,
and the warehouse's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import polars as pl

from marketdata_assets.errors import BadInput
from marketdata_assets.model.table import Table
from marketdata_assets.storage.objects import endpoint, region
from marketdata_assets.storage.warehouse import Warehouse, sql_type

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

    Connection = DuckDBPyConnection


@contextmanager
def open_views(
    files: Mapping[Table, Sequence[str]], warehouse: Warehouse | None
) -> Iterator[Connection]:
    """A view for each table over its files, `market` first, in the table's own types; the warehouse's
    tables beside them.
    """
    import duckdb

    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        if any(uri.startswith("s3://") for uris in files.values() for uri in uris):
            connection.register_filesystem(_s3())
        for table, uris in files.items():
            _view(connection, table, uris)
        if warehouse is None:
            yield connection
            return
        with warehouse.attached(connection, "warehouse"):
            for schema, name in _tables(connection):
                connection.execute(f'CREATE SCHEMA IF NOT EXISTS "{schema}"')
                connection.execute(
                    f'CREATE VIEW "{schema}"."{name}" AS SELECT * FROM warehouse."{schema}"."{name}"'
                )
            yield connection


def answer(connection: Connection, query: str) -> pl.DataFrame:
    """What a query finds. Raises BadInput with DuckDB's own words."""
    import duckdb

    try:
        return pl.DataFrame(connection.sql(query).to_arrow_table())
    except duckdb.Error as error:
        raise BadInput(f"the query cannot be answered: {str(error).splitlines()[0]}") from None


def _tables(connection: Connection) -> list[tuple[str, str]]:
    sql = "SELECT table_schema, table_name FROM information_schema.tables WHERE table_catalog = 'warehouse' ORDER BY ALL"
    found = connection.execute(sql)
    return [(schema, name) for schema, name in found.fetchall()]


def _view(connection: Connection, table: Table, uris: Sequence[str]) -> None:
    """Each object has the decimal scale that its digits need: `union_by_name` finds the widest, where
    DuckDB alone would round.
    """
    schema, name = table.key
    columns = ", ".join(f'"{c.name}"::{sql_type(c.dtype)} AS "{c.name}"' for c in table.columns)
    options = "hive_partitioning = true, hive_types = {'month': VARCHAR}, union_by_name = true"
    source = f"read_parquet([{', '.join(map(_quoted, uris))}], {options})"
    if not uris:
        empty = pl.DataFrame(schema={"market": pl.String, **table.schema})
        connection.register(f"{schema}_{name}_empty", empty.to_arrow())
        source = f"{schema}_{name}_empty"
    connection.execute(f'CREATE SCHEMA IF NOT EXISTS "{schema}"')
    connection.execute(f'CREATE VIEW "{schema}"."{name}" AS SELECT market, {columns} FROM {source}')


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _s3() -> Any:
    """S3 for DuckDB through Arrow's client: DuckDB's own needs a download."""
    import boto3
    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow.fs import S3FileSystem

    keys = boto3.Session().get_credentials()
    options: dict[str, Any] = {"region": region() or "us-east-1"}
    if keys is not None:
        frozen = keys.get_frozen_credentials()
        options |= {
            "access_key": frozen.access_key,
            "secret_key": frozen.secret_key,
            "session_token": frozen.token,
        }
    if where := endpoint():
        parts = urlsplit(where)
        options |= {"endpoint_override": parts.netloc, "scheme": parts.scheme}
    return ArrowFSWrapper(S3FileSystem(**options))

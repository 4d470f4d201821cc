"""Views for SQL users: a DuckDB connection in memory over the lake's objects, on disk or in S3, and
over the warehouse.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import polars as pl

from marketdata_assets.errors import BadInput
from marketdata_assets.model.table import Table
from marketdata_assets.network import ca_file, find_proxy
from marketdata_assets.storage.s3_client import get_endpoint_url, get_region
from marketdata_assets.storage.warehouse import Warehouse, duckdb_type, quoted_name

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

    Connection = DuckDBPyConnection


@contextmanager
def open_views(
    files: Mapping[Table, Sequence[str]], warehouse: Warehouse | None
) -> Iterator[Connection]:
    """Open a connection with one view for each table of `files` over its URIs, and one for each
    table of the warehouse. A view over files has `market` first, then the table's own types.
    """
    import duckdb

    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        if any(uri.startswith("s3://") for uris in files.values() for uri in uris):
            connection.register_filesystem(_s3_filesystem())
        for table, uris in files.items():
            _create_view(connection, table, uris)
        if warehouse is None:
            yield connection
            return
        with warehouse.attach(connection, "warehouse"):
            for schema, name in _list_warehouse_tables(connection):
                view = f'"{schema}"."{name}"'
                connection.execute(f'CREATE SCHEMA IF NOT EXISTS "{schema}"')
                connection.execute(f"CREATE VIEW {view} AS SELECT * FROM warehouse.{view}")
            yield connection


def run_query(connection: Connection, query: str) -> pl.DataFrame:
    """Return the rows of a query. Raises BadInput with the first line of DuckDB's message."""
    import duckdb

    try:
        return pl.DataFrame(connection.sql(query).to_arrow_table())
    except duckdb.Error as error:
        raise BadInput(f"the query cannot be answered: {str(error).splitlines()[0]}") from None


def _list_warehouse_tables(connection: Connection) -> list[tuple[str, str]]:
    rows = connection.execute(
        "SELECT table_schema, table_name FROM information_schema.tables "
        "WHERE table_catalog = 'warehouse' ORDER BY ALL"
    ).fetchall()
    return [(schema, name) for schema, name in rows]


def _create_view(connection: Connection, table: Table, uris: Sequence[str]) -> None:
    """Create the view of one table.

    Each object of an earlier release has the decimal scale of its digits. `union_by_name` makes
    DuckDB find the widest of them, where it would otherwise round to the first.
    """
    schema, name = table.key
    columns = ", ".join(f'"{c.name}"::{duckdb_type(c.dtype)} AS "{c.name}"' for c in table.columns)
    if uris:
        options = "hive_partitioning = true, hive_types = {'month': VARCHAR}, union_by_name = true"
        source = f"read_parquet([{', '.join(map(_quote, uris))}], {options})"
    else:
        source = f"{schema}_{name}_empty"
        empty = pl.DataFrame(schema={"market": pl.String, **table.schema})
        connection.register(source, empty.to_arrow())
    connection.execute(f'CREATE SCHEMA IF NOT EXISTS "{schema}"')
    connection.execute(
        f"CREATE VIEW {quoted_name(table)} AS SELECT market, {columns} FROM {source}"
    )


def _quote(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _s3_filesystem() -> Any:
    """Return S3 through Arrow's client, because DuckDB's own needs a download."""
    import boto3
    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow.fs import S3FileSystem

    credentials = boto3.Session().get_credentials()
    options: dict[str, Any] = {"region": get_region() or "us-east-1"}
    if credentials is not None:
        keys = credentials.get_frozen_credentials()
        options["access_key"] = keys.access_key
        options["secret_key"] = keys.secret_key
        options["session_token"] = keys.token
    if url := get_endpoint_url():
        parts = urlsplit(url)
        options |= {"endpoint_override": parts.netloc, "scheme": parts.scheme}
    proxy = find_proxy(url or f"https://s3.{options['region']}.amazonaws.com")
    tls_ca_file_path = ca_file("AWS_CA_BUNDLE")
    return ArrowFSWrapper(
        S3FileSystem(**options, proxy_options=proxy, tls_ca_file_path=tls_ca_file_path)
    )

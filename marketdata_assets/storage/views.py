"""Views for SQL users: a DuckDB connection in memory over the lake's objects, on disk or in S3, and
over the warehouse.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import polars as pl

from marketdata_assets.errors import BadInput
from marketdata_assets.model.table import Table
from marketdata_assets.storage.warehouse import Warehouse, duckdb_type, quoted_name

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

    Connection = DuckDBPyConnection


_EXPLAIN = re.compile(r"explain\s+(analyze\s+)?", re.IGNORECASE)
_PIVOT = re.compile(r"(pivot|unpivot|from|with|select)\b", re.IGNORECASE)


@contextmanager
def open_views(
    files: Mapping[Table, Sequence[str]], warehouse: Warehouse | None
) -> Iterator[Connection]:
    """Open a connection with one view for each table of `files` over its URIs, and one for each
    table of the warehouse. A view over files has `market` first, then the table's own types.
    """
    import duckdb

    with duckdb.connect() as connection, ExitStack() as attached:
        connection.execute("SET TimeZone = 'UTC'")
        if any(uri.startswith("s3://") for uris in files.values() for uri in uris):
            attached.enter_context(_s3_files(connection))
        for table, uris in files.items():
            _create_view(connection, table, uris)
        if warehouse is not None:
            attached.enter_context(warehouse.attach(connection, "warehouse"))
            for schema, name in _list_warehouse_tables(connection):
                view = f'"{schema}"."{name}"'
                connection.execute(f'CREATE SCHEMA IF NOT EXISTS "{schema}"')
                connection.execute(f"CREATE VIEW {view} AS SELECT * FROM warehouse.{view}")
        yield connection


@contextmanager
def _s3_files(connection: Connection) -> Iterator[None]:
    """Let DuckDB read S3 through our client. Raises StoreFailed where that is why a query fails."""
    import duckdb

    from marketdata_assets.storage.s3_files import S3Files

    files = S3Files()
    connection.register_filesystem(files)
    try:
        yield
    except (duckdb.Error, BadInput):
        if files.failure:
            raise files.failure from None
        raise


def restrict(connection: Connection, locations: Sequence[str]) -> None:
    """Let queries read no files but those below these locations, and change no setting."""
    folders = ", ".join(_quote(f"{location.rstrip('/')}/") for location in locations)
    connection.execute(f"SET allowed_directories = [{folders}]")
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")


def run_query(connection: Connection, query: str, *, unsafe: bool = False) -> pl.DataFrame:
    """Return the rows of a query. Raises BadInput with the first line of DuckDB's message, and
    unless `unsafe` for a statement that is no query.
    """
    import duckdb

    try:
        if not unsafe:
            _raise_unless_query(query)
        found = connection.sql(query)
        if found is None:
            raise BadInput("the query returns no rows; write one such as SELECT ...")
        rows = found.to_arrow_table()
    except duckdb.Error as error:
        raise BadInput(f"the query cannot be answered: {str(error).splitlines()[0]}") from None
    if twice := sorted({name for name in rows.column_names if rows.column_names.count(name) > 1}):
        raise BadInput(f"two columns are called {', '.join(twice)}; name one of them with AS")
    return pl.DataFrame(rows)


def _raise_unless_query(query: str) -> None:
    """Raise BadInput for statements that could write. A PIVOT is several statements to DuckDB."""
    import duckdb

    for statement in duckdb.extract_statements(query):
        text = _EXPLAIN.sub("", statement.query.strip())
        kinds = {part.type for part in duckdb.extract_statements(text)}
        is_pivot = kinds == {duckdb.StatementType.MULTI} and _PIVOT.match(text)
        if not is_pivot and kinds != {duckdb.StatementType.SELECT}:
            raise BadInput(
                f"{text.split(maxsplit=1)[0].upper()} is no query; `sql` only reads, unless "
                "--unsafe is given"
            )


def _list_warehouse_tables(connection: Connection) -> list[tuple[str, str]]:
    rows = connection.execute(
        "SELECT table_schema, table_name FROM information_schema.tables "
        "WHERE table_catalog = 'warehouse' AND table_schema = 'rollup' ORDER BY ALL"
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

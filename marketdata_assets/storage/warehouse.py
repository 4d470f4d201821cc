"""The DuckDB warehouse of rollups. One writer at a time: short transactions, and a patient wait for
the file.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import polars as pl

from marketdata_assets.errors import StoreFailed
from marketdata_assets.model.market import Market
from marketdata_assets.model.table import Table
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import Window

if TYPE_CHECKING:
    import duckdb

T = TypeVar("T")
Connect = Callable[[], AbstractContextManager["duckdb.DuckDBPyConnection"]]


class Warehouse:
    """Rollup tables `rollup.ohlcv_<timeframe>`, keyed by `market` and `open_time`, in one file."""

    def __init__(self, path: Path, connect: Connect | None = None, patience: float = 60.0) -> None:
        self.path = path
        self._connect = connect or self._open
        self._patience = patience

    @property
    def exists(self) -> bool:
        """Whether the file is there; it can always be rebuilt from the lake."""
        return self.path.exists()

    def replace(
        self,
        market: Market,
        frames: Mapping[Timeframe, pl.DataFrame],
        windows: Mapping[Timeframe, Window],
    ) -> dict[str, int]:
        """Make each table hold exactly these bars of a market inside each timeframe's window, in one
        transaction.

        Only rows that differ are touched. Returns how many rows each timeframe changed.
        """
        changed: dict[str, int] = {}
        with self._translated(), self._connect() as connection:
            try:
                connection.execute("BEGIN")
                for timeframe, frame in frames.items():
                    changed[timeframe.name] = _replace(
                        connection, market, timeframe, frame, windows[timeframe]
                    )
                connection.execute("COMMIT")
            except BaseException:
                connection.close()  # rolls back; who lent the connection may keep it open after an exception
                raise
        return changed

    def read(self, table: Table, market: Market, window: Window) -> pl.DataFrame:
        """The bars of a market that open inside the window, sorted; none where the table is not there
        yet.
        """
        if not self.exists:
            return pl.DataFrame(schema=table.schema)
        with self._translated(), self._open(read_only=True) as connection:
            return _select(connection, table, market, window)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the file open where it is there, so that many reads in a row cost a fourth each; nobody
        writes meanwhile.
        """
        with ExitStack() as stack:
            if self.exists:
                with self._translated():
                    stack.enter_context(self._open(read_only=True))
            yield

    def forget(self, table: Table, before: datetime, dry_run: bool = False) -> int:
        """Remove the bars of a table that open before a moment; how many there are."""
        schema, name = table.key
        if not self.exists:
            return 0
        with self._translated(), self._open(read_only=dry_run) as connection:
            if not _has(connection, table):
                return 0
            found = connection.execute(
                f'SELECT count(*) FROM "{schema}"."{name}" WHERE open_time < ?', [before]
            ).fetchall()
            if not dry_run:
                connection.execute(f'DELETE FROM "{schema}"."{name}" WHERE open_time < ?', [before])
            return int(found[0][0])

    @contextmanager
    def attached(self, connection: duckdb.DuckDBPyConnection, name: str) -> Iterator[None]:
        """The file beside a connection's own tables, to read from; nobody writes meanwhile."""
        with self._translated():
            self._patiently(
                lambda: connection.execute(
                    f"ATTACH '{str(self.path).replace(chr(39), chr(39) * 2)}' AS {name} (READ_ONLY)"
                )
            )
        yield

    @contextmanager
    def _open(self, read_only: bool = False) -> Iterator[duckdb.DuckDBPyConnection]:
        import duckdb

        self.path.parent.mkdir(parents=True, exist_ok=True)
        connection = self._patiently(
            lambda: duckdb.connect(str(self.path), read_only=read_only, config={"threads": "1"})
        )
        try:
            yield connection
        finally:
            connection.close()

    def _patiently(self, open_it: Callable[[], T]) -> T:
        """Wait for whoever holds the file."""
        import duckdb

        deadline = time.monotonic() + self._patience
        while True:
            try:
                return open_it()
            except duckdb.Error as error:
                if not any(sign in str(error) for sign in _HELD):
                    raise
                if time.monotonic() > deadline:
                    raise StoreFailed(
                        f"{self.path}: another process holds it; close that process or set another `duckdb:`"
                    ) from None
                _pause()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        import duckdb

        try:
            yield
        except (duckdb.Error, OSError) as error:
            why = str(error).splitlines()[0][:160]
            fix = "mend the folder, set another `duckdb:`, or move the file away: it is made anew"
            raise StoreFailed(f"{self.path}: {why}; {fix}") from None


_HELD = (
    "Could not set lock",
    "different configuration than existing connections",
    "Unique file handle conflict",
)
"""What DuckDB says when another process, or another thread of this one, has the file open."""


def _pause() -> None:
    import threading

    threading.Event().wait(0.05)


def _replace(
    connection: duckdb.DuckDBPyConnection,
    market: Market,
    timeframe: Timeframe,
    frame: pl.DataFrame,
    window: Window,
) -> int:
    table = Table("rollup", timeframe)
    frame = frame.select(table.typed)
    _create(connection, table)
    stored = _select(connection, table, market, window)
    if stored.equals(frame):
        return 0
    stale = stored.join(frame, on=frame.columns, how="anti", nulls_equal=True)
    fresh = frame.join(stored, on=frame.columns, how="anti", nulls_equal=True)
    schema, name = table.key
    connection.register("stale", stale.to_arrow())
    connection.register(
        "fresh", fresh.select(pl.lit(market.key).alias("market"), pl.all()).to_arrow()
    )
    inside = "market = ? AND open_time >= ? AND open_time < ?"
    connection.execute(
        f'DELETE FROM "{schema}"."{name}" WHERE {inside} AND open_time IN (SELECT open_time FROM stale)',
        [market.key, window.start, window.end],
    )
    connection.execute(f'INSERT INTO "{schema}"."{name}" BY NAME SELECT * FROM fresh')
    connection.unregister("stale")
    connection.unregister("fresh")
    return pl.concat([stale["open_time"], fresh["open_time"]]).n_unique()


def _create(connection: duckdb.DuckDBPyConnection, table: Table) -> None:
    schema, name = table.key
    columns = ", ".join(f'"{column.name}" {sql_type(column.dtype)}' for column in table.columns)
    connection.execute(f'CREATE SCHEMA IF NOT EXISTS "{schema}"')
    connection.execute(
        f'CREATE TABLE IF NOT EXISTS "{schema}"."{name}" (market VARCHAR, {columns})'
    )


def sql_type(dtype: pl.DataType) -> str:
    """DuckDB's name of a column's type."""
    if isinstance(dtype, pl.Decimal):
        return f"DECIMAL({dtype.precision}, {dtype.scale})"
    if dtype == pl.String:
        return "VARCHAR"
    return "TIMESTAMPTZ" if dtype.is_temporal() else "BIGINT"


def _has(connection: duckdb.DuckDBPyConnection, table: Table) -> bool:
    sql = "SELECT 1 FROM information_schema.tables WHERE table_schema = ? AND table_name = ?"
    return bool(connection.execute(sql, list(table.key)).fetchall())


def _select(
    connection: duckdb.DuckDBPyConnection, table: Table, market: Market, window: Window
) -> pl.DataFrame:
    schema, name = table.key
    if not _has(connection, table):
        return pl.DataFrame(schema=table.schema)
    columns = ", ".join(f'"{column.name}"' for column in table.columns)
    found = connection.sql(
        f'SELECT {columns} FROM "{schema}"."{name}" WHERE market = ? AND open_time >= ? AND open_time < ? ORDER BY open_time',
        params=[market.key, window.start, window.end],
    )
    frame = pl.DataFrame(found.to_arrow_table())
    return frame.select(table.typed)

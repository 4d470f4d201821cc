"""The DuckDB warehouse of rollups: one file that one process at a time may write.

Transactions are short, and a process that finds the file in use waits for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import polars as pl

from marketdata_assets.errors import Damaged, StoreFailed
from marketdata_assets.model.intervals import slice_inside
from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import PartitionKey
from marketdata_assets.model.table import Table, rollup_table
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import Window
from marketdata_assets.retry import pauses_until, retry
from marketdata_assets.storage.cache import FrameCache, Stamp, file_stamp

if TYPE_CHECKING:
    import duckdb

T = TypeVar("T")
ConnectionFactory = Callable[[], AbstractContextManager["duckdb.DuckDBPyConnection"]]
_pause = threading.Event().wait
_FILE_IN_USE = (
    "Could not set lock",
    "different configuration than existing connections",
    "Unique file handle conflict",
)
"""Parts of DuckDB's messages when another process, or another thread of this one, uses the file."""


_DAMAGED = ("not a valid DuckDB", "Corrupt", "corrupt", "checksum", "Could not read enough")
"""Parts of DuckDB's messages when the file's content is not what DuckDB wrote."""
_SOURCES = '"marketdata"."sources"'


class Warehouse:
    """Rollup tables `rollup.ohlcv_<timeframe>`, keyed by `market` and `open_time`, in one file.

    The table `marketdata.sources` holds, by `market` and `month`, the digest of the raw rows that a
    partition's rollups were made of: written in the same transaction, so that an older file is
    recognised.

    `connect` opens the connections that write (default: to `path`). `wait_seconds` is how long to
    wait for a file that another process uses. Raises StoreFailed.
    """

    def __init__(
        self, path: Path, connect: ConnectionFactory | None = None, wait_seconds: float = 60.0
    ) -> None:
        self.path = path
        self._connect = connect or self._open
        self._wait_seconds = wait_seconds
        self._cache = FrameCache()
        self._sources: tuple[Stamp, dict[PartitionKey, str] | None] | None = None

    @property
    def exists(self) -> bool:
        """Whether the file exists; the lake holds all that is needed to rebuild it."""
        return self.path.exists()

    def replace(
        self,
        market: Market,
        frames: Mapping[Timeframe, pl.DataFrame],
        windows: Mapping[Timeframe, Window],
        source: tuple[str, str] | None = None,
    ) -> dict[str, int]:
        """Replace a market's bars inside each timeframe's window by the frame's bars, in one
        transaction that touches only rows that differ.

        `source` is a month key and the digest of the raw rows that all rollups of that month are
        made of now; None where only some were made. A file that DuckDB cannot read is set aside,
        and a new one begun. Returns how many rows changed, by the timeframe's name.
        """
        try:
            return self._replace(market, frames, windows, source=source)
        except Damaged:
            if not self.path.is_file():
                raise
            for file in (self.path, self.path.with_name(self.path.name + ".wal")):
                if file.exists():
                    file.replace(file.with_name(file.name + ".damaged"))
            return self._replace(market, frames, windows, source=source)

    def _replace(
        self,
        market: Market,
        frames: Mapping[Timeframe, pl.DataFrame],
        windows: Mapping[Timeframe, Window],
        *,
        source: tuple[str, str] | None,
    ) -> dict[str, int]:
        changed: dict[str, int] = {}
        with self._translate_errors(), ExitStack() as stack:
            self._make_folder()
            connection = stack.enter_context(self._connect())
            try:
                connection.execute("BEGIN")
                for timeframe, frame in frames.items():
                    rows = _MarketRows(connection, rollup_table(timeframe), market)
                    changed[timeframe.name] = rows.replace(windows[timeframe], frame)
                if source is not None:
                    _write_source(connection, market, *source)
                connection.execute("COMMIT")
            except BaseException:
                # a rollback, even where the owner of the connection keeps it after an exception
                connection.close()
                raise
        return changed

    def sources(self) -> dict[PartitionKey, str] | None:
        """Return the digest of the raw rows that each partition's rollups were made of, by market
        key and month key; None for a file of an earlier release. Raises Damaged.
        """
        import duckdb

        if not self.exists:
            return {}
        stamp = file_stamp(self.path, f"{self.path}.wal")
        if self._sources and stamp == self._sources[0]:
            return self._sources[1]
        found: dict[PartitionKey, str] | None
        with self._translate_errors(), self._open(read_only=True) as connection:
            try:
                rows = connection.execute(f"SELECT market, month, source FROM {_SOURCES}")
                found = {(market, month): source for market, month, source in rows.fetchall()}
            except duckdb.CatalogException:
                found = None if _has_rollups(connection) else {}
        if stamp:
            self._sources = (stamp, found)
        return found

    def read(self, table: Table, market: Market, window: Window) -> pl.DataFrame:
        """Return the bars of a market that open inside the window, sorted; none where the table
        does not exist yet.
        """
        return self.read_markets(table, [market], window)[0]

    def read_markets(
        self, table: Table, markets: Sequence[Market], window: Window
    ) -> list[pl.DataFrame]:
        """Return what `read` returns of each market, from one connection.

        Years of a market that are read a second time are kept in memory until the file changes.
        """
        if not self.exists or not window:
            return [pl.DataFrame(schema=table.schema) for _ in markets]
        with self._translate_errors(), ExitStack() as stack:
            connect = cache(lambda: stack.enter_context(self._open(read_only=True)))
            return [self._read_kept(table, market, window, connect=connect) for market in markets]

    def _read_kept(
        self,
        table: Table,
        market: Market,
        window: Window,
        *,
        connect: Callable[[], duckdb.DuckDBPyConnection],
    ) -> pl.DataFrame:
        stamp = file_stamp(self.path, f"{self.path}.wal")
        last = window.end - timedelta(microseconds=1)
        years = [(table.key, market.key, y) for y in range(window.start.year, last.year + 1)]
        kept = {year: self._cache.get(year, stamp) if stamp else None for year in years}
        missing = [year for year, frame in kept.items() if frame is None]
        if missing:
            known = [stamp is not None and self._cache.is_known(year, stamp) for year in missing]
            rows = _MarketRows(connect(), table, market)
            if stamp is None or not all(known):
                return rows.read(window)
            for year in missing:
                kept[year] = bars = rows.read(_whole_year(year[-1]))
                self._cache.put(year, stamp, bars)
        return slice_inside(
            pl.concat(frame for frame in kept.values() if frame is not None), window
        )

    @contextmanager
    def keep_open(self) -> Iterator[None]:
        """Keep an existing file open, so that each of many reads takes a fourth of the time; no
        process can write meanwhile. Each read says by itself that the file is damaged.
        """
        with ExitStack() as stack:
            if self.exists:
                with suppress(Damaged), self._translate_errors():
                    stack.enter_context(self._open(read_only=True))
            yield

    def delete_before(self, table: Table, moment: datetime, *, dry_run: bool = False) -> int:
        """Remove the bars of a table that open before a moment. Return how many there are."""
        if not self.exists:
            return 0
        with self._translate_errors(), self._open(read_only=dry_run) as connection:
            if not _has_table(connection, table):
                return 0
            where = f"FROM {quoted_name(table)} WHERE open_time < ?"
            rows = connection.execute(f"SELECT count(*) {where}", [moment]).fetchall()
            if not dry_run:
                connection.execute(f"DELETE {where}", [moment])
            return int(rows[0][0])

    @contextmanager
    def attach(self, connection: duckdb.DuckDBPyConnection, name: str) -> Iterator[None]:
        """Attach the file to another connection as the read-only database `name`; no process can
        write meanwhile.
        """
        path = str(self.path).replace("'", "''")
        with self._translate_errors():
            self._wait_for_file(
                lambda: connection.execute(f"ATTACH '{path}' AS {name} (READ_ONLY)")
            )
        yield

    @contextmanager
    def _open(self, *, read_only: bool = False) -> Iterator[duckdb.DuckDBPyConnection]:
        import duckdb

        self._make_folder()
        connection = self._wait_for_file(
            lambda: duckdb.connect(str(self.path), read_only=read_only, config={"threads": "1"})
        )
        try:
            yield connection
        finally:
            connection.close()

    def _make_folder(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def _wait_for_file(self, open_file: Callable[[], T]) -> T:
        """Open the file, again and again while it is in use."""
        import duckdb

        def is_in_use(error: Exception) -> bool:
            return isinstance(error, duckdb.Error) and any(s in str(error) for s in _FILE_IN_USE)

        pauses = pauses_until(self._wait_seconds, every=0.05)
        try:
            return retry(open_file, should_retry=is_in_use, pauses=pauses, sleep=_pause)
        except duckdb.Error as error:
            if not is_in_use(error):
                raise
            raise StoreFailed(
                f"{self.path}: another process holds it; close that process "
                "or set another `duckdb:`"
            ) from None

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        import duckdb

        try:
            yield
        except (duckdb.Error, OSError) as error:
            reason = str(error).splitlines()[0][:160]
            if isinstance(error, duckdb.Error) and any(part in str(error) for part in _DAMAGED):
                raise Damaged(
                    f"{self.path}: it is damaged ({reason}); `marketdata backfill` makes it again, "
                    "or move the file away: it is built again"
                ) from None
            raise StoreFailed(
                f"{self.path}: {reason}; mend the folder, set another `duckdb:`, "
                "or move the file away: it is built again"
            ) from None


class _MarketRows:
    """One market's rows of one table, in an open connection."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, table: Table, market: Market) -> None:
        self._connection, self._table, self._market = connection, table, market

    def read(self, window: Window) -> pl.DataFrame:
        """Return the bars that open inside the window, sorted; none where there is no table."""
        stored = self._read(window)
        return pl.DataFrame(schema=self._table.schema) if stored is None else stored

    def _read(self, window: Window) -> pl.DataFrame | None:
        import duckdb

        columns = ", ".join(f'"{column.name}"' for column in self._table.columns)
        try:
            rows = self._connection.sql(
                f"SELECT {columns} FROM {quoted_name(self._table)} "
                "WHERE market = ? AND open_time >= ? AND open_time < ? ORDER BY open_time",
                params=[self._market.key, window.start, window.end],
            )
        except duckdb.CatalogException:  # there is no such table
            return None
        return pl.DataFrame(rows.to_arrow_table()).select(self._table.typed_columns)

    def replace(self, window: Window, frame: pl.DataFrame) -> int:
        """Make the window hold exactly these bars. Return how many rows changed."""
        frame, stored = frame.select(self._table.typed_columns), self._read(window)
        if stored is None:
            self._create_table()
            stored = frame.clear()
        if stored.equals(frame):
            return 0
        stale = stored.join(frame, on=frame.columns, how="anti", nulls_equal=True)
        fresh = frame.join(stored, on=frame.columns, how="anti", nulls_equal=True)
        self._delete(window, stale)
        self._insert(fresh)
        return pl.concat([stale["open_time"], fresh["open_time"]]).n_unique()

    def _delete(self, window: Window, stale: pl.DataFrame) -> None:
        self._connection.register("stale", stale.to_arrow())
        self._connection.execute(
            f"DELETE FROM {quoted_name(self._table)} "
            "WHERE market = ? AND open_time >= ? AND open_time < ? "
            "AND open_time IN (SELECT open_time FROM stale)",
            [self._market.key, window.start, window.end],
        )
        self._connection.unregister("stale")

    def _insert(self, fresh: pl.DataFrame) -> None:
        rows = fresh.select(pl.lit(self._market.key).alias("market"), pl.all())
        self._connection.register("fresh", rows.to_arrow())
        self._connection.execute(
            f"INSERT INTO {quoted_name(self._table)} BY NAME SELECT * FROM fresh"
        )
        self._connection.unregister("fresh")

    def _create_table(self) -> None:
        schema, _ = self._table.key
        columns = ", ".join(
            f'"{column.name}" {duckdb_type(column.dtype)}' for column in self._table.columns
        )
        self._connection.execute(f'CREATE SCHEMA IF NOT EXISTS "{schema}"')
        self._connection.execute(
            f"CREATE TABLE IF NOT EXISTS {quoted_name(self._table)} (market VARCHAR, {columns})"
        )


def _write_source(
    connection: duckdb.DuckDBPyConnection, market: Market, month: str, source: str
) -> None:
    connection.execute('CREATE SCHEMA IF NOT EXISTS "marketdata"')
    connection.execute(
        f"CREATE TABLE IF NOT EXISTS {_SOURCES} "
        "(market VARCHAR, month VARCHAR, source VARCHAR, PRIMARY KEY (market, month))"
    )
    connection.execute(
        f"INSERT OR REPLACE INTO {_SOURCES} VALUES (?, ?, ?)", [market.key, month, source]
    )


def _has_rollups(connection: duckdb.DuckDBPyConnection) -> bool:
    sql = "SELECT 1 FROM information_schema.tables WHERE table_schema = 'rollup' LIMIT 1"
    return bool(connection.execute(sql).fetchall())


def _whole_year(year: int) -> Window:
    return Window(datetime(year, 1, 1, tzinfo=UTC), datetime(year + 1, 1, 1, tzinfo=UTC))


def _has_table(connection: duckdb.DuckDBPyConnection, table: Table) -> bool:
    sql = "SELECT 1 FROM information_schema.tables WHERE table_schema = ? AND table_name = ?"
    return bool(connection.execute(sql, list(table.key)).fetchall())


def quoted_name(table: Table) -> str:
    """Return a table's schema and name in SQL: `"rollup"."ohlcv_1h"`."""
    schema, name = table.key
    return f'"{schema}"."{name}"'


def duckdb_type(dtype: pl.DataType) -> str:
    """Return DuckDB's name of a column's type."""
    if isinstance(dtype, pl.Decimal):
        return f"DECIMAL({dtype.precision}, {dtype.scale})"
    if dtype == pl.String:
        return "VARCHAR"
    return "TIMESTAMPTZ" if dtype.is_temporal() else "BIGINT"

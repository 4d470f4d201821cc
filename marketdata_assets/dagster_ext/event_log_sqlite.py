"""Dagster's event log in SQLite with pooled connections, wipeable partitions and prunable runs.

Dagster's own storage opens a database connection for every event, which takes four times as long as
writing the event; a backfill writes about forty events a partition. It cannot wipe a partition, and
creates an empty file of 131 KB when it reads the log of a run that has no file. Tables, files and
all other behavior are Dagster's.
"""

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Self

import dagster as dg

# The storage that this one derives from, and what it calls inside: Dagster exports no event log.
from dagster._core.storage.event_log.sqlite.sqlite_event_log import (
    INDEX_SHARD_NAME,
    SqliteEventLogStorage,
    SqliteEventLogStorageWatchdog,
)

# What Dagster passes to everything that dagster.yaml names.
from dagster._serdes import ConfigurableClassData
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.pool import NullPool, QueuePool

from marketdata_assets.dagster_ext.partition_wiping import PartitionWipingMixin

OPEN_SHARDS = 8


class PooledSqliteEventLogStorage(PartitionWipingMixin, SqliteEventLogStorage):
    """Keeps the connections of the OPEN_SHARDS files ("shards": one a run, one index) used last.

    The files lie in DAGSTER_HOME/history/runs, where Dagster's own storage has them.
    """

    def __init__(self, base_dir: str, inst_data: ConfigurableClassData | None = None) -> None:
        self._engines: OrderedDict[str, Engine] = OrderedDict()
        self._existing: set[str] = set()
        """Tables and columns of the index that were found; none of them is ever dropped."""
        super().__init__(base_dir, inst_data)
        self._pruned_runs = create_engine(
            self.conn_string_for_shard(INDEX_SHARD_NAME),
            poolclass=NullPool,
            connect_args={"timeout": 60},
        )

    @classmethod
    def config_type(cls) -> dict[str, Any]:
        """Return the settings in dagster.yaml: none, as the place follows from DAGSTER_HOME."""
        return {}

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]
    ) -> Self:
        """Build the storage that dagster.yaml names."""
        return cls(str(Path(os.environ["DAGSTER_HOME"], "history", "runs")), inst_data)

    @contextmanager
    def _connect(self, shard: str) -> Iterator[Connection]:
        with self._db_lock:
            engine = self._engine(shard)
            if shard not in self._initialized_dbs:
                self._initdb(engine)
                self._initialized_dbs.add(shard)
            with engine.connect() as connection, connection.begin():
                yield connection

    def _engine(self, shard: str) -> Engine:
        if shard not in self._engines:
            engine = create_engine(
                self.conn_string_for_shard(shard),
                poolclass=QueuePool,
                pool_size=1,
                connect_args={"timeout": 60, "check_same_thread": False},
            )
            event.listen(engine, "connect", _sync_at_checkpoints_only)
            self._engines[shard] = engine
            while len(self._engines) > OPEN_SHARDS:
                self._engines.popitem(last=False)[1].dispose()
        self._engines.move_to_end(shard)
        return self._engines[shard]

    def has_table(self, table_name: str) -> bool:
        """Return whether the index has a table; Dagster asks at every event."""
        if table_name not in self._existing and super().has_table(table_name):
            self._existing.add(table_name)
        return table_name in self._existing

    def _has_asset_key_col_on_connection(self, conn: Connection, column_name: str) -> bool:
        name = f"asset_keys.{column_name}"
        has_column = super()._has_asset_key_col_on_connection
        if name not in self._existing and has_column(conn, column_name):
            self._existing.add(name)
        return name in self._existing

    def run_connection(self, run_id: str | None = None) -> AbstractContextManager[Connection]:
        """Return a connection to the run's file, or, without one, to its events in the index."""
        assert run_id is not None
        return self._connect(run_id) if self._has_shard(run_id) else self._connect_pruned(run_id)

    def store_event(self, event: dg.EventLogEntry) -> None:
        """Write an event, and create the run's file for its first one."""
        if not self._has_shard(event.run_id):
            self.close_shard(event.run_id)
            with self._connect(event.run_id):
                pass
        super().store_event(event)

    def _has_shard(self, run_id: str) -> bool:
        return Path(self.path_for_shard(run_id)).exists()

    @contextmanager
    def _connect_pruned(self, run_id: str) -> Iterator[Connection]:
        """Connect to the events of one run that the index keeps, in a table that queries expect.

        These are its start, end, materializations and checks. The table is a copy for this
        connection: what is written to it is lost.
        """
        with self._pruned_runs.connect() as connection:
            copy = (
                "CREATE TEMP TABLE event_logs AS SELECT * FROM main.event_logs WHERE run_id = :run"
            )
            connection.execute(text(copy), {"run": run_id})
            yield connection

    def close_shard(self, run_id: str) -> None:
        """Close the connection to a run's file, so that the file can be deleted."""
        with self._db_lock:
            self._initialized_dbs.discard(run_id)
            if engine := self._engines.pop(run_id, None):
                engine.dispose()

    def watch(self, run_id: str, cursor: str | None, callback: Callable[..., Any]) -> None:
        """Call `callback` for each new event, also while it is in the write-ahead log only."""
        super().watch(run_id, cursor, callback)
        observer: Any = self._obs
        dagsters, schedule = self._watchers[run_id][callback]
        observer.remove_handler_for_watch(dagsters, schedule)
        ours = _WriteAheadLogWatchdog(self, run_id, callback, cursor)
        self._watchers[run_id][callback] = (
            ours,
            observer.schedule(ours, self._base_dir, recursive=True),
        )

    def dispose(self) -> None:
        """Close all files."""
        while self._engines:
            self._engines.popitem()[1].dispose()
        super().dispose()


class _WriteAheadLogWatchdog(SqliteEventLogStorageWatchdog):
    """Watches `RUN.db-wal` too: events are in `RUN.db` only after a checkpoint."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._patterns = [self._log_path, f"{self._log_path}-wal"]

    def on_modified(self, event: Any) -> None:
        """Read the new events."""
        self._process_log()


def _sync_at_checkpoints_only(connection: Any, _record: Any) -> None:
    """Do not wait for the disk at every event.

    A killed process loses nothing. After a power cut events may be missing, but lake and ledger,
    which the sensors compare, are complete.
    """
    connection.execute("PRAGMA synchronous=NORMAL")

"""Dagster's SQLite event log: connections kept open, partitions that can be wiped, runs that can be
pruned.

The stock storage opens and throws away a database connection for every event, which costs four
times what writing the event does; a backfill writes about forty events a partition. It cannot wipe
a partition, and reading the log of a run without a file makes an empty one of 131 KB. Tables, files
and all other behaviour are the stock ones.
"""

import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Self

import dagster as dg
from dagster._core.storage.event_log.sqlite.sqlite_event_log import (
    INDEX_SHARD_NAME,
    SqliteEventLogStorage,
    SqliteEventLogStorageWatchdog,
)
from dagster._serdes import ConfigurableClassData
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.pool import NullPool, QueuePool

from marketdata_assets.dagster_ext.partition_wiping import Wiping

OPEN_SHARDS = 8


class PooledSqliteEventLogStorage(Wiping, SqliteEventLogStorage):
    """Keeps the connections of the OPEN_SHARDS last used files; lies in DAGSTER_HOME/history/runs as
    the stock one.
    """

    def __init__(self, base_dir: str, inst_data: ConfigurableClassData | None = None) -> None:
        self._engines: OrderedDict[str, Engine] = OrderedDict()
        super().__init__(base_dir, inst_data)
        self._remnants = create_engine(
            self.conn_string_for_shard(INDEX_SHARD_NAME),
            poolclass=NullPool,
            connect_args={"timeout": 60},
        )

    @classmethod
    def config_type(cls) -> dict[str, Any]:
        """No settings: the place follows from DAGSTER_HOME."""
        return {}

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]
    ) -> Self:
        """Dagster's way to build it from dagster.yaml."""
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
            event.listen(engine, "connect", _relax)
            self._engines[shard] = engine
            while len(self._engines) > OPEN_SHARDS:
                self._engines.popitem(last=False)[1].dispose()
        self._engines.move_to_end(shard)
        return self._engines[shard]

    def run_connection(self, run_id: str | None = None) -> AbstractContextManager[Connection]:
        """The run's own file; where it is pruned, or not yet begun, what the index keeps of the
        run.
        """
        assert run_id is not None
        return self._connect(run_id) if self._has_shard(run_id) else self._remnant(run_id)

    def store_event(self, event: dg.EventLogEntry) -> None:
        """As the stock one; only this makes a run's file."""
        if not self._has_shard(event.run_id):
            self.close_shard(event.run_id)
            with self._connect(event.run_id):
                pass
        super().store_event(event)

    def _has_shard(self, run_id: str) -> bool:
        return Path(self.path_for_shard(run_id)).exists()

    @contextmanager
    def _remnant(self, run_id: str) -> Iterator[Connection]:
        """Start, end, materializations and checks of one run, under the name that queries expect; what
        is written to it is lost.
        """
        with self._remnants.connect() as connection:
            of_run = (
                "CREATE TEMP TABLE event_logs AS SELECT * FROM main.event_logs WHERE run_id = :run"
            )
            connection.execute(text(of_run), {"run": run_id})
            yield connection

    def close_shard(self, run_id: str) -> None:
        """Close and forget a run's file, so that it can be deleted."""
        with self._db_lock:
            self._initialized_dbs.discard(run_id)
            if engine := self._engines.pop(run_id, None):
                engine.dispose()

    def watch(self, run_id: str, cursor: str | None, callback: Any) -> None:
        """Tell the run page of new events, also of those that stand in the file's write-ahead log
        only.
        """
        super().watch(run_id, cursor, callback)
        observer: Any = self._obs
        stock, watched = self._watchers[run_id][callback]
        observer.remove_handler_for_watch(stock, watched)
        ours = _Watchdog(self, run_id, callback, cursor)
        self._watchers[run_id][callback] = (
            ours,
            observer.schedule(ours, self._base_dir, recursive=True),
        )

    def dispose(self) -> None:
        """Close all files."""
        while self._engines:
            self._engines.popitem()[1].dispose()
        super().dispose()


class _Watchdog(SqliteEventLogStorageWatchdog):
    """Open connections write to `RUN.db-wal`; `RUN.db` itself changes at checkpoints only."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._patterns = [self._log_path, f"{self._log_path}-wal"]

    def on_modified(self, event: Any) -> None:
        """Read what is new."""
        self._process_log()


def _relax(connection: Any, _record: Any) -> None:
    """No fsync for every event: a killed process loses nothing, and after a power cut the lake and our
    ledger stand.
    """
    connection.execute("PRAGMA synchronous=NORMAL")

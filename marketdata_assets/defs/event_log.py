"""Dagster's SQLite event log: connections kept open, partitions that can be wiped, runs that can be pruned.

The stock storage opens and throws away a database connection for every event, which costs four times what writing the
event does; a backfill writes about forty events a partition. It cannot wipe a partition, and reading the log of a run
without a file makes an empty one of 131 KB. Tables, files and all other behaviour are the stock ones.
"""

import json
import logging
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Self

import dagster as dg
from dagster._core.events import AssetWipedData, DagsterEvent, DagsterEventType
from dagster._core.instance.utils import RUNLESS_JOB_NAME, RUNLESS_RUN_ID
from dagster._core.storage.event_log.sqlite.sqlite_event_log import INDEX_SHARD_NAME, SqliteEventLogStorage, SqliteEventLogStorageWatchdog
from dagster._core.storage.partition_status_cache import AssetStatusCacheValue
from dagster._serdes import ConfigurableClassData, serialize_value
from dagster._time import get_current_timestamp
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.pool import NullPool, QueuePool

OPEN_SHARDS = 8

_WIPED = "asset_key = :asset AND partition IN (SELECT value FROM json_each(:keys))"
_WIPE = (
    f"DELETE FROM asset_event_tags WHERE event_id IN (SELECT id FROM event_logs WHERE {_WIPED})",
    f"DELETE FROM event_logs WHERE {_WIPED}",
    # what a check found bears neither asset nor partition there; what it planned is one event for many partitions
    "DELETE FROM event_logs WHERE dagster_event_type = 'ASSET_CHECK_EVALUATION'"
    f" AND id IN (SELECT evaluation_event_storage_id FROM asset_check_executions WHERE {_WIPED})",
    f"DELETE FROM asset_check_executions WHERE {_WIPED}",
)
_OF_ASSET = "FROM event_logs WHERE asset_key = :asset AND dagster_event_type IN"
_PLAN_OR_MADE = "'ASSET_MATERIALIZATION', 'ASSET_MATERIALIZATION_PLANNED'"
# Without `last_materialization` Dagster looks for the newest that is left.
_FORGET = (
    "UPDATE asset_keys SET cached_status_data = NULL, last_materialization = NULL,"
    f" last_run_id = (SELECT run_id {_OF_ASSET} ({_PLAN_OR_MADE}) ORDER BY id DESC LIMIT 1),"
    f" last_materialization_timestamp = (SELECT max(timestamp) {_OF_ASSET} ({_PLAN_OR_MADE}, 'ASSET_OBSERVATION'))"
    " WHERE asset_key = :asset"
)
_CACHE = (
    "UPDATE asset_keys SET cached_status_data = :status WHERE asset_key = :asset AND NOT EXISTS"
    " (SELECT 1 FROM event_logs WHERE asset_key = :asset AND dagster_event_type = 'ASSET_WIPED' AND id > :latest)"
)


class PooledSqliteEventLogStorage(SqliteEventLogStorage):
    """Keeps the connections of the OPEN_SHARDS last used files; lies in DAGSTER_HOME/history/runs as the stock one."""

    def __init__(self, base_dir: str, inst_data: ConfigurableClassData | None = None) -> None:
        self._engines: OrderedDict[str, Engine] = OrderedDict()
        super().__init__(base_dir, inst_data)
        self._remnants = create_engine(self.conn_string_for_shard(INDEX_SHARD_NAME), poolclass=NullPool, connect_args={"timeout": 60})

    @classmethod
    def config_type(cls) -> dict[str, Any]:
        """No settings: the place follows from DAGSTER_HOME."""
        return {}

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]) -> Self:
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
        """The run's own file; where it is pruned, or not yet begun, what the index keeps of the run."""
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
        """Start, end, materializations and checks of one run, under the name that queries expect; what is written to it is lost."""
        with self._remnants.connect() as connection:
            of_run = "CREATE TEMP TABLE event_logs AS SELECT * FROM main.event_logs WHERE run_id = :run"
            connection.execute(text(of_run), {"run": run_id})
            yield connection

    def close_shard(self, run_id: str) -> None:
        """Close and forget a run's file, so that it can be deleted."""
        with self._db_lock:
            self._initialized_dbs.discard(run_id)
            if engine := self._engines.pop(run_id, None):
                engine.dispose()

    def wipe_asset_partitions(self, asset_key: dg.AssetKey, partition_keys: Sequence[str]) -> None:
        """Forget that these partitions were ever planned, materialized, observed or checked; run logs keep their own events.

        An event in the index says so. It comes first, so that no id is used again (cursors would skip new events), and
        keeps statuses that were computed before it from being cached.
        """
        bound = {"asset": asset_key.to_string(), "keys": json.dumps(list(partition_keys))}
        with self.index_transaction() as connection:
            connection.execute(self.prepare_insert_event(_wiped(asset_key, partition_keys)))
            for statement in (*_WIPE, _FORGET):
                connection.execute(text(statement), bound)

    def update_asset_cached_status_data(self, asset_key: dg.AssetKey, cache_values: AssetStatusCacheValue) -> None:
        """Cache partition statuses, unless partitions were wiped after the events that these rest on."""
        status = {"status": serialize_value(cache_values), "latest": cache_values.latest_storage_id}
        with self.index_connection() as connection:
            connection.execute(text(_CACHE), {"asset": asset_key.to_string(), **status})

    def watch(self, run_id: str, cursor: str | None, callback: Any) -> None:
        """Tell the run page of new events, also of those that stand in the file's write-ahead log only."""
        super().watch(run_id, cursor, callback)
        observer: Any = self._obs
        stock, watched = self._watchers[run_id][callback]
        observer.remove_handler_for_watch(stock, watched)
        ours = _Watchdog(self, run_id, callback, cursor)
        self._watchers[run_id][callback] = (ours, observer.schedule(ours, self._base_dir, recursive=True))

    def dispose(self) -> None:
        """Close all files."""
        while self._engines:
            self._engines.popitem()[1].dispose()
        super().dispose()


def _wiped(asset_key: dg.AssetKey, partition_keys: Sequence[str]) -> dg.EventLogEntry:
    kind = DagsterEventType.ASSET_WIPED.value
    data = AssetWipedData(asset_key=asset_key, partition_keys=list(partition_keys))
    wiped = DagsterEvent(event_type_value=kind, job_name=RUNLESS_JOB_NAME, event_specific_data=data)
    return dg.EventLogEntry(None, logging.INFO, "", RUNLESS_RUN_ID, get_current_timestamp(), None, RUNLESS_JOB_NAME, wiped)  # type: ignore[no-untyped-call]


class _Watchdog(SqliteEventLogStorageWatchdog):
    """Open connections write to `RUN.db-wal`; `RUN.db` itself changes at checkpoints only."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._patterns = [self._log_path, f"{self._log_path}-wal"]

    def on_modified(self, event: Any) -> None:
        """Read what is new."""
        self._process_log()


def _relax(connection: Any, _record: Any) -> None:
    """No fsync for every event: a killed process loses nothing, and after a power cut the lake and our ledger stand."""
    connection.execute("PRAGMA synchronous=NORMAL")

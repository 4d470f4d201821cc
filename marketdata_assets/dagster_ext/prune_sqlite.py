"""Prune runs whose event logs are SQLite files: one a run, and the index of all."""

from __future__ import annotations

import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path

import dagster as dg

from marketdata_assets.dagster_ext.event_log_sqlite import PooledSqliteEventLogStorage
from marketdata_assets.dagster_ext.runs import RUN_LOGS

_MATERIALIZATION_PLANNED = "ASSET_MATERIALIZATION_PLANNED"
_CHECK_PLANNED = "ASSET_CHECK_EVALUATION_PLANNED"
_PLANNED_RUNS = (
    "SELECT DISTINCT run_id FROM event_logs"
    f" WHERE dagster_event_type IN ('{_MATERIALIZATION_PLANNED}', '{_CHECK_PLANNED}')"
)
_NOT_IN_INDEX = """
    SELECT event FROM shard.event_logs
    WHERE dagster_event_type
        IN ('ASSET_MATERIALIZATION', 'ASSET_OBSERVATION', 'ASSET_CHECK_EVALUATION')
    EXCEPT SELECT event FROM main.event_logs WHERE run_id = ? LIMIT 1
"""
# The log itself last: SQLite would replay a -wal that is left over beside a new log.
_SHARD_SUFFIXES = ("-wal", "-shm", "-journal", "")
_MIN_FREE_BYTES = 4 << 20
_MAX_VACUUM_BYTES = 1 << 30


def deletable_plans(*, equals: str) -> str:
    """Return the FROM and WHERE of the plans of `:run` that can be deleted.

    `equals` is the database's comparison in which NULL equals NULL. The newest event is never
    deleted, because SQLite would use its id again.
    """
    return f"""
        FROM event_logs AS plan
        WHERE run_id = :run AND id < (SELECT max(id) FROM event_logs) AND (
            dagster_event_type = '{_CHECK_PLANNED}'
            OR dagster_event_type = '{_MATERIALIZATION_PLANNED}' AND EXISTS (
                SELECT 1 FROM event_logs AS later
                WHERE later.asset_key = plan.asset_key
                AND later.dagster_event_type = plan.dagster_event_type
                AND later.partition {equals} plan.partition AND later.id > plan.id
            )
        )
    """


_PLANS = deletable_plans(equals="IS")


def prune_files(
    storage: PooledSqliteEventLogStorage,
    outputs: Path,
    finished: Callable[[Iterable[str]], Iterator[dg.DagsterRun]],
    *,
    dry_run: bool,
) -> Counter[str]:
    """Delete log, output and plans of those runs that `finished` selects, and count them.

    `outputs` is where Dagster captures what steps print.
    """
    path = storage.path_for_shard("index")
    with closing(sqlite3.connect(path, timeout=60, isolation_level=None, uri=True)) as index:
        pruner = _Pruner(storage, index, outputs, dry_run=dry_run)
        for run in finished(pruner.candidates()):
            pruner.prune_run(run)
        if not dry_run:
            pruner.counts["reclaimed_bytes"] = _vacuum(index)
        return pruner.counts


class _Pruner:
    """Prunes run after run, and counts what was deleted."""

    def __init__(
        self,
        storage: PooledSqliteEventLogStorage,
        index: sqlite3.Connection,
        outputs: Path,
        *,
        dry_run: bool,
    ) -> None:
        self._storage, self._index, self._outputs, self._dry_run = storage, index, outputs, dry_run
        self._run_logs = outputs.parent / RUN_LOGS
        self.counts: Counter[str] = Counter()

    def candidates(self) -> set[str]:
        """Return the runs of which anything is left that can be deleted."""
        with_log = set(self._storage.get_all_run_ids())
        with_output = {folder.parent.name for folder in self._outputs.glob("*/compute_logs")}
        with_output |= {log.stem for log in self._run_logs.glob("*.log")}
        with_plans = {run_id for (run_id,) in self._index.execute(_PLANNED_RUNS)}
        return with_log | with_output | with_plans

    def prune_run(self, run: dg.DagsterRun) -> None:
        """Prune one finished run."""
        before = self._deletions()
        if run.is_success:
            self._delete_plans(run.run_id)
        self._delete_output(run.run_id)
        if Path(self._storage.path_for_shard(run.run_id)).exists():
            self._delete_log(run.run_id)
        self.counts["runs"] += self._deletions() > before

    def _deletions(self) -> int:
        return self.counts["logs"] + self.counts["outputs"] + self.counts["plans"]

    def _delete_plans(self, run_id: str) -> None:
        sql = f"SELECT count(*), coalesce(sum(length(event)), 0) {_PLANS}"
        count, size = self._index.execute(sql, {"run": run_id}).fetchone()
        self.counts += Counter(plans=count, plan_bytes=size)
        if count and not self._dry_run:
            self._index.execute(f"DELETE {_PLANS}", {"run": run_id})

    def _delete_output(self, run_id: str) -> None:
        folder, log = self._outputs / run_id / "compute_logs", self._run_logs / f"{run_id}.log"
        sizes = [file.stat().st_size for file in (*folder.rglob("*"), log) if file.is_file()]
        self.counts += Counter(outputs=int(bool(sizes)), output_bytes=sum(sizes))
        if self._dry_run:
            return
        log.unlink(missing_ok=True)
        if folder.exists():
            shutil.rmtree(folder, ignore_errors=True)
            if not any(folder.parent.iterdir()):
                folder.parent.rmdir()

    def _delete_log(self, run_id: str) -> None:
        self._storage.close_shard(run_id)
        shard = Path(self._storage.path_for_shard(run_id))
        files = [Path(f"{shard}{suffix}") for suffix in _SHARD_SUFFIXES]
        size = sum(file.stat().st_size for file in files if file.exists())
        if reason := self._reason_to_keep(run_id, shard):
            self.counts[reason] += 1
            return
        self.counts += Counter(logs=1, log_bytes=size)
        if not self._dry_run:
            for file in files:
                file.unlink(missing_ok=True)

    def _reason_to_keep(self, run_id: str, shard: Path) -> str:
        """Return the count of PruneSummary for a log that cannot be deleted; empty for others.

        SQLite leaves the WAL mode only where no other connection has the file open: that is the
        proof that no process reads or writes the log.
        """
        try:
            self._index.execute("ATTACH ? AS shard", [f"{shard.as_uri()}?mode=rw"])
        except sqlite3.Error:
            return "logs_kept_open"
        try:
            if self._index.execute(_NOT_IN_INDEX, [run_id]).fetchone():
                return "logs_kept_unproven"
            if not self._dry_run:
                self._index.execute("PRAGMA shard.journal_mode = DELETE")
            return ""
        except sqlite3.OperationalError as error:
            return "logs_kept_open" if "locked" in str(error) else "logs_kept_unproven"
        finally:
            self._index.execute("DETACH shard")


def _vacuum(index: sqlite3.Connection) -> int:
    """Return free space of the index to the disk, where it is a quarter of it; return the bytes.

    Less free space is left, because new events fill it again.
    """
    pages, free, page_size = (
        index.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("page_count", "freelist_count", "page_size")
    )
    size = pages * page_size
    if free * page_size < max(_MIN_FREE_BYTES, size // 4) or size > _MAX_VACUUM_BYTES:
        return 0
    try:
        index.execute("VACUUM")
        index.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    except sqlite3.OperationalError:  # busy, or no room for the copy: the next prune may succeed
        return 0
    return int((pages - index.execute("PRAGMA page_count").fetchone()[0]) * page_size)

"""Old runs lose their logs, and nothing that an asset's page shows.

    python -m marketdata_assets.dagster_ext.prune --days 14 [--dry-run]

prints what went as one JSON object. Of a run that finished long ago go: its own event log, once the
index is proven to hold every materialization, observation and check result in it; its captured
output; and if it succeeded, its plans: of materializations where a later plan for the same
partition exists (the newest one tells the grid its colour and the page its latest run), of checks
all (what became of them stands in a table of its own).

Safe beside everything else and at any kill: each deletion stands alone and is found again by the
next prune. A log that any process has open is left for then.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sqlite3
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path

import dagster as dg
from dagster._core.storage.event_log import SqlEventLogStorage
from dagster._time import get_current_datetime
from sqlalchemy import Connection, text

from marketdata_assets.dagster_ext.event_log import PooledSqliteEventLogStorage
from marketdata_assets.dagster_ext.launcher import RUN_LOGS

_FINISHED = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED]
_SHARD_FILES = ("-wal", "-shm", "-journal", "")
_RUNS_AT_ONCE = 500
_WORTH_A_VACUUM = 4 << 20
_TOO_BIG_FOR_A_VACUUM = 1 << 30
_UNPROVEN = """
    SELECT event FROM shard.event_logs
    WHERE dagster_event_type IN ('ASSET_MATERIALIZATION', 'ASSET_OBSERVATION', 'ASSET_CHECK_EVALUATION')
    EXCEPT SELECT event FROM main.event_logs WHERE run_id = ? LIMIT 1
"""
# never the newest row: its id would be used again
_PLANS = """
    FROM event_logs AS plan WHERE run_id = :run AND id < (SELECT max(id) FROM event_logs)
    AND (dagster_event_type = 'ASSET_CHECK_EVALUATION_PLANNED' OR dagster_event_type = 'ASSET_MATERIALIZATION_PLANNED' AND EXISTS (
        SELECT 1 FROM event_logs AS later
        WHERE later.asset_key = plan.asset_key AND later.dagster_event_type = plan.dagster_event_type
        AND later.partition IS plan.partition AND later.id > plan.id
    ))
"""
_PLANS_IN_TABLES = _PLANS.replace(
    "later.partition IS plan.partition", "later.partition IS NOT DISTINCT FROM plan.partition"
)


@dataclass(frozen=True)
class Pruned:
    """What went, or in a dry run would go; `kept` logs are open somewhere, or hold what the index
    lacks.
    """

    dry_run: bool
    runs: int = 0
    logs: int = 0
    log_bytes: int = 0
    logs_kept_open: int = 0
    logs_kept_unproven: int = 0
    outputs: int = 0
    output_bytes: int = 0
    plans: int = 0
    plan_bytes: int = 0
    reclaimed_bytes: int = 0


def prune(
    instance: dg.DagsterInstance, days: float, now: datetime, dry_run: bool = False
) -> Pruned:
    """Prune runs that finished more than `days` before `now`."""
    storage = instance.event_log_storage
    if not isinstance(storage, PooledSqliteEventLogStorage):
        return _prune_tables(instance, now - timedelta(days=days), dry_run)
    index = sqlite3.connect(
        storage.path_for_shard("index"), timeout=60, isolation_level=None, uri=True
    )
    with closing(index):
        pruning = _Pruning(storage, index, Path(instance.storage_directory()), dry_run)
        for run_id, succeeded in _finished(
            instance, pruning.candidates(), now - timedelta(days=days)
        ):
            pruning.run(run_id, succeeded)
        return Pruned(dry_run, **pruning.tally, reclaimed_bytes=0 if dry_run else _vacuum(index))


def _finished(
    instance: dg.DagsterInstance, candidates: Iterable[str], before: datetime
) -> Iterator[tuple[str, bool]]:
    """Which of these runs finished before then, and whether they succeeded."""
    names = sorted(candidates)
    for start in range(0, len(names), _RUNS_AT_ONCE):
        wanted = dg.RunsFilter(
            run_ids=names[start : start + _RUNS_AT_ONCE], statuses=_FINISHED, updated_before=before
        )
        for run in instance.get_runs(wanted):
            yield run.run_id, run.is_success


class _Pruning:
    """One prune: where things lie, and the tally of what went."""

    def __init__(
        self,
        storage: PooledSqliteEventLogStorage,
        index: sqlite3.Connection,
        outputs: Path,
        dry_run: bool,
    ) -> None:
        self._storage, self._index, self._outputs, self._dry_run = storage, index, outputs, dry_run
        self._run_logs = outputs.parent / RUN_LOGS
        self.tally: Counter[str] = Counter()

    def candidates(self) -> set[str]:
        """Runs of which anything is left that could go."""
        logged = set(self._storage.get_all_run_ids())
        printed = {folder.parent.name for folder in self._outputs.glob("*/compute_logs")} | {
            log.stem for log in self._run_logs.glob("*.log")
        }
        kinds = "('ASSET_MATERIALIZATION_PLANNED', 'ASSET_CHECK_EVALUATION_PLANNED')"
        planned = self._index.execute(
            f"SELECT DISTINCT run_id FROM event_logs WHERE dagster_event_type IN {kinds}"
        )
        return logged | printed | {run_id for (run_id,) in planned}

    def run(self, run_id: str, succeeded: bool) -> None:
        """Prune one finished run."""
        before = self.tally["logs"] + self.tally["outputs"] + self.tally["plans"]
        if succeeded:
            self._plans(run_id)
        self._output(run_id)
        if Path(self._storage.path_for_shard(run_id)).exists():
            self._log(run_id)
        self.tally["runs"] += (
            self.tally["logs"] + self.tally["outputs"] + self.tally["plans"] > before
        )

    def _plans(self, run_id: str) -> None:
        count, size = self._index.execute(
            f"SELECT count(*), coalesce(sum(length(event)), 0) {_PLANS}", {"run": run_id}
        ).fetchone()
        self._count("plans", count, size)
        if count and not self._dry_run:
            self._index.execute(f"DELETE {_PLANS}", {"run": run_id})

    def _output(self, run_id: str) -> None:
        folder, log = self._outputs / run_id / "compute_logs", self._run_logs / f"{run_id}.log"
        files = [file.stat().st_size for file in (*folder.rglob("*"), log) if file.is_file()]
        self._count("outputs", bool(files), sum(files))
        if self._dry_run:
            return
        log.unlink(missing_ok=True)
        if folder.exists():
            shutil.rmtree(folder, ignore_errors=True)
            if not any(folder.parent.iterdir()):
                folder.parent.rmdir()

    def _log(self, run_id: str) -> None:
        self._storage.close_shard(run_id)
        shard = Path(self._storage.path_for_shard(run_id))
        files = [Path(f"{shard}{suffix}") for suffix in _SHARD_FILES]
        size = sum(file.stat().st_size for file in files if file.exists())
        verdict = self._verdict(run_id, shard)
        self._count(verdict, 1, size)
        if verdict == "logs" and not self._dry_run:
            for file in (
                files
            ):  # the log itself last: beside a new one, a stale -wal would be taken for its own
                file.unlink(missing_ok=True)

    def _verdict(self, run_id: str, shard: Path) -> str:
        """May this log go? To leave WAL mode, SQLite must be alone with the file: then nobody has it
        open.
        """
        try:
            self._index.execute("ATTACH ? AS shard", [f"{shard.as_uri()}?mode=rw"])
        except sqlite3.Error:
            return "logs_kept_open"
        try:
            if self._index.execute(_UNPROVEN, [run_id]).fetchone():
                return "logs_kept_unproven"
            if not self._dry_run:
                self._index.execute("PRAGMA shard.journal_mode = DELETE")
            return "logs"
        except sqlite3.OperationalError as error:
            return "logs_kept_open" if "locked" in str(error) else "logs_kept_unproven"
        finally:
            self._index.execute("DETACH shard")

    def _count(self, kind: str, count: int, size: int) -> None:
        self.tally[kind] += count
        if not kind.startswith("logs_kept"):
            self.tally[f"{kind.removesuffix('s')}_bytes"] += size


# in PostgreSQL all events lie in one table, whose free space the server uses again by itself
_LOGGED = "(dagster_event_type IS NULL OR dagster_event_type NOT LIKE 'ASSET%' AND dagster_event_type NOT LIKE 'PIPELINE%')"


def _prune_tables(instance: dg.DagsterInstance, before: datetime, dry_run: bool) -> Pruned:
    """The same for a log in tables: of old runs stay their beginning, their end and what asset pages
    show.
    """
    storage, tally = instance.event_log_storage, Counter[str]()
    assert isinstance(storage, SqlEventLogStorage)
    with storage.index_connection() as connection:
        for run_id, succeeded in _finished(instance, _logged_runs(connection), before):
            parts = {
                "log": f"FROM event_logs WHERE run_id = :run AND {_LOGGED}",
                **({"plan": _PLANS_IN_TABLES} if succeeded else {}),
            }
            found = {
                name: connection.execute(
                    text(f"SELECT count(*), coalesce(sum(length(event)), 0) {sql}"), {"run": run_id}
                ).one()
                for name, sql in parts.items()
            }
            tally["runs"] += any(count for count, _ in found.values())
            for name, (count, size) in found.items():
                tally[f"{name}s"] += count if name == "plan" else bool(count)
                tally[f"{name}_bytes"] += size
                if count and not dry_run:
                    connection.execute(text(f"DELETE {parts[name]}"), {"run": run_id})
    return Pruned(dry_run, **tally)


def _logged_runs(connection: Connection) -> list[str]:
    """Runs of which more is there than beginning, end and what asset pages show."""
    more = f"{_LOGGED} OR dagster_event_type LIKE 'ASSET%PLANNED'"
    return [
        run_id
        for (run_id,) in connection.execute(
            text(f"SELECT DISTINCT run_id FROM event_logs WHERE {more}")
        )
    ]


def _vacuum(index: sqlite3.Connection) -> int:
    """Give back what is free in the index where that is a quarter of it; otherwise new events fill it
    again.
    """
    pages, free, page = (
        index.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("page_count", "freelist_count", "page_size")
    )
    if (
        free * page < max(_WORTH_A_VACUUM, pages * page // 4)
        or pages * page > _TOO_BIG_FOR_A_VACUUM
    ):
        return 0
    try:
        index.execute("VACUUM")
        index.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    except (
        sqlite3.OperationalError
    ):  # busy all the time, or no room for the copy: the next prune will
        return 0
    return int((pages - index.execute("PRAGMA page_count").fetchone()[0]) * page)


def main() -> None:
    """Prune the instance in DAGSTER_HOME."""
    parser = argparse.ArgumentParser(prog="marketdata prune")
    parser.add_argument("--days", type=float, required=True)
    parser.add_argument("--dry-run", action="store_true")
    asked = parser.parse_args()
    with dg.DagsterInstance.get() as instance:
        pruned = prune(instance, asked.days, get_current_datetime(), asked.dry_run)
    sys.stdout.write(json.dumps(asdict(pruned)) + "\n")


if __name__ == "__main__":
    main()

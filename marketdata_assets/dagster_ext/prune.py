"""Prune old runs: their logs are deleted, and nothing that an asset's page shows.

    python -m marketdata_assets.dagster_ext.prune --days 14 [--dry-run]

prints what was deleted as one JSON object. Of a run that finished long ago, prune deletes its own
event log, once the index is proven to hold every materialization, observation and check result in
it; its captured output; and if it succeeded, its plans. A plan of a materialization stays where no
later plan for the same partition exists, because the newest one gives the grid its color and the
page its latest run. Plans of checks are all deleted: a table of its own holds their results.

It may run beside everything else and may be killed at any moment: each deletion is independent, and
the next prune finds what is left. A log that any process has open is left for then.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path

import dagster as dg

# The clock by which Dagster records when runs ended; MARKETDATA_NOW does not replace it.
from dagster._time import get_current_datetime

from marketdata_assets.dagster_ext.event_log_sqlite import PooledSqliteEventLogStorage
from marketdata_assets.dagster_ext.prune_postgres import prune_tables
from marketdata_assets.dagster_ext.prune_sqlite import prune_files

_FINISHED = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED]
_RUNS_PER_QUERY = 500
_TICK_LOGS = (".err", ".out", ".complete")


@dataclass(frozen=True)
class PruneSummary:
    """What was deleted, or in a dry run would be.

    `logs_kept_open` are open in some process, `logs_kept_unproven` hold events that the index does
    not hold.
    """

    dry_run: bool
    runs: int = 0
    logs: int = 0
    log_bytes: int = 0
    logs_kept_open: int = 0
    logs_kept_unproven: int = 0
    tick_logs: int = 0
    tick_log_bytes: int = 0
    outputs: int = 0
    output_bytes: int = 0
    plans: int = 0
    plan_bytes: int = 0
    reclaimed_bytes: int = 0


def prune_runs(
    instance: dg.DagsterInstance,
    days: float,
    *,
    now: datetime | None = None,
    dry_run: bool = False,
) -> PruneSummary:
    """Prune the runs that finished more than `days` before `now` (default: the machine's clock)."""
    before = (now or get_current_datetime()) - timedelta(days=days)

    def finished(run_ids: Iterable[str]) -> Iterator[dg.DagsterRun]:
        return _finished_runs(instance, run_ids, before)

    storage = instance.event_log_storage
    if isinstance(storage, PooledSqliteEventLogStorage):
        outputs = Path(instance.storage_directory())
        counts = prune_files(storage, outputs, finished, dry_run=dry_run)
    else:
        counts = prune_tables(storage, finished, dry_run=dry_run)
    counts += _prune_tick_logs(Path(instance.storage_directory()), before, dry_run)
    return PruneSummary(dry_run, **counts)


def _prune_tick_logs(outputs: Path, before: datetime, dry_run: bool) -> Counter[str]:
    """Delete what ticks of sensors and schedules logged, `<repository>/<name>/<tick>.<kind>`."""
    old = [
        (file, status.st_size)
        for file in outputs.glob("*/*/*")
        if file.stem.isdigit() and file.suffix in _TICK_LOGS and file.is_file()
        if (status := file.stat()).st_mtime < before.timestamp()
    ]
    for file, _ in [] if dry_run else old:
        file.unlink(missing_ok=True)
    return Counter(tick_logs=len(old), tick_log_bytes=sum(size for _, size in old))


def _finished_runs(
    instance: dg.DagsterInstance, run_ids: Iterable[str], before: datetime
) -> Iterator[dg.DagsterRun]:
    names = sorted(run_ids)
    for start in range(0, len(names), _RUNS_PER_QUERY):
        some = names[start : start + _RUNS_PER_QUERY]
        wanted = dg.RunsFilter(run_ids=some, statuses=_FINISHED, updated_before=before)
        yield from instance.get_runs(wanted)


def main() -> None:
    """Prune the instance in DAGSTER_HOME."""
    parser = argparse.ArgumentParser(prog="marketdata prune")
    parser.add_argument("--days", type=float, required=True)
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    with dg.DagsterInstance.get() as instance:
        summary = prune_runs(instance, arguments.days, dry_run=arguments.dry_run)
    sys.stdout.write(json.dumps(asdict(summary)) + "\n")


if __name__ == "__main__":
    main()

"""A worker of `marketdata backfill`: does ranges of partitions as Dagster runs, one after the other, in one warm process.

    python -m marketdata_assets.defs.worker

reads one JSON line per range from standard input (`{"start": key, "end": key}`) and writes JSON lines to standard
output: what `tell` hears, and `{"done": ..., "success": ...}` after each range. It ends with its input; when whoever
started it is killed, it stops at once. Everything it stores is atomic, so that moment may be any.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import queue
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import dagster as dg

from marketdata_assets.defs.jobs import INGEST, build_definitions
from marketdata_assets.defs.partitions import RANGE_END, RANGE_START
from marketdata_assets.settings import Settings, load_settings

PROCESS_TAG = "marketdata/process"
_UNFINISHED = [dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.NOT_STARTED, dg.DagsterRunStatus.CANCELING]


def main() -> None:
    """Serve ranges until standard input ends."""
    lines: queue.Queue[str | None] = queue.Queue()
    tell = _Channel()
    threading.Thread(target=_read, args=(lines,), daemon=True).start()
    settings = load_settings()
    with _open_instance() as instance:
        job = build_definitions(settings, tell).resolve_job_def(INGEST)
        _warm_up()
        tell({"ready": True})
        while (line := lines.get()) is not None:
            _run(job, instance, settings, json.loads(line), tell)


def _open_instance() -> dg.DagsterInstance:
    """The instance in DAGSTER_HOME, opened by one process at a time: two that create its tables at once would fail."""
    with Path(os.environ["DAGSTER_HOME"], "opening.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        instance = dg.DagsterInstance.get()
        end_dead_runs(instance)
        return instance


def _warm_up() -> None:
    """Import now what the first range would wait for."""
    importlib.import_module("ccxt.async_support")
    importlib.import_module("marketdata_assets.quality.contract")
    importlib.import_module("pyarrow.parquet")


def _run(job: dg.JobDefinition, instance: dg.DagsterInstance, settings: Settings, span: dict[str, str], tell: _Channel) -> None:
    tags = {RANGE_START: span["start"], RANGE_END: span["end"], PROCESS_TAG: process_id()}
    result = job.execute_in_process(instance=instance, tags=tags, raise_on_error=False)
    errors = [str(e.event_specific_data.error_display_string) for e in result.all_events if e.is_step_failure]  # type: ignore[union-attr]
    tell({"done": span, "success": result.success, "run": result.run_id, "says": errors[0][:2000] if errors else ""})


def process_id() -> str:
    """This process on this machine, as long as it lives."""
    return f"{socket.gethostname()}:{os.getpid()}"


def end_dead_runs(instance: dg.DagsterInstance) -> int:
    """Mark runs of killed workers as failed and give their pool slots back; how many there were."""
    ended = 0
    for run in instance.get_runs(dg.RunsFilter(statuses=_UNFINISHED)):
        host, _, pid = run.tags.get(PROCESS_TAG, "").rpartition(":")
        if host != socket.gethostname() or Path("/proc", pid).exists():
            continue
        instance.report_run_failed(run, "its process was killed")
        instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
        ended += 1
    return ended


class _Channel:
    """Standard output as a channel of JSON lines; what else writes to it goes to standard error."""

    def __init__(self) -> None:
        self._pipe = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
        os.dup2(2, 1)
        self._lock = threading.Lock()

    def __call__(self, event: dict[str, Any]) -> None:
        with self._lock:
            self._pipe.write(json.dumps(event) + "\n")


def _read(lines: queue.Queue[str | None]) -> None:
    for line in sys.stdin:
        if line == "end\n":
            lines.put(None)
            return
        lines.put(line)
    os._exit(1)  # the one who asked is gone


if __name__ == "__main__":
    main()
    os._exit(0)  # all is closed; taking down the imported libraries would take another second

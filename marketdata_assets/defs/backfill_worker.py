"""A worker process of `marketdata backfill`: executes ranges of partitions, one Dagster run each.

    python -m marketdata_assets.defs.backfill_worker

reads one `RangeRequest` a line from standard input and writes events as lines of JSON to standard
output: WorkerReady, those of the flows, and RangeFinished after each range. It ends after the line
END_OF_REQUESTS. Where its input ends without that line, the process that started it is dead, and
the worker stops at once: all that it stores is atomic, so it may stop at any moment.
"""

from __future__ import annotations

import importlib
import os
import queue
import sys
import threading

import dagster as dg

from marketdata_assets.dagster_ext.runs import PROCESS_TAG, failure_message, open_instance
from marketdata_assets.defs.consolidated import CONSOLIDATE
from marketdata_assets.defs.jobs import INGEST, build_definitions
from marketdata_assets.defs.partitions import RANGE_END, RANGE_START
from marketdata_assets.defs.tags import KIND, RunKind
from marketdata_assets.flows.operate.universe import load_universe
from marketdata_assets.model.events import (
    END_OF_REQUESTS,
    Event,
    ProgressCallback,
    RangeFinished,
    RangeRequest,
    WorkerReady,
    request_from_json,
    to_json,
)
from marketdata_assets.model.partition import Partition
from marketdata_assets.settings.universe import Settings
from marketdata_assets.system import process_id


def main() -> None:
    """Execute ranges until the last request."""
    lines: queue.Queue[str] = queue.Queue()
    on_progress = _EventWriter()
    threading.Thread(target=_read_lines, args=[lines], daemon=True).start()
    settings = load_universe()
    with open_instance() as instance:
        definitions = build_definitions(settings, on_progress)
        _import_slow_libraries()
        on_progress(WorkerReady())
        while (line := lines.get()) != END_OF_REQUESTS:
            request = request_from_json(line)
            job = definitions.resolve_job_def(_job_name(settings, request))
            _execute_range(job, instance, request, on_progress=on_progress)


def _import_slow_libraries() -> None:
    """Import what the first range would otherwise wait for."""
    importlib.import_module("ccxt.async_support")
    importlib.import_module("pyarrow.parquet")


def _job_name(settings: Settings, request: RangeRequest) -> str:
    is_consolidated = Partition.parse(request.start).market in settings.consolidate
    return CONSOLIDATE if is_consolidated else INGEST


def _execute_range(
    job: dg.JobDefinition,
    instance: dg.DagsterInstance,
    request: RangeRequest,
    *,
    on_progress: ProgressCallback,
) -> None:
    tags = {
        RANGE_START: request.start,
        RANGE_END: request.end,
        PROCESS_TAG: process_id(os.getpid()),
    }
    selection = None
    if request.imported:
        tags[KIND] = RunKind.IMPORT.value
        selection = _select_imported(job, request.imported)
    result = job.execute_in_process(
        instance=instance, tags=tags, raise_on_error=False, asset_selection=selection
    )
    on_progress(RangeFinished(request.start, request.end, result.success, failure_message(result)))


def _select_imported(job: dg.JobDefinition, imported: tuple[str, ...]) -> list[dg.AssetKey]:
    """Return the imported raw tables and, with "rollup", all tables made from raw ones."""
    return [
        key
        for key in job.asset_layer.executable_asset_keys
        if key.to_user_string() in imported or (key.path[0] != "raw" and "rollup" in imported)
    ]


class _EventWriter:
    """Writes events to standard output; all else that is printed goes to standard error."""

    def __init__(self) -> None:
        self._pipe = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
        os.dup2(2, 1)
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        with self._lock:
            self._pipe.write(to_json(event) + "\n")


def _read_lines(lines: queue.Queue[str]) -> None:
    for line in map(str.rstrip, sys.stdin):
        lines.put(line)
        if line == END_OF_REQUESTS:
            return
    os._exit(1)


if __name__ == "__main__":
    main()
    os._exit(0)  # everything is closed; unloading the libraries would take another second

"""A worker of `marketdata backfill`: does ranges of partitions as Dagster runs, one after the other,
in one warm process.

    python -m marketdata_assets.defs.backfill_worker

reads one JSON line per range from standard input (`{"start": key, "end": key, "imported": []}`, the
last one the tables of `cli.backfill.Span`) and writes JSON lines to standard output: what `tell`
hears, and `{"done": ..., "success": ...}` after each range. It ends with its input; when whoever
started it is killed, it stops at once. Everything it stores is atomic, so that moment may be any.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import sys
import threading
from typing import Any

import dagster as dg

from marketdata_assets.dagster_ext.launcher import (
    PROCESS_TAG,
    open_instance,
    process_id,
    why_failed,
)
from marketdata_assets.defs.checks import IMPORT, KIND
from marketdata_assets.defs.consolidated import CONSOLIDATE
from marketdata_assets.defs.jobs import INGEST, build_definitions
from marketdata_assets.defs.partitions import RANGE_END, RANGE_START
from marketdata_assets.model.partition import Partition
from marketdata_assets.settings.load import load_settings


def main() -> None:
    """Serve ranges until standard input ends."""
    lines: queue.Queue[str | None] = queue.Queue()
    tell = _Channel()
    threading.Thread(target=_read, args=(lines,), daemon=True).start()
    settings = load_settings()
    with open_instance() as instance:
        definitions = build_definitions(settings, tell)
        _warm_up()
        tell({"ready": True})
        while (line := lines.get()) is not None:
            span = json.loads(line)
            name = (
                CONSOLIDATE
                if Partition.parse(span["start"]).market in settings.consolidate
                else INGEST
            )
            _run(definitions.resolve_job_def(name), instance, span, tell)


def _warm_up() -> None:
    """Import now what the first range would wait for."""
    importlib.import_module("ccxt.async_support")
    importlib.import_module("pyarrow.parquet")


def _run(
    job: dg.JobDefinition, instance: dg.DagsterInstance, span: dict[str, Any], tell: _Channel
) -> None:
    tags = {
        RANGE_START: span["start"],
        RANGE_END: span["end"],
        PROCESS_TAG: process_id(os.getpid()),
    }
    selection = None
    if imported := span["imported"]:
        tags[KIND] = IMPORT
        selection = [
            key
            for key in job.asset_layer.executable_asset_keys
            if key.to_user_string() in imported or _follows(key, imported)
        ]
    result = job.execute_in_process(
        instance=instance, tags=tags, raise_on_error=False, asset_selection=selection
    )
    tell(
        {"done": span, "success": result.success, "run": result.run_id, "says": why_failed(result)}
    )


def _follows(key: dg.AssetKey, imported: list[str]) -> bool:
    """What is made from raw tables is made anew where the base is there."""
    return key.path[0] != "raw" and "rollup" in imported


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

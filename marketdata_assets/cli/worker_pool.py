"""Worker processes that execute ranges of partitions as Dagster runs. Imports no Dagster."""

from __future__ import annotations

import queue
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import IO, cast

from marketdata_assets.cli.dagster_home import dagster_environment
from marketdata_assets.model.events import (
    END_OF_REQUESTS,
    BarsReceived,
    CheckNotPassed,
    Event,
    PartitionFailed,
    RangeFinished,
    RangeRequest,
    WorkerReady,
    from_json,
    to_json,
)
from marketdata_assets.model.partition import Partition
from marketdata_assets.settings.universe import Settings
from marketdata_assets.system import start_module, stop

WORKERS = 2
MONTHS_PER_RUN = 2
WORKER_LOG = "worker.log"
"""What workers print, in Dagster's home below the state folder."""

_Worker = subprocess.Popen[str]


@dataclass(slots=True)
class BackfillOutcome:
    """What the runs of a backfill brought, and everything that went wrong."""

    bars: int = 0
    requests: int = 0
    runs: int = 0
    failures: list[PartitionFailed] = field(default_factory=list)
    checks: list[CheckNotPassed] = field(default_factory=list)
    broken_runs: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """The exit code of the command: 2 or 3 when a partition failed with it, else 1 or 0."""
        codes = {failure.exit_code for failure in self.failures}
        for code in (2, 3):
            if code in codes:
                return code
        has_red_check = not all(check.is_warning for check in self.checks)
        return int(bool(self.failures or self.broken_runs or has_red_check))


def split_into_ranges(
    partitions: Sequence[Partition], imported: tuple[str, ...] = ()
) -> list[RangeRequest]:
    """Return ranges of one market and at most MONTHS_PER_RUN consecutive months; markets alternate.

    `partitions` are ordered by market; `imported` is that of every RangeRequest.
    """
    by_market = [
        _ranges_of_market(sorted(group), imported)
        for _, group in groupby(partitions, key=lambda partition: partition.market)
    ]
    most = max(map(len, by_market), default=0)
    return [ranges[i] for i in range(most) for ranges in by_market if i < len(ranges)]


def _ranges_of_market(
    partitions: Sequence[Partition], imported: tuple[str, ...]
) -> list[RangeRequest]:
    ranges: list[list[Partition]] = []
    for partition in partitions:
        last = ranges[-1] if ranges else []
        if last and last[-1].month.end == partition.month.start and len(last) < MONTHS_PER_RUN:
            last.append(partition)
        else:
            ranges.append([partition])
    return [RangeRequest(each[0].key, each[-1].key, imported) for each in ranges]


def execute_ranges(
    settings: Settings,
    requests: Sequence[RangeRequest],
    on_change: Callable[[BackfillOutcome], None],
) -> BackfillOutcome:
    """Execute the ranges in worker processes; call `on_change` after every event."""
    pool = _WorkerPool(deque(requests))
    environment = dagster_environment(settings)
    lines: queue.Queue[tuple[_Worker, str | None]] = queue.Queue()
    workers: list[_Worker] = []
    try:
        for _ in range(min(WORKERS, len(requests))):
            workers.append(_start_worker(environment))
            threading.Thread(target=_read_lines, args=(workers[-1], lines), daemon=True).start()
        running = len(workers)
        while running:
            worker, line = lines.get()
            if line is None:
                running -= 1
                pool.on_worker_exit(worker)
            else:
                pool.on_event(from_json(line), worker)
                on_change(pool.outcome)
    finally:
        stop(*workers)
        for worker in workers:
            with suppress(BrokenPipeError):
                _stdin(worker).close()
    return pool.outcome


def _start_worker(environment: dict[str, str]) -> _Worker:
    with Path(environment["DAGSTER_HOME"], WORKER_LOG).open("a", encoding="utf-8") as log:
        return start_module(
            ["marketdata_assets.defs.backfill_worker"],
            environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.fileno(),
        )


def _read_lines(worker: _Worker, lines: queue.Queue[tuple[_Worker, str | None]]) -> None:
    """Forward what a worker writes; None follows when it has ended."""
    with cast(IO[str], worker.stdout) as stdout:
        for line in stdout:
            lines.put((worker, line))
    lines.put((worker, None))


def _stdin(worker: _Worker) -> IO[str]:
    return cast(IO[str], worker.stdin)


@dataclass(slots=True)
class _WorkerPool:
    """The ranges that no worker has yet, and what came of the others."""

    waiting: deque[RangeRequest]
    outcome: BackfillOutcome = field(default_factory=BackfillOutcome)

    def on_event(self, event: Event, worker: _Worker) -> None:
        """Record an event; send the worker its next range when it waits for one."""
        match event:
            case BarsReceived():
                self.outcome.bars += event.bars
                self.outcome.requests += event.requests
            case PartitionFailed():
                self.outcome.failures.append(event)
            case CheckNotPassed():
                self.outcome.checks.append(event)
            case RangeFinished():
                self._record_run(event)
                self._send_next(worker)
            case WorkerReady():
                self._send_next(worker)
            case _:
                pass  # events of other commands

    def on_worker_exit(self, worker: _Worker) -> None:
        """Record a worker that ended by itself; after a crash no range is begun any more.

        What its run had stored is stored, and the next backfill plans the rest.
        """
        code = worker.wait()
        if code != 0:
            self.outcome.broken_runs.append(
                f"a worker ended with code {code}; see dagster/{WORKER_LOG} in the state folder, "
                "then run the command again"
            )
            self.waiting.clear()

    def _record_run(self, run: RangeFinished) -> None:
        self.outcome.runs += 1
        is_explained = any(run.start <= f.partition <= run.end for f in self.outcome.failures)
        if not run.success and not is_explained:
            self.outcome.broken_runs.append(f"{run.start} .. {run.end}: {run.message.strip()}")

    def _send_next(self, worker: _Worker) -> None:
        line = to_json(self.waiting.popleft()) if self.waiting else END_OF_REQUESTS
        with suppress(BrokenPipeError):  # it has died: its exit is the next that is read
            _stdin(worker).write(line + "\n")
            _stdin(worker).flush()

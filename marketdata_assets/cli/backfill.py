"""`marketdata backfill`: plan, hand ranges to warm workers, show how far they are, say how it
ended.
"""

from __future__ import annotations

import json
import selectors
import subprocess
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from marketdata_assets.cli.common import err, out, plain
from marketdata_assets.cli.dagster_home import dagster_environment
from marketdata_assets.flows.fetch.plan import Task
from marketdata_assets.model.partition import Partition
from marketdata_assets.settings.universe import Settings
from marketdata_assets.system import start_module, stop

WORKERS = 2
MONTHS_A_RUN = 2


class Span(NamedTuple):
    """A range of partitions for one run. `imported`: raw tables that files have told; then no venue is
    asked, only they are looked at, and rollups are made where "rollup" is among them.
    """

    first: Partition
    last: Partition
    imported: tuple[str, ...] = ()


@dataclass(slots=True)
class Outcome:
    """How a backfill went. `exit_code` is the command's."""

    bars: int = 0
    requests: int = 0
    runs: int = 0
    failed: list[dict[str, Any]] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)
    broken_runs: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0 all done, else the worst of what happened."""
        codes = [int(f["exit_code"]) for f in self.failed]
        if 2 in codes:
            return 2
        if 3 in codes:
            return 3
        return (
            1
            if self.failed
            or self.broken_runs
            or not all(check.get("mild") for check in self.checks)
            else 0
        )


def backfill_tasks(settings: Settings, tasks: list[Task], console: Console = out) -> int:
    """Run these tasks through Dagster, with a progress bar, and say on the console how it ended; the
    exit code.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    total = sum(task.bars for task in tasks)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("bars"),
        TextColumn("{task.fields[requests]} requests"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=err) as progress:
        bar = progress.add_task(f"{len(tasks)} partitions", total=total, requests=0)
        outcome = run_ranges(
            settings,
            ranges(tasks),
            lambda o: progress.update(bar, completed=min(o.bars, total), requests=o.requests),
        )
    print_trouble(outcome)
    done = (
        f"{outcome.bars} bars received in {outcome.requests} requests, "
        if total or outcome.requests
        else ""
    )
    console.print(f"{done}{len(tasks)} partitions in {outcome.runs} runs")
    return outcome.exit_code


def print_trouble(outcome: Outcome) -> None:
    """A line for every partition that failed, every red check and every broken run."""
    for failure in outcome.failed:
        err.print(
            f"[red]failed[/red] {failure['failed']}: {plain(failure['says'])}", highlight=False
        )
    for check in outcome.checks:
        err.print(
            f"[yellow]check[/yellow] {check['check']} {check['partition']}: {plain(check['says'])}",
            highlight=False,
        )
    for run in outcome.broken_runs:
        err.print(f"[red]run failed[/red] {plain(run)}", highlight=False)


def ranges(tasks: Sequence[Task], imported: tuple[str, ...] = ()) -> list[Span]:
    """Partitions as ranges of one market and at most MONTHS_A_RUN consecutive months; markets take
    turns.
    """
    found: list[list[Span]] = []
    for _, group in groupby((task.partition for task in tasks), key=lambda p: p.market):
        mine: list[list[Partition]] = []
        for partition in sorted(group):
            if (
                mine
                and mine[-1][-1].month.end == partition.month.start
                and len(mine[-1]) < MONTHS_A_RUN
            ):
                mine[-1].append(partition)
            else:
                mine.append([partition])
        found.append([Span(run[0], run[-1], imported) for run in mine])
    longest = max((len(f) for f in found), default=0)
    return [f[i] for i in range(longest) for f in found if i < len(f)]


def run_ranges(
    settings: Settings, spans: Sequence[Span], show: Callable[[Outcome], None]
) -> Outcome:
    """Do the ranges in worker processes; `show` is called after every message."""
    outcome, waiting = Outcome(), deque(spans)
    environment = dagster_environment(settings)
    with selectors.DefaultSelector() as selector:
        workers = [_start_worker(environment, selector) for _ in range(min(WORKERS, len(spans)))]
        try:
            while selector.get_map():
                for key, _ in selector.select():
                    worker = key.data
                    line = worker.stdout.readline()
                    if not line:
                        selector.unregister(worker.stdout)
                        _mourn(worker, outcome, waiting)
                        continue
                    _hear(json.loads(line), worker, outcome, waiting)
                    show(outcome)
        finally:
            for worker in workers:
                stop(worker)
                for pipe in (worker.stdin, worker.stdout):
                    with suppress(BrokenPipeError):
                        pipe.close()  # type: ignore[union-attr]
    return outcome


def _start_worker(
    environment: dict[str, str], selector: selectors.BaseSelector
) -> subprocess.Popen[str]:
    with Path(environment["DAGSTER_HOME"], "worker.log").open("a", encoding="utf-8") as log:
        worker = start_module(
            ["marketdata_assets.defs.backfill_worker"],
            environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.fileno(),
        )
    selector.register(worker.stdout, selectors.EVENT_READ, worker)  # type: ignore[arg-type]
    return worker


def _hear(
    event: dict[str, Any], worker: subprocess.Popen[str], outcome: Outcome, waiting: deque[Span]
) -> None:
    if "bars" in event:
        outcome.bars += event["bars"]
        outcome.requests += event["requests"]
    elif "failed" in event:
        outcome.failed.append(event)
    elif "check" in event:
        outcome.checks.append(event)
    elif "done" in event:
        outcome.runs += 1
        known = any(
            event["done"]["start"] <= f["failed"] <= event["done"]["end"] for f in outcome.failed
        )
        if not event["success"] and not known:
            outcome.broken_runs.append(
                f"{event['done']['start']} .. {event['done']['end']}: {event['says'].strip()}"
            )
    if "ready" in event or "done" in event:
        assert worker.stdin is not None
        if waiting:
            span = waiting.popleft()
            worker.stdin.write(
                json.dumps(
                    {"start": span.first.key, "end": span.last.key, "imported": span.imported}
                )
                + "\n"
            )
        else:
            worker.stdin.write("end\n")
        worker.stdin.flush()


def _mourn(worker: subprocess.Popen[str], outcome: Outcome, waiting: deque[Span]) -> None:
    code = worker.wait()
    if code != 0:
        outcome.broken_runs.append(
            f"a worker ended with code {code}; its log is worker.log in the state folder"
        )
        waiting.clear()

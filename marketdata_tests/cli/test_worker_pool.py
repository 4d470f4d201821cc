"""Worker processes of a backfill: what they report is counted, and a dead one is reported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from marketdata_assets.cli import worker_pool
from marketdata_assets.cli.worker_pool import BackfillOutcome, execute_ranges, split_into_ranges
from marketdata_assets.model.events import CheckNotPassed, PartitionFailed, RangeRequest
from marketdata_assets.model.partition import Partition
from marketdata_tests.conftest import Universe

pytestmark = pytest.mark.server

WORKER = """
import json, sys

def send(*events):
    sys.stdout.write("".join(json.dumps(event) + "\\n" for event in events))
    sys.stdout.flush()

send({"event": "WorkerReady"})
for line in sys.stdin:
    if line == "end\\n":
        sys.exit(0)
    request = json.loads(line)
    finished = {"event": "RangeFinished", "start": request["start"], "end": request["end"]}
    ANSWER
sys.exit(9)
"""
"""A worker that does no work; ANSWER is what it does with a request."""
RECEIVE = """send(
        {"event": "BarsReceived", "bars": 10, "requests": 2},
        {"event": "RowsProcessed", "rows": 1},
        finished | {"success": True, "message": ""},
    )"""
FAIL = """send(
        {"event": "PartitionFailed", "partition": request["end"], "message": "no", "exit_code": 3},
        finished | {"success": False, "message": "a partition failed"},
    )"""
BREAK = """send(finished | {"success": False, "message": "no space left\\n"})"""
CRASH = "sys.exit(7)"
DIE_BEFORE_NEXT = """import os
    os.close(0)
    send(finished | {"success": True, "message": ""})
    sys.exit(7)"""
REQUESTS = [RangeRequest(f"venue:A-B|2024-0{n}-01", f"venue:A-B|2024-0{n}-01") for n in range(1, 6)]


@pytest.fixture
def execute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, universe: Universe) -> Any:
    """`execute(answer)`: the outcome of REQUESTS at workers with that answer, and all changes."""
    settings, shown = universe("http://127.0.0.1:1"), list[tuple[int, int]]()
    environment = {"DAGSTER_HOME": str(tmp_path)}
    monkeypatch.setattr(worker_pool, "dagster_environment", lambda settings: environment)

    def run(answer: str) -> tuple[BackfillOutcome, list[tuple[int, int]]]:
        def start(arguments: Any, environment: Any, **options: Any) -> subprocess.Popen[str]:
            assert arguments == ["marketdata_assets.defs.backfill_worker"]
            command = [sys.executable, "-c", WORKER.replace("ANSWER", answer)]
            return subprocess.Popen(command, text=True, start_new_session=True, **options)

        monkeypatch.setattr(worker_pool, "start_module", start)
        outcome = execute_ranges(settings, REQUESTS, lambda o: shown.append((o.bars, o.runs)))
        return outcome, shown

    return run


@pytest.mark.timeout(60)
def test_events_that_arrive_in_one_write_are_all_counted(execute: Any) -> None:
    """A worker that waits for its next range writes nothing more that would wake the reader."""
    outcome, shown = execute(RECEIVE)
    assert (outcome.bars, outcome.requests, outcome.runs, outcome.exit_code) == (50, 10, 5, 0)
    assert shown[-1] == (50, 5)
    assert len(shown) == 2 + 5 * 3


@pytest.mark.timeout(60)
def test_a_failed_partition_explains_its_run_and_another_run_is_broken(execute: Any) -> None:
    outcome, _ = execute(FAIL)
    assert (len(outcome.failures), outcome.broken_runs, outcome.exit_code) == (5, [], 3)
    outcome, _ = execute(BREAK)
    assert (outcome.runs, outcome.exit_code) == (5, 1)
    assert sorted(outcome.broken_runs) == [f"{r.start} .. {r.end}: no space left" for r in REQUESTS]


@pytest.mark.timeout(60)
def test_after_a_crash_no_range_is_begun(execute: Any) -> None:
    """The other worker may have begun one range before the crash is seen."""
    outcome, _ = execute(CRASH)
    assert (outcome.runs, outcome.exit_code) == (0, 1)
    assert 1 <= len(outcome.broken_runs) <= 2
    assert "a worker ended with code 7" in outcome.broken_runs[0]


@pytest.mark.timeout(60)
def test_a_worker_that_dies_before_it_takes_a_range_is_a_broken_run(execute: Any) -> None:
    outcome, _ = execute(DIE_BEFORE_NEXT)
    assert (outcome.bars, outcome.exit_code) == (0, 1)
    assert 1 <= outcome.runs <= 2
    assert all("a worker ended with code 7" in line for line in outcome.broken_runs)


def failure(exit_code: int) -> PartitionFailed:
    return PartitionFailed("venue:A-B|2024-01-01", "no", exit_code)


def check(is_warning: bool) -> CheckNotPassed:
    return CheckNotPassed("raw/ohlcv_1m gaps", "venue:A-B|2024-01-01", "no", is_warning)


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        (BackfillOutcome(), 0),
        (BackfillOutcome(checks=[check(is_warning=True)]), 0),
        (BackfillOutcome(checks=[check(is_warning=True), check(is_warning=False)]), 1),
        (BackfillOutcome(broken_runs=["a run"]), 1),
        (BackfillOutcome(failures=[failure(1)]), 1),
        (BackfillOutcome(failures=[failure(1), failure(3)]), 3),
        (BackfillOutcome(failures=[failure(3), failure(2)], checks=[check(is_warning=False)]), 2),
    ],
)
def test_the_exit_code_is_that_of_the_worst(outcome: BackfillOutcome, code: int) -> None:
    assert outcome.exit_code == code


def test_ranges_hold_two_consecutive_months_and_markets_alternate() -> None:
    keys = [
        *("venue:A-B|2024-03-01", "venue:A-B|2024-01-01", "venue:A-B|2024-02-01"),
        *("venue:A-B|2024-05-01", "venue:C-D|2024-01-01", "venue:C-D|2023-12-01"),
    ]
    ranges = split_into_ranges([Partition.parse(key) for key in keys], ("raw/ohlcv_1m",))
    assert ranges == [
        RangeRequest("venue:A-B|2024-01-01", "venue:A-B|2024-02-01", ("raw/ohlcv_1m",)),
        RangeRequest("venue:C-D|2023-12-01", "venue:C-D|2024-01-01", ("raw/ohlcv_1m",)),
        RangeRequest("venue:A-B|2024-03-01", "venue:A-B|2024-03-01", ("raw/ohlcv_1m",)),
        RangeRequest("venue:A-B|2024-05-01", "venue:A-B|2024-05-01", ("raw/ohlcv_1m",)),
    ]
    assert split_into_ranges([]) == []

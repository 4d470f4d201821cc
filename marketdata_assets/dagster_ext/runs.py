"""Runs and the processes that execute them: a run fails when its process dies."""

from __future__ import annotations

import os
from pathlib import Path

import dagster as dg

from marketdata_assets.system import is_alive, lock_file

PROCESS_TAG = "marketdata/process"
"""The tag that names a run's process, as `process_id` writes it."""
RUN_LOGS = "run_logs"
"""Where in DAGSTER_HOME the output of runs lies until they have succeeded, or are pruned."""
IN_PROGRESS = [
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.CANCELING,
]
_MESSAGE_LENGTH = 2000


def open_instance() -> dg.DagsterInstance:
    """Return the instance in DAGSTER_HOME, after the runs of dead processes were ended.

    Processes that open it at once take turns: two that create its tables at once would fail.
    """
    with lock_file(Path(os.environ["DAGSTER_HOME"], "opening.lock")):
        instance = dg.DagsterInstance.get()
        end_dead_runs(instance)
        return instance


def end_dead_runs(instance: dg.DagsterInstance, *, include_untagged: bool = False) -> int:
    """End the runs whose process is dead, and return how many there were.

    `include_untagged` also ends runs that have no process yet. It is right only while nothing in
    this instance launches runs: then whatever was launching them is dead.
    """
    # A run of `marketdata backfill` has its process before it starts.
    unfinished = dg.RunsFilter(statuses=[*IN_PROGRESS, dg.DagsterRunStatus.NOT_STARTED])
    dead = [
        run
        for run in instance.get_runs(unfinished)
        if not has_process(run)
        and (PROCESS_TAG in run.tags or (include_untagged and run.status in IN_PROGRESS))
    ]
    reason = "its process is gone: killed, or ended with the machine"
    return sum(end_run(instance, run.run_id, reason) for run in dead)


def end_run(instance: dg.DagsterInstance, run_id: str, reason: str) -> bool:
    """Report the end of a run whose process is dead, and free its pool slots.

    Returns False, and changes nothing, where the run has reported its end itself.
    """
    run = instance.get_run_by_id(run_id)
    if run is None or run.is_finished:
        return False
    if run.status is dg.DagsterRunStatus.CANCELING:
        instance.report_run_canceled(run, reason)
    else:
        instance.report_run_failed(run, reason)
    instance.event_log_storage.free_concurrency_slots_for_run(run_id)
    return True


def has_process(run: dg.DagsterRun) -> bool:
    """Whether the process that the run's tag names lives; without a tag there is none."""
    return is_alive(run.tags.get(PROCESS_TAG, ""))


def failure_message(result: dg.ExecuteInProcessResult) -> str:
    """Return the message of the first step that failed in this process; empty where none did."""
    for event in result.all_events:
        if event.is_step_failure:
            return str(event.step_failure_data.error_display_string)[:_MESSAGE_LENGTH]
    return ""

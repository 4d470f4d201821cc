"""Runs as Celery tasks on many workers; the run of a dead worker has failed.

A worker holds a lock in the ledger's database while it executes a run. The lock ends with its
process, on whatever machine that is: a lock that can be acquired proves that its run is dead.

A worker is

    celery -A dagster_celery.app worker

with a module `dagster_celery_config` on its path that holds what `celery_config` returns;
`marketdata serve worker` writes that module and starts the worker.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import cache
from typing import Any

import dagster as dg
from celery.signals import task_postrun, task_prerun

# What a launcher answers to run monitoring; Dagster exports neither.
from dagster._core.launcher import CheckRunHealthResult, WorkerStatus

# The arguments of a run's task, from which its run id is read: Celery's signals carry nothing else.
from dagster._grpc.types import ExecuteRunArgs
from dagster._serdes import unpack_value
from dagster_celery.config import TASK_EXECUTE_JOB_NAME
from dagster_celery.launcher import CeleryRunLauncher

from marketdata_assets.errors import MarketDataError
from marketdata_assets.flows.operate.universe import load_universe
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.settings.fields import reveal_secret

_DAYS_OF_A_RUN = 7


def celery_config() -> dict[str, Any]:
    """Return the configuration of a Celery worker of this universe."""
    _lock_runs()
    return {
        "broker_url": reveal_secret(load_universe().broker),
        "broker_connection_retry_on_startup": True,
        # after that time the broker gives a task to a second worker
        "broker_transport_options": {"visibility_timeout": _DAYS_OF_A_RUN * 86400},
        # Dagster's own storage holds what became of a run
        "result_backend": "disabled://",
        "task_ignore_result": True,
        # a worker reserves no task beyond those that it executes
        "task_acks_late": True,
        "worker_prefetch_multiplier": 1,
        "worker_max_tasks_per_child": 100,
        "worker_hijack_root_logger": False,
    }


def _lock_runs() -> None:
    """Make this worker's processes hold the lock of each run that they execute."""
    lock = ExitStack()

    def acquire(task: Any = None, kwargs: Any = None, **_: Any) -> None:
        if task.name == TASK_EXECUTE_JOB_NAME:
            run_id = unpack_value(kwargs["execute_job_args_packed"], as_type=ExecuteRunArgs).run_id
            lock.enter_context(_ledger().lock(_lock_name(run_id), wait=False))

    def release(**_: Any) -> None:
        lock.close()

    task_prerun.connect(acquire, weak=False)
    task_postrun.connect(release, weak=False)


@cache
def _ledger() -> Ledger:
    """Return the ledger of this process; a worker opens it in the child that executes the run."""
    settings = load_universe()
    return Ledger(settings.state, reveal_secret(settings.database))


def _lock_name(run_id: str) -> str:
    return f"run {run_id}"


class WorkerRunLauncher(CeleryRunLauncher):
    """Gives runs to Celery's workers, and knows by their locks which of them are dead."""

    @property
    def supports_resume_run(self) -> bool:
        """Whether a run can be resumed: no, because a new run fetches only what is not stored."""
        return False

    def get_run_worker_debug_info(
        self, run: dg.DagsterRun, include_container_logs: bool | None = True
    ) -> str | None:
        """Return nothing: the base class would ask Celery for results, which are not kept."""
        return None

    def check_run_worker_health(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        """Return FAILED for a started run whose lock is free and that has not reported its end."""
        try:
            with _ledger().lock(_lock_name(run.run_id), wait=False) as is_free:
                current = self._instance.get_run_by_id(run.run_id) if is_free else None
        except MarketDataError as error:  # the database is away; the next check may reach it
            return CheckRunHealthResult(WorkerStatus.RUNNING, str(error))
        if current is None:
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        if current.is_finished:
            return CheckRunHealthResult(WorkerStatus.SUCCESS)
        message = "its worker is gone: killed, or ended with its machine"
        return CheckRunHealthResult(WorkerStatus.FAILED, message)

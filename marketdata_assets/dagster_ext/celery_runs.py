"""Runs as Celery tasks on many workers, and the truth about them: one whose worker is gone has failed,
and says so.

A worker holds a lock in the ledger's database while it works on a run. The lock ends with its
process, on whatever machine that is; so whoever gets it knows that the run is dead. A worker is

    celery -A dagster_celery.app worker

with a module `dagster_celery_config` on its path that is made of `celery_config()`; `marketdata
serve worker` does that.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import cache
from typing import Any

import dagster as dg
from celery.signals import task_postrun, task_prerun
from dagster._core.launcher import CheckRunHealthResult, WorkerStatus
from dagster._grpc.types import ExecuteRunArgs
from dagster._serdes import unpack_value
from dagster_celery.config import TASK_EXECUTE_JOB_NAME
from dagster_celery.launcher import CeleryRunLauncher

from marketdata_assets.errors import MarketDataError
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.settings.fields import reveal_secret
from marketdata_assets.settings.load import load_settings


def celery_config() -> dict[str, Any]:
    """What a worker of this universe is told. Results are not kept: what became of a run stands in
    Dagster's own storage.
    """
    held = ExitStack()

    def begin(task: Any = None, kwargs: Any = None, **_: Any) -> None:
        if task.name == TASK_EXECUTE_JOB_NAME:
            run_id = unpack_value(kwargs["execute_job_args_packed"], as_type=ExecuteRunArgs).run_id
            held.enter_context(_ledger().lock(_lock_of(run_id), wait=False))

    def end(**_: Any) -> None:
        held.close()

    task_prerun.connect(begin, weak=False)
    task_postrun.connect(end, weak=False)
    return {
        "broker_url": reveal_secret(load_settings().broker),
        "broker_connection_retry_on_startup": True,
        "broker_transport_options": {
            "visibility_timeout": 7 * 86400
        },  # a run is never given out twice because it takes long
        "result_backend": "disabled://",
        "task_ignore_result": True,
        "task_acks_late": True,  # with this, a worker holds back no run beside those that it works on
        "worker_prefetch_multiplier": 1,
        "worker_max_tasks_per_child": 100,
        "worker_hijack_root_logger": False,
    }


@cache
def _ledger() -> Ledger:
    """The ledger of this process, opened once; a worker opens it in the child that does the run."""
    settings = load_settings()
    return Ledger(settings.state, reveal_secret(settings.database))


def _lock_of(run_id: str) -> str:
    return f"run {run_id}"


class WorkerRunLauncher(CeleryRunLauncher):
    """Gives runs to the workers, and knows whether the one that works on a run still lives."""

    @property
    def supports_resume_run(self) -> bool:
        """A run of a dead worker is made again, not resumed: nothing that is stored is fetched
        twice.
        """
        return False

    def get_run_worker_debug_info(
        self, run: dg.DagsterRun, include_container_logs: bool | None = True
    ) -> str | None:
        """Nothing: what a run printed is in its logs."""
        return None

    def check_run_worker_health(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        """A run that has begun is dead when nobody holds its lock and it has not said that it
        ended.
        """
        try:
            with _ledger().lock(_lock_of(run.run_id), wait=False) as free:
                now = self._instance.get_run_by_id(run.run_id) if free else None
        except MarketDataError as error:  # nobody knows; the next look may
            return CheckRunHealthResult(WorkerStatus.RUNNING, str(error))
        if now is None:
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        if now.is_finished:
            return CheckRunHealthResult(WorkerStatus.SUCCESS)
        return CheckRunHealthResult(
            WorkerStatus.FAILED, "its worker is gone: killed, or ended with its machine"
        )

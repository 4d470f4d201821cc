"""A launcher that executes each run in a process of its own.

The processes are children of Dagster's daemon and not of the code server, so that the code server
may die or be reloaded. When the daemon itself is killed, they continue and finish.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import dagster as dg

# The base class of launchers and the types of its methods: Dagster loads launchers from
# dagster.yaml, but exports none of these.
from dagster._core.launcher import CheckRunHealthResult, LaunchRunContext, RunLauncher, WorkerStatus

# Makes the command line that Dagster's own launcher gives to a run.
from dagster._grpc.types import ExecuteRunArgs

# The interface of everything that dagster.yaml names.
from dagster._serdes import ConfigurableClass, ConfigurableClassData

from marketdata_assets.dagster_ext.runs import (
    IN_PROGRESS,
    PROCESS_TAG,
    RUN_LOGS,
    end_run,
    has_process,
)
from marketdata_assets.system import process_id, signal_group

CHECK_SECONDS = 10.0
"""How often a process is compared with the status of its run."""
_GRACE = ((signal.SIGTERM, 8.0), (signal.SIGKILL, 2.0))
"""The signals that end what is left when the daemon ends, and the seconds that each is given."""
# The process waits until its tag is written. When the daemon is killed in between, the process ends
# without having done anything.
_GATE = ["/bin/sh", "-c", 'read -r go && exec "$0" "$@" </dev/null']


class ProcessRunLauncher(RunLauncher[dg.DagsterInstance], ConfigurableClass):
    """Executes each run in a process, and reports its end as soon as the process ends."""

    def __init__(self, inst_data: ConfigurableClassData | None = None) -> None:
        self._inst_data = inst_data
        self._children: dict[threading.Thread, subprocess.Popen[bytes]] = {}
        super().__init__()  # type: ignore[no-untyped-call]

    @property
    def inst_data(self) -> ConfigurableClassData | None:
        """Return the part of dagster.yaml that names this class."""
        return self._inst_data

    @classmethod
    def config_type(cls) -> dict[str, Any]:
        """Return the settings in dagster.yaml: none."""
        return {}

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]
    ) -> Self:
        """Build the launcher that dagster.yaml names."""
        return cls(inst_data)

    def launch_run(self, context: LaunchRunContext) -> None:
        """Start the run's process; its output is kept in `run_logs` until it has succeeded."""
        run, origin = context.dagster_run, context.job_code_origin
        assert origin is not None, "a run that is launched has a code location"
        execution = ExecuteRunArgs(origin, run.run_id, self._instance.get_ref())
        arguments = execution.get_command_args()[-3:]
        log = Path(self._instance.root_directory, RUN_LOGS, f"{run.run_id}.log")
        log.parent.mkdir(exist_ok=True)
        with log.open("ab") as output:
            process = subprocess.Popen(
                [*_GATE, sys.executable, "-m", "dagster", *arguments],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                process_group=0,
            )
        self._start_watch(process, run.run_id, log)
        assert process.stdin is not None
        with suppress(BrokenPipeError), process.stdin as gate:
            self._instance.add_run_tags(run.run_id, {PROCESS_TAG: process_id(process.pid)})
            gate.write(b"go\n")

    def _start_watch(self, process: subprocess.Popen[bytes], run_id: str, log: Path) -> None:
        name = f"run-{run_id[:8]}"
        arguments = (process, run_id, log)
        thread = threading.Thread(target=self._watch, args=arguments, name=name, daemon=True)
        self._children[thread] = process
        thread.start()

    def _watch(self, process: subprocess.Popen[bytes], run_id: str, log: Path) -> None:
        """Wait for the process and report how it ended."""
        code = self._wait(process, run_id)
        signal_group(process.pid, signal.SIGKILL)  # what the process left behind
        end = (
            f"ended with code {code}"
            if code >= 0
            else f"was killed by signal {-code} ({signal.strsignal(-code)})"
        )
        end_run(self._instance, run_id, f"its process {end}; its last output is in {log}")
        if self._status(run_id) is dg.DagsterRunStatus.SUCCESS:
            log.unlink(missing_ok=True)
        del self._children[threading.current_thread()]

    def _wait(self, process: subprocess.Popen[bytes], run_id: str) -> int:
        """Return the exit code; a process that still lives when its run has ended is killed."""
        run_has_ended = False
        while True:
            try:
                return process.wait(CHECK_SECONDS)
            except subprocess.TimeoutExpired:
                if run_has_ended:  # since one interval, in which it could have ended
                    process.kill()
                run_has_ended = self._status(run_id) not in IN_PROGRESS

    def _status(self, run_id: str) -> dg.DagsterRunStatus | None:
        run = self._instance.get_run_by_id(run_id)
        return run.status if run else None

    def terminate(self, run_id: str) -> bool:
        """Ask the run's process to end; the process, or `end_dead_runs`, reports the end."""
        run = self._instance.get_run_by_id(run_id)
        if run is None or run.is_finished:
            return False
        self._instance.report_run_canceling(run)
        if not has_process(run):
            reason = "it was canceled when its process was dead already"
            return end_run(self._instance, run_id, reason)
        host, pid, _ = run.tags[PROCESS_TAG].split(":")
        if host != socket.gethostname():
            message = f"its process runs on another host, {host}: end it there"
            self._instance.report_engine_event(message, run)
            return False
        os.kill(int(pid), signal.SIGTERM)
        return True

    @property
    def supports_check_run_worker_health(self) -> bool:
        """Whether run monitoring may ask this launcher about its runs."""
        return True

    def check_run_worker_health(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        """Return whether the process of a started run lives; its tag is older than its start."""
        if PROCESS_TAG not in run.tags:
            return CheckRunHealthResult(WorkerStatus.NOT_FOUND, "the run names no process")
        if has_process(run):
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        message = f"its process {run.tags[PROCESS_TAG]} is gone"
        return CheckRunHealthResult(WorkerStatus.FAILED, message)

    def dispose(self) -> None:
        """End the processes that this daemon started, and wait until they have reported that."""
        watches = list(self._children.items())
        for kind, seconds in _GRACE:
            for thread, process in watches:
                if thread.is_alive():
                    process.send_signal(kind)
            deadline = time.monotonic() + seconds
            for thread, _ in watches:
                thread.join(max(0.0, deadline - time.monotonic()))

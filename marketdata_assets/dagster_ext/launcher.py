"""Runs as processes of their own, and the truth about them: a run whose process is gone has ended, and
says why.

    python -m marketdata_assets.dagster_ext.launcher run -w FILE

is Dagster's daemon, which starts them. They are children of the daemon and not of the code server,
so that a code server may die or be reloaded; when the daemon itself is killed, they go on and
finish.
"""

from __future__ import annotations

import fcntl
import logging
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
from dagster._core.launcher import CheckRunHealthResult, LaunchRunContext, RunLauncher, WorkerStatus
from dagster._grpc.types import ExecuteRunArgs
from dagster._serdes import ConfigurableClass, ConfigurableClassData

PROCESS_TAG = "marketdata/process"
RUN_LOGS = "run_logs"
"""Where in DAGSTER_HOME the output of runs lies until they have succeeded, or are pruned."""
LOOK_SECONDS = 10.0
"""How often somebody looks for runs without a process and for processes without a run."""
_LAST_WORDS = 8.0
_ALIVE = [dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.CANCELING]
# The process waits until its tag is written. When we are killed in between, it ends without having
# done anything.
_GATE = ["/bin/sh", "-c", 'read -r go && exec "$0" "$@" </dev/null']


# --------------------------------------------------------------------------------- processes
def process_id(pid: int) -> str:
    """This process and none after it: host, pid, and when it began, in ticks of which boot."""
    return f"{socket.gethostname()}:{pid}:{_begun(pid)}"


def _begun(pid: int | str) -> str:
    """When a living process began; empty for one that is gone, or dead and only not yet buried."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[0] in "ZX" else f"{fields[19]}@{boot[:8]}"


def lives(process: str) -> bool:
    """Whether a process named by `process_id` lives; one on another host is believed to."""
    host, pid, begun = [*process.split(":"), "", "", ""][:3]
    if host != socket.gethostname():
        return bool(host)
    return bool(begun) and _begun(pid) == begun


# --------------------------------------------------------------------------------- the truth about
def end_run(instance: dg.DagsterInstance, run_id: str, why: str) -> bool:
    """Report the end of a run whose process is gone, and give its pool slots back; False when it had
    said so itself.
    """
    run = instance.get_run_by_id(run_id)
    if run is None or run.is_finished:
        return False
    if run.status is dg.DagsterRunStatus.CANCELING:
        instance.report_run_canceled(run, why)
    else:
        instance.report_run_failed(run, why)
    instance.event_log_storage.free_concurrency_slots_for_run(run_id)
    return True


def end_dead_runs(instance: dg.DagsterInstance, sole: bool = False) -> int:
    """End the runs of dead processes; how many there were.

    `sole` says that nobody is launching runs now: then one without a process was being launched by
    somebody who died.
    """
    # a run of `marketdata backfill` has its process before it has begun
    unfinished = instance.get_runs(
        dg.RunsFilter(statuses=[*_ALIVE, dg.DagsterRunStatus.NOT_STARTED])
    )
    dead = [
        r
        for r in unfinished
        if (r.tags.get(PROCESS_TAG) or (sole and r.status in _ALIVE)) and not _has_process(r)
    ]
    return sum(
        end_run(instance, run.run_id, "its process is gone: killed, or ended with the machine")
        for run in dead
    )


def _has_process(run: dg.DagsterRun) -> bool:
    return lives(run.tags.get(PROCESS_TAG, ""))


def why_failed(result: dg.ExecuteInProcessResult) -> str:
    """What a run that was executed in this process says of its first failure; empty when it has
    none.
    """
    for event in result.all_events:
        if event.is_step_failure:
            return str(event.step_failure_data.error_display_string)[:2000]
    return ""


def open_instance(sole: bool = False) -> dg.DagsterInstance:
    """The instance in DAGSTER_HOME without dead runs; one process at a time, as two that create its
    tables at once would fail.
    """
    with Path(os.environ["DAGSTER_HOME"], "opening.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        instance = dg.DagsterInstance.get()
        end_dead_runs(instance, sole)
        return instance


# --------------------------------------------------------------------------------- the launcher
class ProcessRunLauncher(RunLauncher[dg.DagsterInstance], ConfigurableClass):
    """Each run is a process; its end is reported as soon as it ends, whatever ended it."""

    def __init__(self, inst_data: ConfigurableClassData | None = None) -> None:
        self._inst_data = inst_data
        self._children: dict[threading.Thread, subprocess.Popen[bytes]] = {}
        super().__init__()  # type: ignore[no-untyped-call]

    @property
    def inst_data(self) -> ConfigurableClassData | None:
        """What dagster.yaml says of it."""
        return self._inst_data

    @classmethod
    def config_type(cls) -> dict[str, Any]:
        """No settings."""
        return {}

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]
    ) -> Self:
        """Dagster's way to build it from dagster.yaml."""
        return cls(inst_data)

    def launch_run(self, context: LaunchRunContext) -> None:
        """Start the run's process; its output lies in run_logs until it has succeeded."""
        run, origin = context.dagster_run, context.job_code_origin
        assert origin is not None, "a run that is launched has a code location"
        arguments = ExecuteRunArgs(origin, run.run_id, self._instance.get_ref()).get_command_args()[
            -3:
        ]
        log = Path(self._instance.root_directory, RUN_LOGS, f"{run.run_id}.log")
        log.parent.mkdir(exist_ok=True)
        with log.open("ab") as out:
            process = subprocess.Popen(
                [*_GATE, sys.executable, "-m", "dagster", *arguments],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
                process_group=0,
            )
        watch = threading.Thread(
            target=self._watch,
            args=(process, run.run_id, log),
            name=f"run-{run.run_id[:8]}",
            daemon=True,
        )
        self._children[watch] = process
        watch.start()
        assert process.stdin is not None
        with suppress(BrokenPipeError), process.stdin as gate:
            self._instance.add_run_tags(run.run_id, {PROCESS_TAG: process_id(process.pid)})
            gate.write(b"go\n")

    def _watch(self, process: subprocess.Popen[bytes], run_id: str, log: Path) -> None:
        """Wait for the process; one that outlives its run hangs and is killed."""
        outlives = False
        while True:
            try:
                code = process.wait(LOOK_SECONDS)
                break
            except subprocess.TimeoutExpired:
                if outlives:
                    process.kill()
                outlives = self._status(run_id) not in _ALIVE
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it left behind
        how = (
            f"ended with code {code}"
            if code >= 0
            else f"was killed by signal {-code} ({signal.strsignal(-code)})"
        )
        end_run(self._instance, run_id, f"its process {how}; what it wrote last is in {log}")
        if self._status(run_id) is dg.DagsterRunStatus.SUCCESS:
            log.unlink(missing_ok=True)
        del self._children[threading.current_thread()]

    def _status(self, run_id: str) -> dg.DagsterRunStatus | None:
        run = self._instance.get_run_by_id(run_id)
        return run.status if run else None

    def terminate(self, run_id: str) -> bool:
        """Ask the run's process to end; it reports the cancellation itself, or whoever finds it dead
        does.
        """
        run = self._instance.get_run_by_id(run_id)
        if run is None or run.is_finished:
            return False
        self._instance.report_run_canceling(run)
        if not _has_process(run):
            return end_run(
                self._instance, run_id, "it was canceled when its process was gone already"
            )
        host, pid, _ = run.tags[PROCESS_TAG].split(":")
        if host != socket.gethostname():
            self._instance.report_engine_event(
                f"its process is on another host, {host}: end it there", run
            )
            return False
        os.kill(int(pid), signal.SIGTERM)
        return True

    @property
    def supports_check_run_worker_health(self) -> bool:
        """Yes: run monitoring may ask."""
        return True

    def check_run_worker_health(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        """Whether the process of a started run lives; its tag was written before it began."""
        if PROCESS_TAG not in run.tags:
            return CheckRunHealthResult(
                WorkerStatus.NOT_FOUND, "no process is known that does this run"
            )
        if lives(run.tags[PROCESS_TAG]):
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        return CheckRunHealthResult(
            WorkerStatus.FAILED, f"its process {run.tags[PROCESS_TAG]} is gone"
        )

    def dispose(self) -> None:
        """Whoever started runs and ends politely ends them too, and waits until they have said so."""
        watched = list(self._children.items())
        for end, patience in ((signal.SIGTERM, _LAST_WORDS), (signal.SIGKILL, 2.0)):
            for watch, process in watched:
                if watch.is_alive():
                    process.send_signal(end)
            deadline = time.monotonic() + patience
            for watch, _ in watched:
                watch.join(max(0.0, deadline - time.monotonic()))


# --------------------------------------------------------------------------------- the daemon
def main() -> None:
    """Dagster's daemon; before it starts and beside it, runs of dead processes are ended."""
    from dagster._daemon.cli import cli

    with open_instance(sole=True):
        pass
    threading.Thread(target=_look_after_runs, name="dead-runs", daemon=True).start()
    cli(obj={})


def _look_after_runs() -> None:
    with dg.DagsterInstance.get() as instance:
        while not threading.Event().wait(LOOK_SECONDS):
            try:
                end_dead_runs(instance)
            except Exception:  # a locked database, a full disk: the next look may do
                logging.getLogger("dagster.daemon").exception("could not look for dead runs")


if __name__ == "__main__":
    main()

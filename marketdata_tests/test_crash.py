"""SIGKILL for every process of `marketdata dev`: the UI soon shows the true status of each run.

No process is left behind.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from marketdata_assets.cli import processes
from marketdata_assets.dagster_ext import launcher
from marketdata_assets.dagster_ext.launcher import PROCESS_TAG, lives, process_id
from marketdata_assets.errors import StoreFailed
from marketdata_assets.sources.sandbox.server import SandboxExchange, serve_in_thread
from marketdata_tests.conftest import SANDBOX_NOW

BTC_DEC, BTC, ETH = (
    "binance:BTC-USDT|2023-12-01",
    "binance:BTC-USDT|2024-01-01",
    "binance:ETH-USDT|2024-01-01",
)
TICKS = 20.0
"""Two ticks of the run monitoring."""
UNIVERSE = """# the sensors find nothing to do: all months lie too far back
venues:
  binance:
    symbols: [BTC/USDT, ETH/USDT]
    since: 2023-12-31
    until: 2024-01-03
    base_url: "{url}"
lake: {folder}/lake
duckdb: {folder}/market.duckdb
state: {folder}/state
automation: {{lookback_days: 1}}
"""
LAUNCH = """mutation($selector: JobOrPipelineSelector!, $tags: [ExecutionTag!]!) {
  launchRun(executionParams: {selector: $selector, executionMetadata: {tags: $tags}}) {
    __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }"""
RUN = """query($id: ID!) { runOrError(runId: $id) { ... on Run {
  status tags { key value } eventConnection { events { ... on MessageEvent { message } } } } } }"""
TERMINATE = """mutation($id: String!) { terminateRun(runId: $id) {
  __typename ... on TerminateRunFailure { message } } }"""
RELOAD = """mutation { reloadRepositoryLocation(repositoryLocationName: "marketdata_assets") {
  ... on WorkspaceLocationEntry { locationOrLoadError { __typename } } } }"""
KEYS = "{ assetNodes { partitionKeys } }"


def soon(true: Callable[[], Any], seconds: float, what: str) -> Any:
    """Wait until `true` returns a true value, and return that value."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with suppress(OSError):  # the server restarts
            if value := true():
                return value
        threading.Event().wait(0.1)
    pytest.fail(f"not within {seconds} s: {what}")


class Stack:
    """`marketdata dev` with a mark in the environment of its processes, on a controllable exchange.

    The exchange delays its answers while `hold` is set.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.mark, self.hold, self.delayed = (
            folder,
            f"MARKETDATA_MARK={uuid.uuid4()}",
            threading.Event(),
            0,
        )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.exchange = SandboxExchange(
            now=lambda: SANDBOX_NOW, weight_limit=10**9, tamper=self._answer
        )

    async def _answer(self, *_: Any) -> None:
        self.delayed += self.hold.is_set()
        while self.hold.is_set():
            await asyncio.sleep(0.05)

    def start(self) -> None:
        name, _, value = self.mark.partition("=")
        environment = {
            **os.environ,
            name: value,
            "MARKETDATA_UNIVERSE": str(self.folder / "universe.yaml"),
        }
        with (self.folder / "dev.log").open("w") as log:
            self.supervisor = subprocess.Popen(
                self.command(), env=environment, stdout=log, stderr=log, start_new_session=True
            )
        soon(
            lambda: self.supervisor.poll() is not None or self.logged("UI ready"),
            120,
            "the UI is ready",
        )
        assert self.supervisor.poll() is None, self.log()

    def command(self) -> list[str]:
        return [sys.executable, "-m", "marketdata_assets.cli.main", "dev", "--port", str(self.port)]

    def log(self) -> str:
        return (self.folder / "dev.log").read_text()

    def logged(self, words: str) -> bool:
        return words in self.log()

    def pids(self, words: str = "") -> list[int]:
        """Return the ids of live marked processes whose command line contains these words."""
        found = []
        for process in Path("/proc").iterdir():
            with suppress(OSError):
                if process.name.isdigit() and self.mark in (
                    process / "environ"
                ).read_bytes().decode().split("\0"):
                    line = (process / "cmdline").read_bytes().decode().replace("\0", " ")
                    found += [int(process.name)] if words in line else []
        return found

    def kill(self, *words: str) -> list[int]:
        """Send SIGKILL to the processes once each, and return their ids."""
        pids = [pid for word in words for pid in self.pids(word)]
        assert len(pids) >= len(words), f"{words}: {pids}"
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return pids

    def query(self, query: str, **variables: Any) -> Any:
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/graphql", body, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            message = error.read().decode()
            if error.code == 400:
                pytest.fail(message)
            raise ConnectionError(message) from None

    def launch(self, partition: str) -> str:
        selector = {
            "repositoryLocationName": "marketdata_assets",
            "repositoryName": "__repository__",
            "jobName": "ingest",
        }
        tags = [
            {"key": f"dagster/asset_partition_range_{end}", "value": partition}
            for end in ("start", "end")
        ]
        launched = self.query(LAUNCH, selector=selector, tags=tags)["launchRun"]
        return launched["run"]["runId"] if launched["__typename"] == "LaunchRunSuccess" else ""

    def reload(self) -> bool:
        entry = self.query(RELOAD)["reloadRepositoryLocation"]
        return bool(entry["locationOrLoadError"]["__typename"] == "RepositoryLocation")

    def run(self, run_id: str) -> dict[str, Any]:
        return self.query(RUN, id=run_id)["runOrError"]

    def wait_for_status(self, run_id: str, status: str, seconds: float = 60.0) -> list[str]:
        """Wait until the run has that status, and return the messages of its events."""
        soon(lambda: self.run(run_id)["status"] == status, seconds, f"the run is {status}")
        return [event["message"] for event in self.run(run_id)["eventConnection"]["events"]]

    def start_waiting_run(self, partition: str) -> tuple[str, int]:
        """Start a run that waits for the exchange; return the id of the run and of its process."""
        self.hold.set()
        before = self.delayed
        run_id = soon(lambda: self.launch(partition), 60, "a run can be launched")
        self.wait_for_status(run_id, "STARTED")
        soon(lambda: self.delayed > before, 60, "it requests bars")
        tag = next(tag["value"] for tag in self.run(run_id)["tags"] if tag["key"] == PROCESS_TAG)
        assert lives(tag)
        return run_id, int(tag.split(":")[1])

    @contextmanager
    def instance(self) -> Iterator[dg.DagsterInstance]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DAGSTER_HOME", str(self.folder / "state" / "dagster"))
            with dg.DagsterInstance.get() as instance:
                yield instance

    def end(self) -> None:
        self.supervisor.send_signal(signal.SIGTERM)
        self.supervisor.wait(30)


# --------------------------------------------------------------------------------- parts
def test_a_process_is_identified_by_more_than_its_number() -> None:
    child = subprocess.Popen(["sleep", "60"])
    known = process_id(child.pid)
    host, pid, begun = known.split(":")
    assert lives(known)
    assert not lives(f"{host}:{pid}:{begun}0"), "it belongs to another boot"
    assert not lives(f"{host}:{pid}:1{begun}"), "another process has the same number"
    assert not any(lives(broken) for broken in ("", host, f"{host}:{pid}", f"{host}:{pid}:"))
    assert lives(f"elsewhere:{pid}:{begun}"), "the state of a process on another host is not known"
    child.kill()
    soon(lambda: not lives(known), 5, "a dead process is not alive before it is reaped")
    assert child.wait() == -signal.SIGKILL
    assert not lives(known)


def test_a_process_that_outlives_its_run_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "LOOK_SECONDS", 0.1)
    with dg.DagsterInstance.ephemeral() as instance:
        run_launcher = launcher.ProcessRunLauncher()
        run_launcher.register_instance(instance)
        run = instance.create_run_for_job(
            dg.GraphDefinition("nothing").to_job(), status=dg.DagsterRunStatus.CANCELED
        )
        hanging_process = subprocess.Popen(["sleep", "60"])
        run_launcher._children[threading.current_thread()] = hanging_process
        run_launcher._watch(hanging_process, run.run_id, tmp_path / "log")
        assert hanging_process.returncode == -signal.SIGKILL
        assert run_launcher._children == {}


def test_a_service_that_cannot_start_raises_after_three_attempts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(processes, "PAUSES", (0.0, 0.1))
    messages: list[str] = []
    service = processes.Service(
        "the thing", ["marketdata_assets.errors"]
    )  # a module that ends at once

    def restart_until_it_raises() -> None:
        while True:
            service.tend(dict(os.environ), messages.append)
            threading.Event().wait(0.05)

    with pytest.raises(
        StoreFailed, match="the thing ended with code 0, 3 times in a row right after its start"
    ):
        restart_until_it_raises()
    assert messages == [
        "the thing ended with code 0; starting it again",
        "the thing ended with code 0; starting it again in 0.1 s",
    ]


# --------------------------------------------------------------------------------- the stack
@contextmanager
def run_stack(folder: Path) -> Iterator[Stack]:
    stack = Stack(folder)
    with serve_in_thread(stack.exchange) as url:
        (folder / "universe.yaml").write_text(UNIVERSE.format(url=url, folder=folder))
        try:
            stack.start()
            yield stack
            if stack.supervisor.poll() is None:
                stack.end()
            assert stack.pids() == []
        finally:
            stack.hold.clear()
            for pid in stack.pids():
                os.kill(pid, signal.SIGKILL)
            stack.supervisor.wait()


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with run_stack(tmp_path_factory.mktemp("crash")) as stack:
        yield stack


def test_a_run_whose_process_is_killed_fails_and_releases_its_slots(stack: Stack) -> None:
    run_id, pid = stack.start_waiting_run(BTC)
    with stack.instance() as instance:
        slots = instance.event_log_storage
        slots.set_concurrency_slots("narrow", 1)
        assert slots.claim_concurrency_slot("narrow", run_id, "rollups").is_claimed
        os.kill(pid, signal.SIGKILL)
        logged = stack.wait_for_status(run_id, "FAILURE", TICKS)
        assert any("its process was killed by signal 9 (Killed)" in message for message in logged)
        # the watcher of the process releases the slot at once; where the machine is too busy for
        # that, the run monitoring releases it
        assert soon(
            lambda: slots.claim_concurrency_slot("narrow", "another", "rollups").is_claimed,
            3 * TICKS,
            "the slot is free",
        )


def test_runs_outlive_the_code_server_and_the_daemon(stack: Stack) -> None:
    """The UI can still terminate a run whose daemon has died."""
    first, pid = stack.start_waiting_run(BTC_DEC)
    servers = stack.kill("code-server start", "api grpc")
    soon(lambda: set(stack.pids("api grpc")) - set(servers), 60, "a new code server")
    second, other = stack.start_waiting_run(ETH)
    process = process_id(other)
    daemon = stack.kill("dagster_ext.launcher run")
    soon(lambda: set(stack.pids("dagster_ext.launcher run")) - set(daemon), 30, "a new daemon")
    assert {pid, other} <= set(stack.pids("execute_run"))
    assert stack.query(TERMINATE, id=second)["terminateRun"]["__typename"] == "TerminateRunSuccess"
    stack.wait_for_status(second, "CANCELED", TICKS)
    soon(lambda: not lives(process), TICKS, "the process has ended")
    stack.hold.clear()
    stack.wait_for_status(first, "SUCCESS")
    assert stack.logged("the code server was killed by signal 9; starting it again")
    assert stack.logged("the daemon was killed by signal 9; starting it again")


def test_a_code_server_that_lost_its_child_is_replaced_and_reloads(stack: Stack) -> None:
    before, orphaned = stack.pids("code-server start"), stack.kill("api grpc")
    soon(lambda: set(stack.pids("code-server start")) - set(before), 30, "a new code server")
    soon(lambda: set(stack.pids("api grpc")) - set(orphaned), 30, "its new child process")
    universe = stack.folder / "universe.yaml"
    written = universe.read_text()
    universe.write_text(written.replace("ETH/USDT]", "ETH/USDT, SOL/USDT]"))
    soon(stack.reload, 60, "the UI can reload")
    universe.write_text(written)
    assert "binance:SOL-USDT|2024-01-01" in stack.query(KEYS)["assetNodes"][0]["partitionKeys"]


def test_a_second_server_on_the_same_state_folder_is_refused(stack: Stack) -> None:
    environment = {**os.environ, "MARKETDATA_UNIVERSE": str(stack.folder / "universe.yaml")}
    second = subprocess.run(
        stack.command(), env=environment, capture_output=True, text=True, timeout=60
    )
    assert second.returncode == 2
    assert (
        f"http://127.0.0.1:{stack.port} (process {stack.supervisor.pid}) already serves"
        in " ".join(second.stderr.split())
    )
    assert "Traceback" not in second.stderr


def test_after_a_kill_of_all_processes_a_restart_shows_the_truth(stack: Stack) -> None:
    """Active runs have failed and queued runs start; then the server ends while a run is active."""
    killed, _ = stack.start_waiting_run(BTC)
    os.kill(stack.pids("dagster_ext.launcher run")[0], signal.SIGSTOP)
    queued, begun = (soon(lambda: stack.launch(ETH), 60, "a run can be launched") for _ in range(2))
    stack.kill(
        "cli.main dev",
        "dagster_webserver",
        "code-server start",
        "dagster_ext.launcher run",
        "execute_run",
    )
    stack.supervisor.wait()
    # the second process of the code server ends only because heartbeats are missing
    orphan = stack.pids("api grpc")
    with stack.instance() as instance:
        instance.report_dagster_event(
            dg.DagsterEvent(dg.DagsterEventType.RUN_STARTING.value, "ingest"), begun
        )
        statuses = {
            run_id: instance.get_run_by_id(run_id).status.value
            for run_id in (killed, queued, begun)
        }  # type: ignore[union-attr]
    assert statuses == {killed: "STARTED", queued: "QUEUED", begun: "STARTING"}
    stack.start()
    for run_id in (killed, begun):
        stack.wait_for_status(run_id, "FAILURE", TICKS)
    stack.wait_for_status(queued, "STARTED")
    soon(lambda: not set(orphan) & set(stack.pids()), 30, "the old code server has ended")
    stack.end()
    assert stack.pids() == []
    with stack.instance() as instance:
        assert instance.get_run_by_id(queued).status is dg.DagsterRunStatus.FAILURE  # type: ignore[union-attr]

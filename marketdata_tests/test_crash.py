"""SIGKILL to every process of `marketdata dev`: the UI shows the true status of runs soon after.

No process is left behind.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
import pytest

from marketdata_assets.cli import supervisor
from marketdata_assets.dagster_ext import launcher
from marketdata_assets.dagster_ext.runs import PROCESS_TAG
from marketdata_assets.errors import StoreFailed
from marketdata_assets.sources.sandbox.server import SandboxExchange, serve_in_thread
from marketdata_assets.system import is_alive
from marketdata_tests.conftest import SANDBOX_NOW
from marketdata_tests.processes import find_free_port, kill, processes_with, wait_until

pytestmark = pytest.mark.server

BTC_DEC, BTC, ETH = (
    "binance:BTC-USDT|2023-12-01",
    "binance:BTC-USDT|2024-01-01",
    "binance:ETH-USDT|2024-01-01",
)
TICKS = 20.0
"""Seconds of two ticks of the run monitoring."""
MARK = "MARKETDATA_MARK"
DAEMON = "dagster_ext.daemon run"
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


class Stack:
    """`marketdata dev` as processes with a mark, on an exchange that can hold back its answers."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.mark, self.port = folder, str(uuid.uuid4()), find_free_port()
        self.hold, self.held = threading.Event(), 0
        self.exchange = SandboxExchange(
            now=lambda: SANDBOX_NOW, weight_limit=10**9, tamper=self._answer
        )

    async def _answer(self, *_: Any) -> None:
        self.held += self.hold.is_set()
        while self.hold.is_set():
            await asyncio.sleep(0.05)

    def start(self) -> None:
        environment = {
            **os.environ,
            MARK: self.mark,
            "MARKETDATA_UNIVERSE": str(self.folder / "universe.yaml"),
        }
        with (self.folder / "dev.log").open("w") as log:
            self.supervisor = subprocess.Popen(
                self.command(), env=environment, stdout=log, stderr=log, start_new_session=True
            )
        wait_until(
            lambda: self.supervisor.poll() is not None or self.has_printed("UI ready"),
            120,
            "the UI is ready",
        )
        assert self.supervisor.poll() is None, self.log()

    def command(self) -> list[str]:
        return [sys.executable, "-m", "marketdata_assets.cli.main", "dev", "--port", str(self.port)]

    def log(self) -> str:
        return (self.folder / "dev.log").read_text()

    def has_printed(self, words: str) -> bool:
        return words in self.log()

    def processes(self, words: str = "") -> list[psutil.Process]:
        """Return the living marked processes whose command line holds these words."""
        return processes_with(MARK, self.mark, words)

    def kill(self, *words: str) -> list[psutil.Process]:
        """Send SIGKILL to the processes with these words; return them."""
        victims = [process for word in words for process in self.processes(word)]
        assert len(victims) >= len(words), f"{words}: {victims}"
        kill(*victims)
        return victims

    def wait_for_new(self, words: str, old: list[psutil.Process], seconds: float) -> None:
        """Wait for a process with these words that is none of the old ones."""
        wait_until(lambda: set(self.processes(words)) - set(old), seconds, f"a new {words}")

    def query_ui(self, query: str, **variables: Any) -> Any:
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
        launched = self.query_ui(LAUNCH, selector=selector, tags=tags)["launchRun"]
        return launched["run"]["runId"] if launched["__typename"] == "LaunchRunSuccess" else ""

    def reload(self) -> bool:
        entry = self.query_ui(RELOAD)["reloadRepositoryLocation"]
        return bool(entry["locationOrLoadError"]["__typename"] == "RepositoryLocation")

    def run(self, run_id: str) -> dict[str, Any]:
        return self.query_ui(RUN, id=run_id)["runOrError"]

    def wait_for_status(self, run_id: str, status: str, seconds: float = 60.0) -> list[str]:
        """Wait for that status; return the messages of the run's events."""
        wait_until(lambda: self.run(run_id)["status"] == status, seconds, f"the run is {status}")
        return [event["message"] for event in self.run(run_id)["eventConnection"]["events"]]

    def start_held_run(self, partition: str) -> tuple[str, psutil.Process]:
        """Start a run that waits for the exchange; return its id and its process."""
        self.hold.set()
        before = self.held
        run_id = wait_until(lambda: self.launch(partition), 60, "a run can be launched")
        self.wait_for_status(run_id, "STARTED")
        wait_until(lambda: self.held > before, 60, "it asks for bars")
        tag = next(tag["value"] for tag in self.run(run_id)["tags"] if tag["key"] == PROCESS_TAG)
        assert is_alive(tag)
        return run_id, psutil.Process(int(tag.split(":")[1]))

    @contextmanager
    def instance(self) -> Iterator[dg.DagsterInstance]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DAGSTER_HOME", str(self.folder / "state" / "dagster"))
            with dg.DagsterInstance.get() as instance:
                yield instance

    def end(self) -> None:
        self.supervisor.send_signal(signal.SIGTERM)
        self.supervisor.wait(30)


# --------------------------------------------------------------------------------- the pieces
def test_a_process_that_outlives_its_run_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "CHECK_SECONDS", 0.1)
    with dg.DagsterInstance.ephemeral() as instance:
        run_launcher = launcher.ProcessRunLauncher()
        run_launcher.register_instance(instance)
        run = instance.create_run_for_job(
            dg.GraphDefinition("nothing").to_job(), status=dg.DagsterRunStatus.CANCELED
        )
        process = subprocess.Popen(["sleep", "60"], process_group=0)
        run_launcher._children[threading.current_thread()] = process
        run_launcher._watch(process, run.run_id, tmp_path / "log")
        assert process.returncode == -signal.SIGKILL
        assert run_launcher._children == {}


def test_a_service_that_cannot_start_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "RESTART_DELAYS", (0.0, 0.1))
    reports: list[str] = []
    service = supervisor.Service("the thing", ["marketdata_assets.errors"])  # ends at once

    def restart_until_given_up() -> None:
        while True:
            service.restart_if_dead(dict(os.environ), reports.append)
            threading.Event().wait(0.05)

    with pytest.raises(
        StoreFailed, match="the thing ended with code 0, 3 times in a row right after its start"
    ):
        restart_until_given_up()
    assert reports == [
        "the thing ended with code 0; starting it again",
        "the thing ended with code 0; starting it again in 0.1 s",
    ]


# --------------------------------------------------------------------------------- the whole
@contextmanager
def stack_in(folder: Path) -> Iterator[Stack]:
    stack = Stack(folder)
    with serve_in_thread(stack.exchange) as url:
        (folder / "universe.yaml").write_text(UNIVERSE.format(url=url, folder=folder))
        try:
            stack.start()
            yield stack
            if stack.supervisor.poll() is None:
                stack.end()
            assert stack.processes() == []
        finally:
            stack.hold.clear()
            kill(*stack.processes())
            stack.supervisor.wait()


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with stack_in(tmp_path_factory.mktemp("crash")) as stack:
        yield stack


def test_a_run_whose_process_is_killed_has_failed_and_frees_its_slots(stack: Stack) -> None:
    run_id, process = stack.start_held_run(BTC)
    with stack.instance() as instance:
        slots = instance.event_log_storage
        slots.set_concurrency_slots("narrow", 1)
        assert slots.claim_concurrency_slot("narrow", run_id, "rollups").is_claimed
        process.kill()
        messages = stack.wait_for_status(run_id, "FAILURE", TICKS)
        assert any("its process was killed by signal 9 (Killed)" in text for text in messages)
        # at once by the thread that watches the process, or by the run monitoring where the machine
        # is too busy for that
        assert wait_until(
            lambda: slots.claim_concurrency_slot("narrow", "another", "rollups").is_claimed,
            3 * TICKS,
            "the slot is free",
        )


def test_runs_outlive_the_code_server_and_the_daemon(stack: Stack) -> None:
    """The UI can still terminate a run whose daemon was killed."""
    first, process = stack.start_held_run(BTC_DEC)
    servers = stack.kill("code-server start", "api grpc")
    stack.wait_for_new("api grpc", servers, 60)
    second, other_process = stack.start_held_run(ETH)
    daemon = stack.kill(DAEMON)
    stack.wait_for_new(DAEMON, daemon, 30)
    assert {process, other_process} <= set(stack.processes("execute_run"))
    answer = stack.query_ui(TERMINATE, id=second)["terminateRun"]
    assert answer["__typename"] == "TerminateRunSuccess"
    stack.wait_for_status(second, "CANCELED", TICKS)
    wait_until(lambda: not other_process.is_running(), TICKS, "the process has ended")
    stack.hold.clear()
    stack.wait_for_status(first, "SUCCESS")
    assert stack.has_printed("the code server was killed by signal 9; starting it again")
    assert stack.has_printed("the daemon was killed by signal 9; starting it again")


def test_a_code_server_that_lost_its_own_child_is_replaced_and_reloads(stack: Stack) -> None:
    before, children = stack.processes("code-server start"), stack.kill("api grpc")
    stack.wait_for_new("code-server start", before, 30)
    stack.wait_for_new("api grpc", children, 30)
    universe = stack.folder / "universe.yaml"
    written = universe.read_text()
    universe.write_text(written.replace("ETH/USDT]", "ETH/USDT, SOL/USDT]"))
    wait_until(stack.reload, 60, "the UI can reload")
    universe.write_text(written)
    assert "binance:SOL-USDT|2024-01-01" in stack.query_ui(KEYS)["assetNodes"][0]["partitionKeys"]


def test_a_second_one_on_the_same_state_is_refused(stack: Stack) -> None:
    environment = {**os.environ, "MARKETDATA_UNIVERSE": str(stack.folder / "universe.yaml")}
    second = subprocess.run(
        stack.command(), env=environment, capture_output=True, text=True, timeout=60
    )
    assert second.returncode == 2
    holder = f"http://127.0.0.1:{stack.port} (process {stack.supervisor.pid})"
    assert f"{holder} already serves" in " ".join(second.stderr.split())
    assert "Traceback" not in second.stderr


def test_everything_killed_and_started_again(stack: Stack) -> None:
    """After the restart, what was running has failed and what was queued runs.

    Then `marketdata dev` is asked to end while a run is in progress.
    """
    killed, _ = stack.start_held_run(BTC)
    stack.processes(DAEMON)[0].suspend()
    queued, starting = (
        wait_until(lambda: stack.launch(ETH), 60, "a run can be launched") for _ in range(2)
    )
    stack.kill("cli.main dev", "dagster_ext.webserver", "code-server start", DAEMON, "execute_run")
    stack.supervisor.wait()
    # The child of the code server lives until it has heard no heartbeat for a while.
    orphans = stack.processes("api grpc")
    with stack.instance() as instance:
        instance.report_dagster_event(
            dg.DagsterEvent(dg.DagsterEventType.RUN_STARTING.value, "ingest"), starting
        )
        statuses = {
            run_id: instance.get_run_by_id(run_id).status.value  # type: ignore[union-attr]
            for run_id in (killed, queued, starting)
        }
    assert statuses == {killed: "STARTED", queued: "QUEUED", starting: "STARTING"}
    stack.start()
    for run_id in (killed, starting):
        stack.wait_for_status(run_id, "FAILURE", TICKS)
    stack.wait_for_status(queued, "STARTED")
    wait_until(
        lambda: not set(orphans) & set(stack.processes()), 30, "the old code server has ended"
    )
    stack.end()
    assert stack.processes() == []
    with stack.instance() as instance:
        assert instance.get_run_by_id(queued).status is dg.DagsterRunStatus.FAILURE  # type: ignore[union-attr]

"""kill -9 of every process of `marketdata dev`: what the UI says of runs is true soon after, and
nothing is left behind.
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
venues: {{binance: {{symbols: [BTC/USDT, ETH/USDT], since: 2023-12-31, until: 2024-01-03, base_url: "{url}"}}}}
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
TERMINATE = "mutation($id: String!) { terminateRun(runId: $id) { __typename ... on TerminateRunFailure { message } } }"
RELOAD = """mutation { reloadRepositoryLocation(repositoryLocationName: "marketdata_assets") {
  ... on WorkspaceLocationEntry { locationOrLoadError { __typename } } } }"""
KEYS = "{ assetNodes { partitionKeys } }"


def soon(true: Callable[[], Any], seconds: float, what: str) -> Any:
    """What it gives once it is true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with suppress(OSError):  # a server that is dead for a moment
            if value := true():
                return value
        threading.Event().wait(0.1)
    pytest.fail(f"not within {seconds} s: {what}")


class Stack:
    """`marketdata dev` as processes that carry a mark, on an exchange that can hold its answers
    back.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.mark, self.hold, self.held = (
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
        self.held += self.hold.is_set()
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
            lambda: self.supervisor.poll() is not None or self.said("UI ready"),
            120,
            "the UI is ready",
        )
        assert self.supervisor.poll() is None, self.log()

    def command(self) -> list[str]:
        return [sys.executable, "-m", "marketdata_assets.cli.main", "dev", "--port", str(self.port)]

    def log(self) -> str:
        return (self.folder / "dev.log").read_text()

    def said(self, words: str) -> bool:
        return words in self.log()

    def pids(self, words: str = "") -> list[int]:
        """Living marked processes whose command line holds these words."""
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
        """kill -9, each once; who it was."""
        victims = [pid for word in words for pid in self.pids(word)]
        assert len(victims) >= len(words), f"{words}: {victims}"
        for pid in victims:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return victims

    def ask(self, query: str, **variables: Any) -> Any:
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/graphql", body, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            says = error.read().decode()
            if error.code == 400:
                pytest.fail(says)
            raise ConnectionError(says) from None

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
        launched = self.ask(LAUNCH, selector=selector, tags=tags)["launchRun"]
        return launched["run"]["runId"] if launched["__typename"] == "LaunchRunSuccess" else ""

    def reload(self) -> bool:
        entry = self.ask(RELOAD)["reloadRepositoryLocation"]
        return bool(entry["locationOrLoadError"]["__typename"] == "RepositoryLocation")

    def run(self, run_id: str) -> dict[str, Any]:
        return self.ask(RUN, id=run_id)["runOrError"]

    def becomes(self, run_id: str, status: str, seconds: float = 60.0) -> list[str]:
        """Wait for that status; what the run's events say."""
        soon(lambda: self.run(run_id)["status"] == status, seconds, f"the run is {status}")
        return [event["message"] for event in self.run(run_id)["eventConnection"]["events"]]

    def working(self, partition: str) -> tuple[str, int]:
        """A run that has begun and waits for the exchange; and its process."""
        self.hold.set()
        before = self.held
        run_id = soon(lambda: self.launch(partition), 60, "a run can be launched")
        self.becomes(run_id, "STARTED")
        soon(lambda: self.held > before, 60, "it asks for bars")
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


# --------------------------------------------------------------------------------- the pieces
def test_a_process_is_known_by_more_than_its_number() -> None:
    child = subprocess.Popen(["sleep", "60"])
    known = process_id(child.pid)
    host, pid, begun = known.split(":")
    assert lives(known)
    assert not lives(f"{host}:{pid}:{begun}0"), "another boot"
    assert not lives(f"{host}:{pid}:1{begun}"), "another process with the same number"
    assert not any(lives(broken) for broken in ("", host, f"{host}:{pid}", f"{host}:{pid}:"))
    assert lives(f"elsewhere:{pid}:{begun}"), "we cannot know"
    child.kill()
    soon(lambda: not lives(known), 5, "a dead process does not live, buried or not")
    assert child.wait() == -signal.SIGKILL
    assert not lives(known)


def test_a_process_that_outlives_its_run_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "LOOK_SECONDS", 0.1)
    with dg.DagsterInstance.ephemeral() as instance:
        starter = launcher.ProcessRunLauncher()
        starter.register_instance(instance)
        run = instance.create_run_for_job(
            dg.GraphDefinition("nothing").to_job(), status=dg.DagsterRunStatus.CANCELED
        )
        hangs = subprocess.Popen(["sleep", "60"])
        starter._children[threading.current_thread()] = hangs
        starter._watch(hangs, run.run_id, tmp_path / "log")
        assert hangs.returncode == -signal.SIGKILL
        assert starter._children == {}


def test_a_service_that_cannot_start_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "PAUSES", (0.0, 0.1))
    heard: list[str] = []
    service = processes.Service("the thing", ["marketdata_assets.errors"])  # ends at once

    def dies_again() -> None:
        while True:
            service.tend(dict(os.environ), heard.append)
            threading.Event().wait(0.05)

    with pytest.raises(
        StoreFailed, match="the thing ended with code 0, 3 times in a row right after its start"
    ):
        dies_again()
    assert heard == [
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
            assert stack.pids() == []
        finally:
            stack.hold.clear()
            for pid in stack.pids():
                os.kill(pid, signal.SIGKILL)
            stack.supervisor.wait()


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with stack_in(tmp_path_factory.mktemp("crash")) as stack:
        yield stack


def test_a_run_whose_process_is_killed_has_failed_and_gives_its_slots_back(stack: Stack) -> None:
    run_id, worker = stack.working(BTC)
    with stack.instance() as instance:
        slots = instance.event_log_storage
        slots.set_concurrency_slots("narrow", 1)
        assert slots.claim_concurrency_slot("narrow", run_id, "rollups").is_claimed
        os.kill(worker, signal.SIGKILL)
        said = stack.becomes(run_id, "FAILURE", TICKS)
        assert any("its process was killed by signal 9 (Killed)" in message for message in said)
        # at once by who watches the process, or by the run monitoring where the machine is too busy
        # for that
        assert soon(
            lambda: slots.claim_concurrency_slot("narrow", "another", "rollups").is_claimed,
            3 * TICKS,
            "the slot is free",
        )


def test_runs_outlive_the_code_server_and_the_daemon(stack: Stack) -> None:
    """And a run that its daemon left behind can still be terminated in the UI."""
    first, worker = stack.working(BTC_DEC)
    servers = stack.kill("code-server start", "api grpc")
    soon(lambda: set(stack.pids("api grpc")) - set(servers), 60, "a new code server")
    second, other = stack.working(ETH)
    process = process_id(other)
    daemon = stack.kill("dagster_ext.launcher run")
    soon(lambda: set(stack.pids("dagster_ext.launcher run")) - set(daemon), 30, "a new daemon")
    assert {worker, other} <= set(stack.pids("execute_run"))
    assert stack.ask(TERMINATE, id=second)["terminateRun"]["__typename"] == "TerminateRunSuccess"
    stack.becomes(second, "CANCELED", TICKS)
    soon(lambda: not lives(process), TICKS, "the process has ended")
    stack.hold.clear()
    stack.becomes(first, "SUCCESS")
    assert stack.said("the code server was killed by signal 9; starting it again")
    assert stack.said("the daemon was killed by signal 9; starting it again")


def test_a_code_server_that_lost_its_own_child_is_replaced_and_reloads(stack: Stack) -> None:
    before, orphaned = stack.pids("code-server start"), stack.kill("api grpc")
    soon(lambda: set(stack.pids("code-server start")) - set(before), 30, "a new code server")
    soon(lambda: set(stack.pids("api grpc")) - set(orphaned), 30, "with a child of its own")
    universe = stack.folder / "universe.yaml"
    written = universe.read_text()
    universe.write_text(written.replace("ETH/USDT]", "ETH/USDT, SOL/USDT]"))
    soon(stack.reload, 60, "the UI can reload")
    universe.write_text(written)
    assert "binance:SOL-USDT|2024-01-01" in stack.ask(KEYS)["assetNodes"][0]["partitionKeys"]


def test_a_second_one_on_the_same_state_is_refused(stack: Stack) -> None:
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


def test_everything_killed_and_started_again(stack: Stack) -> None:
    """The truth after a restart: what was running has failed, what was queued runs. Then a polite end,
    with a run at work.
    """
    killed, _ = stack.working(BTC)
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
    orphan = stack.pids(
        "api grpc"
    )  # nobody tells the second process of the code server; it hears no more heartbeats
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
        stack.becomes(run_id, "FAILURE", TICKS)
    stack.becomes(queued, "STARTED")
    soon(lambda: not set(orphan) & set(stack.pids()), 30, "the old code server has ended")
    stack.end()
    assert stack.pids() == []
    with stack.instance() as instance:
        assert instance.get_run_by_id(queued).status is dg.DagsterRunStatus.FAILURE  # type: ignore[union-attr]

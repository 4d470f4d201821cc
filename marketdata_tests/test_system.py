"""Locks, names of processes and children, on Linux and, with Linux's means taken away, as on a Mac.

All processes and all kills are real.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest

from marketdata_assets import system
from marketdata_assets.errors import StoreFailed
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.notify import open_channels
from marketdata_assets.system import (
    is_alive,
    lock_file,
    make_private_folder,
    process_id,
    start_module,
    stop,
)
from marketdata_tests.processes import is_running, kill, processes_with, wait_until
from marketdata_tests.test_notify import STALE

pytestmark = pytest.mark.server

ON_LINUX = sys.platform == "linux"
linux_only = pytest.mark.skipif(not ON_LINUX, reason="needs what only Linux has")
WITHOUT_LINUX = """
from pathlib import Path
from marketdata_assets import system
system.BOOT_ID_FILE, system._prctl = Path("/nowhere"), lambda: None
"""
WAITS = "import signal\nsignal.pause()\n"
"""A module that lives until it is killed."""


@pytest.fixture(params=[pytest.param("linux", marks=linux_only), "portable"])
def platform(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Linux as it is, then the same machine without what only Linux has."""
    if request.param == "portable":
        monkeypatch.setattr(system, "BOOT_ID_FILE", Path("/nowhere"))
        monkeypatch.setattr(system, "_prctl", lambda: None)
    return str(request.param)


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment in which the modules of the test's folder can be run.

    Processes that have it end with the test.
    """
    (tmp_path / "waits.py").write_text(WAITS)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    yield {**os.environ, "PYTHONPATH": path}
    kill(*processes_with("PYTHONPATH", path))


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


# --------------------------------------------------------------------------------- locks
HOLDS = """
import fcntl, signal, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("holds", flush=True)
signal.pause()
"""
"""Holds a file as release 14cedaa does."""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLDS, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holds\n"
        yield process
        process.kill()


def test_a_lock_ends_with_the_process_that_holds_it(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    with lock_file(tmp_path / "lock", wait=False) as is_held:
        assert not is_held
    holder.kill()
    with lock_file(tmp_path / "lock") as is_held:  # waits until the holder is dead
        assert is_held
        with lock_file(tmp_path / "lock", wait=False) as is_held_twice:
            assert not is_held_twice
    with lock_file(tmp_path / "lock", wait=False) as is_held:
        assert is_held


def test_a_lock_keeps_what_the_file_holds(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("who")
    with lock_file(tmp_path / "lock") as is_held:
        assert is_held
    assert (tmp_path / "lock").read_text() == "who"


def test_a_lock_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    with (
        pytest.raises(StoreFailed, match=r"absent/lock cannot be locked .*; mend the folder"),
        lock_file(tmp_path / "absent" / "lock"),
    ):
        pass


# --------------------------------------------------------------------------------- process names
def test_a_process_is_known_by_more_than_its_number(
    platform: str, sleeper: subprocess.Popen[bytes]
) -> None:
    name = process_id(sleeper.pid)
    host, pid, start = name.split(":")
    assert (host, int(pid)) == (socket.gethostname(), sleeper.pid)
    assert is_alive(name)
    assert not is_alive(f"{host}:{pid}:1{start}"), "another process with that number"
    assert not is_alive(f"{host}:{pid}:{start}0"), "another boot, or another clock"
    assert not any(is_alive(name) for name in ("", host, f"{host}:{pid}", f"{host}:{pid}:"))
    assert not is_alive(f"{host}:{pid}:junk")
    assert not is_alive(f"{host}:junk:{start}")
    assert is_alive(f"elsewhere:{pid}:{start}"), "nothing here can know"
    sleeper.kill()
    wait_until(lambda: not is_alive(name), 5, "a dead process does not live, reaped or not")
    assert process_id(sleeper.pid) == f"{host}:{pid}:"
    assert sleeper.wait() == -signal.SIGKILL
    assert not is_alive(name)


@linux_only
def test_a_run_that_release_14cedaa_tagged_is_judged(sleeper: subprocess.Popen[bytes]) -> None:
    """That release read /proc by hand: the 22nd field of stat, and 8 digits of the boot's id."""
    fields = Path(f"/proc/{sleeper.pid}/stat").read_text().split()
    assert fields[1] == "(sleep)"
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    tag = f"{socket.gethostname()}:{sleeper.pid}:{fields[21]}@{boot}"
    assert is_alive(tag)
    assert not is_alive(tag.replace(f"@{boot}", "@00000000")), "the machine was started again"
    sleeper.kill()
    sleeper.wait()
    assert not is_alive(tag)


@pytest.mark.parametrize("platform", ["portable"], indirect=True)
@pytest.mark.parametrize(("step", "alive"), [(30, True), (-30, True), (3600, False)])
def test_a_wall_clock_that_was_set_kills_no_run(
    platform: str, sleeper: subprocess.Popen[bytes], step: float, alive: bool
) -> None:
    start = psutil.Process(sleeper.pid).create_time() + step
    assert is_alive(f"{socket.gethostname()}:{sleeper.pid}:{start:.3f}@epoch") is alive


# --------------------------------------------------------------------------------- children
def test_a_module_runs_as_python_runs_it(
    platform: str, environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "shows.py").write_text(
        "import os, sys\n"
        "print(__name__, sys.argv[0].endswith('shows.py'), *sys.argv[1:])\n"
        "print(os.getsid(0) == os.getpid())\n"
        "sys.exit(3)\n"
    )
    child = start_module(["shows", "one", "two"], environment, stdout=subprocess.PIPE)
    output, _ = child.communicate(timeout=60)
    assert output.splitlines() == ["__main__ True one two", "True"]
    assert child.returncode == 3


STARTS_CHILD = """
import os, sys
from marketdata_assets.system import start_module
print(start_module(["waits"], dict(os.environ)).pid, flush=True)
sys.stdin.read()
"""


def test_a_child_dies_with_its_parent(platform: str, environment: dict[str, str]) -> None:
    code = (WITHOUT_LINUX if platform == "portable" else "") + STARTS_CHILD
    command = [sys.executable, "-c", code]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as parent:  # type: ignore[call-overload]
        child = psutil.Process(int(parent.stdout.readline()))
        assert is_running(child)
        parent.kill()
        wait_until(lambda: not is_running(child), 30, "the child is dead")


def test_a_child_whose_parent_is_dead_already_does_not_live(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "marketdata_assets.system", "1", "waits"]
    done = subprocess.run(command, env=environment, timeout=60)
    assert done.returncode == -signal.SIGKILL


def test_a_child_that_will_not_end_is_killed_with_its_own(
    platform: str, environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "stays.py").write_text(
        "import os, signal\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = os.fork()\n"
        "if child: print(child, flush=True)\n"
        "while True: signal.pause()\n"
    )
    child = start_module(["stays"], environment, stdout=subprocess.PIPE)
    assert child.stdout is not None
    own = psutil.Process(int(child.stdout.readline()))
    stop(child, grace_seconds=0.2)
    child.stdout.close()
    assert child.returncode == -signal.SIGKILL
    wait_until(lambda: not is_running(own), 10, "its own child is dead")


# --------------------------------------------------------------------------------- orphans
SUPERVISES = """
import os, signal
from marketdata_assets.cli.supervisor import Service, Supervisor

def interrupt(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGTERM, interrupt)
try:
    with Supervisor(dict(os.environ), lambda line: print(line, flush=True)) as supervisor:
        supervisor.start(Service("the starter", ["starts"]))
        supervisor.run(lambda: print("check", flush=True))
except KeyboardInterrupt:
    print("ended", flush=True)
"""
STARTS = """
import os, signal, subprocess, sys
run = subprocess.Popen([sys.executable, "-m", "waits"], process_group=0)
print(f"pids {os.getpid()} {run.pid}", flush=True)
signal.pause()
"""
"""A service that starts a process in a group of its own, as the daemon starts runs."""


class Supervised:
    """A supervisor in a process of its own, and the lines that it prints."""

    def __init__(self, platform: str, environment: dict[str, str]) -> None:
        code = (WITHOUT_LINUX if platform == "portable" else "") + SUPERVISES
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True
        )

    def read_until(self, start: str) -> str:
        assert self.process.stdout is not None
        return next(line for line in self.process.stdout if line.startswith(start))

    def read_pids(self) -> tuple[psutil.Process, psutil.Process]:
        """Return the service and the process that it started, once the supervisor knows both."""
        _, service, run = self.read_until("pids").split()
        for _ in range(2):
            self.read_until("check")
        return psutil.Process(int(service)), psutil.Process(int(run))


@pytest.fixture
def supervised(platform: str, environment: dict[str, str], tmp_path: Path) -> Iterator[Supervised]:
    (tmp_path / "starts.py").write_text(STARTS)
    supervised = Supervised(platform, environment)
    yield supervised
    supervised.process.kill()
    supervised.process.wait()
    supervised.process.stdout.close()


def test_an_orphan_outlives_its_service_and_ends_with_the_supervisor(
    supervised: Supervised,
) -> None:
    service, run = supervised.read_pids()
    service.kill()
    line = supervised.read_until("the starter")
    assert line == "the starter was killed by signal 9; starting it again\n"
    second_service, second_run = supervised.read_pids()
    assert service != second_service
    assert is_running(run)
    run.kill()
    wait_until(lambda: not psutil.pid_exists(run.pid), 10, "the dead orphan is reaped")
    second_service.kill()
    supervised.read_until("the starter")
    _, third_run = supervised.read_pids()
    assert is_running(second_run)
    supervised.process.send_signal(signal.SIGTERM)
    supervised.read_until("ended")
    assert not is_running(second_run), "an orphan"
    assert not is_running(third_run), "a child of a service"


def test_a_private_folder_is_made_for_its_owner_and_an_existing_one_stays(tmp_path: Path) -> None:
    make_private_folder(tmp_path / "a" / "state")
    assert (tmp_path / "a" / "state").stat().st_mode & 0o777 == 0o700
    (tmp_path / "shared").mkdir(mode=0o755)
    make_private_folder(tmp_path / "shared")
    assert (tmp_path / "shared").stat().st_mode & 0o777 == 0o755


def test_the_files_of_a_state_folder_are_its_owners_alone(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.receipts.add("repair", datetime(2024, 1, 1, tzinfo=UTC), message="x", body={})
    with ledger.lock("a name"):
        (channel,) = open_channels(tmp_path / "alerts.jsonl", ())
        channel.send(STALE)
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        modes = {path.name: path.stat().st_mode & 0o777 for path in files}
    ledger.close()
    assert {"ledger.db", "ledger.db-wal", "a name", "alerts.jsonl"} <= modes.keys()
    assert set(modes.values()) == {0o600}

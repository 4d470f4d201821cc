"""Services that are started again when they die, until the person or the machine ends us."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import psutil

from marketdata_assets.errors import BadInput, StoreFailed
from marketdata_assets.system import adopt_orphans, lock_file, signal_group, start_module, stop

RESTART_DELAYS = (0.0, 1.0, 2.0, 4.0, 8.0)
"""Seconds before a restart, after the first, second, ... early exit in a row."""
_EARLY_EXIT_SECONDS = 20.0
_CHECK_SECONDS = 0.5
_ORPHAN_GRACE = ((signal.SIGTERM, 5.0), (signal.SIGKILL, 2.0))
"""The signals that end orphans, and the seconds that each is given."""


@dataclass(slots=True)
class Service:
    """A child process that is started again when it dies.

    `needs_child`: it works through a child of its own; without one it lives but serves nothing.
    """

    name: str
    arguments: list[str]
    needs_child: bool = False
    process: subprocess.Popen[str] | None = None
    _started_at: float = 0.0
    _restart_at: float = 0.0
    _early_exits: int = 0
    _had_child: bool = False
    _checks_without_child: int = 0

    def start(self, environment: dict[str, str]) -> subprocess.Popen[str]:
        """Start it now."""
        self._started_at = time.monotonic()
        self._had_child, self._checks_without_child = False, 0
        self.process = start_module(self.arguments, environment)
        return self.process

    def restart_if_dead(self, environment: dict[str, str], report: Callable[[str], None]) -> None:
        """Report and reap it when it has died; start it again when its delay is over.

        Raises StoreFailed where it died too often right after its start.
        """
        if self.process is not None and self._is_dead(self.process):
            self._reap(self.process, report)
        if self.process is None and time.monotonic() >= self._restart_at:
            self.start(environment)

    def _is_dead(self, process: subprocess.Popen[str]) -> bool:
        if process.poll() is not None:
            return True
        if not self.needs_child:
            return False
        has_child = bool(psutil.Process(process.pid).children())
        self._had_child |= has_child
        self._checks_without_child = 0 if has_child else self._checks_without_child + 1
        # twice, because it may be replacing its child itself
        return self._had_child and self._checks_without_child > 1

    def _reap(self, process: subprocess.Popen[str], report: Callable[[str], None]) -> None:
        end = _describe_end(process.poll())
        signal_group(process.pid, signal.SIGKILL)
        process.wait()
        self.process = None
        is_early = time.monotonic() - self._started_at < _EARLY_EXIT_SECONDS
        self._early_exits = self._early_exits + 1 if is_early else 0
        if self._early_exits > len(RESTART_DELAYS):
            raise StoreFailed(
                f"{self.name} {end}, {self._early_exits} times in a row right after its start; "
                "its messages are above"
            )
        delay = RESTART_DELAYS[max(0, self._early_exits - 1)]
        self._restart_at = time.monotonic() + delay
        report(f"{self.name} {end}; starting it again" + (f" in {delay:g} s" if delay else ""))


def _describe_end(code: int | None) -> str:
    if code is None:
        return "lost its own child"
    return f"ended with code {code}" if code >= 0 else f"was killed by signal {-code}"


@dataclass(slots=True)
class Supervisor:
    """Services that live until the block ends; nothing that they started lives after it.

    A service that is killed leaves its children as orphans, such as the runs of a daemon. They
    continue, and are ended with the block. Where the system does not make us their parent, they are
    known from the last check, at most _CHECK_SECONDS before.
    """

    environment: dict[str, str]
    report: Callable[[str], None]
    services: list[Service] = field(default_factory=list)
    _foreign_children: set[psutil.Process] = field(default_factory=set)
    _descendants: set[psutil.Process] = field(default_factory=set)

    def __enter__(self) -> Supervisor:
        """Become the parent of orphans, and note the children that belong to somebody else."""
        adopt_orphans()
        self._foreign_children = set(psutil.Process().children(recursive=True))
        return self

    def __exit__(self, *_: object) -> None:
        """End the services, then the orphans."""
        self.find_orphans()  # what is known now is still known when its parent is dead
        stop(*(service.process for service in self.services if service.process is not None))
        for kind, seconds in _ORPHAN_GRACE:
            self._end_orphans(kind, seconds)

    def _end_orphans(self, kind: signal.Signals, seconds: float) -> None:
        deadline, signaled = time.monotonic() + seconds, set[psutil.Process]()
        while (orphans := self.find_orphans()) and time.monotonic() < deadline:
            for process in orphans - signaled:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(kind)
            signaled |= orphans
            psutil.wait_procs(list(orphans), timeout=0.1)

    def start(self, service: Service) -> subprocess.Popen[str]:
        """Start a service, and supervise it from now on."""
        self.services.append(service)
        return service.start(self.environment)

    def run(self, check: Callable[[], None] = lambda: None) -> NoReturn:
        """Restart what dies, until an exception ends it: an interrupt, or what a service raises.

        `check` is called all the time, and may raise too.
        """
        while True:
            check()
            for service in self.services:
                service.restart_if_dead(self.environment, self.report)
            self.find_orphans()
            threading.Event().wait(_CHECK_SECONDS)

    def find_orphans(self) -> set[psutil.Process]:
        """Return the living descendants whose parent is dead; reap those that are dead too."""
        own = {service.process.pid for service in self.services if service.process is not None}
        found = set(psutil.Process().children(recursive=True)) | self._descendants
        parents = {process: _parent_of(process) for process in found - self._foreign_children}
        self._descendants = {process for process, parent in parents.items() if parent is not None}
        alive = {process.pid for process in self._descendants | self._foreign_children}
        for process, parent in parents.items():
            if parent is None and process.pid not in own:
                with suppress(psutil.TimeoutExpired):
                    process.wait(0)
        return {
            process
            for process in self._descendants
            if process.pid not in own and parents[process] not in alive
        }


def _parent_of(process: psutil.Process) -> int | None:
    """Return the parent's pid; None for a dead process, reaped or not."""
    try:
        return None if process.status() == psutil.STATUS_ZOMBIE else int(process.ppid())
    except psutil.NoSuchProcess:
        return None


@contextmanager
def hold_state_folder(environment: dict[str, str], name: str) -> Iterator[None]:
    """Hold the state folder: two daemons on it would do everything twice.

    `name` is what a second one reads about us. Raises BadInput where we are the second one.
    """
    home = Path(environment["DAGSTER_HOME"])
    file = home / "dev.lock"
    with lock_file(file, wait=False) as is_held:
        if not is_held:
            holder = file.read_text(encoding="utf-8") or "another `marketdata dev`"
            raise BadInput(
                f"{holder} already serves {home.parent}; end that one first, or set another "
                "`state:`"
            )
        file.write_text(f"{name} (process {os.getpid()})", encoding="utf-8")
        yield

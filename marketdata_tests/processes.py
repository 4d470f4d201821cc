"""What tests do with real processes: wait for them, find them, kill them. All by psutil."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil
import pytest


def wait_until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Return what `condition` gives once it is true; fail the test after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with suppress(OSError):  # a server that is dead for a moment
            if value := condition():
                return value
        threading.Event().wait(0.1)
    pytest.fail(f"not within {seconds} s: {what}")


def find_free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def processes_with(variable: str, value: str, words: str = "") -> list[psutil.Process]:
    """Return the living processes with this environment and these words in the command line."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            is_ours = process.environ().get(variable) == value
            if is_ours and words in " ".join(process.cmdline()) and is_running(process):
                found.append(process)
    return found


def descendants(pid: int) -> list[psutil.Process]:
    """Return the children of a process, their children, and so on; none of a dead process."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def is_running(process: psutil.Process) -> bool:
    """Whether a process lives; one that is dead and not reaped does not."""
    with suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def kill(*processes: psutil.Process) -> None:
    """Send SIGKILL to each process that still lives."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()

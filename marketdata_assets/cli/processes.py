"""Dagster as processes of ours: its home, its workers, its web server and daemon. Imports no Dagster."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from marketdata_assets.errors import StoreFailed
from marketdata_assets.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
_PR_SET_PDEATHSIG = 1
# Three allocators (glibc, jemalloc in polars, Arrow's) each keep what was freed; giving it back saves 100 MB a process.
_LEAN = {
    "MALLOC_ARENA_MAX": "2",
    "_RJEM_MALLOC_CONF": "dirty_decay_ms:0,muzzy_decay_ms:0",
    "ARROW_DEFAULT_MEMORY_POOL": "system",
}


def dagster_environment(settings: Settings) -> dict[str, str]:
    """The environment of a Dagster process: its home lies in the state folder, so that nothing is left elsewhere."""
    home = settings.state / "dagster"
    try:
        home.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / "dagster.yaml", home / "dagster.yaml")
    except OSError as error:
        raise StoreFailed(f"{home} cannot be written: {error.strerror}; mend the folder or set another `state:`") from None
    return {**_LEAN, **os.environ, "DAGSTER_HOME": str(home), "DAGSTER_DISABLE_TELEMETRY": "yes", "PYTHONWARNINGS": "ignore"}


def start(arguments: list[str], environment: dict[str, str], **options: Any) -> subprocess.Popen[str]:
    """A child in a session of its own that ends when we do, however we end."""
    command = [sys.executable, "-m", *arguments]
    options |= {"env": environment, "start_new_session": True, "preexec_fn": _die_with_parent}
    child: subprocess.Popen[str] = subprocess.Popen(command, text=True, **options)
    return child


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def stop(process: subprocess.Popen[str], patience: float = 10.0) -> None:
    """End a child and all that it started."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, kind)
        except ProcessLookupError:
            break
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


@contextmanager
def dagster_ui(settings: Settings, port: int, await_ready: Callable[[subprocess.Popen[str]], None]) -> Iterator[subprocess.Popen[str]]:
    """The web server, and once it is ready the daemon, until the block ends; yields the web server."""
    environment = dagster_environment(settings)
    workspace = str(ROOT / "workspace.yaml")
    children = [start(["dagster_webserver", "-w", workspace, "-h", "127.0.0.1", "-p", str(port)], environment)]
    try:
        await_ready(children[0])
        children.append(start(["dagster._daemon", "run", "-w", workspace], environment))
        yield children[0]
    finally:
        for child in children:
            stop(child)

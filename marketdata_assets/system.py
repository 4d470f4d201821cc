"""The operating system: locks on files, names of processes, children that end with their parent.

Everything works on Linux and on a Mac. Linux has better means for some of it (the id of a boot, a
signal when a parent dies, a parent that adopts orphans); elsewhere psutil, a watching thread and a
memory of descendants replace them.

    python -m marketdata_assets.system PARENT MODULE ARGUMENTS...

does what `python -m MODULE ARGUMENTS...` does, and kills itself when the process PARENT is gone.
"""

from __future__ import annotations

import errno
import fcntl
import os
import runpy
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import psutil

from marketdata_assets.errors import BadInput, StoreFailed

BOOT_ID_FILE = Path("/proc/sys/kernel/random/boot_id")
"""Linux's name of the current boot; other systems have no such file."""
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_EPOCH = "epoch"
"""Replaces the boot id where a start is given by the wall clock."""
_CLOCK_STEP = 60.0
"""Seconds by which the wall clock may be set while a process lives."""
_PARENT_CHECK_SECONDS = 0.5


def make_private_folder(folder: Path) -> None:
    """Create a folder that nobody but its owner may enter; one that exists stays as it is."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)


# --------------------------------------------------------------------------------- locks
@contextmanager
def lock_file(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold `path` against all other processes; the lock ends with the block or with the process.

    Gives False where `wait` is off and another process holds it. Creates the file, and leaves it
    and what it holds in place. Raises StoreFailed where it cannot be opened or locked.
    """
    try:
        handle = os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "a")
    except OSError as error:
        raise _not_lockable(path, error) from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_held = True
        except BlockingIOError:
            is_held = False
        except OSError as error:  # a file system without locks
            raise _not_lockable(path, error) from None
        yield is_held


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold a folder against everybody else who does so; against nobody where its file system has no
    locks. Raises OSError where it cannot be opened.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _not_lockable(path: Path, error: OSError) -> StoreFailed:
    return StoreFailed(
        f"{path} cannot be locked ({error}); mend the folder or set another `state:`"
    )


# --------------------------------------------------------------------------------- process names
def process_id(pid: int) -> str:
    """Return `host:pid:start`, which names this process and none after it.

    The start is `ticks@boot id` on Linux, which no change of the wall clock moves, and
    `seconds@epoch` elsewhere. It is empty for a process that is dead, reaped or not.
    """
    return f"{socket.gethostname()}:{pid}:{_start_of(pid)}"


def is_alive(process: str) -> bool:
    """Whether the process named by `process_id` lives.

    A process on another host counts as living, because nothing here can prove that it is dead.
    """
    host, pid, start = [*process.split(":"), "", "", ""][:3]
    if host != socket.gethostname():
        return bool(host)
    found = _start_of(int(pid)) if pid.isdigit() else ""
    return bool(found) and bool(start) and _is_same_start(start, found)


def _start_of(pid: int) -> str:
    try:
        process = psutil.Process(pid)
        if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return ""
        if BOOT_ID_FILE.exists():
            # By hand, as psutil adds the time of the boot, which moves with the wall clock.
            ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
            return f"{ticks}@{BOOT_ID_FILE.read_text()[:8]}"
        return f"{process.create_time():.3f}@{_EPOCH}"
    except (psutil.Error, FileNotFoundError, ProcessLookupError):
        return ""


def _is_same_start(one: str, other: str) -> bool:
    first, _, clock = one.partition("@")
    second, _, other_clock = other.partition("@")
    if clock == other_clock == _EPOCH:
        with suppress(ValueError):  # a tag that somebody else wrote
            return abs(float(first) - float(second)) < _CLOCK_STEP
    return one == other


# --------------------------------------------------------------------------------- children
def start_module(
    arguments: Sequence[str], environment: dict[str, str], **options: Any
) -> subprocess.Popen[str]:
    """Start `python -m ARGUMENTS` in a session of its own; `options` are those of Popen.

    It is killed when this process ends, however that ends. On Linux that is so when the thread ends
    that called this function: call it from a thread that lives as long as the process.
    """
    command = [sys.executable, "-m"]
    if prctl := _prctl():
        parent = os.getpid()
        options["preexec_fn"] = lambda: _die_with(parent, prctl)
    else:
        command += [__name__, str(os.getpid())]
    child: subprocess.Popen[str] = subprocess.Popen(
        [*command, *arguments], text=True, env=environment, start_new_session=True, **options
    )
    return child


def stop(*processes: subprocess.Popen[str], grace_seconds: float = 15.0) -> None:
    """End children of `start_module` and all that stayed in their sessions.

    All are asked at once; after `grace_seconds` seconds whatever is left is killed.
    """
    for process in processes:
        signal_group(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + grace_seconds
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
    for process in processes:
        signal_group(process.pid, signal.SIGKILL)
        process.wait()


def signal_group(group: int, kind: signal.Signals) -> None:
    """Send a signal to all processes of a group, also to those whose parent is dead already."""
    with suppress(ProcessLookupError, PermissionError):  # a Mac refuses a group of dead processes
        os.killpg(group, kind)


def adopt_orphans() -> None:
    """Become the parent of what our children leave behind, where the system can do that."""
    if prctl := _prctl():
        prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl() -> Callable[[int, int], int] | None:
    """Return Linux's call that sets properties of a process; other systems have none."""
    if not sys.platform.startswith("linux"):
        return None
    import ctypes  # takes 2 ms, which most commands do not need

    call: Callable[[int, int], int] = ctypes.CDLL(None).prctl
    return call


def _die_with(parent: int, prctl: Callable[[int, int], int]) -> None:
    """Between fork and exec: ask for SIGKILL at the parent's death, which may have come already."""
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        threading.Event().wait(_PARENT_CHECK_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Run a module that ends with its parent: the way of `start_module` where Linux is not."""
    parent, module, *arguments = sys.argv[1:]
    threading.Thread(target=_watch_parent, args=[int(parent)], daemon=True).start()
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()


# --------------------------------------------------------------------------------- files
def open_regular(path: Path) -> BinaryIO:
    """Open a file to read it. Raises OSError, also for a folder, and for a device or a pipe, which
    would hang or never end.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(handle, "rb")
    os.close(handle)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    raise OSError(errno.EINVAL, "it is a device or a pipe and no file")


def read_bounded(path: Path, most_bytes: int) -> bytes:
    """Return the bytes of a file that somebody named. Raises OSError, and BadInput where they are
    more than `most_bytes`.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size <= most_bytes:
            return file.read()
    raise BadInput(f"{path}: it has more than {most_bytes} bytes; name a smaller file")

"""Locks between the processes of one machine, as files that a process holds open.

The operating system releases a lock when the process that holds it ends, however it ends. This is
the one module of the room that imports `fcntl`: another platform replaces `acquire`.
"""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO

WAREHOUSE = "warehouse"
"""The lock of the DuckDB file; a partition's lock has the name of its key."""


def acquire(file: Path, *, wait: bool) -> IO[str] | None:
    """Lock a file against all other processes and threads; closing the result releases the lock.

    None when `wait` is off and the lock is held elsewhere. Raises OSError.
    """
    handle = file.open("w")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        return None
    except BaseException:
        handle.close()
        raise
    return handle

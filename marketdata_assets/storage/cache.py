"""What was read from files, kept in memory while these files stay as they are."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Hashable
from pathlib import Path
from threading import Lock

import polars as pl

Stamp = tuple[tuple[int, int, int], ...]
"""Inode, time of change in nanoseconds and size in bytes of files: another content has another."""
_CLOCK_STEP = 100_000_000
"""Nanoseconds within which two changes of a file may have the same time."""


def file_stamp(*paths: Path | str) -> Stamp | None:
    """Return the stamp of those files that exist.

    None when none does, and when one has just changed: the next change may give the same stamp.
    """
    found = []
    for path in paths:
        try:
            # os.stat, because this is on the path of every read
            status = os.stat(path)  # noqa: PTH116
        except OSError:
            continue
        found.append((status.st_ino, status.st_mtime_ns, status.st_size))
    newest = max((modified for _, modified, _ in found), default=0)
    return tuple(found) if newest and newest < time.time_ns() - _CLOCK_STEP else None


class FrameCache:
    """Frames by name, up to a number of bytes; those that were used least recently go first.

    `is_known` tells a second reading from the first, so that what is read once takes no memory.
    Several threads may share it.
    """

    def __init__(self, limit: int = 256 * 2**20, names: int = 65_536) -> None:
        self._limit, self._names = limit, names
        self._frames: OrderedDict[Hashable, tuple[Stamp, pl.DataFrame]] = OrderedDict()
        self._known: OrderedDict[Hashable, Stamp] = OrderedDict()
        self._bytes, self._lock = 0, Lock()

    def get(self, name: Hashable, stamp: Stamp) -> pl.DataFrame | None:
        """Return the frame of this name and stamp; None where it is not kept."""
        with self._lock:
            kept, frame = self._frames.get(name, (None, None))
            if kept != stamp:
                return None
            self._frames.move_to_end(name)
            return frame

    def is_known(self, name: Hashable, stamp: Stamp) -> bool:
        """Return whether this was asked before of this name and stamp."""
        with self._lock:
            is_known = self._known.pop(name, None) == stamp
            self._known[name] = stamp
            if len(self._known) > self._names:
                self._known.popitem(last=False)
            return is_known

    def put(self, name: Hashable, stamp: Stamp, frame: pl.DataFrame) -> None:
        """Keep a frame that was read after its stamp was taken."""
        with self._lock:
            if name in self._frames:
                self._bytes -= int(self._frames.pop(name)[1].estimated_size())
            self._frames[name] = (stamp, frame)
            self._bytes += int(frame.estimated_size())
            while self._bytes > self._limit:
                _, (_, dropped) = self._frames.popitem(last=False)
                self._bytes -= int(dropped.estimated_size())

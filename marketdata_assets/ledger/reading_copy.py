"""Read a ledger whose file cannot be written: copy it and its WAL to a temporary folder.

SQLite writes beside a file that it only reads, and `immutable=1`, which avoids that, ignores the
commits that are still in the WAL.
"""

from __future__ import annotations

import filecmp
import shutil
import tempfile
import weakref
from pathlib import Path

from marketdata_assets.errors import StoreFailed
from marketdata_assets.ledger.sqlite import FILE, SqliteDatabase

ATTEMPTS = 10
"""So often a file that changes meanwhile is copied again."""
HEADER = 32
"""Bytes at the beginning of a WAL that change when it starts anew."""


class ReadingCopy(SqliteDatabase):
    """A copy of a ledger that lasts as long as its process reads it; nothing can be written.

    Where there is no ledger yet, the copy is an empty one. Raises StoreFailed.
    """

    def __init__(self, state: Path) -> None:
        file = state / FILE
        try:
            folder = Path(tempfile.mkdtemp(prefix="marketdata-ledger-"))
            self._remove = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            _copy(file, folder / FILE)
        except OSError as error:
            raise StoreFailed(
                f"{file} cannot be copied for reading ({error}); {self.remedy}"
            ) from None
        super().__init__(folder, str(file))

    def close(self) -> None:
        """Close all connections, and remove the copy."""
        super().close()
        self._remove()


def _copy(file: Path, target: Path) -> None:
    """Copy a file and its WAL as they were at one moment.

    A process elsewhere may write them: commits are added to the end of the WAL, of which any part
    from its beginning is whole. What must not happen meanwhile is that commits move from the WAL
    to the file, which then differs from its copy.
    """
    for _ in range(ATTEMPTS):
        header = _header(file)
        for suffix in ("", "-wal"):
            source, copy = (place.with_name(FILE + suffix) for place in (file, target))
            copy.unlink(missing_ok=True)
            if source.exists():
                shutil.copyfile(source, copy)
        if not file.exists() or (filecmp.cmp(file, target, False) and _header(file) == header):
            return
    raise StoreFailed(f"{file} is written to all the time and cannot be copied; try again")


def _header(file: Path) -> bytes:
    try:
        with file.with_name(FILE + "-wal").open("rb") as wal:
            return wal.read(HEADER)
    except FileNotFoundError:
        return b""

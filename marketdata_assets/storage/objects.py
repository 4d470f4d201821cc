"""Stores of whole objects: a local folder here, S3 in `storage.s3`. A write replaces an object
completely or not at all.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from marketdata_assets.errors import StoreFailed
from marketdata_assets.model.partition import PartitionKey
from marketdata_assets.model.table import OBJECT_NAME, parse_folders
from marketdata_assets.storage.object_proof import Listed, StoredContent
from marketdata_assets.storage.s3 import S3Objects
from marketdata_assets.system import lock_folder, open_regular


def _listed(status: os.stat_result) -> Listed:
    return Listed(status.st_size, f"{status.st_size} {status.st_mtime_ns}")


class ObjectStore(Protocol):
    """A store of whole objects, named by paths relative to its root. Raises StoreFailed; a failed
    call leaves the object's earlier content in place.
    """

    def read(self, path: str) -> bytes | None:
        """Return the object's content; None where there is no object."""
        ...

    def read_stamped(self, path: str) -> StoredContent | None:
        """Return the object's content with its stamp; None where there is no object."""
        ...

    def write(self, path: str, content: bytes) -> str:
        """Replace the whole object; return its stamp. A store that can detect it refuses to replace
        an object that another writer has changed since it was read here.
        """
        ...

    def write_while(
        self, held: Mapping[str, bytes | None], path: str, content: bytes
    ) -> str | None:
        """Replace the whole object while these objects hold these contents; None: do not exist.

        Return its stamp; None where one of them was changed, in S3 perhaps while this object was
        written.
        """
        ...

    def find(self, path: str) -> Listed | None:
        """Return the object's size and stamp; None where there is no object."""
        ...

    def list(self, prefix: str, name: str = OBJECT_NAME) -> Iterator[tuple[PartitionKey, Listed]]:
        """Yield partition, size and stamp of every object of this name in
        `<prefix>/<market>/<month>/`.
        """
        ...

    def find_uris(self, paths: Sequence[str], *, all_exist: bool) -> dict[str, str]:
        """Return the URI that every reader understands, by path, of each object that exists.

        `all_exist`: the caller knows that all of them do, so that S3 need not be asked.
        """
        ...

    def delete(self, path: str) -> None:
        """Remove the object where it exists. A store that can detect it refuses to remove an
        object that another writer has changed since it was read here.
        """
        ...

    def quarantine_object(self, path: str) -> str:
        """Rename the object, so that it is read no more. Return the new name."""
        ...

    def list_storage_classes(self, prefix: str) -> dict[str, str]:
        """Return the S3 storage class of every object below a prefix, by path; none in a folder."""
        ...

    def set_storage_class(self, path: str, storage_class: str) -> None:
        """Change the S3 storage class of an object in place."""
        ...

    def remove_abandoned_uploads(self) -> int:
        """Remove what writers that died have left behind. Return how many files or uploads."""
        ...


def open_object_store(location: str) -> ObjectStore:
    """Return the store of `s3://bucket/prefix`, or of a folder."""
    return S3Objects(location) if location.startswith("s3://") else _FolderObjects(Path(location))


class _FolderObjects:
    """A local folder. A write fills a temporary file, syncs it and renames it, so that a reader
    sees the old object or the new one.
    """

    def __init__(self, root: Path) -> None:
        self._root, self._temporary = root, root / ".writing"

    def read(self, path: str) -> bytes | None:
        found = self.read_stamped(path)
        return found.content if found else None

    def read_stamped(self, path: str) -> StoredContent | None:
        try:
            with open_regular(self._root / path) as file:
                return StoredContent(file.read(), _listed(os.fstat(file.fileno())).stamp)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._failure("read", path, error) from None

    def write(self, path: str, content: bytes) -> str:
        return self.write_while({}, path, content) or ""

    def write_while(
        self, held: Mapping[str, bytes | None], path: str, content: bytes
    ) -> str | None:
        target = self._root / path
        temporary = self._temporary / f"{os.getpid()}-{secrets.token_hex(6)}"
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            self._temporary.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                stamp = _listed(os.fstat(file.fileno())).stamp
            with lock_folder(self._root):
                is_held = all(self.read(other) == expected for other, expected in held.items())
                if is_held:
                    temporary.replace(target)
            if is_held:
                _sync_folder(target.parent)
            return stamp if is_held else None
        except OSError as error:
            raise self._failure("written", path, error) from None
        finally:
            with suppress(OSError):
                temporary.unlink()

    def find(self, path: str) -> Listed | None:
        try:
            return _listed((self._root / path).stat())
        except OSError:
            return None

    def list(self, prefix: str, name: str = OBJECT_NAME) -> Iterator[tuple[PartitionKey, Listed]]:
        for market in _list_folder(self._root / prefix):
            for month in _list_folder(market):
                with suppress(OSError):
                    # os.stat, because this runs for 48,000 objects at once
                    status = os.stat(f"{month.path}/{name}")  # noqa: PTH116
                    yield parse_folders(market.name, month.name), _listed(status)

    def find_uris(self, paths: Sequence[str], *, all_exist: bool) -> dict[str, str]:
        # os.path, because this is on the path of every read
        uris = {path: f"{self._root}/{path}" for path in paths}
        return {path: uri for path, uri in uris.items() if os.path.exists(uri)}  # noqa: PTH110

    def delete(self, path: str) -> None:
        try:
            with lock_folder(self._root):
                (self._root / path).unlink(missing_ok=True)
            for folder in (self._root / path).parents[:2]:
                folder.rmdir()  # the month, then the market, until one holds something else
        except OSError as error:
            if (self._root / path).exists():
                raise self._failure("removed", path, error) from None

    def quarantine_object(self, path: str) -> str:
        target = self._root / path
        damaged = target.with_name(target.name + ".damaged")
        try:
            target.replace(damaged)
        except OSError as error:
            raise self._failure("renamed", path, error) from None
        return str(damaged)

    def list_storage_classes(self, prefix: str) -> dict[str, str]:
        return {}

    def set_storage_class(self, path: str, storage_class: str) -> None:
        raise StoreFailed(f"{self._root} is a folder; storage classes exist only for a lake in S3")

    def remove_abandoned_uploads(self) -> int:
        try:
            abandoned = [
                path for path in self._temporary.iterdir() if not _is_writer_alive(path.name)
            ]
        except OSError:
            return 0
        for path in abandoned:
            path.unlink(missing_ok=True)
        return len(abandoned)

    def _failure(self, verb: str, path: str, error: OSError) -> StoreFailed:
        return StoreFailed(
            f"{self._root / path} cannot be {verb}: {error.strerror}; "
            "mend the folder or set another `lake:`"
        )


def _list_folder(folder: os.PathLike[str]) -> Iterator[os.DirEntry[str]]:
    """Yield the entries of a folder; none where it does not exist or is a file."""
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        yield from entries


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_writer_alive(name: str) -> bool:
    """Say whether the process that a temporary file is named after still runs."""
    try:
        os.kill(int(name.partition("-")[0]), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return True

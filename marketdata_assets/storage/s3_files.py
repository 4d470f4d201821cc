"""S3 as a file system for DuckDB, whose own needs a download, through the client that everything
else here uses: its credentials are renewed, and it follows no redirect.
"""

from __future__ import annotations

import io
from typing import Any

from fsspec.asyn import AbstractFileSystem
from fsspec.spec import AbstractBufferedFile

from marketdata_assets.errors import StoreFailed
from marketdata_assets.storage.s3_client import S3Client, S3RefusedError

_ABSENT = "NoSuchKey"


class S3Files(AbstractFileSystem):  # type: ignore[misc]
    """Files are named `bucket/key`. Raises StoreFailed, and FileNotFoundError.

    DuckDB makes a text of the errors that come from here; `failure` is the last one itself.
    """

    protocol = "s3"
    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self._clients: dict[str, S3Client] = {}
        self._known: dict[str, dict[str, Any]] = {}
        self.failure: StoreFailed | None = None

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Return name, size in bytes and type; a file is asked about once."""
        path = self._strip_protocol(path)
        if path not in self._known:
            answer = self.call("get_object", path, Range="bytes=0-0")
            size = int(answer["ContentRange"].rpartition("/")[2])
            self._known[path] = {
                "name": path,
                "size": size,
                "type": "file",
                "ETag": answer.get("ETag"),
                "mtime": answer["LastModified"],
            }
        return self._known[path]

    def modified(self, path: str) -> Any:
        """Return when a file was written last."""
        return self.info(path)["mtime"]

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """Return what lies directly in a folder."""
        path = self._strip_protocol(path)
        folder = path.rstrip("/") + "/"
        bucket, prefix = folder.split("/", 1)
        position = {"Delimiter": "/", "Prefix": prefix}
        found = list[dict[str, Any]]()
        while True:
            answer = self.call("list_objects_v2", folder, **position)
            found += [
                {"name": f"{bucket}/{each['Prefix'].rstrip('/')}", "size": 0, "type": "directory"}
                for each in answer.get("CommonPrefixes", ())
            ]
            found += [
                {"name": f"{bucket}/{each['Key']}", "size": int(each["Size"]), "type": "file"}
                for each in answer.get("Contents", ())
            ]
            if not answer.get("IsTruncated"):
                return found if detail else [each["name"] for each in found]
            position["ContinuationToken"] = answer["NextContinuationToken"]

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        if mode == "rb":
            return _ReadFile(self, path, mode, cache_type="readahead")
        return _WrittenFile(self, path)

    def call(self, verb: str, path: str, **options: Any) -> dict[str, Any]:
        """Make one request about a file, or about a folder, whose name ends with a slash."""
        bucket, _, key = path.partition("/")
        client = self._clients.setdefault(bucket, S3Client(f"s3://{bucket}"))
        named = {} if path.endswith("/") else {"Key": key}
        try:
            return client.call(verb, key, **named, **options)
        except StoreFailed as failure:
            if isinstance(failure, S3RefusedError) and failure.code == _ABSENT:
                raise FileNotFoundError(f"s3://{path}") from None
            self.failure = failure
            raise


class _ReadFile(AbstractBufferedFile):  # type: ignore[misc]
    """An object that is read by ranges, as it was when it was opened."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        version = {"IfMatch": self.details["ETag"]} if self.details.get("ETag") else {}
        part = f"bytes={start}-{end - 1}"
        content: bytes = self.fs.call("get_object", self.path, Range=part, **version)["Content"]
        return content


class _WrittenFile(io.BytesIO):
    """An object that is written when it is closed."""

    def __init__(self, files: S3Files, path: str) -> None:
        super().__init__()
        self._files, self._path = files, path

    def close(self) -> None:
        """Put what was written."""
        if not self.closed:
            self._files.call("put_object", self._path, Body=self.getvalue())
            self._files._known.pop(self._path, None)
        super().close()

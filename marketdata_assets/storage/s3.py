"""Objects below a prefix in S3."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

from marketdata_assets.errors import StoreFailed
from marketdata_assets.model.partition import PartitionKey
from marketdata_assets.model.table import OBJECT_NAME, parse_folders
from marketdata_assets.storage.object_proof import Listed, StoredContent
from marketdata_assets.storage.s3_client import S3Client, S3RefusedError

ABANDONED_AFTER = timedelta(days=1)
"""A multipart upload that began longer ago has no living writer."""
_ABSENT = "NoSuchKey"
_BUSY = ("ConditionalRequestConflict", "409")
_CONDITION_REFUSED = (
    *_BUSY,
    "PreconditionFailed",
    "412",
    _ABSENT,
    "NotImplemented",
    "501",
)
"""Error codes of a server where the condition does not hold (an object that does not exist has no
version), or that supports no conditions.
"""


def _stamp(answer: Mapping[str, Any]) -> str:
    """Return the ETag of an answer without its quotes, which not every server sends."""
    return (answer.get("ETag") or "").strip('"')


class _ChangedMeanwhileError(StoreFailed):
    """Another writer has changed an object since it was read here."""


class S3Objects:
    """A prefix in S3: one PUT replaces an object completely.

    An object that was read here is only replaced or removed while no other writer has changed it
    since (If-Match), and one that did not exist is only created while it still does not
    (If-None-Match).
    """

    def __init__(self, location: str) -> None:
        self._client = S3Client(location)
        self._versions: dict[str, str | None] = {}
        """The ETag of each object that was read or written here; None where none existed."""

    def read(self, path: str) -> bytes | None:
        """Return the object's content, None where there is no object, and note its version."""
        found = self.read_stamped(path)
        return found.content if found else None

    def read_stamped(self, path: str) -> StoredContent | None:
        """Return the object's content with its ETag, None where there is no object."""
        answer = self._get(path)
        self._versions[path] = answer.get("ETag")
        return StoredContent(answer["Content"], _stamp(answer)) if answer else None

    def write(self, path: str, content: bytes) -> str:
        """Replace the object; return its ETag. Raises StoreFailed where another writer has changed
        it.
        """
        self._change("put_object", path, content)
        return _stamp({"ETag": self._versions.get(path)})

    def write_while(
        self, held: Mapping[str, bytes | None], path: str, content: bytes
    ) -> str | None:
        """Replace the object; return its ETag where these objects hold these contents afterwards,
        too.
        """
        try:
            stamp = self.write(path, content)
        except _ChangedMeanwhileError:
            if path not in held:
                raise
            return None
        is_held = all(self.read(other) == held[other] for other in held.keys() - {path})
        return stamp if is_held else None

    def delete(self, path: str) -> None:
        """Remove the object. Raises StoreFailed where another writer has changed it."""
        self._change("delete_object", path, None)

    def _get(self, path: str, **part: str) -> dict[str, Any]:
        """Return an object's content, or a part of it, with its headers; an empty answer where
        there is no object.
        """
        try:
            return self._client.call("get_object", path, Key=self._client.key(path), **part)
        except S3RefusedError as refusal:
            if refusal.code != _ABSENT:
                raise
            return {}

    def _change(self, verb: str, path: str, content: bytes | None) -> None:
        """Replace an object, or remove it (`content` is None), while its version is the one that
        was read here.

        A server refuses the condition because of another writer; after our own request whose answer
        was lost; where it supports no conditions, so that reading again has to do; and radosgw 16
        refuses an ETag with its quotes.
        """
        version = self._versions.get(path)
        body = {} if content is None else {"Body": content}
        for condition in self._conditions(path, creates=content is not None):
            try:
                key = self._client.key(path)
                answer = self._client.call(verb, path, Key=key, **body, **condition)
                self._versions[path] = answer.get("ETag")
                return
            except S3RefusedError as refusal:
                if not condition or refusal.code not in _CONDITION_REFUSED:
                    raise
                if self.read(path) == content:
                    return
                if self._versions[path] != version or refusal.code in _BUSY:
                    self._versions[path] = version  # the other writer's content was not used here
                    raise _ChangedMeanwhileError(
                        f"{self._client.uri(path)} was changed by another writer meanwhile; "
                        "the next run reads it again"
                    ) from None

    def _conditions(self, path: str, *, creates: bool) -> list[dict[str, str]]:
        """Return the conditions to request one after the other, each where the server refuses the
        one before although the object has not changed.
        """
        if version := self._versions.get(path):
            return [{"IfMatch": version}, {"IfMatch": version.strip('"')}, {}]
        return [{"IfNoneMatch": "*"}, {}] if creates and path in self._versions else [{}]

    def find(self, path: str) -> Listed | None:
        """Return the object's size and ETag; None where there is no object."""
        try:
            # not a HEAD, because its answer does not say why it is refused
            answer = self._get(path, Range="bytes=0-0")
        except S3RefusedError as refusal:
            if refusal.code != "InvalidRange":
                raise
            return Listed(0, "")
        if not answer:
            return None
        return Listed(int(answer["ContentRange"].rpartition("/")[2]), _stamp(answer))

    def list(self, prefix: str, name: str = OBJECT_NAME) -> Iterator[tuple[PartitionKey, Listed]]:
        """Yield partition, size and ETag of every object of this name below `<prefix>/`."""
        for path, entry in self._list_objects(prefix):
            folders = path.removeprefix(prefix + "/").split("/")
            if len(folders) == 3 and folders[-1] == name:  # others may store files there too
                listed = Listed(int(entry["Size"]), _stamp(entry))
                yield parse_folders(folders[0], folders[1]), listed

    def find_uris(self, paths: Sequence[str], *, all_exist: bool) -> dict[str, str]:
        """Return `s3://bucket/key` by path of each object that exists.

        Unless `all_exist`, the folders of the markets are listed.
        """
        if not all_exist:
            market_folders = {path.rsplit("/", 2)[0] for path in paths}
            listed = {path for folder in market_folders for path, _ in self._list_objects(folder)}
            paths = [path for path in paths if path in listed]
        return {path: self._client.uri(path) for path in paths}

    def list_storage_classes(self, prefix: str) -> dict[str, str]:
        """Return the storage class of every object below `<prefix>/`, by path."""
        entries = self._list_objects(prefix)
        return {path: entry.get("StorageClass", "STANDARD") for path, entry in entries}

    def set_storage_class(self, path: str, storage_class: str) -> None:
        """Change the storage class of an object in place."""
        self._client.set_storage_class(path, storage_class)

    def quarantine_object(self, path: str) -> str:
        """Copy the object to `<path>.damaged` and remove it. Return the new name.

        Raises StoreFailed where another writer replaces it meanwhile; the new object stays.
        """
        content = self.read(path)
        if content is not None:
            self.write(path + ".damaged", content)
            self.delete(path)
        return self._client.uri(path) + ".damaged"

    def remove_abandoned_uploads(self) -> int:
        """Abort the multipart uploads of other writers below this prefix that nobody finishes any
        more: they cost money, and no listing of objects shows them.

        Keys that may not list or abort uploads can use the rest of the lake all the same.
        """
        before, aborted = datetime.now(UTC) - ABANDONED_AFTER, 0
        marks = {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"}
        with suppress(S3RefusedError):
            for upload in self._list("list_multipart_uploads", "", entries="Uploads", marks=marks):
                if upload["Initiated"] < before:
                    target = {"Key": upload["Key"], "UploadId": upload["UploadId"]}
                    self._client.call("abort_multipart_upload", "", **target)
                    aborted += 1
        return aborted

    def _list_objects(self, prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the path and the listing's entry of every object below a prefix."""
        root = len(self._client.key(""))
        marks = {"ContinuationToken": "NextContinuationToken"}
        for entry in self._list("list_objects_v2", prefix, entries="Contents", marks=marks):
            yield entry["Key"][root:], entry

    def _list(
        self, verb: str, prefix: str, *, entries: str, marks: dict[str, str]
    ) -> Iterator[dict[str, Any]]:
        """Yield all entries of a listing, page by page. `marks` names the parameters that request
        the next page, and the field of an answer that holds the value of each.
        """
        position: dict[str, str] = {}
        below = self._client.key(prefix) + "/" * bool(prefix)
        while True:
            answer = self._client.call(verb, prefix, Prefix=below, **position)
            yield from answer.get(entries, ())
            position = {name: answer[mark] for name, mark in marks.items() if answer.get(mark)}
            if not answer.get("IsTruncated") or not position:
                return

"""Where objects live: a local folder, or a prefix in S3. Each is replaced whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from marketdata_assets.errors import StoreFailed
from marketdata_assets.model.table import OBJECT


class Objects(Protocol):
    """A store of whole objects. Raises StoreFailed; what an object held before survives any
    failure.
    """

    def read(self, path: str) -> bytes | None:
        """The object's content; None where there is none."""
        ...

    def write(self, path: str, content: bytes) -> None:
        """Replace it whole; where the store can tell, not one that another writer has changed since it
        was read here.
        """
        ...

    def size(self, path: str) -> int | None:
        """Its size in bytes; None where there is none."""
        ...

    def sizes(self, prefix: str) -> Iterator[tuple[str, str, int]]:
        """Every object `<prefix>/<a>/<b>/data.parquet`: a, b and its size."""
        ...

    def uris(self, paths: Sequence[str], known: bool) -> dict[str, str]:
        """Under what name every reader finds each object that is there. `known`: all of them are, by
        the ledger.
        """
        ...

    def delete(self, path: str) -> None:
        """Remove it, where it is there; where the store can tell, not one that another writer has
        changed since it was read here.
        """
        ...

    def set_aside(self, path: str) -> str:
        """Rename it; the new name."""
        ...

    def classes(self, prefix: str) -> dict[str, str]:
        """The storage class of every object below a prefix, by path; nothing where there are no
        classes.
        """
        ...

    def set_class(self, path: str, storage_class: str) -> None:
        """Move an object to another storage class, in place."""
        ...

    def sweep(self) -> int:
        """Remove what dead writers left; how many."""
        ...


def open_objects(location: str) -> Objects:
    """The store of `s3://bucket/prefix`, or of a folder."""
    return _Bucket(location) if location.startswith("s3://") else _Folder(Path(location))


class _Folder:
    """A local folder. A write goes aside, is synced, then renamed: a reader sees the old object or the
    new one.
    """

    def __init__(self, root: Path) -> None:
        self._root, self._aside = root, root / ".writing"

    def read(self, path: str) -> bytes | None:
        try:
            return (self._root / path).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._failed("read", path, error) from None

    def write(self, path: str, content: bytes) -> None:
        target = self._root / path
        aside = self._aside / f"{os.getpid()}-{secrets.token_hex(6)}"
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            self._aside.mkdir(parents=True, exist_ok=True)
            with aside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(target)
            _sync_folder(target.parent)
        except OSError as error:
            with suppress(OSError):
                aside.unlink()
            raise self._failed("written", path, error) from None

    def size(self, path: str) -> int | None:
        try:
            return (self._root / path).stat().st_size
        except OSError:
            return None

    def sizes(self, prefix: str) -> Iterator[tuple[str, str, int]]:
        with (
            suppress(FileNotFoundError, NotADirectoryError),
            os.scandir(self._root / prefix) as outer,
        ):
            for a in outer:
                with suppress(NotADirectoryError), os.scandir(a) as inner:
                    for b in inner:
                        with suppress(OSError):
                            yield a.name, b.name, os.stat(f"{b.path}/{OBJECT}").st_size  # noqa: PTH116 - 48,000 of them at once

    def uris(self, paths: Sequence[str], known: bool) -> dict[str, str]:
        return {path: uri for path in paths if os.path.exists(uri := f"{self._root}/{path}")}  # noqa: PTH110 - on a hot path

    def delete(self, path: str) -> None:
        try:
            (self._root / path).unlink(missing_ok=True)
            for folder in (self._root / path).parents[:2]:
                folder.rmdir()  # an empty month, then an empty market
        except OSError as error:
            if (self._root / path).exists():
                raise self._failed("removed", path, error) from None

    def set_aside(self, path: str) -> str:
        target = self._root / path
        moved = target.with_name(target.name + ".damaged")
        try:
            target.replace(moved)
        except OSError as error:
            raise self._failed("moved", path, error) from None
        return str(moved)

    def classes(self, prefix: str) -> dict[str, str]:
        return {}

    def set_class(self, path: str, storage_class: str) -> None:
        raise StoreFailed(f"{self._root} is a folder; storage classes are for a lake in S3")

    def sweep(self) -> int:
        try:
            left = [p for p in self._aside.iterdir() if not _alive(p.name)]
        except OSError:
            return 0
        for path in left:
            path.unlink(missing_ok=True)
        return len(left)

    def _failed(self, verb: str, path: str, error: OSError) -> StoreFailed:
        return StoreFailed(
            f"{self._root / path} cannot be {verb}: {error.strerror}; mend the folder or set another `lake:`"
        )


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _alive(name: str) -> bool:
    try:
        os.kill(int(name.partition("-")[0]), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return True


ATTEMPTS = 5
CONNECT_SECONDS, ANSWER_SECONDS = 10, 20
"""How long a server may keep silent, before it takes the call and after."""
ABANDONED = timedelta(days=1)
"""An upload in parts that began so long ago has no living writer."""
_ABSENT = "NoSuchKey"
_BUSY = ("ConditionalRequestConflict", "409")
_CONDITIONAL = (*_BUSY, "PreconditionFailed", "412", _ABSENT, "NotImplemented", "501")
"""What a server says to a condition: it does not hold (an object that is not there has no version), or
it knows none.
"""
_KEYS = "these keys may not do that; give their owner s3:GetObject, s3:PutObject, s3:DeleteObject and s3:ListBucket on it"
_EXPIRED = "the credentials have expired; get new ones"
_REGION = "the bucket lies elsewhere; set AWS_REGION, or mend AWS_ENDPOINT_URL"
_SILENT = "the server does not answer; check AWS_ENDPOINT_URL and the network"
_BROKEN = "the server's answers break off; check AWS_ENDPOINT_URL and the network"
_STRANGE = "that is no answer of S3; check AWS_ENDPOINT_URL"
_ADVICE = {
    "NoSuchBucket": "there is no such bucket; make it, or mend `lake:`",
    "AccessDenied": _KEYS,
    "403": _KEYS,
    "InvalidAccessKeyId": "the server does not know this AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the AWS_SECRET_ACCESS_KEY does not fit its key id",
    "ExpiredToken": _EXPIRED,
    "ExpiredTokenException": _EXPIRED,
    "InvalidToken": "AWS_SESSION_TOKEN is not one that the server knows; get new credentials",
    "RequestTimeTooSkewed": "this machine's clock is wrong; set it",
    "PermanentRedirect": _REGION,
    "301": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "IllegalLocationConstraintException": _REGION,
    "SlowDown": "the server asks for patience; the next run goes on",
    "NoCredentialsError": "there are no AWS credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role",
    "EndpointConnectionError": _SILENT,
    "ConnectTimeoutError": _SILENT,
    "ReadTimeoutError": _SILENT,
    "ConnectionClosedError": _BROKEN,
    "ResponseStreamingError": _BROKEN,
    "IncompleteReadError": _BROKEN,
    "ProtocolError": _BROKEN,
    "FlexibleChecksumError": "what comes is not what was stored; check the network",
    "SSLError": "the server's certificate is not trusted; set AWS_CA_BUNDLE",
    "ResponseParserError": _STRANGE,
}


class _Bucket:
    """A prefix in S3: one PUT replaces an object whole. Endpoint, region and credentials come from the
    usual AWS variables or roles.

    What was read here is only replaced or removed while nobody else has changed it since (If-Match;
    If-None-Match for what was not there).
    """

    def __init__(self, location: str) -> None:
        parts = urlsplit(location)
        self._bucket, self._prefix = parts.netloc, parts.path.strip("/")
        self._client: Any = None
        self._versions: dict[str, str | None] = {}

    def _call(self, verb: str, path: str, **kwargs: Any) -> dict[str, Any]:
        """One request, repeated where that may help. Raises _RefusedError where the server says no,
        else StoreFailed.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        for attempt in range(ATTEMPTS):
            try:
                return self._ask(verb, **kwargs)
            except ClientError as error:
                code = str(error.response.get("Error", {}).get("Code"))
                raise _RefusedError(self._words(path, code), code) from None
            except _broken() as error:  # botocore repeats the rest by itself
                if attempt + 1 == ATTEMPTS:
                    raise StoreFailed(self._words(path, type(error).__name__)) from None
            except (BotoCoreError, ValueError) as error:
                raise StoreFailed(self._words(path, type(error).__name__)) from None
        raise AssertionError  # the last attempt has returned or raised

    def _ask(self, verb: str, **kwargs: Any) -> dict[str, Any]:
        """An answer with the whole body, where it has one, as Content."""
        from botocore.exceptions import ReadTimeoutError, ResponseStreamingError
        from botocore.parsers import ResponseParserError

        self._client = self._client or open_client()
        found: dict[str, Any] = getattr(self._client, verb)(Bucket=self._bucket, **kwargs)
        if verb in ("get_object", "put_object") and "ETag" not in found:
            raise ResponseParserError
        if "Body" in found:
            try:
                found["Content"] = bytes(found["Body"].read())
            except ReadTimeoutError as error:
                raise ResponseStreamingError(error=error) from None
        return found

    def _key(self, path: str) -> str:
        return f"{self._prefix}/{path}".lstrip("/")

    def _get(self, path: str, **part: str) -> dict[str, Any]:
        """An object's Content, or a part of it, and what is known of it; nothing where there is no
        object.
        """
        try:
            return self._call("get_object", path, Key=self._key(path), **part)
        except _RefusedError as refusal:
            if refusal.code != _ABSENT:
                raise
            return {}

    def read(self, path: str) -> bytes | None:
        found = self._get(path)
        self._versions[path] = found.get("ETag")
        return found.get("Content")

    def write(self, path: str, content: bytes) -> None:
        self._change("put_object", path, content, Body=content)

    def delete(self, path: str) -> None:
        self._change("delete_object", path, None)

    def _change(self, verb: str, path: str, wanted: bytes | None, **body: bytes) -> None:
        """Replace or remove an object that is still as it was when it was read here.

        A condition is refused for another writer; after our own request, whose answer was lost; by
        a store that knows no conditions, where looking again has to do; and by radosgw 16, which
        wants the ETag without its quotes.
        """
        version = self._versions.get(path)
        for condition in self._conditions(path, creates=wanted is not None):
            try:
                self._versions[path] = self._call(
                    verb, path, Key=self._key(path), **body, **condition
                ).get("ETag")
                return
            except _RefusedError as refusal:
                if not condition or refusal.code not in _CONDITIONAL:
                    raise
                if self.read(path) == wanted:
                    return
                if self._versions[path] != version or refusal.code in _BUSY:
                    self._versions[path] = version  # nobody here has seen what the other one wrote
                    where = f"s3://{self._bucket}/{self._key(path)}"
                    raise StoreFailed(
                        f"{where} was changed by another writer meanwhile; the next run reads it anew"
                    ) from None

    def _conditions(self, path: str, creates: bool) -> list[dict[str, str]]:
        """What to ask for first, and what next where that is refused although nothing has changed."""
        if version := self._versions.get(path):
            return [{"IfMatch": version}, {"IfMatch": version.strip('"')}, {}]
        return [{"IfNoneMatch": "*"}, {}] if creates and path in self._versions else [{}]

    def size(self, path: str) -> int | None:
        try:
            found = self._get(path, Range="bytes=0-0")  # a HEAD would not say why it is refused
        except _RefusedError as refusal:
            if refusal.code != "InvalidRange":
                raise
            return 0
        return int(found["ContentRange"].rpartition("/")[2]) if found else None

    def sizes(self, prefix: str) -> Iterator[tuple[str, str, int]]:
        for path, entry in self._objects(prefix):
            folders = path.removeprefix(prefix + "/").split("/")
            if len(folders) == 3 and folders[-1] == OBJECT:  # what else lies there is not ours
                yield folders[0], folders[1], int(entry["Size"])

    def uris(self, paths: Sequence[str], known: bool) -> dict[str, str]:
        if not known:
            folders = {
                path.rsplit("/", 2)[0] for path in paths
            }  # of a market, which holds its months
            there = {path for folder in folders for path, _ in self._objects(folder)}
            paths = [path for path in paths if path in there]
        return {path: f"s3://{self._bucket}/{self._key(path)}" for path in paths}

    def classes(self, prefix: str) -> dict[str, str]:
        return {
            path: entry.get("StorageClass", "STANDARD") for path, entry in self._objects(prefix)
        }

    def _objects(self, prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every object below a prefix, by path."""
        cut = len(self._key(""))
        for entry in self._listed(
            "list_objects_v2", prefix, "Contents", {"ContinuationToken": "NextContinuationToken"}
        ):
            yield entry["Key"][cut:], entry

    def _listed(
        self, verb: str, prefix: str, what: str, marks: dict[str, str]
    ) -> Iterator[dict[str, Any]]:
        """All entries of a listing, page by page; `marks` names what an answer tells and the next
        request asks from.
        """
        asks: dict[str, str] = {}
        while True:
            found = self._call(verb, prefix, Prefix=self._key(prefix) + "/" * bool(prefix), **asks)
            yield from found.get(what, ())
            asks = {ask: found[told] for ask, told in marks.items() if found.get(told)}
            if not found.get("IsTruncated") or not asks:
                return

    def set_class(self, path: str, storage_class: str) -> None:
        source = {"Bucket": self._bucket, "Key": self._key(path)}
        self._call(
            "copy_object",
            path,
            Key=self._key(path),
            CopySource=source,
            StorageClass=storage_class,
            MetadataDirective="COPY",
        )

    def set_aside(self, path: str) -> str:
        content = self.read(path)
        if content is not None:
            self.write(path + ".damaged", content)
            self.delete(path)
        return f"s3://{self._bucket}/{self._key(path)}.damaged"

    def sweep(self) -> int:
        # uploads in parts (by other writers into this prefix) that nobody finishes any more cost
        # money, and nobody sees them
        before, ended = datetime.now(UTC) - ABANDONED, 0
        marks = {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"}
        with suppress(
            _RefusedError
        ):  # whoever may not look or remove keeps the rest of the lake all the same
            for upload in self._listed("list_multipart_uploads", "", "Uploads", marks):
                if upload["Initiated"] < before:
                    self._call(
                        "abort_multipart_upload", "", Key=upload["Key"], UploadId=upload["UploadId"]
                    )
                    ended += 1
        return ended

    def _words(self, path: str, code: str) -> str:
        advice = _ADVICE.get(code, "check the bucket, AWS_ENDPOINT_URL and the AWS keys")
        return f"s3://{self._bucket}/{self._key(path)}: {code}; {advice}"


class _RefusedError(StoreFailed):
    """The server answered with an error; its code."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


def open_client() -> Any:
    """A client that repeats what may pass (503, 500, resets, timeouts), with everything else from the
    usual AWS variables.
    """
    from botocore.config import Config

    retries = {"mode": "standard", "max_attempts": ATTEMPTS}
    config = Config(connect_timeout=CONNECT_SECONDS, read_timeout=ANSWER_SECONDS, retries=retries)
    client = _session().create_client("s3", region_name=region(), config=config)
    client.meta.events.register_last("before-call.s3.HeadBucket", _ask_once)
    return client


def _ask_once(context: dict[str, Any], **_: Any) -> None:
    """botocore asks where a bucket has moved to; where it gets no answer but that it has moved, it
    would ask for ever.
    """
    context["s3_redirect"] = {"redirected": True}


def _session() -> Any:
    """Credentials by the usual variables, profiles and roles. Not boto3's shared one, which is not
    safe to use in two threads at once.
    """
    from botocore.session import Session

    session = Session()
    session.register_component("data_loader", _loader())
    return session


@cache
def _loader() -> Any:
    """What botocore knows of S3: 60 ms to read, so that it is read once."""
    from botocore.loaders import create_loader

    return create_loader()


def region() -> str | None:
    """The region, by the variables that AWS's tools know (botocore knows only the second), or by the
    profile.
    """
    named = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    found: str | None = named or _session().get_config_variable("region")
    return found


def endpoint() -> str | None:
    """The URL of another server than Amazon's, by the usual variables."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def _broken() -> tuple[type[Exception], ...]:
    """What botocore raises where an answer ends too early, is not what was stored, or is none that S3
    would give.
    """
    from botocore.exceptions import (
        FlexibleChecksumError,
        IncompleteReadError,
        ResponseStreamingError,
    )
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    return (
        FlexibleChecksumError,
        IncompleteReadError,
        ResponseStreamingError,
        ResponseParserError,
        HTTPError,
    )


def storage_options() -> dict[str, str]:
    """The same for Polars' own object store, which takes the credentials from boto3."""
    options = {"aws_region": region() or "us-east-1"}
    if where := endpoint():
        options |= {
            "aws_endpoint_url": where,
            "aws_allow_http": str(where.startswith("http://")).lower(),
        }
    return options

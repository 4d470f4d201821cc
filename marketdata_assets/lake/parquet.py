"""The lake: one Parquet object per table and partition, on a local disk or in S3, replaced whole or not at all."""

from __future__ import annotations

import hashlib
import io
import os
import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

import numpy as np
import polars as pl

from marketdata_assets.errors import Damaged, StoreFailed
from marketdata_assets.lake.tables import OBJECT, Table, keys_of
from marketdata_assets.model.bar import SCALE
from marketdata_assets.model.window import Partition

_INT64_DIGITS = 18


class Stored(NamedTuple):
    """One object as it lies there."""

    bytes: int
    digest: str


class Objects(Protocol):
    """A store of whole objects. Raises StoreFailed; what an object held before survives any failure."""

    def read(self, path: str) -> bytes | None:
        """The object's content; None where there is none."""
        ...

    def write(self, path: str, content: bytes) -> None:
        """Replace it whole."""
        ...

    def size(self, path: str) -> int | None:
        """Its size in bytes; None where there is none."""
        ...

    def sizes(self, prefix: str) -> Iterator[tuple[str, str, int]]:
        """Every object `<prefix>/<a>/<b>/data.parquet`: a, b and its size."""
        ...

    def set_aside(self, path: str) -> str:
        """Rename it; the new name."""
        ...

    def sweep(self) -> int:
        """Remove what dead writers left; how many."""
        ...


class Lake:
    """Frames in and out of objects. A decimal column takes the smallest scale that holds its digits, as integers."""

    def __init__(self, location: str) -> None:
        self.location = location
        self._objects: Objects = _Bucket(location) if location.startswith("s3://") else _Folder(Path(location))

    def write(self, table: Table, partition: Partition, frame: pl.DataFrame) -> Stored:
        """Replace a partition's object atomically; the same rows always give the same bytes."""
        content = encode(frame)
        self._objects.write(table.path(partition), content)
        return Stored(len(content), hashlib.sha256(content).hexdigest())

    def read(self, table: Table, partition: Partition) -> pl.DataFrame | None:
        """The partition's rows, sorted by open_time, or None where there is no object. Raises Damaged."""
        path = table.path(partition)
        content = self._objects.read(path)
        return None if content is None else decode(content, table, f"{self.location}/{path}")

    def size(self, table: Table, partition: Partition) -> int | None:
        """The object's size in bytes, or None where there is none."""
        return self._objects.size(table.path(partition))

    def sizes(self, table: Table) -> dict[tuple[str, str], int]:
        """The size of every object of a table, by market key and month key: one walk, or one listing in S3."""
        return {keys_of(market, month): size for market, month, size in self._objects.sizes(table.name)}

    def set_aside(self, table: Table, partition: Partition) -> str:
        """Move a damaged object out of the way and return its new name."""
        return self._objects.set_aside(table.path(partition))

    def sweep(self) -> int:
        """Remove what writers that died have left behind; how many files."""
        return self._objects.sweep()


def encode(frame: pl.DataFrame) -> bytes:
    """A frame as Parquet: one row group, zstd, integers delta-packed, decimals at the scale their digits need."""
    import pyarrow.parquet as pq

    slim = frame.with_columns(_slim(frame, name) for name, dtype in frame.schema.items() if isinstance(dtype, pl.Decimal))
    packed = [name for name, dtype in slim.schema.items() if _packs(dtype)]
    sink = io.BytesIO()
    pq.write_table(
        slim.to_arrow(),
        sink,
        compression="zstd",
        row_group_size=max(1, frame.height),
        use_dictionary=False,
        store_decimal_as_integer=True,
        write_page_checksum=True,
        column_encoding=dict.fromkeys(packed, "DELTA_BINARY_PACKED"),
    )
    return sink.getvalue()


def decode(content: bytes, table: Table, name: str) -> pl.DataFrame:
    """The frame of an object, checksums verified, columns bound by name and in the table's types. Raises Damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        frame = pl.DataFrame(pq.ParquetFile(io.BytesIO(content), page_checksum_verification=True).read())
        return frame.select(pl.col(column.name).cast(column.dtype) for column in table.columns)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, pa.ArrowException, OSError, ValueError) as error:
        raise Damaged(f"{name} is damaged ({type(error).__name__}); `marketdata backfill` fetches it again") from None


def _slim(frame: pl.DataFrame, name: str) -> pl.Series:
    """The column at the smallest decimal scale that holds all its digits, where they fit in 18; else as it is.

    A wide column keeps its scale: DuckDB's union of objects takes 38 digits from a wide one and would cut the others' decimals.
    """
    digits = pl.col(name).to_physical()
    fraction = frame.select((digits % pl.lit(10**SCALE, pl.Int128)).cast(pl.Int64)).to_series().drop_nulls()
    shared = int(np.gcd.reduce(fraction.to_numpy(), initial=10**SCALE))
    scale = next(s for s in range(SCALE + 1) if shared % 10 ** (SCALE - s) == 0)
    largest = max((abs(v) for v in frame.select(digits.min().alias("a"), digits.max().alias("b")).row(0) if v is not None), default=0)
    fits = largest < 10 ** (_INT64_DIGITS + SCALE - scale)
    return frame[name].cast(pl.Decimal(_INT64_DIGITS, scale)) if fits else frame[name]


def _packs(dtype: pl.DataType) -> bool:
    if isinstance(dtype, pl.Decimal):
        return dtype.precision <= _INT64_DIGITS
    return dtype.is_integer() or dtype.is_temporal()


# --------------------------------------------------------------------------------- where objects live
class _Folder:
    """A local folder. A write goes aside, is synced, then renamed: a reader sees the old object or the new one."""

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
        with suppress(FileNotFoundError), os.scandir(self._root / prefix) as outer:
            for a in outer:
                with suppress(NotADirectoryError), os.scandir(a) as inner:
                    for b in inner:
                        with suppress(OSError):
                            yield a.name, b.name, os.stat(f"{b.path}/{OBJECT}").st_size  # noqa: PTH116 - 48,000 of them at once

    def set_aside(self, path: str) -> str:
        target = self._root / path
        moved = target.with_name(target.name + ".damaged")
        try:
            target.replace(moved)
        except OSError as error:
            raise self._failed("moved", path, error) from None
        return str(moved)

    def sweep(self) -> int:
        try:
            left = [p for p in self._aside.iterdir() if not _alive(p.name)]
        except OSError:
            return 0
        for path in left:
            path.unlink(missing_ok=True)
        return len(left)

    def _failed(self, verb: str, path: str, error: OSError) -> StoreFailed:
        return StoreFailed(f"{self._root / path} cannot be {verb}: {error.strerror}; mend the folder or set another `lake:`")


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


class _Bucket:
    """A prefix in S3: one PUT replaces an object whole. Endpoint and keys come from the usual AWS variables."""

    def __init__(self, location: str) -> None:
        parts = urlsplit(location)
        self._bucket, self._prefix = parts.netloc, parts.path.strip("/")
        self._client: Any = None

    def _call(self, verb: str, path: str, **kwargs: Any) -> Any:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            if self._client is None:
                config = Config(connect_timeout=10, read_timeout=60, retries={"mode": "standard", "max_attempts": 5})
                self._client = boto3.client("s3", config=config)
            found = getattr(self._client, verb)(Bucket=self._bucket, **kwargs)
            return {**found, "Body": bytes(found["Body"].read())} if "Body" in found else found
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") in ("NoSuchKey", "404", "NotFound"):
                return None
            raise self._failed(path, str(error.response.get("Error", {}).get("Code"))) from None
        except (BotoCoreError, ValueError) as error:
            raise self._failed(path, type(error).__name__) from None

    def _key(self, path: str) -> str:
        return f"{self._prefix}/{path}".lstrip("/")

    def read(self, path: str) -> bytes | None:
        found = self._call("get_object", path, Key=self._key(path))
        return None if found is None else bytes(found["Body"])

    def write(self, path: str, content: bytes) -> None:
        if self._call("put_object", path, Key=self._key(path), Body=content) is None:
            raise self._failed(path, "NoSuchBucket")

    def size(self, path: str) -> int | None:
        found = self._call("head_object", path, Key=self._key(path))
        return None if found is None else int(found["ContentLength"])

    def sizes(self, prefix: str) -> Iterator[tuple[str, str, int]]:
        token: dict[str, str] = {}
        while True:
            found = self._call("list_objects_v2", prefix, Prefix=self._key(prefix) + "/", **token) or {}
            for entry in found.get("Contents", ()):
                *_, a, b, name = entry["Key"].split("/")
                if name == OBJECT:
                    yield a, b, int(entry["Size"])
            if not found.get("IsTruncated"):
                return
            token = {"ContinuationToken": found["NextContinuationToken"]}

    def set_aside(self, path: str) -> str:
        content = self.read(path)
        if content is not None:
            self.write(path + ".damaged", content)
            self._call("delete_object", path, Key=self._key(path))
        return f"s3://{self._bucket}/{self._key(path)}.damaged"

    def sweep(self) -> int:
        return 0

    def _failed(self, path: str, code: str) -> StoreFailed:
        return StoreFailed(f"s3://{self._bucket}/{self._key(path)}: {code}; check the bucket, AWS_ENDPOINT_URL and the AWS keys")

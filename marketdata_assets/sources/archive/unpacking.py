"""The bytes of a file: its checksum, and what is around its text."""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from pathlib import Path
from typing import Protocol

from marketdata_assets.errors import BadInput
from marketdata_assets.system import read_bounded

MAX_BYTES = 1 << 29
"""Of one file, and of its text: what unpacks to more is not unpacked. Its rows take four times as
much memory.
"""
MAX_RATIO = 200
"""How many times its size a file may unpack to; rows of bars are packed to a fifth or a tenth."""
_BLOCK = 1 << 22
_ZIP = b"PK\x03\x04"
_CODECS = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd"}
"""By the bytes that a file begins with: Arrow's name of what packed it."""
SUFFIXES = (".zip", ".csv", ".gz", ".bz2", ".zst")
"""Of the files that are looked for in folders."""


class Readable(Protocol):
    """A stream of bytes."""

    def read(self, size: int, /) -> bytes:
        """Return at most `size` bytes; none at the end."""
        ...


def verify_checksum(path: Path, sha256: str) -> None:
    """Compare a file with `<file>.CHECKSUM` in its folder, where there is one. Raises BadInput."""
    checksum = path.with_name(path.name + ".CHECKSUM")
    if not checksum.exists():
        return
    try:
        words = read_bounded(checksum, _BLOCK).decode("ascii").split()
    except (OSError, UnicodeDecodeError, BadInput):
        words = []
    if len(words) != 2 or not re.fullmatch(r"[0-9a-fA-F]{64}", words[0]):
        raise BadInput(f"{checksum}: it is not `sha256  name`; download it again, or remove it")
    if words[0].lower() != sha256:
        raise BadInput(
            f"{path}: its sha256 is {sha256[:12]}... and its CHECKSUM says "
            f"{words[0][:12].lower()}...; download it again"
        )
    if not path.name.endswith(words[1].lstrip("*")):
        raise BadInput(f"{checksum}: it is of {words[1]}; give the file its own name again")


def unpack(path: Path, raw: bytes) -> tuple[bytes, str | None]:
    """Return the text of a file and the name of the CSV in it; None for a file that is not packed.

    What it is, its first bytes say and not its name. Raises BadInput.
    """
    if raw.startswith(_ZIP) or path.suffix.lower() == ".zip":
        return _unzip(path, raw)
    codec = next((codec for mark, codec in _CODECS.items() if raw.startswith(mark)), None)
    if codec is None:
        return raw, None
    content = _decompress(path, raw, codec)
    if content[257:262] == b"ustar":
        raise BadInput(f"{path}: there is a tar in it; unpack it and import its files")
    return content, path.stem


def _decompress(path: Path, raw: bytes, codec: str) -> bytes:
    """Return what a stream holds, whose own checksum has to agree. Raises BadInput."""
    import pyarrow as pa

    try:
        with pa.CompressedInputStream(pa.BufferReader(raw), codec) as stream:
            return _read_bounded(path, stream, len(raw))
    except OSError as error:
        raise BadInput(
            f"{path}: it is damaged or cut short ({codec}: {error}); download it again"
        ) from None


def _read_bounded(path: Path, stream: Readable, packed: int) -> bytes:
    """Return what a stream of so many packed bytes holds. Raises BadInput where it is too much."""
    content, most = bytearray(), min(MAX_BYTES, max(_BLOCK, MAX_RATIO * packed))
    while part := stream.read(_BLOCK):
        content += part
        if len(content) > most:
            raise BadInput(
                f"{path}: it unpacks to more than {most >> 20} MiB, which no file of bars does; "
                "unpack it yourself, and split it, if it is one"
            )
    return bytes(content)


def _unzip(path: Path, raw: bytes) -> tuple[bytes, str]:
    """Return the one CSV of a zip, after its CRC was verified, and its name. Raises BadInput."""
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            member = _only_csv(path, archive)
            with archive.open(member) as packed:
                # the declared size ends the read, and the CRC is checked there
                return _read_bounded(path, packed, len(raw)), member.filename
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        RuntimeError,
        NotImplementedError,
        OSError,
    ) as error:
        raise BadInput(
            f"{path}: the zip is damaged or cannot be read ({error}); download it again"
        ) from None


def _only_csv(path: Path, archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    members = [m for m in archive.infolist() if not m.is_dir()]
    if len(members) != 1 or not members[0].filename.lower().endswith(".csv"):
        names = [m.filename for m in members[:3]] + (["..."] if len(members) > 3 else [])
        raise BadInput(
            f"{path}: one .csv is expected in it, and it holds {', '.join(names) or 'nothing'}; "
            "unpack it and import the .csv"
        )
    return members[0]

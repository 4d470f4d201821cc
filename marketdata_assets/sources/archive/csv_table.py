"""The bytes of a file: its checksum, the zip around it, and the cells of its CSV."""

from __future__ import annotations

import csv
import io
import re
import zipfile
import zlib
from pathlib import Path

import polars as pl

from marketdata_assets.errors import BadInput

MAX_BYTES = 1 << 30
"""Of one file's text: a zip that unpacks to more is not unpacked."""


def verify_checksum(path: Path, sha256: str) -> None:
    """Compare a file with `<file>.CHECKSUM` in its folder, where there is one. Raises BadInput."""
    checksum = path.with_name(path.name + ".CHECKSUM")
    if not checksum.exists():
        return
    try:
        words = checksum.read_text(encoding="ascii").split()
    except (OSError, UnicodeDecodeError):
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


def unzip(path: Path, raw: bytes) -> tuple[bytes, str]:
    """Return the one CSV of a zip, after its CRC was verified, and its name. Raises BadInput."""
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            member = _only_csv(path, archive)
            with archive.open(member) as packed:
                # the declared size ends the read, and the CRC is checked there
                content = packed.read(MAX_BYTES + 1)
            return content, member.filename
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
    if members[0].file_size > MAX_BYTES:
        raise BadInput(f"{path}: it unpacks to more than {MAX_BYTES >> 20} MiB; split it")
    return members[0]


class CsvTable:
    """The cells of a CSV, all of them as text."""

    def __init__(self, path: Path, content: bytes) -> None:
        self.path = path
        self.ends_with_line_break = content.endswith((b"\n", b"\r"))
        self._content = content.rstrip(b"\r\n")
        if not self._content.strip():
            raise BadInput(f"{path}: it is empty")
        if len(content) > MAX_BYTES:
            raise BadInput(f"{path}: it is larger than {MAX_BYTES >> 20} MiB; split it")
        try:
            self.cells = pl.read_csv(self._content, has_header=False, infer_schema=False)
        except pl.exceptions.PolarsError as error:
            self._refuse_ragged_lines()
            raise BadInput(f"{path}: it is no CSV ({str(error).splitlines()[0]})") from None
        if self.cells[:, -1].null_count():
            self._refuse_ragged_lines()

    @property
    def first_line(self) -> list[str]:
        """The cells of the first line, without spaces around them."""
        return [(cell or "").strip() for cell in self.cells.row(0)]

    def error_at(self, row: int, message: str) -> BadInput:
        """Return an error about one row of `cells` (from 0); in the message lines count from 1."""
        return BadInput(f"{self.path} line {row + 1}: {message}")

    def _refuse_ragged_lines(self) -> None:
        """Raise BadInput where a line has another number of columns than the first one."""
        try:
            text = self._content.decode()
        except UnicodeDecodeError as error:
            row = self._content.count(b"\n", 0, error.start)
            raise self.error_at(row, "it is not text in UTF-8") from None
        reader, width = csv.reader(io.StringIO(text, newline="")), _width(text)
        try:
            wrong = next((len(cells) for cells in reader if len(cells) != width), width)
        except csv.Error as error:
            raise self.error_at(reader.line_num - 1, str(error)) from None
        if wrong != width:
            is_last = reader.line_num - 1 == text.count("\n")
            cut = "; the file ends in the middle of it" if is_last else ""
            raise self.error_at(
                reader.line_num - 1,
                f"it has {wrong} columns, and the first line has {width}{cut}",
            )


def _width(text: str) -> int:
    return len(next(csv.reader(io.StringIO(text, newline="")), []))

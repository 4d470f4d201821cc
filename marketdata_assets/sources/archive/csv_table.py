"""The cells of a CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from marketdata_assets.errors import BadInput
from marketdata_assets.sources.archive.unpacking import MAX_BYTES

_DELIMITERS = (";", "\t", "|", ",")


class CsvTable:
    """The cells of a CSV, all of them as text without blanks around it."""

    def __init__(self, path: Path, content: bytes, delimiter: str = ",") -> None:
        self.path, self._delimiter = path, delimiter
        self.ends_with_line_break = content.endswith((b"\n", b"\r"))
        self._content = content.rstrip(b"\r\n")
        if not self._content.strip():
            raise BadInput(f"{path}: it is empty")
        if len(content) > MAX_BYTES:
            raise BadInput(f"{path}: it is larger than {MAX_BYTES >> 20} MiB; split it")
        self._refuse_other_delimiter()
        try:
            cells = pl.read_csv(
                self._content, has_header=False, infer_schema=False, separator=delimiter
            )
        except pl.exceptions.PolarsError as error:
            self._refuse_ragged_lines()
            raise BadInput(f"{path}: it is no CSV ({str(error).splitlines()[0]})") from None
        if cells[:, -1].null_count():
            self._refuse_ragged_lines()
        self.cells = cells.select(pl.all().str.strip_chars())
        self.width = self.cells.width

    def join_columns(self, places: Sequence[int]) -> int:
        """Add a column that holds those at `places`, with a blank between; return its place."""
        joined = pl.concat_str([pl.nth(place) for place in places], separator=" ")
        self.cells = self.cells.with_columns(joined.alias(f"joined_{self.cells.width}"))
        return self.cells.width - 1

    def _refuse_other_delimiter(self) -> None:
        """Raise BadInput where another character than the delimiter stands between the cells."""
        first = self._content.partition(b"\n")[0].decode(errors="replace")
        if self._delimiter in first:
            return
        other = next((each for each in _DELIMITERS if first.count(each) > 1), None)
        if other:
            name = {"\t": "tab"}.get(other, other)
            raise BadInput(
                f"{self.path}: its cells are not divided by {self._delimiter!r}; "
                f"try --delimiter '{name}'"
            )

    @property
    def first_line(self) -> list[str]:
        """The cells of the first line, without spaces around them."""
        return [cell or "" for cell in self.cells.row(0)[: self.width]]

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
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=self._delimiter)
        try:
            width = len(next(reader, []))
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

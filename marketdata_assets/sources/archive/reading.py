"""One file at a time: what it is, and its rows as a venue would send them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import polars as pl

from marketdata_assets.errors import BadInput
from marketdata_assets.model.bar import COLUMN_NAMES
from marketdata_assets.model.market import Market
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import Window, from_ms, to_ms
from marketdata_assets.sources.archive.columns import Layout, find_layout
from marketdata_assets.sources.archive.csv_table import CsvTable
from marketdata_assets.sources.archive.names import find_market, find_timeframe, parse_file_name
from marketdata_assets.sources.archive.options import ImportOptions
from marketdata_assets.sources.archive.times import check_lengths, check_spacing, read_times
from marketdata_assets.sources.archive.unpacking import (
    MAX_BYTES,
    SUFFIXES,
    unpack,
    verify_checksum,
)
from marketdata_assets.system import read_bounded
from marketdata_assets.venues.registry import facts_of

_UTF8_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class ArchiveFile:
    """What one file is.

    `span`: the open times it is about, by its name or from its first to its last row, end
    exclusive; `rows_window`: those of its rows. `missing_bars`: bars of its span that it does not
    hold.
    """

    path: Path
    sha256: str
    format: str
    market: Market
    timeframe: Timeframe
    unit: str
    """The unit of its open times: one of `times.UNITS` or `times.ISO`."""
    rows: int
    span: Window
    rows_window: Window
    missing_bars: int
    is_final: bool
    """Whether bars that it does not hold never existed (`venues.facts.Archive.is_final`)."""
    columns: tuple[str, ...] = field(repr=False)
    """The columns of a bar that it gives: null in one of them breaks a rule."""


def find_files(paths: Iterable[Path]) -> list[Path]:
    """Return the files, and all CSVs below the folders, packed or not, each once, by name.

    Checksum files are left out. Raises BadInput for a folder without such files.
    """
    found: set[Path] = set()
    for path in paths:
        inside = _files_below(path) if path.is_dir() else [path]
        if not inside:
            raise BadInput(
                f"{path}: there is no file below this folder that ends in {', '.join(SUFFIXES)}"
            )
        found |= {p.resolve() for p in inside if p.suffix != ".CHECKSUM"}
    return sorted(found)


def _files_below(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()]


def read_file(
    path: Path, options: ImportOptions, markets: Sequence[Market]
) -> tuple[ArchiveFile, pl.DataFrame]:
    """Return what a file is, and its rows as `BarsPage.rows`, but `trades` is text, too.

    `markets`: the one of these that fits the file's name is its market, unless `options` name one.
    Raises BadInput that names the file, the line and the way out.
    """
    try:
        raw = read_bounded(path, MAX_BYTES)
    except OSError as error:
        raise BadInput(f"{path}: it cannot be read ({error.strerror})") from None
    sha256 = hashlib.sha256(raw).hexdigest()
    verify_checksum(path, sha256)
    content, inner = unpack(path, raw)
    name = parse_file_name(path, inner)
    if options.columns and name and not name.format.is_distinctive:
        name = None  # the columns are stated, and a file of another source may have such a name
    table = CsvTable(path, content.removeprefix(_UTF8_MARK), options.delimiter)
    layout = find_layout(table, name, options)
    if table.cells.height == int(layout.has_header):
        raise BadInput(f"{path}: it holds no rows")
    market = find_market(path, name, options, markets=markets, has_header=layout.has_header)
    timeframe = find_timeframe(path, name, options)
    rows, unit = _read_rows(table, layout, timeframe, options=options)
    rows_window = _window_of(table, rows["open_time"], timeframe)
    span = (name and name.window) or rows_window
    return ArchiveFile(
        path,
        sha256,
        format=layout.format,
        market=market,
        timeframe=timeframe,
        unit=unit,
        rows=rows.height,
        span=span,
        rows_window=rows_window,
        missing_bars=span.count(timeframe) - _count_inside(rows["open_time"], span),
        is_final=_is_final(market, layout),
        columns=tuple(column for column in COLUMN_NAMES if column in layout.places),
    ), rows


def _is_final(market: Market, layout: Layout) -> bool:
    archive = facts_of(market.venue).archive
    return archive is not None and archive.is_final and layout.format == archive.format.name


def _read_rows(
    table: CsvTable, layout: Layout, timeframe: Timeframe, *, options: ImportOptions
) -> tuple[pl.DataFrame, str]:
    """Return the rows, and the unit of their open times."""
    skipped = int(layout.has_header)
    cells = table.cells[skipped:]
    _refuse_cut_number(table, layout)
    taken = {c: cells.to_series(place).alias(c) for c, place in layout.places.items()}
    opens, found = read_times(
        table,
        taken["open_time"],
        skipped=skipped,
        unit=options.unit,
        time_zone=options.time_zone,
    )
    if "close_time" in taken:
        closes, _ = read_times(table, taken["close_time"], skipped=skipped, unit=None)
        check_lengths(table, opens, closes, timeframe=timeframe, skipped=skipped)
    check_spacing(table, opens, timeframe)
    given = {
        n: opens if n == "open_time" else _with_point(table, taken[n], options.decimal, skipped)
        for n in COLUMN_NAMES
        if n in taken
    }
    absent = [pl.lit(None, pl.String).alias(n) for n in COLUMN_NAMES if n not in taken]
    return pl.DataFrame(given).with_columns(absent).select(COLUMN_NAMES), found


def _with_point(table: CsvTable, numbers: pl.Series, decimal: str, skipped: int) -> pl.Series:
    """Return numbers with a point before the fraction. Raises BadInput for thousands separators."""
    if decimal == ".":
        return numbers
    wrong = numbers.str.contains(".", literal=True).arg_true()
    if len(wrong):
        raise table.error_at(
            skipped + wrong[0],
            f"{numbers.name} {numbers[wrong[0]]!r} has a point though --decimal is ','; write the "
            "numbers without thousands separators",
        )
    return numbers.str.replace(",", ".", literal=True)


def _refuse_cut_number(table: CsvTable, layout: Layout) -> None:
    """Raise BadInput where the file may end in the middle of a number that is read."""
    last = table.width - 1
    is_read = any(place == last and c in COLUMN_NAMES for c, place in layout.places.items())
    if is_read and not table.ends_with_line_break:
        raise table.error_at(
            table.cells.height - 1,
            "it has no line break, so its last number may be cut; if it is whole, add one",
        )


def _window_of(table: CsvTable, opens: pl.Series, timeframe: Timeframe) -> Window:
    first, last = (_moment(table, opens, row) for row in (opens.arg_min(), opens.arg_max()))
    return Window(first, timeframe.shift(last, 1))


def _moment(table: CsvTable, opens: pl.Series, row: int | None) -> datetime:
    try:
        return from_ms(opens[row or 0])
    except OverflowError:
        raise BadInput(
            f"{table.path}: {opens[row or 0]} ms is no moment; is its column open_time the right "
            "one?"
        ) from None


def _count_inside(opens: pl.Series, span: Window) -> int:
    inside = opens.is_between(to_ms(span.start), to_ms(span.end), closed="left")
    return opens.filter(inside).n_unique()

"""Which column of a file is which column of a bar."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from marketdata_assets.errors import BadInput
from marketdata_assets.model.bar import COLUMN_NAMES
from marketdata_assets.model.market import Market
from marketdata_assets.sources.archive.csv_table import CsvTable
from marketdata_assets.sources.archive.names import FileName
from marketdata_assets.sources.archive.options import REQUIRED, ImportOptions
from marketdata_assets.venues.facts import ArchiveFormat
from marketdata_assets.venues.registry import facts_of

PLAIN_FORMAT = "csv"
"""The format's name of a CSV that is no venue's archive."""


class Layout(NamedTuple):
    """How the columns of a file are arranged. `places`: by column of the format, counted from 0."""

    format: str
    places: Mapping[str, int]
    has_header: bool


def find_layout(table: CsvTable, name: FileName | None, options: ImportOptions) -> Layout:
    """Return the layout that `options` state, that the name implies, or that the first line shows.

    Raises BadInput.
    """
    first = table.first_line
    if options.columns:
        return _map_columns(table, first, options.columns)
    known = name.format if name else _recognize_format(first, options.market)
    return _layout_of_format(table, first, known) if known else _layout_of_header(table, first)


def _recognize_format(first: list[str], market: Market | None) -> ArchiveFormat | None:
    """Return the format of the market's venue where the first line looks like a row of it."""
    archive = facts_of(market.venue).archive if market else None
    if archive is None or len(first) != len(archive.format.columns):
        return None
    return archive.format if all(map(_is_number, first)) else None


def _layout_of_format(table: CsvTable, first: list[str], known: ArchiveFormat) -> Layout:
    if len(first) != len(known.columns):
        raise BadInput(
            f"{table.path}: {known.name}'s files have {len(known.columns)} columns, and this has "
            f"{len(first)}; see --columns"
        )
    has_header = not _is_number(first[1])
    if has_header and [_normalize(cell) for cell in first[1:6]] != list(known.columns[1:6]):
        raise BadInput(
            f"{table.path} line 1: its header names {', '.join(first)}; say which column is what "
            "with --columns"
        )
    return Layout(known.name, {column: i for i, column in enumerate(known.columns)}, has_header)


def _layout_of_header(table: CsvTable, first: list[str]) -> Layout:
    """Return the layout of a header that names the columns as bars do."""
    has_header = len(first) > 1 and not _is_number(first[1])
    written = [_normalize(cell) for cell in first]
    names = {name: name for name in COLUMN_NAMES if name in written}
    if not has_header or not set(REQUIRED) <= set(names):
        raise BadInput(
            f"{table.path}: say which columns it has with --columns open_time=...,open=...,high=..."
        )
    return _map_columns(table, first, names)


def _map_columns(table: CsvTable, first: list[str], columns: Mapping[str, str]) -> Layout:
    """Return the places of mapped columns: by their names in the header, or by their numbers."""
    parts = {ours: _split_name(first, theirs) for ours, theirs in columns.items()}
    for ours, theirs in parts.items():
        if len(theirs) > 1 and ours != "open_time":
            raise BadInput(f"--columns {ours}={'+'.join(theirs)}: only open_time has two columns")
    if not all(name.isdecimal() for theirs in parts.values() for name in theirs):
        found = {o: [_place_of(table, first, name) for name in t] for o, t in parts.items()}
        has_header = True
    else:
        found = {ours: [int(name) - 1 for name in theirs] for ours, theirs in parts.items()}
        if not all(0 <= place < len(first) for places in found.values() for place in places):
            raise BadInput(
                f"{table.path}: it has columns 1 to {len(first)}, and --columns names another"
            )
        has_header = not _is_number(first[found["open"][0]])
    places = {
        ours: where[0] if len(where) == 1 else table.join_columns(where)
        for ours, where in found.items()
    }
    return Layout(PLAIN_FORMAT, places, has_header)


def _split_name(first: list[str], theirs: str) -> list[str]:
    """Return the names in `Date+Time`; a column may itself have a `+` in its name."""
    return [theirs] if theirs in first else [part.strip() for part in theirs.split("+")]


def _place_of(table: CsvTable, first: list[str], name: str) -> int:
    """Return the place of a name in the header, as it is written or but for case and brackets."""
    if first.count(name) == 1:
        return first.index(name)
    written = [_normalize(cell) for cell in first]
    if written.count(_normalize(name)) == 1:
        return written.index(_normalize(name))
    raise BadInput(f"{table.path} line 1: there is no single column {name!r} in {', '.join(first)}")


def _is_number(text: str) -> bool:
    try:
        number = float(text.replace(",", "."))
        return number == number
    except ValueError:
        return False


def _normalize(cell: str) -> str:
    return cell.strip("<> ").lower().replace(" ", "_")

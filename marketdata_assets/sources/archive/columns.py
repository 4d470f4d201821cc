"""Which column of a file is which column of a bar."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from marketdata_assets.errors import BadInput
from marketdata_assets.model.bar import NAMES
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
    names = {name: name for name in NAMES if name in first}
    if not has_header or not set(REQUIRED) <= set(names):
        raise BadInput(
            f"{table.path}: say which columns it has with --columns open_time=...,open=...,high=..."
        )
    return _map_columns(table, first, names)


def _map_columns(table: CsvTable, first: list[str], columns: Mapping[str, str]) -> Layout:
    """Return the places of mapped columns: by their names in the header, or by their numbers."""
    if not all(theirs.isdecimal() for theirs in columns.values()):
        for theirs in columns.values():
            if first.count(theirs) != 1:
                raise BadInput(
                    f"{table.path} line 1: there is no single column {theirs!r} in "
                    f"{', '.join(first)}"
                )
        places = {ours: first.index(theirs) for ours, theirs in columns.items()}
        return Layout(PLAIN_FORMAT, places, has_header=True)
    places = {ours: int(theirs) - 1 for ours, theirs in columns.items()}
    if not all(0 <= place < len(first) for place in places.values()):
        raise BadInput(
            f"{table.path}: it has columns 1 to {len(first)}, and --columns names another"
        )
    return Layout(PLAIN_FORMAT, places, has_header=not _is_number(first[places["open"]]))


def _is_number(text: str) -> bool:
    try:
        return bool(text) and float(text) == float(text)
    except ValueError:
        return False


def _normalize(cell: str) -> str:
    return cell.lower().replace(" ", "_")

"""The lock file: the content of every partition of a dataset at one moment, as JSON with one
partition a line.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from marketdata_assets.errors import BadInput, StoreFailed
from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import every_table
from marketdata_assets.model.window import Window, format_time, parse_time
from marketdata_assets.system import read_bounded

FORMAT, VERSION = "marketdata-lock", 1
MOST_BYTES = 1 << 28
"""Of a lock file: a million partitions."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_TIMEFRAMES = {table.name: table.timeframe for table in every_table()}


class LockedPartition(NamedTuple):
    """One partition of one table that holds bars: their number, the open times of the first and the
    last, and their fingerprint.

    `is_open`: its month was not over, so that bars after the last one may follow.
    """

    table: str
    partition: Partition
    rows: int
    first: datetime
    last: datetime
    fingerprint: str
    is_open: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return its entry in the file."""
        entry = {
            "table": self.table,
            "market": self.partition.market.key,
            "month": self.partition.month_key[:7],
            "rows": self.rows,
            "first": format_time(self.first),
            "last": format_time(self.last),
            "fingerprint": self.fingerprint,
        }
        return {**entry, "open": True} if self.is_open else entry

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> LockedPartition:
        """Return the partition of an entry. Raises KeyError, TypeError, ValueError or BadInput."""
        found = cls(
            table=entry["table"],
            partition=Partition.parse(f"{entry['market']}|{entry['month']}-01"),
            rows=entry["rows"],
            first=parse_time(entry["first"]),
            last=parse_time(entry["last"]),
            fingerprint=entry["fingerprint"],
            is_open=entry.get("open", False),
        )
        timeframe = _TIMEFRAMES[found.table]
        opens = found.partition.open_times(timeframe)
        if not opens.start <= found.first <= found.last < opens.end:
            raise ValueError("its bars do not lie in its month")
        possible = Window(found.first, timeframe.shift(found.last, 1)).count(timeframe)
        if type(found.rows) is not int or not 0 < found.rows <= possible:
            raise ValueError(f"{possible} bars at the most lie between the first and the last")
        if type(found.is_open) is not bool or not _DIGEST.fullmatch(found.fingerprint):
            raise ValueError("no lock has such an entry")
        return found


class WantedVenue(NamedTuple):
    """The part of the universe about one venue: `since` is inclusive, `until` exclusive; `base` and
    `reference` are names of timeframes.
    """

    symbols: tuple[str, ...]
    since: datetime
    until: datetime | None
    base: str
    reference: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return its entry in the file."""
        return {
            "symbols": list(self.symbols),
            "since": format_time(self.since),
            "until": self.until and format_time(self.until),
            "base": self.base,
            "reference": list(self.reference),
        }

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> WantedVenue:
        """Return the venue of an entry. Raises KeyError, TypeError or BadInput."""
        return cls(
            symbols=_texts(entry["symbols"]),
            since=parse_time(entry["since"]),
            until=parse_time(entry["until"]) if entry["until"] is not None else None,
            base=entry["base"],
            reference=_texts(entry["reference"]),
        )


@dataclass(frozen=True, slots=True)
class LockFile:
    """A named dataset: the content of each partition at the moment `as_of` of our clock, for the
    months in `span` and the named tables.

    `venues` and `timeframes` are the parts of the universe that decide about these bars; they hold
    no path, no address and no secret.
    """

    name: str
    as_of: datetime
    span: Window
    venues: Mapping[str, WantedVenue]
    timeframes: tuple[str, ...]
    tables: tuple[str, ...]
    partitions: tuple[LockedPartition, ...]

    @property
    def markets(self) -> list[Market]:
        """Its markets, sorted."""
        return sorted(
            Market(name, symbol) for name, venue in self.venues.items() for symbol in venue.symbols
        )

    @property
    def bars(self) -> int:
        """How many bars it holds."""
        return sum(locked.rows for locked in self.partitions)

    @property
    def dataset_digest(self) -> str:
        """The SHA-256 of the partitions' lines. Equal bars have one digest, whatever the name and
        the moment of the lock.
        """
        return hashlib.sha256("".join(line + "\n" for line in self._lines()).encode()).hexdigest()

    def as_dict(self) -> dict[str, Any]:
        """Return the content of the file."""
        return {
            **self._header(),
            "partitions": [locked.as_dict() for locked in self.partitions],
            "dataset": self.dataset_digest,
        }

    def as_text(self) -> str:
        """Return the file's text, with one key or one partition a line."""
        header = "".join(
            f'"{key}": {json.dumps(value)},\n' for key, value in self._header().items()
        )
        lines = ",\n".join(self._lines())
        return f'{{\n{header}"partitions": [\n{lines}\n],\n"dataset": "{self.dataset_digest}"\n}}\n'

    def _header(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "name": self.name,
            "as_of": format_time(self.as_of),
            "start": format_time(self.span.start),
            "end": format_time(self.span.end),
            "venues": {name: venue.as_dict() for name, venue in sorted(self.venues.items())},
            "timeframes": list(self.timeframes),
            "tables": list(self.tables),
        }

    def _lines(self) -> list[str]:
        return [json.dumps(locked.as_dict(), separators=(",", ":")) for locked in self.partitions]

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> LockFile:
        """Return the lock of a file's content. Raises KeyError, TypeError, ValueError,
        AttributeError or BadInput.
        """
        return cls(
            name=check_name(content["name"]),
            as_of=parse_time(content["as_of"]),
            span=Window(parse_time(content["start"]), parse_time(content["end"])),
            venues={name: WantedVenue.from_dict(e) for name, e in content["venues"].items()},
            timeframes=_texts(content["timeframes"]),
            tables=_texts(content["tables"]),
            partitions=tuple(map(LockedPartition.from_dict, content["partitions"])),
        )


def _texts(values: list[Any]) -> tuple[str, ...]:
    if not all(isinstance(value, str) for value in values):
        raise TypeError("a text is expected")
    return tuple(values)


def check_name(name: str) -> str:
    """Return the name if a dataset can have it. Raises BadInput."""
    if not _NAME.fullmatch(name):
        raise BadInput(
            f"{name[:100]!r} is no name for a dataset; "
            "give it one of letters, digits, dots, dashes and underscores"
        )
    return name


def write_lock(path: Path, lock: LockFile) -> None:
    """Replace the file completely or not at all. Raises StoreFailed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(lock.as_text())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise StoreFailed(
            f"{path} cannot be written: {error.strerror}; choose another --out"
        ) from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def read_lock(path: Path) -> LockFile:
    """Return the lock of a file. Raises BadInput unless it is exactly as it was written."""
    content = _read_content(path)
    if content.get("version") != VERSION:
        raise BadInput(
            f"{path} is of version {content.get('version')!r}, and this release reads version "
            f"{VERSION}; use the release that wrote it"
        )
    try:
        lock = LockFile.from_dict(content)
        is_intact = lock.as_dict() == content and _is_consistent(lock)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, BadInput):
        is_intact = False
    if not is_intact:
        raise BadInput(
            f"{path} is not as `marketdata lock` wrote it: a line or the hash was changed; "
            "get it again"
        )
    return lock


def _read_content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_bounded(path, MOST_BYTES).decode())
    except FileNotFoundError:
        raise BadInput(f"{path}: there is no such file; `marketdata lock` writes one") from None
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise BadInput(
            f"{path} is no lock file, or only a part of one; get it again, or write one with "
            "`marketdata lock`"
        ) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise BadInput(f"{path} is no lock file; `marketdata lock` writes one")
    return content


def _is_consistent(lock: LockFile) -> bool:
    """Say whether every partition belongs to the tables, markets and months of the header, and the
    lines are sorted and unique.
    """
    places = [
        (locked.table, locked.partition.market.key, locked.partition.month)
        for locked in lock.partitions
    ]
    markets = {market.key for market in lock.markets}
    is_named = all(
        table in lock.tables and market in markets and month & lock.span == month
        for table, market, month in places
    )
    return is_named and places == sorted(set(places))

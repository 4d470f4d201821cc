"""The lock file: what every partition of a dataset held at one moment, as JSON with one partition a
line.
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
from marketdata_assets.model.window import Window, iso, parse_time

FORMAT, VERSION = "marketdata-lock", 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class Pinned(NamedTuple):
    """One partition of one table that holds bars: how many, the open times of the first and the last,
    their fingerprint.

    `open`: its month was not over, so that bars after the last one may come.
    """

    table: str
    partition: Partition
    rows: int
    first: datetime
    last: datetime
    fingerprint: str
    open: bool = False

    def as_dict(self) -> dict[str, Any]:
        """As in the file."""
        found = {
            "table": self.table,
            "market": self.partition.market.key,
            "month": self.partition.month_key[:7],
            "rows": self.rows,
            "first": iso(self.first),
            "last": iso(self.last),
            "fingerprint": self.fingerprint,
        }
        return {**found, "open": True} if self.open else found


class Wants(NamedTuple):
    """What the universe wanted of one venue. Times are `since`, inclusive, and `until`, exclusive."""

    symbols: tuple[str, ...]
    since: datetime
    until: datetime | None
    base: str
    reference: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """As in the file."""
        times = {"since": iso(self.since), "until": self.until and iso(self.until)}
        return {
            "symbols": list(self.symbols),
            **times,
            "base": self.base,
            "reference": list(self.reference),
        }


@dataclass(frozen=True, slots=True)
class LockFile:
    """A named dataset: what each partition held `as_of` a moment of our clock, of the months in `span`
    and the tables named.

    `venues` and `timeframes` say what the universe wanted of these markets; they hold no path, no
    address and no secret.
    """

    name: str
    as_of: datetime
    span: Window
    venues: Mapping[str, Wants]
    timeframes: tuple[str, ...]
    tables: tuple[str, ...]
    partitions: tuple[Pinned, ...]

    @property
    def markets(self) -> list[Market]:
        """Its markets, sorted."""
        return sorted(
            Market(venue, symbol)
            for venue, wants in self.venues.items()
            for symbol in wants.symbols
        )

    @property
    def bars(self) -> int:
        """How many bars it holds."""
        return sum(pinned.rows for pinned in self.partitions)

    @property
    def dataset(self) -> str:
        """The one number of it: SHA-256 over the partitions' lines. The same bars have the same
        number, whatever name and moment.
        """
        return hashlib.sha256("".join(line + "\n" for line in self._lines()).encode()).hexdigest()

    def as_dict(self) -> dict[str, Any]:
        """As in the file."""
        return {
            **self._head(),
            "partitions": [pinned.as_dict() for pinned in self.partitions],
            "dataset": self.dataset,
        }

    def text(self) -> str:
        """The file: equal for equal bars and equal moments, one key or partition a line."""
        head = [f'"{key}": {json.dumps(value)},\n' for key, value in self._head().items()]
        body = ",\n".join(self._lines())
        return f'{{\n{"".join(head)}"partitions": [\n{body}\n],\n"dataset": "{self.dataset}"\n}}\n'

    def _head(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "name": self.name,
            "as_of": iso(self.as_of),
            "start": iso(self.span.start),
            "end": iso(self.span.end),
            "venues": {venue: wants.as_dict() for venue, wants in sorted(self.venues.items())},
            "timeframes": list(self.timeframes),
            "tables": list(self.tables),
        }

    def _lines(self) -> list[str]:
        return [json.dumps(pinned.as_dict(), separators=(",", ":")) for pinned in self.partitions]


def check_name(name: str) -> str:
    """A name that a dataset can have. Raises BadInput."""
    if not _NAME.fullmatch(name):
        raise BadInput(
            f"{name[:100]!r} is no name for a dataset; give it one of letters, digits, dots, dashes and underscores"
        )
    return name


def write_lock(path: Path, lock: LockFile) -> None:
    """Replace the file, whole or not at all. Raises StoreFailed."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(lock.text())
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        raise StoreFailed(
            f"{path} cannot be written: {error.strerror}; choose another --out"
        ) from None
    finally:
        with suppress(OSError):
            aside.unlink()


def read_lock(path: Path) -> LockFile:
    """The lock of a file, exactly as it was written. Raises BadInput for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: there is no such file; `marketdata lock` writes one") from None
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise BadInput(
            f"{path} is no lock file, or only a part of one; get it again, or write one with `marketdata lock`"
        ) from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise BadInput(f"{path} is no lock file; `marketdata lock` writes one")
    if found.get("version") != VERSION:
        raise BadInput(
            f"{path} is of version {found.get('version')!r}, and this release reads version {VERSION}; use the one that wrote it"
        )
    try:
        lock = _lock(found)
        whole = lock.as_dict() == found and _is_consistent(lock)
    except (KeyError, TypeError, ValueError, AttributeError, BadInput):
        whole = False
    if not whole:
        raise BadInput(
            f"{path} is not as `marketdata lock` wrote it: a line or the hash was changed; get it again"
        )
    return lock


def _lock(found: dict[str, Any]) -> LockFile:
    return LockFile(
        check_name(found["name"]),
        parse_time(found["as_of"]),
        Window(parse_time(found["start"]), parse_time(found["end"])),
        {venue: _wants(wants) for venue, wants in found["venues"].items()},
        tuple(found["timeframes"]),
        tuple(found["tables"]),
        tuple(_pinned(**row) for row in found["partitions"]),
    )


def _is_consistent(lock: LockFile) -> bool:
    """Whether every partition is of the tables, markets and months that the file names, and stands
    there once.
    """
    places = [
        (pinned.table, pinned.partition.market.key, pinned.partition.month)
        for pinned in lock.partitions
    ]
    markets = {market.key for market in lock.markets}
    known = all(
        t in lock.tables and m in markets and month & lock.span == month for t, m, month in places
    )
    return known and places == sorted(set(places))


def _wants(found: dict[str, Any]) -> Wants:
    until = parse_time(found["until"]) if found["until"] is not None else None
    return Wants(
        tuple(found["symbols"]),
        parse_time(found["since"]),
        until,
        found["base"],
        tuple(found["reference"]),
    )


def _pinned(
    table: str,
    market: str,
    month: str,
    rows: int,
    first: str,
    last: str,
    fingerprint: str,
    open: bool = False,
) -> Pinned:
    return Pinned(
        table,
        Partition.parse(f"{market}|{month}-01"),
        rows,
        parse_time(first),
        parse_time(last),
        fingerprint,
        open,
    )

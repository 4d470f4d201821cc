"""Verify a copy against a lock: it holds the same bars, or what differs in which partition."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from typing import Any, NamedTuple

import polars as pl

from marketdata_assets.errors import BadInput, Damaged
from marketdata_assets.flows.read.lock import DatasetReader, StoredPlace, tables_of
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.model.events import ProgressCallback, no_progress
from marketdata_assets.model.intervals import find_gaps, opens_inside
from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import Partition, partitions_of
from marketdata_assets.model.table import Table, raw_table
from marketdata_assets.model.window import Window, format_time
from marketdata_assets.settings.universe import Settings
from marketdata_assets.storage.bars import BarStorage
from marketdata_assets.storage.fingerprint import fingerprint
from marketdata_assets.storage.lockfile import LockedPartition, LockFile, WantedVenue

_DIFFERENCES_SHOWN = 5


class DifferenceKind(StrEnum):
    """How a partition differs from what was locked."""

    MISSING = "missing"
    DAMAGED = "damaged"
    EXTRA_ROWS = "extra rows"
    FEWER_ROWS = "fewer rows"
    OTHER_CONTENT = "other content"


class PartitionDifference(NamedTuple):
    """A partition that does not hold what was locked, with the bars locked and stored."""

    table: str
    partition: Partition
    kind: DifferenceKind
    locked: int
    stored: int
    message: str

    def as_dict(self) -> dict[str, Any]:
        """Return it as a row of a table."""
        return {
            "table": self.table,
            "market": self.partition.market.key,
            "month": self.partition.month_key[:7],
            "what": self.kind.value,
            "locked": self.locked,
            "stored": self.stored,
            "says": self.message,
        }


@dataclass(slots=True)
class Verification:
    """What a copy holds of a lock.

    `proved` partitions hold what was locked; `from_history` of them did before later corrections.
    """

    lock: LockFile
    proved: int = 0
    bars: int = 0
    from_history: int = 0
    differences: list[PartitionDifference] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "name": self.lock.name,
            "as_of": format_time(self.lock.as_of),
            "dataset": self.lock.dataset_digest,
            "partitions": len(self.lock.partitions),
            "proved": self.proved,
            "bars": self.bars,
            "from_history": self.from_history,
            "differences": [difference.as_dict() for difference in self.differences],
        }


class _Verdict(NamedTuple):
    """One partition: what was locked of it, whether history proves it, and what differs."""

    locked: LockedPartition | None
    is_from_history: bool = False
    difference: PartitionDifference | None = None


@dataclass(frozen=True, slots=True)
class DatasetVerifier:
    """Verifies locks."""

    settings: Settings
    ledger: Ledger
    storage: BarStorage

    def verify(self, lock: LockFile, on_progress: ProgressCallback = no_progress) -> Verification:
        """Read every partition of a lock, and what else is stored in its months, and compare.

        Of a month that was open, later bars are no difference. What was corrected since is proved
        from history where possible. Raises BadInput when the universe does not want all that was
        locked.
        """
        by_rows = replace(self.storage, lake=self.storage.lake.without_records())
        return replace(self, storage=by_rows)._verify(lock, on_progress)

    def _verify(self, lock: LockFile, on_progress: ProgressCallback) -> Verification:
        """Compare rows, whatever bytes hold them."""
        _raise_if_not_wanted(self.settings, lock)
        tables = {t.name: t for market in lock.markets for t in tables_of(self.settings, market)}
        locked = {StoredPlace(tables[p.table], p.partition): p for p in lock.partitions}
        reader = DatasetReader(self.settings, self.ledger, self.storage)
        places = reader.list_places(lock.markets, lock.span, lock.tables)
        others = [place for place in places if place not in locked]

        def compare(place: StoredPlace) -> _Verdict:
            return self._compare(reader, place, locked.get(place), as_of=lock.as_of)

        result = Verification(lock)
        for verdict in reader.map(compare, [*locked, *others], on_progress):
            if verdict.difference:
                result.differences.append(verdict.difference)
            elif verdict.locked:
                result.proved += 1
                result.bars += verdict.locked.rows
                result.from_history += verdict.is_from_history
        return result

    def _compare(
        self,
        reader: DatasetReader,
        place: StoredPlace,
        locked: LockedPartition | None,
        *,
        as_of: datetime,
    ) -> _Verdict:
        table, partition = place
        rows = locked.rows if locked else 0
        try:
            bars = _until_last_locked(reader.read(place), locked)
            if _is_equal(bars, locked):
                return _Verdict(locked)
            later = self._describe_later_bars(table, partition, locked, as_of=as_of)
            if later and bars.height:
                earlier = _until_last_locked(reader.read(place, as_of), locked)
                if _is_equal(earlier, locked):
                    return _Verdict(locked, is_from_history=True)
        except Damaged as error:
            kind, message, stored = DifferenceKind.DAMAGED, str(error), 0
        else:
            kind, stored = _difference_kind(bars, rows), bars.height
            message = "; ".join([*_describe(table, bars, locked), *later])
        difference = PartitionDifference(table.name, partition, kind, rows, stored, message)
        return _Verdict(locked, difference=difference)

    def _describe_later_bars(
        self, table: Table, partition: Partition, locked: LockedPartition | None, *, as_of: datetime
    ) -> list[str]:
        """Describe the raw bars of a partition that came or were corrected since it was locked.

        Without any, history explains no difference: a lost rollup could be built again, but it was
        lost.
        """
        venue = self.settings.venues[partition.market.venue]
        base = table.timeframe if table.layer == "raw" else venue.base
        owned = partition.open_times(table.timeframe)
        end = table.timeframe.shift(locked.last, 1) if locked and locked.is_open else owned.end
        span, found = Window(owned.start, end), list[tuple[datetime, datetime]]()
        for month in partitions_of(partition.market, span):
            frame = self.storage.lake.read(raw_table(base), month, with_provenance=True)
            if frame is not None:
                later = frame.filter((pl.col("known_at") > as_of) & opens_inside(span))
                found += later.select("open_time", "known_at").iter_rows()
        if not found:
            return []
        last = max(known_at for _, known_at in found)
        return [
            f"{len(found)} bars, {format_time(found[0][0])} .. {format_time(found[-1][0])}, "
            f"came or were corrected since, the last ones at {format_time(last)}"
        ]


def _until_last_locked(bars: pl.DataFrame, locked: LockedPartition | None) -> pl.DataFrame:
    if locked is None or not locked.is_open:
        return bars
    return bars.filter(pl.col("open_time") <= locked.last)


def _is_equal(bars: pl.DataFrame, locked: LockedPartition | None) -> bool:
    return fingerprint(bars) == locked.fingerprint if locked else bars.is_empty()


def _difference_kind(bars: pl.DataFrame, locked_rows: int) -> DifferenceKind:
    if bars.is_empty():
        return DifferenceKind.MISSING
    if bars.height == locked_rows:
        return DifferenceKind.OTHER_CONTENT
    is_more = bars.height > locked_rows
    return DifferenceKind.EXTRA_ROWS if is_more else DifferenceKind.FEWER_ROWS


def _describe(table: Table, bars: pl.DataFrame, locked: LockedPartition | None) -> Iterator[str]:
    """Say where the stored bars lie, and the closest that can be said without the locked bars."""
    if bars.is_empty():
        yield "nothing is stored; `marketdata backfill` fetches it again"
        return
    opens = bars["open_time"]
    yield f"stored {format_time(opens[0])} .. {format_time(opens[-1])}"
    if locked is None:
        yield "no bar was locked"
        return
    if (opens[0], opens[-1]) != (locked.first, locked.last):
        yield f"locked {format_time(locked.first)} .. {format_time(locked.last)}"
    inside = bars.filter(pl.col("open_time").is_between(locked.first, locked.last))
    if inside.height < bars.height and _is_equal(inside, locked):
        yield "the locked bars are unchanged, the others lie before or after them"
    span = Window(locked.first, table.timeframe.shift(locked.last, 1))
    if locked.rows == span.count(table.timeframe) and inside.height < locked.rows:
        missing = find_gaps(inside["open_time"], table.timeframe, span)[0].start
        yield f"the first missing bar opened {format_time(missing)}"


def _raise_if_not_wanted(settings: Settings, lock: LockFile) -> None:
    """Raise BadInput when the universe does not want all that was locked; it may want more."""
    found = [
        difference
        for name, wanted in lock.venues.items()
        for difference in _venue_differences(settings, lock, name, wanted=wanted)
    ]
    if found:
        more = len(found) - _DIFFERENCES_SHOWN
        shown = "; ".join(found[:_DIFFERENCES_SHOWN]) + (f"; and {more} more" if more > 0 else "")
        raise BadInput(
            f"{lock.name} was locked in another universe than {settings.source}: {shown}"
        )


def _venue_differences(
    settings: Settings, lock: LockFile, name: str, *, wanted: WantedVenue
) -> Iterator[str]:
    venue = settings.venues.get(name)
    if venue is None:
        yield f"venue {name} is not in it"
        return
    known = [m for m in lock.markets if m.venue == name and m in settings.markets]
    for symbol in wanted.symbols:
        if Market(name, symbol) not in known:
            yield f"market {Market(name, symbol).key} is not in it"
    if venue.base.name != wanted.base:
        yield f"{name} has base {venue.base.name} in it, and {wanted.base} in the lock"
        return
    locked = {(p.table, p.partition.market) for p in lock.partitions if p.partition.market in known}
    here = {(table.name, market) for market in known for table in tables_of(settings, market)}
    for table in sorted({table for table, _ in locked - here}):
        yield f"table {table} of {name} is not in it"
    start = max(wanted.since, lock.span.start)
    end = min(wanted.until or lock.as_of, lock.as_of, lock.span.end)
    if venue.since > start:
        since = format_time(venue.since)
        yield f"it wants {name} since {since}, and the lock holds it since {format_time(start)}"
    if venue.until and venue.until < end:
        until = format_time(venue.until)
        yield f"it wants {name} until {until}, and the lock holds it until {format_time(end)}"

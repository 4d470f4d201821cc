"""Lock and verify: what a dataset holds as one number, and the proof that a copy holds the same, or
what differs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import polars as pl

from marketdata_assets.context import Tell, Toolbox, tell_nobody
from marketdata_assets.errors import BadInput, Damaged
from marketdata_assets.flows.read.as_of import partition_as_of
from marketdata_assets.flows.read.bars import in_warehouse
from marketdata_assets.model.intervals import holes
from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import Partition, partitions_of
from marketdata_assets.model.table import Table, raw_table, rollup_table
from marketdata_assets.model.window import Window, format_time, month_of
from marketdata_assets.settings.universe import Settings
from marketdata_assets.storage.fingerprint import fingerprint
from marketdata_assets.storage.lockfile import (
    LockedPartition,
    LockFile,
    WantedVenue,
    check_name,
    read_lock,
)

READS_AT_ONCE = 8
"""Objects that are on their way from S3."""
A_TURN = 32
"""Partitions for which the warehouse is held open: a second or less."""
MISSING, DAMAGED, EXTRA, FEWER, OTHER = (
    "missing",
    "damaged",
    "extra rows",
    "fewer rows",
    "other content",
)

T = TypeVar("T")
Place = tuple[Table, Partition]


def content(
    toolbox: Toolbox, table: Table, partition: Partition, as_of: datetime | None = None
) -> pl.DataFrame:
    """The bars of a partition that are hashed, sorted by open_time; none where none are stored. Raises
    Damaged.

    The one place that reads them. `as_of`: what was known at that moment of our clock; None is the
    latest.
    """
    if as_of is not None:
        return partition_as_of(toolbox, table, partition, as_of)
    if in_warehouse(toolbox, table):
        return toolbox.warehouse.read(
            table, partition.market, partition.open_times(table.timeframe)
        )
    found = toolbox.lake.read(table, partition)
    return pl.DataFrame(schema=table.schema) if found is None else found


def pinned_moment(path: Path) -> datetime:
    """The moment of our clock at which the dataset of a lock file was known. Raises BadInput."""
    return read_lock(path).as_of


# --------------------------------------------------------------------------------- lock
def lock(
    toolbox: Toolbox,
    name: str,
    markets: Sequence[Market],
    window: Window,
    tables: Sequence[str] | None = None,
    tell: Tell = tell_nobody,
) -> LockFile:
    """What these markets' partitions hold whose months touch the window, of these tables or of all.

    A partition without bars is not in it. `tell` hears how far it is. Raises BadInput where nothing
    is stored, Damaged for an object that cannot be read or that is gone although the ledger knows
    it.
    """
    check_name(name)
    settings, began = toolbox.settings, toolbox.settings.now()
    names = _named(settings, markets, tables)
    span = _months(window & Window(settings.since, began))

    def pin(place: Place) -> LockedPartition | None:
        bars = content(toolbox, *place)
        if (
            bars.is_empty()
            and not in_warehouse(toolbox, place[0])
            and toolbox.lake.size(*place) is None
        ):
            raise Damaged(
                f"{settings.lake}/{place[0].path(place[1])} is gone; `marketdata backfill` fetches it again"
            )
        return _pin(*place, bars, _is_open(settings, place[1], began))

    places = _stored(toolbox, markets, span, names)
    found = [pinned for pinned in _each(toolbox, pin, places, tell) if pinned]
    if not found:
        raise BadInput(
            "nothing is stored of these markets in these months; `marketdata backfill` fetches it"
        )
    timeframes, as_of = (
        tuple(tf.name for tf in settings.timeframes),
        settings.now(),
    )  # whatever was read is known by now
    return LockFile(
        name, as_of, span, _venues(settings, markets), timeframes, tuple(names), tuple(found)
    )


def _tables(settings: Settings, market: Market) -> list[Table]:
    """All tables that hold a market's bars."""
    return [
        *map(raw_table, settings.venues[market.venue].fetched),
        *map(rollup_table, settings.rolled(market)),
    ]


def _named(
    settings: Settings, markets: Iterable[Market], tables: Sequence[str] | None
) -> list[str]:
    known = sorted({table.name for market in markets for table in _tables(settings, market)})
    for name in tables or ():
        if name not in known:
            raise BadInput(f"table {name[:100]!r} is not one of {', '.join(known)}")
    return sorted(set(tables)) if tables else known


def _months(window: Window) -> Window:
    """Whole months."""
    if not window:
        return window
    return Window(month_of(window.start).start, month_of(window.end - datetime.resolution).end)


def _venues(settings: Settings, markets: Iterable[Market]) -> dict[str, WantedVenue]:
    symbols: dict[str, list[str]] = {}
    for market in sorted(markets):
        symbols.setdefault(market.venue, []).append(market.symbol)
    found = {}
    for name, chosen in symbols.items():
        venue = settings.venues[name]
        reference = tuple(tf.name for tf in venue.reference)
        found[name] = WantedVenue(
            tuple(dict.fromkeys(chosen)), venue.since, venue.until, venue.base.name, reference
        )
    return found


def _stored(
    toolbox: Toolbox, markets: Iterable[Market], span: Window, names: Iterable[str]
) -> list[Place]:
    """Where bars may lie, in the order of a lock file: in the lake by its listing and by the ledger,
    in the warehouse every month.
    """
    wanted: dict[Table, list[Partition]] = {}
    for market in sorted(set(markets), key=lambda m: m.key):
        for table in _tables(toolbox.settings, market):
            if table.name in names:
                wanted.setdefault(table, []).extend(
                    partitions_of(market, toolbox.settings.history(market) & span)
                )
    found: list[Place] = []
    for table in sorted(wanted, key=lambda t: t.name):
        months = wanted[table]
        if not in_warehouse(toolbox, table):
            known = {
                key
                for key, outline in toolbox.ledger.outlines(table).items()
                if outline.bytes is not None
            }
            there = known | toolbox.lake.list_sizes(table).keys()
            months = [p for p in months if p.stored_key in there]
        found += [(table, partition) for partition in months]
    return found


def _each(
    toolbox: Toolbox, work: Callable[[Place], T], places: Sequence[Place], tell: Tell
) -> Iterator[T]:
    """Work on every place, several at once; what came of each, in order. Whoever writes rollups waits
    for some of them at the most.
    """
    with ThreadPoolExecutor(
        (os.cpu_count() or 1) if toolbox.lake.is_local else READS_AT_ONCE
    ) as pool:
        for start in range(0, len(places), A_TURN):
            turn = places[start : start + A_TURN]
            held = any(in_warehouse(toolbox, table) for table, _ in turn)
            with toolbox.warehouse.keep_open() if held else nullcontext():
                found = list(pool.map(work, turn))
            for done, result in enumerate(found, start + 1):
                tell({"done": done, "partitions": len(places)})
                yield result


def _is_open(settings: Settings, partition: Partition, moment: datetime) -> bool:
    until = settings.venues[partition.market.venue].until
    return partition.month.end > moment and (until is None or until > moment)


def _pin(
    table: Table, partition: Partition, bars: pl.DataFrame, open: bool
) -> LockedPartition | None:
    if bars.is_empty():
        return None
    opens = bars["open_time"]
    return LockedPartition(
        table.name, partition, bars.height, opens[0], opens[-1], fingerprint(bars), open
    )


# --------------------------------------------------------------------------------- verify
class Difference(NamedTuple):
    """A partition that does not hold what was locked: how many bars were, how many there are now, and
    all that is known of it.
    """

    table: str
    partition: Partition
    what: str
    locked: int
    stored: int
    says: str

    def as_dict(self) -> dict[str, Any]:
        """As a row of a table."""
        where = {
            "table": self.table,
            "market": self.partition.market.key,
            "month": self.partition.month_key[:7],
        }
        return {
            **where,
            "what": self.what,
            "locked": self.locked,
            "stored": self.stored,
            "says": self.says,
        }


@dataclass(slots=True)
class Verified:
    """What a copy was found to hold. `proved` partitions hold what was locked, `from_history` of them
    before later corrections.
    """

    lock: LockFile
    proved: int = 0
    bars: int = 0
    from_history: int = 0
    differences: list[Difference] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """As a person's program reads it."""
        found = {
            "name": self.lock.name,
            "as_of": format_time(self.lock.as_of),
            "dataset": self.lock.dataset_digest,
        }
        counts = {
            "partitions": len(self.lock.partitions),
            "proved": self.proved,
            "bars": self.bars,
            "from_history": self.from_history,
        }
        return {
            **found,
            **counts,
            "differences": [difference.as_dict() for difference in self.differences],
        }


def verify(toolbox: Toolbox, lock: LockFile, tell: Tell = tell_nobody) -> Verified:
    """Read every partition of a lock, and what else is stored in its months and tables, and compare.
    Raises BadInput.

    Of a month that was open, bars after the last locked one are no difference. What was corrected
    since is proved from history, where it can be. `tell` hears how far it is.
    """
    _same_universe(toolbox.settings, lock)
    tables = {
        table.name: table for market in lock.markets for table in _tables(toolbox.settings, market)
    }
    locked = {(tables[pinned.table], pinned.partition): pinned for pinned in lock.partitions}
    others = [
        place
        for place in _stored(toolbox, lock.markets, lock.span, lock.tables)
        if place not in locked
    ]

    def judge(place: Place) -> tuple[LockedPartition | None, bool, Difference | None]:
        return locked.get(place), *_judge(toolbox, *place, locked.get(place), lock.as_of)

    found = Verified(lock)
    for pinned, past, difference in _each(toolbox, judge, [*locked, *others], tell):
        if difference:
            found.differences.append(difference)
        elif pinned:
            found.proved += 1
            found.bars += pinned.rows
            found.from_history += past
    return found


def _judge(
    toolbox: Toolbox,
    table: Table,
    partition: Partition,
    pinned: LockedPartition | None,
    as_of: datetime,
) -> tuple[bool, Difference | None]:
    """Whether only history holds what was locked, and what differs where nothing does."""
    rows = pinned.rows if pinned else 0
    try:
        bars = _up_to(content(toolbox, table, partition), pinned)
        if _holds(bars, pinned):
            return False, None
        late = _late(toolbox, table, partition, pinned, as_of)
        if (
            late
            and bars.height
            and _holds(_up_to(content(toolbox, table, partition, as_of), pinned), pinned)
        ):
            return True, None
    except Damaged as error:
        return False, Difference(table.name, partition, DAMAGED, rows, 0, str(error))
    what = (
        MISSING
        if bars.is_empty()
        else EXTRA
        if bars.height > rows
        else FEWER
        if bars.height < rows
        else OTHER
    )
    says = "; ".join([*_words(table, bars, pinned), *late])
    return False, Difference(table.name, partition, what, rows, bars.height, says)


def _up_to(bars: pl.DataFrame, pinned: LockedPartition | None) -> pl.DataFrame:
    return bars.filter(pl.col("open_time") <= pinned.last) if pinned and pinned.is_open else bars


def _holds(bars: pl.DataFrame, pinned: LockedPartition | None) -> bool:
    return fingerprint(bars) == pinned.fingerprint if pinned else bars.is_empty()


def _words(table: Table, bars: pl.DataFrame, pinned: LockedPartition | None) -> Iterator[str]:
    """Where the bars lie that there are now, and the closest that can be said without those that were
    locked.
    """
    if bars.is_empty():
        yield "nothing is stored; `marketdata backfill` fetches it again"
        return
    opens = bars["open_time"]
    yield f"stored {format_time(opens[0])} .. {format_time(opens[-1])}"
    if pinned is None:
        yield "no bar was locked"
        return
    if (opens[0], opens[-1]) != (pinned.first, pinned.last):
        yield f"locked {format_time(pinned.first)} .. {format_time(pinned.last)}"
    inside = bars.filter(pl.col("open_time").is_between(pinned.first, pinned.last))
    if inside.height < bars.height and _holds(inside, pinned):
        yield "the locked bars are unchanged, the others lie before or after them"
    span = Window(pinned.first, pinned.last + table.timeframe.width)
    if pinned.rows == span.count(table.timeframe) and inside.height < pinned.rows:
        yield f"the first bar that lacks opened {format_time(holes(inside['open_time'], table.timeframe, span)[0].start)}"


def _late(
    toolbox: Toolbox,
    table: Table,
    partition: Partition,
    pinned: LockedPartition | None,
    as_of: datetime,
) -> list[str]:
    """What is to be said of raw bars that the partition is made of and that came or were corrected
    since it was locked.

    Where there are none, no history explains a difference: a rollup that was lost could be made
    anew, but it was lost.
    """
    base = (
        table.timeframe
        if table.layer == "raw"
        else toolbox.settings.venues[partition.market.venue].base
    )
    owned = partition.open_times(table.timeframe)
    end = pinned.last + table.timeframe.width if pinned and pinned.is_open else owned.end
    since = (pl.col("known_at") > as_of) & pl.col("open_time").is_between(
        owned.start, end, closed="left"
    )
    months = partitions_of(partition.market, Window(owned.start, end))
    found = [
        frame
        for month in months
        if (frame := toolbox.lake.read(raw_table(base), month, with_provenance=True)) is not None
    ]
    rows = [
        row
        for frame in found
        for row in frame.filter(since).select("open_time", "known_at").iter_rows()
    ]
    if not rows:
        return []
    span, last = (
        f"{format_time(rows[0][0])} .. {format_time(rows[-1][0])}",
        max(known for _, known in rows),
    )
    return [
        f"{len(rows)} bars, {span}, came or were corrected since, the last ones at {format_time(last)}"
    ]


# --------------------------------------------------------------------------------- the same univers
def _same_universe(settings: Settings, lock: LockFile) -> None:
    """Raises BadInput where the universe does not want all that was locked; what it wants besides is
    no matter.
    """
    found = [
        words
        for name, wants in lock.venues.items()
        for words in _venue_differs(settings, lock, name, wants)
    ]
    if found:
        more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise BadInput(
            f"{lock.name} was locked in another universe than {settings.source}: {'; '.join(found[:_SHOWN])}{more}"
        )


_SHOWN = 5


def _venue_differs(
    settings: Settings, lock: LockFile, name: str, wants: WantedVenue
) -> Iterator[str]:
    venue = settings.venues.get(name)
    if venue is None:
        yield f"venue {name} is not in it"
        return
    known = [
        market for market in lock.markets if market.venue == name and market in settings.markets
    ]
    yield from (
        f"market {Market(name, symbol).key} is not in it"
        for symbol in wants.symbols
        if Market(name, symbol) not in known
    )
    if venue.base.name != wants.base:
        yield f"{name} has base {venue.base.name} in it, and {wants.base} in the lock"
        return
    used = {(p.table, p.partition.market) for p in lock.partitions if p.partition.market in known}
    here = {(table.name, market) for market in known for table in _tables(settings, market)}
    yield from (
        f"table {table} of {name} is not in it"
        for table in sorted({table for table, _ in used - here})
    )
    start, end = (
        max(wants.since, lock.span.start),
        min(wants.until or lock.as_of, lock.as_of, lock.span.end),
    )
    if venue.since > start:
        yield f"it wants {name} since {format_time(venue.since)}, and the lock holds it since {format_time(start)}"
    if venue.until and venue.until < end:
        yield f"it wants {name} until {format_time(venue.until)}, and the lock holds it until {format_time(end)}"

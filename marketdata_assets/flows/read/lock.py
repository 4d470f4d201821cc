"""Lock a dataset: what every stored partition of it holds, as one file with one number."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NamedTuple, TypeVar

import polars as pl

from marketdata_assets.errors import BadInput, BarsMissing
from marketdata_assets.flows.read.as_of import AsOfReader
from marketdata_assets.flows.read.bars import BarReader
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.model.events import PartitionsRead, ProgressCallback, no_progress
from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import Partition, partitions_of
from marketdata_assets.model.table import Table, raw_table, rollup_table
from marketdata_assets.model.window import Window, month_of
from marketdata_assets.settings.universe import Settings
from marketdata_assets.storage.bars import BarStorage
from marketdata_assets.storage.fingerprint import fingerprint
from marketdata_assets.storage.lockfile import (
    LockedPartition,
    LockFile,
    WantedVenue,
    check_name,
    read_lock,
)

S3_READS = 8
"""How many objects are read from S3 at once."""
BATCH = 32
"""For so many partitions the warehouse is held open: a second or less."""

T = TypeVar("T")


class StoredPlace(NamedTuple):
    """A partition of a table."""

    table: Table
    partition: Partition


@dataclass(frozen=True, slots=True)
class DatasetReader:
    """Reads the content that locks are made of."""

    settings: Settings
    ledger: Ledger
    storage: BarStorage

    def read(self, place: StoredPlace, as_of: datetime | None = None) -> pl.DataFrame:
        """Return the bars that are hashed, sorted by open_time. Raises Damaged.

        `as_of`: what was known at that moment of our clock; None is the latest.
        """
        if as_of is None:
            return self.storage.read(*place)
        reader = AsOfReader(self.settings, self.ledger, self.storage)
        return reader.read_partition(*place, as_of)

    def list_places(
        self, markets: Iterable[Market], span: Window, names: Iterable[str]
    ) -> list[StoredPlace]:
        """Return where bars may lie, in the order of a lock file.

        The lake is judged by its listing and the ledger; in the warehouse every month may have
        bars.
        """
        wanted: dict[Table, list[Partition]] = {}
        for market in sorted(set(markets), key=lambda m: m.key):
            months = partitions_of(market, self.settings.history(market) & span)
            for table in tables_of(self.settings, market):
                if table.name in names:
                    wanted.setdefault(table, []).extend(months)
        places = []
        for table in sorted(wanted, key=lambda t: t.name):
            partitions = wanted[table]
            if not self.storage.in_warehouse(table):
                summaries = self.ledger.partitions.summaries(table).items()
                stored = {key for key, summary in summaries if summary.bytes is not None}
                stored |= self.storage.lake.list_sizes(table).keys()
                partitions = [p for p in partitions if p.stored_key in stored]
            places += [StoredPlace(table, partition) for partition in partitions]
        return places

    def map(
        self,
        work: Callable[[StoredPlace], T],
        places: Sequence[StoredPlace],
        on_progress: ProgressCallback,
    ) -> Iterator[T]:
        """Yield the result of `work` for every place, in order; several are worked on at once.

        The warehouse is held open for BATCH places at a time: whoever writes rollups waits so long.
        """
        threads = (os.cpu_count() or 1) if self.storage.lake.is_local else S3_READS
        with ThreadPoolExecutor(threads) as pool:
            for start in range(0, len(places), BATCH):
                batch = places[start : start + BATCH]
                uses_warehouse = any(self.storage.in_warehouse(place.table) for place in batch)
                with self.storage.warehouse.keep_open() if uses_warehouse else nullcontext():
                    results = list(pool.map(work, batch))
                for done, result in enumerate(results, start + 1):
                    on_progress(PartitionsRead(done, len(places)))
                    yield result


@dataclass(frozen=True, slots=True)
class DatasetLocker:
    """Locks datasets."""

    settings: Settings
    ledger: Ledger
    storage: BarStorage

    def lock(
        self,
        name: str,
        markets: Sequence[Market],
        window: Window,
        *,
        tables: Sequence[str] | None = None,
        on_progress: ProgressCallback = no_progress,
    ) -> LockFile:
        """Return what the partitions of these markets hold whose months touch the window.

        Of these tables, or of all. Partitions without bars are left out. Raises BadInput when
        nothing is stored, Damaged for an object that cannot be read, BarsMissing for what the
        ledger counts and the lake or the warehouse has not.
        """
        check_name(name)
        settings, began = self.settings, self.settings.now()
        names = _table_names(settings, markets, tables)
        span = _whole_months(window & Window(settings.since, began))
        reader = DatasetReader(settings, self.ledger, self.storage)

        def lock_place(place: StoredPlace) -> LockedPartition | None:
            return self._lock_place(reader, place, began)

        rolled_up = [t for t in settings.rollup_timeframes if rollup_table(t).name in names]
        if self.storage.rollups_in_warehouse and rolled_up:
            bars = BarReader(settings, self.ledger, self.storage)
            bars.ensure_rolled_up(markets, rolled_up[-1], span)
        places = reader.list_places(markets, span, names)
        results = reader.map(lock_place, places, on_progress)
        locked = tuple(partition for partition in results if partition)
        if not locked:
            raise BadInput(
                "nothing is stored of these markets in these months; `marketdata backfill` fetches "
                "it"
            )
        return LockFile(
            name,
            as_of=settings.now(),  # everything that was read is known by now
            span=span,
            venues=_wanted_venues(settings, markets),
            timeframes=tuple(timeframe.name for timeframe in settings.timeframes),
            tables=tuple(names),
            partitions=locked,
        )

    def _lock_place(
        self, reader: DatasetReader, place: StoredPlace, began: datetime
    ) -> LockedPartition | None:
        bars = reader.read(place)
        if bars.is_empty():
            is_lost = self.storage.lake.size(*place) is None
            if is_lost and not self.storage.in_warehouse(place.table):
                path = place.table.path(place.partition)
                raise BarsMissing(
                    f"{self.settings.lake}/{path} is gone; `marketdata backfill` fetches it again"
                )
            return None
        until = self.settings.venues[place.partition.market.venue].until
        is_open = place.partition.month.end > began and (until is None or until > began)
        opens = bars["open_time"]
        return LockedPartition(
            place.table.name,
            place.partition,
            rows=bars.height,
            first=opens[0],
            last=opens[-1],
            fingerprint=fingerprint(bars),
            is_open=is_open,
        )


def locked_moment(path: Path) -> datetime:
    """Return the moment of our clock at which a locked dataset was known. Raises BadInput."""
    return read_lock(path).as_of


def tables_of(settings: Settings, market: Market) -> list[Table]:
    """Return all tables that hold a market's bars."""
    fetched = settings.venues[market.venue].fetched_timeframes
    return [*map(raw_table, fetched), *map(rollup_table, settings.rollup_timeframes_of(market))]


def _table_names(
    settings: Settings, markets: Iterable[Market], tables: Sequence[str] | None
) -> list[str]:
    known = sorted({table.name for market in markets for table in tables_of(settings, market)})
    for name in tables or ():
        if name not in known:
            raise BadInput(f"table {name[:100]!r} is not one of {', '.join(known)}")
    return sorted(set(tables)) if tables else known


def _whole_months(window: Window) -> Window:
    if not window:
        return window
    return Window(month_of(window.start).start, month_of(window.end - datetime.resolution).end)


def _wanted_venues(settings: Settings, markets: Iterable[Market]) -> dict[str, WantedVenue]:
    symbols: dict[str, dict[str, None]] = {}
    for market in sorted(markets):
        symbols.setdefault(market.venue, {})[market.symbol] = None
    found = {}
    for name, chosen in symbols.items():
        venue = settings.venues[name]
        found[name] = WantedVenue(
            symbols=tuple(chosen),
            since=venue.since,
            until=venue.until,
            base=venue.base.name,
            reference=tuple(timeframe.name for timeframe in venue.reference),
        )
    return found

"""Consolidate: bars of several venues as one series, and which months have to be built again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import polars as pl

from marketdata_assets.errors import BadInput, MarketDataError, StoreFailed, Unreachable
from marketdata_assets.flows.fetch.plan import PlannedPartition
from marketdata_assets.ledger.consolidations import (
    ConsolidationRecord,
    ConsolidationState,
    SourcePartition,
)
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.ledger.records import IngestFailure
from marketdata_assets.model.bar import CONSOLIDATED_COLUMNS, RECONCILED_SCHEMA, empty_bars
from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import Partition, PartitionKey
from marketdata_assets.model.partition_status import LOST_REASON, ensure_lake_mounted
from marketdata_assets.model.table import Table, consolidated_table, raw_table, reconciled_table
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import Window
from marketdata_assets.quality.reconcile import compare_venues
from marketdata_assets.settings.universe import Settings
from marketdata_assets.storage.lake import Lake
from marketdata_assets.transforms.consolidate import consolidate

_CONSOLIDATED_SCHEMA = {column.name: column.dtype for column in CONSOLIDATED_COLUMNS}
_Sources = Mapping[PartitionKey, SourcePartition]
"""By market key and month key."""


@dataclass(frozen=True, slots=True)
class ConsolidationResult:
    """One consolidated partition: its bars and every pair of venues (model.bar.RECONCILED_COLUMNS).

    `changed`: it held other bars before. `note` says why it was left as it is. After a failure
    `error` is set and the partition is as it was before.
    """

    partition: Partition
    bars: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=_CONSOLIDATED_SCHEMA))
    pairs: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=RECONCILED_SCHEMA))
    bytes: int = 0
    changed: bool = False
    note: str | None = None
    error: MarketDataError | None = None


@dataclass(frozen=True, slots=True)
class OutdatedConsolidation:
    """Why a partition has to be built, and a digest of what it would be built from."""

    reason: str
    source_digest: str


@dataclass(frozen=True, slots=True)
class Consolidator:
    """Builds consolidated partitions from stored raw bars; sends no request."""

    settings: Settings
    ledger: Ledger
    lake: Lake

    def build(
        self, timeframe: Timeframe, partitions: Sequence[Partition]
    ) -> Iterator[ConsolidationResult]:
        """Build each partition from the raw bars of its venues; one that fails does not stop
        others.
        """
        for partition in partitions:
            try:
                with self.ledger.lock(partition.key):
                    yield self._build(timeframe, partition)
            except MarketDataError as error:
                start = partition.month.start
                failure = IngestFailure(
                    consolidated_table(timeframe),
                    partition,
                    Window(start, start),
                    error=str(error),
                    fetches=[],
                    now=self.settings.now(),
                    is_excused=isinstance(error, Unreachable),
                )
                self.ledger.partitions.record_failure(failure)
                yield ConsolidationResult(partition, error=error)

    def find_outdated(
        self,
        search_lake: bool,
        busy: Collection[str] = (),
        shown: Mapping[Table, Collection[str]] | None = None,
    ) -> dict[Partition, OutdatedConsolidation]:
        """Return the partitions that are lost or whose raw bars have changed since they were built.

        `search_lake`: whether the lake is searched for lost objects. `busy`: the Dagster keys of
        partitions that a run works on; `shown`: the keys that Dagster shows as materialized, by
        table. Raises StoreFailed when most of the lake is lost.
        """
        found, stored = {}, 0
        for timeframe in self.settings.consolidated_timeframes:
            table, ledger = consolidated_table(timeframe), self.ledger.consolidations
            sources, states = ledger.sources(raw_table(timeframe)), ledger.states(table)
            sizes = self.lake.list_proven_sizes(table) if search_lake else None
            stored += len(states)
            for partition in self._wanted(table):
                if partition.key in busy:
                    continue
                key = partition.stored_key
                digest = self._source_digest(partition, sources)
                size = sizes.get(key) if sizes is not None else None
                reason = digest and _reason(states.get(key), digest, size, search_lake=search_lake)
                if (
                    not reason
                    and digest
                    and shown is not None
                    and partition.key not in shown[table]
                ):
                    reason = "Dagster does not show it"
                if reason:
                    found[partition] = OutdatedConsolidation(reason, digest or "")
        lost = sum(outdated.reason == LOST_REASON for outdated in found.values())
        ensure_lake_mounted(lost, stored, self.settings.lake)
        return found

    def plan(self, partitions: Sequence[Partition]) -> list[PlannedPartition]:
        """Return what has to be built above these raw partitions: no bars and no requests."""
        if not self.settings.consolidate:
            return []
        months = {(partition.market, partition.month) for partition in partitions}
        return [
            PlannedPartition(partition, 0, 0, reason=outdated.reason)
            for partition, outdated in self.find_outdated(search_lake=True).items()
            if any(
                (m, partition.month) in months for m in self.settings.consolidate[partition.market]
            )
        ]

    def _build(self, timeframe: Timeframe, partition: Partition) -> ConsolidationResult:
        settings, table = self.settings, consolidated_table(timeframe)
        markets = settings.consolidate.get(partition.market)
        if markets is None:
            symbol = partition.market.symbol
            raise BadInput(f"{settings.source}: `consolidate:` does not name {symbol} any more")
        base = settings.base(partition.market)
        if base != timeframe:
            return ConsolidationResult(partition, note=f"its bars are {base.name} bars")
        # read before the bars: what changes meanwhile is built once more
        sources = self.ledger.consolidations.sources(raw_table(timeframe), partition.month_key)
        if _is_retired(sources, markets, partition.month_key):
            return self._retired(timeframe, partition)
        bars, no_trade = {}, {}
        for market in markets:
            part = Partition(market, partition.month)
            source = sources.get(part.stored_key)
            bars[market.venue] = self._read(raw_table(timeframe), part) if source else empty_bars()
            windows = self.ledger.consolidations.no_trade_windows(raw_table(timeframe), part)
            no_trade[market.venue] = windows
        series, pairs = consolidate(bars, no_trade), compare_venues(bars, timeframe)
        return self._store(table, partition, series, pairs=pairs, sources=sources)

    def _store(
        self,
        table: Table,
        partition: Partition,
        series: pl.DataFrame,
        *,
        pairs: pl.DataFrame,
        sources: _Sources,
    ) -> ConsolidationResult:
        ledger = self.ledger.consolidations
        before = ledger.states(table).get(partition.stored_key)
        self.lake.write_if_changed(reconciled_table(table.timeframe), partition, pairs)
        stored = self.lake.write(table, partition, series)
        opens, start = series["open_time"], partition.open_times(table.timeframe).start
        shift = table.timeframe.shift
        span = Window(opens[0], shift(opens[-1], 1)) if series.height else Window(start, start)
        record = ConsolidationRecord(
            table,
            partition,
            span,
            newest=opens[-1] if series.height else None,
            rows=series.height,
            bytes=stored.bytes,
            digest=stored.digest,
            source_digest=self._source_digest(partition, sources) or "",
            now=self.settings.now(),
        )
        ledger.record(record)
        changed = before is None or before.digest != stored.digest
        return ConsolidationResult(partition, series, pairs, bytes=stored.bytes, changed=changed)

    def _read(self, table: Table, partition: Partition) -> pl.DataFrame:
        """Return raw bars; raises StoreFailed when the ledger has some and the lake has not."""
        bars = self.lake.read(table, partition)
        if bars is None:
            raise StoreFailed(
                f"{table.name} {partition.key} is not in the lake any more; "
                "`marketdata backfill` fetches it again"
            )
        return bars

    def _retired(self, timeframe: Timeframe, partition: Partition) -> ConsolidationResult:
        table = consolidated_table(timeframe)
        tables = (table, reconciled_table(timeframe))
        bars, pairs = (self.lake.read(each, partition) for each in tables)
        note = "retention has removed raw bars of this month: it stays as it is"
        if bars is None or pairs is None:
            return ConsolidationResult(partition, note=note)
        size = self.lake.size(table, partition) or 0
        return ConsolidationResult(partition, bars, pairs, bytes=size, note=note)

    def _wanted(self, table: Table) -> Iterator[Partition]:
        """Return every partition of a consolidated table that its retention keeps."""
        settings, oldest = self.settings, self.settings.kept_since(table.name)
        markets = [m for m in settings.consolidate if settings.base(m) == table.timeframe]
        window = Window(settings.since, settings.now())
        return (p for p in settings.partitions(markets, window) if p.month.start >= oldest)

    def _source_digest(self, partition: Partition, sources: _Sources) -> str | None:
        """Return a digest of what a partition is built from; None when it cannot be built.

        It covers the venues in order, and of each the rows and the windows without trades.
        """
        markets, month = self.settings.consolidate[partition.market], partition.month_key
        has_source = any((market.key, month) in sources for market in markets)
        if not has_source or _is_retired(sources, markets, month):
            return None
        parts = [(market.key, *sources.get((market.key, month), ())) for market in markets]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _is_retired(sources: _Sources, markets: Sequence[Market], month: str) -> bool:
    """Return whether retention has removed raw bars of a month."""
    of_month = (sources.get((market.key, month)) for market in markets)
    return any(source is not None and not source.is_stored for source in of_month)


def _reason(
    state: ConsolidationState | None, digest: str, size: int | None, *, search_lake: bool
) -> str | None:
    """Return why a partition has to be built; None when it is up to date."""
    if state is None or state.source_digest is None or state.bytes is None:
        return "never made"
    if state.source_digest != digest:
        return "its venues' bars have changed"
    return LOST_REASON if search_lake and size != state.bytes else None

"""Publish: what lake and warehouse hold becomes Delta Lake tables, for readers of those."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from marketdata_assets.errors import BadInput, MarketDataError
from marketdata_assets.flows.read.bars import BarReader
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import raw_table, rollup_table
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.settings.universe import Settings
from marketdata_assets.storage.bars import BarStorage
from marketdata_assets.storage.delta import DeltaTables, open_delta_tables
from marketdata_assets.storage.delta_maintenance import DeltaMaintenance


@dataclass(frozen=True, slots=True)
class PublishResult:
    """One partition after a publication. `version` is None when nothing is stored to be published.

    `changed`: the Delta table held something else before. After a failure `error` is set and the
    table holds what it held before.
    """

    partition: Partition
    rows: int = 0
    changed: bool = False
    version: int | None = None
    bytes: int = 0
    error: MarketDataError | None = None


@dataclass(frozen=True, slots=True)
class DeltaPublisher:
    """Publishes stored bars as Delta tables."""

    settings: Settings
    ledger: Ledger
    storage: BarStorage

    def publish(
        self, timeframe: Timeframe, partitions: Sequence[Partition]
    ) -> Iterator[PublishResult]:
        """Make the Delta tables hold what is stored of each partition; a failure stops no other.

        What is not stored erases nothing: a Delta table keeps what retention removed from the lake.
        Raises BadInput without `delta:`.
        """
        tables = _delta_tables(self.settings)
        for partition in partitions:
            try:
                yield self._publish(tables, timeframe, partition)
            except MarketDataError as error:
                yield PublishResult(partition, error=error)

    def _publish(
        self, tables: DeltaTables, timeframe: Timeframe, partition: Partition
    ) -> PublishResult:
        reader = BarReader(self.settings, self.ledger, self.storage)
        try:
            table = reader.table_of(partition.market, timeframe)
        except BadInput:
            return PublishResult(partition)  # a market with another base has no such bars
        bars = self.storage.read(table, partition)
        is_stored = bars.height or self.storage.lake.size(table, partition) is not None
        if not is_stored:
            return PublishResult(partition)
        done = tables.replace(table, partition, bars)
        return PublishResult(
            partition,
            rows=done.rows,
            changed=done.changed,
            version=done.version,
            bytes=done.bytes,
        )


def maintain(settings: Settings, dry_run: bool = False) -> dict[str, DeltaMaintenance]:
    """Compact and clean every existing Delta table; return what was (or would be) done by name."""
    tables, delta = _delta_tables(settings), settings.delta
    assert delta is not None, "there are tables"
    found = {}
    for timeframe in delta.timeframes:
        for table in (raw_table(timeframe), rollup_table(timeframe)):
            done = tables.maintain(table, delta.history_days, dry_run=dry_run)
            if done is not None:
                found[table.name] = done
    return found


def _delta_tables(settings: Settings) -> DeltaTables:
    if settings.delta is None:
        raise BadInput(
            f"{settings.source}: there is no `delta:`; write "
            "`delta: {location: data/delta, timeframes: [1h]}`"
        )
    return open_delta_tables(settings.delta.location)

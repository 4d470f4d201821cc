"""Read bars of any stored timeframe, at once or lazily."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

import polars as pl

from marketdata_assets.errors import BadInput, BarsMissing
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.model.bar import TIME
from marketdata_assets.model.intervals import enclosing_window
from marketdata_assets.model.market import CONSOLIDATED_VENUE, Market
from marketdata_assets.model.partition import Partition, partitions_of
from marketdata_assets.model.table import Table, consolidated_table, raw_table, rollup_table
from marketdata_assets.model.timeframe import TIMEFRAMES, Timeframe
from marketdata_assets.model.window import Window, month_of
from marketdata_assets.settings.universe import Settings
from marketdata_assets.storage.bars import BarStorage
from marketdata_assets.storage.lake import with_market_column


class StoredTimeframes(NamedTuple):
    """The timeframes of one market: the base, what is rolled up from it, and the references."""

    base: Timeframe
    rollups: Sequence[Timeframe]
    references: Sequence[Timeframe]


@dataclass(frozen=True, slots=True)
class BarReader:
    """Reads the stored bars of markets, also of those that have left the universe."""

    settings: Settings
    ledger: Ledger
    storage: BarStorage

    def find_market(self, key: str) -> Market:
        """Return a market of the universe, or a former one with stored bars. Raises BadInput."""
        for market in self.settings.consolidate:
            if market.key == key:
                return market
        try:
            return self.settings.market(key)
        except BadInput:
            former = _parse_market(key)
            if former is not None and self.ledger.partitions.stored_span(former):
                return former
            raise

    def table_of(self, market: Market, timeframe: Timeframe) -> Table:
        """Return the table with the bars of a timeframe. Raises BadInput when there is none.

        The base is read as it was fetched, coarser timeframes from the rollups, else a reference.
        """
        if market.venue == CONSOLIDATED_VENUE:
            return self._consolidated_table(market, timeframe)
        base, rollups, references = self._timeframes(market)
        if timeframe == base:
            return raw_table(timeframe)
        if timeframe in rollups:
            return rollup_table(timeframe)
        if timeframe in references:
            return raw_table(timeframe)
        stored = dict.fromkeys(tf.name for tf in (base, *rollups, *references))
        raise BadInput(f"{market.key} has no {timeframe.name} bars; it has {' '.join(stored)}")

    def base_timeframe(self, market: Market) -> Timeframe:
        """Return the finest timeframe fetched of a market; of a former one, the finest stored."""
        return self._timeframes(market).base

    def read(self, market: Market, timeframe: Timeframe, window: Window) -> pl.DataFrame:
        """Return the stored bars that open inside the window, sorted by open_time.

        Raises BadInput, Damaged, StoreFailed.
        """
        table = self.table_of(market, timeframe)
        if self.storage.in_warehouse(table):
            self.ensure_rolled_up([market], timeframe, window)
            return self.storage.warehouse.read(table, market, window)
        wanted = Window(window.start, timeframe.shift(window.end, 1))
        partitions = partitions_of(market, self._stored_span(market) & wanted)
        lake, empty = self.storage.lake, pl.DataFrame(schema=table.schema)
        known = lake.records(table, partitions)
        read = (lake.read_stored(table, partition, window, known=known) for partition in partitions)
        return pl.concat([empty, *(frame for frame in read if frame is not None)])

    def scan(
        self,
        markets: Sequence[Market],
        timeframe: Timeframe,
        window: Window,
        *,
        with_market: bool = False,
    ) -> pl.LazyFrame:
        """Return the bars that open inside the window, of one market after the other.

        Files are read when the frame is collected. `with_market`: with the market's key as the
        first column. A consolidated market has a column `venue`, null for others beside it.
        """
        by_table: dict[Table, list[Market]] = {}
        for market in markets:
            by_table.setdefault(self.table_of(market, timeframe), []).append(market)
        if len(by_table) > 1:
            every = [self.scan([m], timeframe, window, with_market=with_market) for m in markets]
            has_venue = any(table.layer == "consolidated" for table in by_table)
            return pl.concat(every, how="diagonal" if has_venue else "vertical")
        ((table, _),) = by_table.items()
        if self.storage.in_warehouse(table):
            self.ensure_rolled_up(markets, timeframe, window)
            frames = self.storage.warehouse.read_markets(table, markets, window)
            if with_market:
                frames = [with_market_column(f, m) for f, m in zip(frames, markets, strict=True)]
            return pl.concat(frames).lazy()
        wanted = Window(window.start, timeframe.shift(window.end, 1))
        partitions = [p for market in markets for p in partitions_of(market, wanted)]
        if not self.storage.lake.is_local:  # asking the store for what is not there takes a request
            stored = {market: self._stored_months(table, market) for market in markets}
            if all(stored.values()):
                partitions = [p for p in partitions if p.month_key in stored[p.market]]
        return self.storage.lake.scan(table, partitions, window, with_market=with_market)

    def ensure_rolled_up(
        self, markets: Sequence[Market], timeframe: Timeframe, window: Window
    ) -> None:
        """Raise BarsMissing where the warehouse does not hold the rollups that the ledger counts:
        its file is lost, older or damaged.
        """
        ends = (window.start, timeframe.shift(window.end, 1))
        first, last = (Partition(markets[0], month_of(moment)).month_key for moment in ends)
        keys = [market.key for market in markets]
        expected = self.ledger.partitions.rollup_sources(keys, (first, last))
        outdated = sorted(self.storage.outdated_rollups(expected))
        if outdated:
            named = ", ".join(f"{market} {month[:7]}" for market, month in outdated[:3])
            more = f" and {len(outdated) - 3} more" if len(outdated) > 3 else ""
            raise BarsMissing(
                f"{self.storage.warehouse.path} does not hold the rollups of {named}{more} that "
                "the ledger counts: it is lost, older or damaged; `marketdata backfill` makes them "
                "again from the lake, without a request"
            )

    def newest(self, markets: Sequence[Market], timeframe: Timeframe) -> pl.DataFrame:
        """Return `market`, `open_time`: the newest stored bar of each market, null for none.

        Raw tables are answered from the ledger alone, rollups from their last objects.
        """
        known = self.ledger.partitions.newest(raw_table(timeframe))
        rows = []
        for market in markets:
            table = self.table_of(market, timeframe)
            if table.layer == "raw":
                newest = known[market.key][0] if market.key in known else None
            else:
                newest = self._newest_rollup(table, market)
            rows.append((market.key, newest))
        return pl.DataFrame(rows, schema={"market": pl.String, "open_time": TIME}, orient="row")

    def _newest_rollup(self, table: Table, market: Market) -> datetime | None:
        base = self.settings.venues[market.venue].base
        months = sorted(self.ledger.partitions.of_market(raw_table(base), market), reverse=True)
        for month in months[:2]:  # a week ends in the month after it began
            window = Partition.parse(f"{market.key}|{month}").open_times(table.timeframe)
            bars = self.scan([market], table.timeframe, window)
            newest: datetime | None = bars.select(pl.col("open_time").max()).collect().item()
            if newest is not None:
                return newest
        return None

    def _stored_months(self, table: Table, market: Market) -> set[str]:
        """Return the months of a table with an object, by the ledger."""
        venue = self.settings.venues.get(market.venue)
        source = raw_table(venue.base) if table.layer == "rollup" and venue else table
        kept = f"{self.settings.kept_since(table.name):%Y-%m-%d}"
        found = set()
        for month, state in self.ledger.partitions.of_market(source, market).items():
            has_object = state.bytes if source == table else state.rollup_source_digest
            if has_object is not None and month >= kept:
                found.add(month)
        return found

    def _consolidated_table(self, market: Market, timeframe: Timeframe) -> Table:
        if market in self.settings.consolidate:
            timeframes = [self.settings.base(market)]
        else:
            stored = self.ledger.partitions.stored_span(market)
            timeframes = [tf for tf in TIMEFRAMES.values() if consolidated_table(tf).name in stored]
        if timeframe not in timeframes:
            names = " ".join(tf.name for tf in timeframes)
            raise BadInput(f"{market.key} has no {timeframe.name} bars; it has {names}")
        return consolidated_table(timeframe)

    def _timeframes(self, market: Market) -> StoredTimeframes:
        settings = self.settings
        if market in settings.markets:
            venue = settings.venues[market.venue]
            return StoredTimeframes(
                venue.base, settings.rollup_timeframes_of(market), venue.reference
            )
        stored = self.ledger.partitions.stored_span(market)
        base, *references = [tf for tf in TIMEFRAMES.values() if raw_table(tf).name in stored]
        coarser = [tf for tf in settings.timeframes if tf != base and tf.is_made_of(base)]
        return StoredTimeframes(base, coarser, references)

    def _stored_span(self, market: Market) -> Window:
        if market in self.settings.markets or market in self.settings.consolidate:
            return self.settings.history(market)
        return enclosing_window(self.ledger.partitions.stored_span(market).values())


def _parse_market(key: str) -> Market | None:
    try:
        return Market.parse(key)
    except BadInput:
        return None

"""Read bars as they were known at a moment. Sends no request."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

import polars as pl

from marketdata_assets.errors import BadInput
from marketdata_assets.flows.read.bars import BarReader
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.model.bar import COLUMN_NAMES, ROLLUP_SCHEMA, TIME, empty_bars
from marketdata_assets.model.intervals import opens_inside
from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import Partition, adjacent_partition, partitions_of
from marketdata_assets.model.table import Table, history_table, raw_table
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import Window, format_time
from marketdata_assets.settings.universe import Settings
from marketdata_assets.storage.bars import BarStorage
from marketdata_assets.transforms.rollup import roll_up


@dataclass(frozen=True, slots=True)
class AsOfReader:
    """Reads what was known at a moment of our clock, from the stored bars and their history."""

    settings: Settings
    ledger: Ledger
    storage: BarStorage

    def read(
        self, market: Market, timeframe: Timeframe, window: Window, *, moment: datetime
    ) -> pl.DataFrame:
        """Return the bars that open inside the window as known at `moment` (inclusive), sorted.

        Fetched timeframes come from the stored bars and their history; others are rolled up from
        what was known then. A bar from before revisions were kept counts as always known. Raises
        BadInput for a moment in the future or before the first fetch.
        """
        now = self.settings.now()
        if moment > now:
            raise BadInput(
                f"--as-of {format_time(moment)} lies in the future; it is now {format_time(now)}"
            )
        reader = BarReader(self.settings, self.ledger, self.storage)
        table = reader.table_of(market, timeframe)
        if table.layer not in ("raw", "rollup"):
            raise BadInput(
                f"{market.key} keeps no revisions, as it is made of other markets; ask for one of "
                f"these as of {format_time(moment)}"
            )
        base = timeframe if table.layer == "raw" else reader.base_timeframe(market)
        known = self.ledger.partitions.of_market(raw_table(base), market)
        span = Window(window.start, timeframe.shift(window.end, 1))
        months = [p for p in partitions_of(market, span) if p.month_key in known]
        frames = [self.read_partition(table, partition, moment) for partition in months]
        bars = pl.concat(frames) if frames else pl.DataFrame(schema=table.schema)
        bars = bars.filter(opens_inside(window))
        if bars.is_empty():
            self._raise_if_before_first_fetch(base, months, moment)
        return bars

    def read_partition(self, table: Table, partition: Partition, moment: datetime) -> pl.DataFrame:
        """Return one partition of a raw or rollup table as it was known at `moment`."""
        if table.layer == "raw":
            return self._read_raw(partition, table.timeframe, moment)
        reader = BarReader(self.settings, self.ledger, self.storage)
        base = reader.base_timeframe(partition.market)
        return self._read_rollup(partition, base, table.timeframe, moment=moment)

    def _raise_if_before_first_fetch(
        self, base: Timeframe, months: Iterable[Partition], moment: datetime
    ) -> None:
        lake, partitions = self.storage.lake, list(months)
        stored = [
            lake.read(raw_table(base), partition, with_provenance=True) for partition in partitions
        ]
        replaced = [lake.read(history_table(base), partition) for partition in partitions]
        frames = [frame for frame in (*stored, *replaced) if frame is not None]
        known_at = pl.concat([pl.Series("known_at", dtype=TIME), *(f["known_at"] for f in frames)])
        first = None if known_at.null_count() else known_at.min()
        if isinstance(first, datetime) and first > moment:
            market = partitions[0].market
            raise BadInput(
                f"nothing of {market.key} in these months was known at {format_time(moment)}; "
                f"the first of it was fetched at {format_time(first)}"
            )

    def _read_raw(self, partition: Partition, base: Timeframe, moment: datetime) -> pl.DataFrame:
        stored = self.storage.lake.read(raw_table(base), partition, with_provenance=True)
        if stored is None:
            return empty_bars()
        was_known = pl.col("known_at").is_null() | (pl.col("known_at") <= moment)
        current = stored.filter(was_known)
        replaced = None
        if current.height < stored.height:
            replaced = self.storage.lake.read(history_table(base), partition)
        if replaced is None:
            return current.select(COLUMN_NAMES)
        earlier = replaced.filter(was_known & (pl.col("replaced_at") > moment))
        earlier = earlier.join(current, on="open_time", how="anti")
        earlier = earlier.unique("open_time", keep="first", maintain_order=True)
        return pl.concat([current.select(COLUMN_NAMES), earlier.select(COLUMN_NAMES)]).sort(
            "open_time"
        )

    def _read_rollup(
        self, partition: Partition, base: Timeframe, timeframe: Timeframe, *, moment: datetime
    ) -> pl.DataFrame:
        """Return a rolled-up partition as flows.derive.rollup would have built it at `moment`."""
        owned, earlier = partition.open_times(timeframe), adjacent_partition(partition, -1)
        state = self.ledger.partitions.get(raw_table(base), partition)
        before = self.ledger.partitions.get(raw_table(base), earlier)
        if state is None:
            return pl.DataFrame(schema=ROLLUP_SCHEMA)
        bars, start = self._read_raw(partition, base, moment), state.start
        month = partition.month.start
        if owned.start < month and before is not None and before.through >= month:
            end_before = self._read_raw(earlier, base, moment)
            end_before = end_before.filter(pl.col("open_time") >= owned.start)
            bars, start = pl.concat([end_before, bars]), max(owned.start, before.start)
        if bars.is_empty():
            return roll_up(bars, base, [timeframe], whole=owned)[timeframe]
        was_complete = state.completed_at is not None and state.completed_at <= moment
        end = max(base.shift(bars["open_time"][-1], 1), state.through if was_complete else start)
        requested = Window(min(start, bars["open_time"][0]), end)
        built = roll_up(bars, base, [timeframe], whole=requested)[timeframe]
        return built.filter(opens_inside(owned))

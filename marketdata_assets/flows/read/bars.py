"""Read: bars of any timeframe, and the coverage that explains every bar that is not there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from marketdata_assets.errors import BadInput
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.model.market import CONSOLIDATED, Market
from marketdata_assets.model.partition import partitions_of
from marketdata_assets.model.table import Table, consolidated, raw, rollup
from marketdata_assets.model.timeframe import TIMEFRAMES, Timeframe
from marketdata_assets.model.window import Window
from marketdata_assets.settings.universe import Settings
from marketdata_assets.storage.bars import BarStorage


@dataclass(frozen=True, slots=True)
class BarReader:
    """."""

    settings: Settings
    ledger: Ledger
    storage: BarStorage

    def find_market(self, key: str) -> Market:
        """A market of the universe, or one that was taken out of it and whose bars are still stored.
        Raises BadInput.
        """
        for market in self.settings.consolidate:
            if market.key == key:
                return market
        try:
            return self.settings.market(key)
        except BadInput:
            try:
                former = Market.parse(key)
            except BadInput:
                former = None
            if former is not None and self.ledger.stored_span(former):
                return former
            raise

    def table_of(self, market: Market, timeframe: Timeframe) -> Table:
        """Where the bars of a timeframe are: the base as fetched, coarser ones rolled up, else a
        reference. Raises BadInput.
        """
        if market.venue == CONSOLIDATED:
            return self._consolidated_table(market, timeframe)
        base, rolled, reference = self._timeframes(market)
        if timeframe == base:
            return raw(timeframe)
        if timeframe in rolled:
            return rollup(timeframe)
        if timeframe in reference:
            return raw(timeframe)
        known = [tf.name for tf in (base, *rolled, *reference)]
        raise BadInput(
            f"{market.key} has no {timeframe.name} bars; it has {' '.join(dict.fromkeys(known))}"
        )

    def base_timeframe(self, market: Market) -> Timeframe:
        """The finest timeframe that is fetched of a market; of a former one, that is stored."""
        return self._timeframes(market)[0]

    def _consolidated_table(self, market: Market, timeframe: Timeframe) -> Table:
        settings, stored = self.settings, self.ledger.stored_span(market)
        known = [tf for tf in TIMEFRAMES.values() if consolidated(tf).name in stored]
        base = [settings.base(market)] if market in settings.consolidate else known
        if timeframe not in base:
            raise BadInput(
                f"{market.key} has no {timeframe.name} bars; it has {' '.join(tf.name for tf in base)}"
            )
        return consolidated(timeframe)

    def _timeframes(
        self, market: Market
    ) -> tuple[Timeframe, Sequence[Timeframe], Sequence[Timeframe]]:
        """The base, what is rolled up from it and the references of a market; of a former one by what is
        stored.
        """
        settings = self.settings
        if market in settings.markets:
            venue = settings.venues[market.venue]
            return venue.base, settings.rolled(market), venue.reference
        base, *reference = [
            tf for tf in TIMEFRAMES.values() if raw(tf).name in self.ledger.stored_span(market)
        ]
        return base, [tf for tf in settings.timeframes if tf.width > base.width], reference

    def read(self, market: Market, timeframe: Timeframe, window: Window) -> pl.DataFrame:
        """The bars that open inside the window, sorted by open_time; what is not stored is not there.
        Raises Damaged.
        """
        table = self.table_of(market, timeframe)
        if self.storage.in_warehouse(table):
            return self.storage.warehouse.read(table, market, window)
        span = self._stored_span(market) & Window(window.start, window.end + timeframe.width)
        frames = [
            frame
            for p in partitions_of(market, span)
            if (frame := self.storage.lake.read(table, p)) is not None
        ]
        if not frames:
            return pl.DataFrame(schema=table.schema)
        inside = pl.col("open_time").is_between(window.start, window.end, closed="left")
        return pl.concat(frames).filter(inside)

    def _stored_span(self, market: Market) -> Window:
        if market in self.settings.markets or market in self.settings.consolidate:
            return self.settings.history(market)
        spans = self.ledger.stored_span(market).values()
        return Window(min(span.start for span in spans), max(span.end for span in spans))

"""Markets by the volume that was traded before a moment, without what was known only later."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import polars as pl

from marketdata_assets.errors import BadInput
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.model.bar import format_number
from marketdata_assets.model.instrument import Instrument
from marketdata_assets.model.intervals import opens_inside
from marketdata_assets.model.market import Market, find_market
from marketdata_assets.model.partition import partitions_of
from marketdata_assets.model.table import Table, raw_table
from marketdata_assets.model.timeframe import TIMEFRAMES, Timeframe
from marketdata_assets.model.window import Window
from marketdata_assets.settings.universe import Settings
from marketdata_assets.storage.lake import Lake

_COLUMNS = ("open_time", "close", "volume", "quote_volume")


@dataclass(frozen=True, slots=True)
class RankedMarket:
    """One market: what was traded of it in quote currency, and on how many days it had bars."""

    market: Market
    volume: Decimal
    days: int
    is_wanted: bool
    """Whether today's universe has it."""

    def as_dict(self, rank: int) -> dict[str, Any]:
        """Return it as the command line prints it."""
        return {
            "rank": rank,
            "market": self.market.key,
            "quote_volume": format_number(self.volume),
            "days": self.days,
            "in_universe": self.is_wanted,
        }


@dataclass(frozen=True, slots=True)
class Ranking:
    """Markets by volume, and the keys of those listed then of which no bar is stored."""

    markets: list[RankedMarket]
    unknown: list[str]


@dataclass(frozen=True, slots=True)
class MarketRanker:
    """Ranks what is stored; sends no request."""

    settings: Settings
    ledger: Ledger
    lake: Lake

    def rank(self, moment: datetime, *, days: int, venue: str | None, quote: str | None) -> Ranking:
        """Rank all markets with stored bars, former ones as well, by their quote volume in the
        `days` before a moment (UTC, exclusive).

        Where a venue gives no quote volume, a bar counts as its volume times its close. Raises
        BadInput where markets have several quote currencies and none is named, Damaged and
        BarsMissing.
        """
        stored = [m for m in self.ledger.partitions.stored_markets() if venue in (None, m.venue)]
        quotes = sorted({_quote(market) for market in stored})
        if quote is None and len(quotes) > 1:
            raise BadInput(
                f"volumes in several currencies cannot be ranked: {', '.join(quotes)}; name one "
                "with --quote"
            )
        wanted = [market for market in stored if quote in (None, _quote(market))]
        window = Window(moment - timedelta(days=days), moment)
        ranked = [found for m in wanted if (found := self._measure(m, window))]
        return Ranking(
            sorted(ranked, key=lambda one: (-one.volume, one.market.key)),
            self._unknown(moment, {m.key for m in wanted}, venue=venue, quote=quote),
        )

    def _measure(self, market: Market, window: Window) -> RankedMarket | None:
        stored = self.ledger.partitions.stored_span(market)
        timeframe = next(tf for tf in TIMEFRAMES.values() if raw_table(tf).name in stored)
        bars = self._read(raw_table(timeframe), market, window, timeframe)
        if bars.is_empty():
            return None
        paid = pl.coalesce("quote_volume", pl.col("volume") * pl.col("close"))
        volume, days = bars.select(
            paid.sum().alias("paid"), pl.col("open_time").dt.date().n_unique().alias("days")
        ).row(0)
        return RankedMarket(market, volume, days, market in self.settings.markets)

    def _read(
        self, table: Table, market: Market, window: Window, timeframe: Timeframe
    ) -> pl.DataFrame:
        read = (
            self.lake.read_stored(table, partition, window, columns=_COLUMNS)
            for partition in partitions_of(market, window)
        )
        empty = pl.DataFrame(schema=table.schema).select(_COLUMNS)
        frames = (frame.select(_COLUMNS) for frame in read if frame is not None)
        bars = pl.concat([empty, *frames]).filter(opens_inside(window))
        return bars.filter(timeframe.closes(pl.col("open_time")) <= window.end)

    def _unknown(
        self, moment: datetime, stored: set[str], *, venue: str | None, quote: str | None
    ) -> list[str]:
        """Return the markets that snapshots of then name, of which no bar is stored."""
        keys = list[str]()
        for name in self.settings.venues:
            if venue not in (None, name):
                continue
            book = self.ledger.instruments
            later = (one for one in book.list(name) if _was_listed(one, moment))
            listed = {one.symbol: one for one in (*book.list(name, moment), *later)}
            keys += [
                market.key
                for one in listed.values()
                if quote in (None, one.quote) and (market := find_market(name, one.symbol))
            ]
        return [key for key in keys if key not in stored]


def _was_listed(one: Instrument, moment: datetime) -> bool:
    is_created = one.created is not None and one.created <= moment
    return is_created and (one.expiry is None or one.expiry > moment)


def _quote(market: Market) -> str:
    return market.symbol.partition("/")[2].partition(":")[0]

"""The door for Python: bars as Polars LazyFrames, and SQL over all tables, without Dagster.

from marketdata_assets import open_reader

with open_reader() as reader:
    reader.bars("binance:BTC-USDT", "1h", "2024-01-01", "2024-02-01").collect()
    reader.sql("SELECT market, max(open_time) FROM raw.ohlcv_1m GROUP BY market")
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from marketdata_assets.context import Toolbox, open_toolbox
from marketdata_assets.flows.read.as_of import read_as_of
from marketdata_assets.flows.read.bars import known_market
from marketdata_assets.flows.read.scan import newest_bars, scan_bars
from marketdata_assets.flows.read.sql import connected
from marketdata_assets.model.market import CONSOLIDATED_VENUE
from marketdata_assets.model.timeframe import parse_timeframe
from marketdata_assets.model.window import Window, format_time, parse_time
from marketdata_assets.settings.universe import PREFIX, load_settings
from marketdata_assets.storage.views import run_query

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from marketdata_assets.storage.views import Connection

Moment = str | datetime | None
"""An ISO text or a datetime, UTC where it names no zone; None is the beginning or our now."""


class Reader:
    """What is stored of one universe. It sends no request to any venue and writes nothing. Raises
    errors.MarketDataError.
    """

    def __init__(self, toolbox: Toolbox) -> None:
        self._toolbox = toolbox

    @property
    def markets(self) -> list[str]:
        """The keys of the universe's markets, such as `binance:BTC-USDT`."""
        return [market.key for market in self._toolbox.settings.markets]

    def bars(
        self,
        market: str | Sequence[str],
        timeframe_: str,
        start: Moment = None,
        end: Moment = None,
        as_of: Moment = None,
    ) -> pl.LazyFrame:
        """The bars that open in `[start, end)`, sorted by open_time: all columns of model.bar, prices
        and volumes Decimal(38, 12).

        Only the files of those months are read, and of them what the query needs, when it is
        collected. With a list of markets, the first column is `market`, and each market's bars come
        after the other's. With `as_of` (our clock) they are the bars that were known at that
        moment; these are read at once. A consolidated market, such as `consolidated:BTC-USDT`, has
        a last column `venue`.
        """
        window, moment = self._window(start, end), _moment(as_of)
        if isinstance(market, str):
            return self._scan(market, timeframe_, window, moment)
        if not market:
            raise ValueError("name at least one market; reader.markets has all of them")
        frames = [
            self._scan(key, timeframe_, window, moment).select(
                pl.lit(key).alias("market"), pl.all()
            )
            for key in market
        ]
        mixed = any(key.startswith(CONSOLIDATED_VENUE) for key in market)
        return pl.concat(frames, how="diagonal" if mixed else "vertical")

    def newest(self, timeframe_: str) -> pl.DataFrame:
        """`market`, `open_time`: the newest stored bar of every market of the universe, null where
        there is none.
        """
        return newest_bars(
            self._toolbox, self._toolbox.settings.markets, parse_timeframe(timeframe_)
        )

    def sql(self, query: str) -> pl.DataFrame:
        """The answer of DuckDB to a query over the views `raw.ohlcv_<timeframe>`,
        `rollup.ohlcv_<timeframe>` and so on.
        """
        with self.connect() as connection:
            return run_query(connection, query)

    def connect(
        self, markets: Sequence[str] | None = None, start: Moment = None, end: Moment = None
    ) -> AbstractContextManager[Connection]:
        """A DuckDB connection with those views; over these markets and months only, where they are
        given (it opens fewer files).

        While it is open and rollups lie in the warehouse, nobody can write there: close it soon.
        """
        return connected(self._toolbox, markets, self._window(start, end))

    def _scan(self, key: str, name: str, window: Window, moment: datetime | None) -> pl.LazyFrame:
        asked = self._toolbox, known_market(self._toolbox, key), parse_timeframe(name), window
        return scan_bars(*asked) if moment is None else read_as_of(*asked, moment).lazy()

    def _window(self, start: Moment, end: Moment) -> Window:
        settings = self._toolbox.settings
        return Window(_moment(start) or settings.since, _moment(end) or settings.now())


def _moment(moment: Moment) -> datetime | None:
    return (
        parse_time(
            format_time(moment) if isinstance(moment, datetime) and moment.tzinfo else str(moment)
        )
        if moment is not None
        else None
    )


@contextmanager
def open_reader(universe: str | Path | None = None) -> Iterator[Reader]:
    """A reader of the universe in that file; by default, of the one that the command `marketdata`
    uses.
    """
    environment = {**os.environ, PREFIX + "UNIVERSE": str(universe)} if universe else None
    with open_toolbox(load_settings(environment)) as toolbox:
        yield Reader(toolbox)

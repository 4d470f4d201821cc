"""Reading from Python: bars as Polars LazyFrames, and SQL over all tables, without Dagster.

from marketdata_assets import open_reader

with open_reader() as reader:
    reader.bars("binance:BTC-USDT", "1h", "2024-01-01", "2024-02-01").collect()
    reader.sql("SELECT market, max(open_time) FROM raw.ohlcv_1m GROUP BY market")
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from marketdata_assets.context import Context, open_context
from marketdata_assets.flows.operate.universe import load_universe
from marketdata_assets.flows.read.as_of import AsOfReader
from marketdata_assets.flows.read.bars import BarReader
from marketdata_assets.flows.read.sql import open_sql_views
from marketdata_assets.model.timeframe import parse_timeframe
from marketdata_assets.model.window import Window, parse_time
from marketdata_assets.settings.load import PREFIX
from marketdata_assets.storage.views import run_query

if TYPE_CHECKING:
    from marketdata_assets.storage.views import Connection

Moment = str | datetime | None
"""An ISO text or a datetime, UTC where it names no zone. None means: no limit."""


class Reader:
    """Reads what is stored of one universe. Sends no request to a venue and writes nothing.

    Every method raises BadInput for an unknown market, timeframe or moment, Damaged for an object
    that cannot be read, and StoreFailed for a store that does not answer; all are MarketDataErrors.
    """

    def __init__(self, context: Context) -> None:
        self._context = context

    @property
    def markets(self) -> list[str]:
        """The keys of the universe's markets, such as `binance:BTC-USDT`, in its order."""
        return [market.key for market in self._context.settings.markets]

    def bars(
        self,
        market: str | Sequence[str],
        timeframe_: str,
        start: Moment = None,
        end: Moment = None,
        as_of: Moment = None,
    ) -> pl.LazyFrame:
        """Return the bars that open in `[start, end)` UTC, sorted by open_time.

        By default `start` is the universe's first day and `end` our now. The columns are those of
        model.bar: open_time in UTC, prices and volumes as Decimal(38, 12), null where the venue
        gives no value. Only files of those months are read, when the frame is collected.

        A list of markets puts a column `market` in front, and all bars of a market come before
        those of the next. A consolidated market, such as `consolidated:BTC-USDT`, has a last
        column `venue`. With `as_of`, a moment of our clock (inclusive), the bars are those that
        were known then, and they are read at once. Raises ValueError for an empty list.
        """
        keys = [market] if isinstance(market, str) else market
        if not keys:
            raise ValueError("name at least one market; reader.markets has all of them")
        reader = self._context.bind(BarReader)
        markets = [reader.find_market(key) for key in keys]
        timeframe, window = parse_timeframe(timeframe_), self._window(start, end)
        with_market = not isinstance(market, str)
        moment = _parse_moment(as_of)
        if moment is None:
            return reader.scan(markets, timeframe, window, with_market=with_market)
        past = self._context.bind(AsOfReader)
        frames = []
        for key, each in zip(keys, markets, strict=True):
            bars = past.read(each, timeframe, window, moment=moment).lazy()
            named = [pl.lit(key).alias("market")] if with_market else []
            frames.append(bars.select(*named, pl.all()))
        return pl.concat(frames)

    def newest(self, timeframe_: str) -> pl.DataFrame:
        """Return `market`, `open_time`: the newest stored bar of every market of the universe.

        `open_time` is null for a market without bars.
        """
        reader = self._context.bind(BarReader)
        return reader.newest(self._context.settings.markets, parse_timeframe(timeframe_))

    def sql(self, query: str, unsafe: bool = False) -> pl.DataFrame:
        """Return DuckDB's answer to a query over `raw.ohlcv_1m`, `rollup.ohlcv_1h` and so on.

        The views have a first column `market`. Unless `unsafe`, the query reads only the lake and
        writes nothing. Raises BadInput for one that DuckDB refuses.
        """
        with self._open_views(None, self._window(None, None), unsafe=unsafe) as connection:
            return run_query(connection, query, unsafe=unsafe)

    def connect(
        self, markets: Sequence[str] | None = None, start: Moment = None, end: Moment = None
    ) -> AbstractContextManager[Connection]:
        """Return a context manager with a DuckDB connection to the views of `sql`.

        The views show the months that `[start, end)` touches, of these markets or of all; the
        fewer, the fewer files are opened. While rollups lie in the warehouse and the connection is
        open, no process can write them: close it soon.
        """
        return self._open_views(markets, self._window(start, end), unsafe=True)

    def _open_views(
        self, keys: Sequence[str] | None, window: Window, *, unsafe: bool
    ) -> AbstractContextManager[Connection]:
        context = self._context
        return open_sql_views(
            context.settings,
            context.ledger,
            context.storage,
            keys=keys,
            window=window,
            unsafe=unsafe,
        )

    def _window(self, start: Moment, end: Moment) -> Window:
        settings = self._context.settings
        return Window(_parse_moment(start) or settings.since, _parse_moment(end) or settings.now())


def _parse_moment(moment: Moment) -> datetime | None:
    return None if moment is None else parse_time(str(moment))


@contextmanager
def open_reader(universe: str | Path | None = None) -> Iterator[Reader]:
    """Open a reader of the universe in that file; by default, of the command `marketdata`'s.

    Raises BadInput for a mistake in the universe, StoreFailed for a state that cannot be opened.
    """
    environment = {**os.environ, PREFIX + "UNIVERSE": str(universe)} if universe else None
    with open_context(load_universe(environment, for_reading=True), for_reading=True) as context:
        yield Reader(context)

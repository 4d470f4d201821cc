"""`marketdata bars`, `sql` and `coverage`: what is stored, and what every missing bar is."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from marketdata_assets.cli.options import (
    BarFormat,
    End,
    FileFormat,
    Format,
    ListFormat,
    Markets,
    Out,
    Start,
)
from marketdata_assets.cli.output import check_bar_format, show, write_bars
from marketdata_assets.cli.selection import load_context, select_markets, select_window
from marketdata_assets.model.timeframe import TIMEFRAMES, Timeframe
from marketdata_assets.model.timeframe import parse_timeframe as parse_timeframe
from marketdata_assets.model.window import parse_time

commands = typer.Typer()


def _parse_moment(text: str) -> datetime:
    """Return the moment of an ISO text, or that of a lock file. Raises BadInput."""
    from marketdata_assets.flows.read.lock import locked_moment

    return locked_moment(Path(text)) if Path(text).is_file() else parse_time(text)


_Market = Annotated[str, typer.Argument(metavar="MARKET", help="Such as binance:BTC-USDT.")]
_Timeframe = Annotated[
    Timeframe,
    typer.Argument(
        parser=parse_timeframe, metavar="TIMEFRAME", help=f"One of {' '.join(TIMEFRAMES)}."
    ),
]
_AsOf = Annotated[
    datetime | None,
    typer.Option(
        "--as-of",
        parser=_parse_moment,
        metavar="TIME|FILE",
        help="Print the bars as known at this moment (UTC, our clock), or at that of a lock file.",
    ),
]
_Unsafe = Annotated[
    bool,
    typer.Option(
        "--unsafe", help="Allow every statement, such as COPY, and files outside the lake."
    ),
]
_Query = Annotated[
    str,
    typer.Argument(
        metavar="QUERY",
        help="SQL of DuckDB over raw.ohlcv_1m, rollup.ohlcv_1h, ...; `SHOW ALL TABLES` lists them.",
    ),
]


@commands.command()
def bars(
    market: _Market,
    timeframe: _Timeframe,
    *,
    start: Start = None,
    end: End = None,
    as_of: _AsOf = None,
    format: FileFormat = BarFormat.TABLE,
    file: Out = None,
) -> None:
    """Print the stored bars of a market that open in the span, as known now or at a moment."""
    from marketdata_assets.flows.read.as_of import AsOfReader
    from marketdata_assets.flows.read.bars import BarReader

    check_bar_format(format, file)
    with load_context(for_reading=True) as context:
        reader = context.bind(BarReader)
        found, window = reader.find_market(market), select_window(context.settings, start, end)
        if as_of is None:
            frame = reader.read(found, timeframe, window)
        else:
            frame = context.bind(AsOfReader).read(found, timeframe, window, moment=as_of)
    write_bars(frame, format, file)


@commands.command()
def sql(
    query: _Query,
    *,
    market: Markets = None,
    start: Start = None,
    end: End = None,
    unsafe: _Unsafe = False,
    format: FileFormat = BarFormat.TABLE,
    file: Out = None,
) -> None:
    """Query all tables with SQL. With markets and a span, fewer files are opened."""
    from marketdata_assets.flows.read.sql import open_sql_views
    from marketdata_assets.storage.views import run_query

    check_bar_format(format, file)
    with load_context(for_reading=True) as context:
        settings, window = context.settings, select_window(context.settings, start, end)
        views = open_sql_views(
            settings, context.ledger, context.storage, keys=market, window=window, unsafe=unsafe
        )
        with views as connection:
            frame = run_query(connection, query, unsafe=unsafe)
    write_bars(frame, format, file)


@commands.command()
def coverage(
    *,
    market: Markets = None,
    start: Start = None,
    end: End = None,
    format: Format = ListFormat.TABLE,
) -> None:
    """Explain every expected bar of each market, in 1m bars: the parts sum to `expected`."""
    from marketdata_assets.flows.prove.gaps import GapExplainer
    from marketdata_assets.flows.read.coverage import CoverageReporter

    with load_context(for_reading=True) as context:
        window = select_window(context.settings, start, end) if start or end else None
        markets = select_markets(context.settings, market)
        context.bind(GapExplainer).explain_new(markets)
        found = context.bind(CoverageReporter).report(markets, window)
    show([each.as_dict() for each in found], format)

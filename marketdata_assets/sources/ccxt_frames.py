"""Rows of an answer become frames, bound by name after the type of each column was checked."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import polars as pl

from marketdata_assets.errors import Garbled
from marketdata_assets.model.bar import NAMES
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import to_ms

OHLCV_COLUMNS = ("open_time", "open", "high", "low", "close", "volume")
"""The columns of ccxt's bars."""


class _KlineColumn(NamedTuple):
    """A column of a kline: its position, and the JSON type that Binance documents for it."""

    name: str
    position: int
    type: type


_KLINE_COLUMNS = (
    _KlineColumn("open_time", 0, int),
    _KlineColumn("open", 1, str),
    _KlineColumn("high", 2, str),
    _KlineColumn("low", 3, str),
    _KlineColumn("close", 4, str),
    _KlineColumn("volume", 5, str),
    _KlineColumn("quote_volume", 7, str),
    _KlineColumn("trades", 8, int),
    _KlineColumn("taker_buy_volume", 9, str),
    _KlineColumn("taker_buy_quote_volume", 10, str),
)
_CLOSE_TIME, _KLINE_WIDTH = 6, 12
_DTYPES = {int: pl.Int64(), str: pl.String()}
_FIRST_MS = 10**11
"""Milliseconds of 1973: a smaller open time is not in milliseconds, and another rule finds it."""


def read_klines(rows: Any, timeframe: Timeframe) -> pl.DataFrame:
    """Return Binance's klines as `BarsPage.rows`. Raises Garbled."""
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise Garbled("the answer is not a list of klines")
    if not rows:
        return pl.DataFrame(schema={c.name: _DTYPES[c.type] for c in _KLINE_COLUMNS})
    widths = {len(row) for row in rows}
    if widths != {_KLINE_WIDTH}:
        found = ", ".join(map(str, sorted(widths)))
        raise Garbled(f"a kline has {found} columns instead of {_KLINE_WIDTH}")
    columns = list(zip(*rows, strict=True))
    series = [_series(c.name, columns[c.position], c.type) for c in _KLINE_COLUMNS]
    _check_lengths(series[0], _series("close_time", columns[_CLOSE_TIME], int), timeframe)
    return pl.DataFrame(series)


def read_ohlcv(rows: list[list[Any]]) -> pl.DataFrame:
    """Return ccxt's bars of six columns as `BarsPage.rows`; the other columns are null.

    Raises Garbled.
    """
    width = len(OHLCV_COLUMNS)
    if any(len(row) < width for row in rows):
        raise Garbled("a bar has fewer than six columns")
    columns = list(zip(*(row[:width] for row in rows), strict=True)) or [()] * width
    series = {"open_time": _series("open_time", columns[0], int)}
    for name, values in zip(OHLCV_COLUMNS[1:], columns[1:], strict=True):
        texts = [None if value is None else str(value) for value in values]
        series[name] = pl.Series(name, texts, dtype=pl.String)
    absent = {
        name: pl.lit(None, pl.Int64() if name == "trades" else pl.String())
        for name in NAMES
        if name not in series
    }
    return pl.DataFrame(series).with_columns(**absent).select(NAMES)


def _series(name: str, values: Sequence[Any], kind: type) -> pl.Series:
    expected = "whole numbers" if kind is int else "text"
    refusal = Garbled(f"column {name} holds something else than {expected}")
    if not set(map(type, values)) <= {kind, type(None)}:
        raise refusal
    try:
        return pl.Series(name, values, dtype=_DTYPES[kind], strict=True)
    except (TypeError, pl.exceptions.PolarsError, OverflowError):
        raise refusal from None


def _check_lengths(opens: pl.Series, closes: pl.Series, timeframe: Timeframe) -> None:
    """Refuse bars of another timeframe by their close times. Raises Garbled.

    A halt may cut a bar short, but no bar is longer than its timeframe, and not all are shorter.
    """
    width = timeframe.width // timedelta(milliseconds=1)
    lengths = closes - opens + 1
    on_grid = ((opens - to_ms(timeframe.origin)) % width == 0) & (opens > _FIRST_MS)
    judged = lengths.filter(on_grid)
    if (lengths > width).any() or (len(judged) > 2 and not (judged == width).any()):
        raise Garbled(f"the bars are not {timeframe.name} bars, by their close times")

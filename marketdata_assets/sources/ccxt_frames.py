"""Rows of an answer become frames, bound by name after the type of each column was checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from decimal import Decimal
from typing import Any, NamedTuple

import polars as pl

from marketdata_assets.errors import Garbled, VenueRefused
from marketdata_assets.model.bar import COLUMN_NAMES
from marketdata_assets.model.intervals import LAST_MS, close_lengths
from marketdata_assets.model.timeframe import Timeframe

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
_CLOSED = ("1", "true")
_PRICE_MARGIN = 1.1
"""How far a page's average price may lie beyond its prices, as a factor: venues round volumes."""
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


def read_ohlcv(
    rows: list[list[Any]],
    row_keys: Mapping[str, int | str] | None = None,
    contract_size: Decimal = Decimal(1),
) -> pl.DataFrame:
    """Return ccxt's bars as `BarsPage.rows`, without those that the venue calls open.

    A row holds ccxt's six values and, as a seventh, the venue's own row, of which `row_keys` takes
    further columns (`BarsEndpoint.row_keys`). Other columns are null. A volume counts contracts of
    `contract_size` in base currency. Raises Garbled.
    """
    width = len(OHLCV_COLUMNS)
    if any(len(row) < width for row in rows):
        raise Garbled("a bar has fewer than six columns")
    columns = list(zip(*(row[:width] for row in rows), strict=True)) or [()] * width
    series = {"open_time": _series("open_time", columns[0], int)}
    for name, values in zip(OHLCV_COLUMNS[1:], columns[1:], strict=True):
        series[name] = _as_texts(name, values)
    own = {name: _own_values(rows, key, name) for name, key in (row_keys or {}).items()}
    closed = own.pop("closed", None)
    series |= {name: _as_texts(name, values) for name, values in own.items()}
    if contract_size != 1:
        series["volume"] = _times(series["volume"], contract_size)
    if "trades" in series:
        series["trades"] = series["trades"].cast(pl.Int64())
    absent = {
        name: pl.lit(None, pl.Int64() if name == "trades" else pl.String())
        for name in COLUMN_NAMES
        if name not in series
    }
    bars = pl.DataFrame(series).with_columns(**absent).select(COLUMN_NAMES)
    if closed is None:
        return bars
    return bars.filter(
        pl.Series([str(flag).lower() in _CLOSED for flag in closed], dtype=pl.Boolean)
    )


def check_distances(bars: pl.DataFrame, timeframe: Timeframe) -> None:
    """Refuse bars most of which lie nearer to each other than the timeframe. Raises Garbled."""
    steps = bars["open_time"].drop_nulls().unique().sort().diff().drop_nulls()
    shortest = timeframe.shortest // timedelta(milliseconds=1)
    if (steps < shortest).sum() * 2 > steps.len():
        usual = timedelta(milliseconds=steps.mode().min())  # type: ignore[arg-type]
        raise Garbled(f"the bars are not {timeframe.name} bars: they are {usual} apart")


def check_volume_unit(bars: pl.DataFrame, symbol: str) -> None:
    """Refuse bars whose quote volume a volume is not the price: it counts something else.

    Needs both volumes; bars without trades prove nothing. Raises VenueRefused.
    """
    numbers = bars.select(
        pl.col("low", "high", "volume", "quote_volume").cast(pl.Float64(), strict=False)
    ).filter((pl.col("volume") > 0) & (pl.col("quote_volume") > 0) & (pl.col("low") > 0))
    if numbers.is_empty():
        return
    low, high = float(numbers["low"].min()), float(numbers["high"].max())  # type: ignore[arg-type]
    paid = float(numbers["quote_volume"].sum()) / float(numbers["volume"].sum())
    if not low / _PRICE_MARGIN <= paid <= high * _PRICE_MARGIN:
        raise VenueRefused(
            f"the volumes of {symbol} do not count its base currency: by them one unit was paid "
            f"with {paid:.6g}, and the prices lie between {low:.6g} and {high:.6g}; nothing of "
            "the answer is stored"
        )


def _own_values(rows: list[list[Any]], key: int | str, name: str) -> list[Any]:
    """Return one column of the venue's own rows; older rows may lack those that ccxt does not
    read.
    """
    try:
        return [row[len(OHLCV_COLUMNS)][key] for row in rows]
    except (IndexError, KeyError, TypeError):
        if name in OHLCV_COLUMNS:
            raise Garbled(f"a bar has no column {key!r}, which is its {name}") from None
        return [True if name == "closed" else None] * len(rows)


def _as_texts(name: str, values: Sequence[Any]) -> pl.Series:
    texts = [None if value is None else str(value) for value in values]
    return pl.Series(name, texts, dtype=pl.String)


def _times(numbers: pl.Series, factor: Decimal) -> pl.Series:
    """Return numbers as text, times a factor, exactly."""
    try:
        products = [
            None if text is None else format(Decimal(text) * factor, "f") for text in numbers
        ]
    except ArithmeticError:
        raise Garbled(f"column {numbers.name} holds something else than numbers") from None
    return pl.Series(numbers.name, products, dtype=pl.String)


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
    width, lengths = close_lengths(opens, timeframe), closes - opens + 1
    moments = opens.clip(0, LAST_MS).cast(pl.Datetime("ms"))
    is_full = (lengths == width).filter(
        (timeframe.floors(moments) == moments) & (opens > _FIRST_MS)
    )
    if (lengths > width).any() or (len(is_full) > 2 and not is_full.any()):
        raise Garbled(f"the bars are not {timeframe.name} bars, by their close times")

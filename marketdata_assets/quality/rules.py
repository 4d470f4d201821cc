"""The table of rules that every row must keep.

A rule's name is its row here, the reason in quarantine, and the key in metadata and alerts. Rules
see typed columns (`open`, `volume`, ...) and what was sent (`sent_open`, ...): a text that is no
number is null in the typed column. An expression is true where a row breaks the rule; null counts
as not broken, because the rules `null` and `not_a_number` find it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import polars as pl

from marketdata_assets.model.bar import BAR_COLUMNS, COLUMN_NAMES, PRICES, SCALE
from marketdata_assets.model.timeframe import Timeframe

SENT = "sent_"
"""Before a column's name: the value as the venue sent it."""
REQUESTED_START, REQUESTED_END = "requested_start", "requested_end"
"""Columns with the window of open times that was requested, end exclusive."""
VOLUMES = ("volume", "quote_volume", "trades", "taker_buy_volume", "taker_buy_quote_volume")
REQUIRED = tuple(column.name for column in BAR_COLUMNS if not column.optional)
_TEXTS = tuple(name for name in COLUMN_NAMES if name not in ("open_time", "trades"))
_VWAP_SLACK = 1e-6
"""`quote_volume` may leave its range by this share of it, and this much: the test is in floats."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A name, what the rule refuses, and the expression that is true for a broken row.

    `is_about_text`: it looks at how a value was written, which typed values cannot break.
    """

    name: str
    description: str
    broken: pl.Expr
    is_about_text: bool = False


def build_rules(
    timeframe: Timeframe, closed_before: datetime, columns: Sequence[str] = REQUIRED
) -> tuple[Rule, ...]:
    """Return the rules for rows of one timeframe.

    `closed_before` is the venue's clock: a bar is closed when its end lies at or before it.
    `columns` are those that the venue always gives.
    """
    return (
        *_value_rules(columns),
        *_bar_rules(),
        Rule("off_grid", "an open time that is no multiple of the timeframe", _off_grid(timeframe)),
        Rule("outside_window", "an open time that was not requested", _outside_window()),
        Rule(
            "unclosed",
            "a bar that the venue's clock has not closed",
            timeframe.closes(pl.col("open_time")) > closed_before,
        ),
    )


def _value_rules(columns: Sequence[str]) -> tuple[Rule, ...]:
    return (
        Rule(
            "null",
            "a value that must be there is missing",
            _any(pl.col(SENT + name).is_null() for name in columns),
        ),
        Rule(
            "not_a_number",
            "NaN, infinite, text that is no number, or no moment",
            _any(_is_unreadable(name) for name in COLUMN_NAMES),
            is_about_text=True,
        ),
        Rule(
            "too_precise",
            f"more than {SCALE} decimals",
            _any(_is_too_precise(name) for name in _TEXTS),
            is_about_text=True,
        ),
        Rule(
            "non_positive_price",
            "a price of zero or below",
            _any(pl.col(name) <= 0 for name in PRICES),
        ),
        Rule(
            "negative_volume",
            "a volume or count below zero",
            _any(pl.col(name) < 0 for name in VOLUMES),
        ),
    )


def _bar_rules() -> tuple[Rule, ...]:
    highest = pl.max_horizontal("open", "close", "low")
    lowest = pl.min_horizontal("open", "close", "high")
    return (
        Rule("high_below", "high below open, close or low", pl.col("high") < highest),
        Rule("low_above", "low above open, close or high", pl.col("low") > lowest),
        Rule("vwap_outside", "quote_volume / volume outside [low, high]", _vwap_outside()),
        Rule("taker_above_total", "takers bought more than was traded", _taker_above_total()),
    )


def _any(expressions: Iterable[pl.Expr]) -> pl.Expr:
    return pl.any_horizontal(*(e.fill_null(False) for e in expressions))


def _is_unreadable(name: str) -> pl.Expr:
    return pl.col(SENT + name).is_not_null() & pl.col(name).is_null()


def _vwap_outside() -> pl.Expr:
    low, high, volume, quote_volume = (
        pl.col(name).cast(pl.Float64) for name in ("low", "high", "volume", "quote_volume")
    )
    slack = (high * volume).abs() * _VWAP_SLACK + _VWAP_SLACK
    return ~quote_volume.is_between(low * volume - slack, high * volume + slack)


def _taker_above_total() -> pl.Expr:
    return _any(
        (
            pl.col("taker_buy_volume") > pl.col("volume"),
            pl.col("taker_buy_quote_volume") > pl.col("quote_volume"),
        )
    )


def _off_grid(timeframe: Timeframe) -> pl.Expr:
    if timeframe.months:
        return timeframe.floors(pl.col("open_time")) != pl.col("open_time")
    since_origin = (pl.col("open_time") - timeframe.origin).dt.total_microseconds()
    return since_origin % (timeframe.width // timedelta(microseconds=1)) != 0


def _outside_window() -> pl.Expr:
    return ~pl.col("open_time").is_between(REQUESTED_START, REQUESTED_END, closed="left")


def _many_decimals_pattern() -> str:
    """Match texts with more decimals than SCALE: `0.1234567890123`, `0.12345e-8`, `1e-13`."""
    plain = rf"\.[0-9]{{{SCALE}}}[0-9]*[1-9]"
    shifted = (
        rf"\.[0-9]{{{SCALE - shift}}}[0-9]*[1-9]0*[eE]-0*{shift}$" for shift in range(1, SCALE + 1)
    )
    far = "|".join(str(shift) for shift in range(SCALE + 1, 100))
    return "|".join((plain, *shifted, rf"[1-9][0-9.]*[eE]-0*({far}|[1-9][0-9]{{2,}})$"))


_MANY_DECIMALS = _many_decimals_pattern()


def _is_too_precise(name: str) -> pl.Expr:
    return pl.col(SENT + name).str.contains(_MANY_DECIMALS)

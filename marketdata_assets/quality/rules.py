"""The table of rules. A rule's name is its row here, the reason in quarantine, the key in metadata and
alerts.

Rules look at typed columns (`open`, `volume`, ...) and at what was sent (`sent_open`, ...): a text
that is no number has become null in the typed column. An expression is true where a row breaks the
rule; null counts as not broken, because `null` and `not_a_number` say so themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import polars as pl

from marketdata_assets.model.bar import BAR_COLUMNS, COLUMN_NAMES, PRICES, SCALE
from marketdata_assets.model.timeframe import Timeframe

SENT = "sent_"
VOLUMES = ("volume", "quote_volume", "trades", "taker_buy_volume", "taker_buy_quote_volume")
REQUIRED = tuple(column.name for column in BAR_COLUMNS if not column.optional)
_TEXTS = tuple(name for name in COLUMN_NAMES if name not in ("open_time", "trades"))


@dataclass(frozen=True, slots=True)
class Rule:
    """A name, what it refuses, and the expression that is true for a broken row."""

    name: str
    refuses: str
    broken: pl.Expr


def rules(
    timeframe: Timeframe, closed_before: datetime, columns: Sequence[str] = REQUIRED
) -> tuple[Rule, ...]:
    """The rules for rows of one timeframe, asked for in `[asked_start, asked_end)`, when the venue's
    clock says this.

    `columns` are those that the venue always gives.
    """
    offset = (pl.col("open_time") - timeframe.origin).dt.total_microseconds() % (
        timeframe.width // timedelta(microseconds=1)
    )
    inside = pl.col("open_time").is_between("asked_start", "asked_end", closed="left")
    closed = pl.col("open_time") + timeframe.width <= closed_before
    highest, lowest = (
        pl.max_horizontal("open", "close", "low"),
        pl.min_horizontal("open", "close", "high"),
    )
    real = {
        name: pl.col(name).cast(pl.Float64) for name in ("low", "high", "volume", "quote_volume")
    }
    vwap_low, vwap_high = real["low"] * real["volume"], real["high"] * real["volume"]
    slack = vwap_high.abs() * 1e-6 + 1e-6
    return (
        Rule(
            "null",
            "a value that must be there is missing",
            _any(pl.col(SENT + n).is_null() for n in columns),
        ),
        Rule(
            "not_a_number",
            "NaN, infinite, text that is no number, or no moment",
            _any(_unreadable(n) for n in COLUMN_NAMES),
        ),
        Rule("too_precise", f"more than {SCALE} decimals", _any(_too_precise(n) for n in _TEXTS)),
        Rule(
            "non_positive_price", "a price of zero or below", _any(pl.col(n) <= 0 for n in PRICES)
        ),
        Rule(
            "negative_volume", "a volume or count below zero", _any(pl.col(n) < 0 for n in VOLUMES)
        ),
        Rule("high_below", "high below open, close or low", pl.col("high") < highest),
        Rule("low_above", "low above open, close or high", pl.col("low") > lowest),
        Rule(
            "vwap_outside",
            "quote_volume / volume outside [low, high]",
            ~real["quote_volume"].is_between(vwap_low - slack, vwap_high + slack),
        ),
        Rule(
            "taker_above_total",
            "takers bought more than was traded",
            _any(
                (
                    pl.col("taker_buy_volume") > pl.col("volume"),
                    pl.col("taker_buy_quote_volume") > pl.col("quote_volume"),
                )
            ),
        ),
        Rule("off_grid", "an open time that is no multiple of the timeframe", offset != 0),
        Rule("outside_window", "an open time that was not asked for", ~inside),
        Rule("unclosed", "a bar that the venue's clock has not closed", ~closed),
    )


def _more_decimals() -> str:
    """A pattern for texts with more decimals than SCALE: `0.1234567890123`, `0.12345e-8`, `1e-13`."""
    plain = rf"\.[0-9]{{{SCALE}}}[0-9]*[1-9]"
    shifted = (
        rf"\.[0-9]{{{SCALE - shift}}}[0-9]*[1-9]0*[eE]-0*{shift}$" for shift in range(1, SCALE + 1)
    )
    far = "|".join(str(shift) for shift in range(SCALE + 1, 100))
    return "|".join((plain, *shifted, rf"[1-9][0-9.]*[eE]-0*({far}|[1-9][0-9]{{2,}})$"))


_MORE_DECIMALS = _more_decimals()


def _any(expressions: Iterable[pl.Expr]) -> pl.Expr:
    return pl.any_horizontal(*(e.fill_null(False) for e in expressions))


def _unreadable(name: str) -> pl.Expr:
    return pl.col(SENT + name).is_not_null() & pl.col(name).is_null()


def _too_precise(name: str) -> pl.Expr:
    return pl.col(SENT + name).str.contains(_MORE_DECIMALS)

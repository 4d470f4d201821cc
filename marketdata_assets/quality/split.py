"""Rows as sent become bars that are kept and rows that are refused, each with its reasons."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import NamedTuple

import polars as pl

from marketdata_assets.model.bar import BAR_SCHEMA, COLUMN_NAMES, TIME
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import Window, to_ms
from marketdata_assets.quality.rules import REQUIRED, SENT, rules

REJECTED_SCHEMA: dict[str, pl.DataType] = {
    "answer": pl.Int64(),
    "open_time": TIME,
    "reasons": pl.String(),
    "fields": pl.String(),
}
_MOMENTS = (to_ms(datetime.min.replace(tzinfo=UTC)), to_ms(datetime.max.replace(tzinfo=UTC)))
"""Beyond these milliseconds nothing is a moment: microseconds sent for milliseconds, or a number that
wraps around.
"""


class Split(NamedTuple):
    """`kept`: bars (model.bar.BAR_SCHEMA and `answer`). `rejected`: REJECTED_SCHEMA; `fields` is JSON, all
    values as text.
    """

    kept: pl.DataFrame
    rejected: pl.DataFrame


def split(
    rows: pl.DataFrame,
    timeframe: Timeframe,
    closed_before: datetime,
    columns: Sequence[str] = REQUIRED,
) -> Split:
    """Judge rows by every rule. Every row ends in exactly one of the two frames.

    `rows` is as `sources.base.Fetched.rows` with the columns of `asked_columns` added;
    `closed_before` is the venue's clock: a bar is closed when its end is at or before it. Null is
    broken in each of `columns`.
    """
    typed = rows.rename({name: SENT + name for name in COLUMN_NAMES}).with_columns(
        _typed(name, dtype) for name, dtype in BAR_SCHEMA.items()
    )
    table = rules(timeframe, closed_before, columns)
    judged = typed.with_columns(
        rule.broken.fill_null(False).alias("broken_" + rule.name) for rule in table
    )
    broken = pl.any_horizontal("broken_" + rule.name for rule in table)
    refused = judged.filter(broken)
    kept = (judged.filter(~broken) if refused.height else judged).select("answer", *COLUMN_NAMES)
    if refused.is_empty():
        return Split(kept, pl.DataFrame(schema=REJECTED_SCHEMA))
    reasons = pl.concat_str(
        [pl.when("broken_" + rule.name).then(pl.lit(rule.name)) for rule in table],
        separator=" ",
        ignore_nulls=True,
    )
    fields = pl.struct(
        pl.col(SENT + name).cast(pl.String).alias(name) for name in COLUMN_NAMES
    ).struct.json_encode()
    return Split(
        kept,
        refused.select("answer", "open_time", reasons.alias("reasons"), fields.alias("fields")),
    )


def asked_columns(rows: pl.DataFrame, answer: int, asked: Window) -> pl.DataFrame:
    """Rows with the number of their answer and the window it was asked for."""
    return rows.with_columns(
        pl.lit(answer, pl.Int64).alias("answer"),
        pl.lit(asked.start, TIME).alias("asked_start"),
        pl.lit(asked.end, TIME).alias("asked_end"),
    )


def reject(bars: pl.DataFrame, reason: str) -> pl.DataFrame:
    """Bars (with `answer`) that are refused after all, in REJECTED_SCHEMA."""
    fields = pl.struct(pl.col(name).cast(pl.String) for name in COLUMN_NAMES).struct.json_encode()
    return bars.select(
        "answer", "open_time", pl.lit(reason).alias("reasons"), fields.alias("fields")
    )


def _typed(name: str, dtype: pl.DataType) -> pl.Expr:
    sent = pl.col(SENT + name)
    if name == "open_time":
        return (
            pl.when(sent.is_between(*_MOMENTS))
            .then(sent * 1000)
            .cast(TIME, strict=False)
            .alias(name)
        )
    return sent.cast(dtype, strict=False).alias(name)

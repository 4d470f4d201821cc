"""Rows as sent become valid bars and rejected rows, each with its reasons."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import NamedTuple

import polars as pl

from marketdata_assets.model.bar import BAR_SCHEMA, COLUMN_NAMES, TIME
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import Window, to_ms
from marketdata_assets.quality.rules import (
    REQUESTED_END,
    REQUESTED_START,
    REQUIRED,
    SENT,
    build_rules,
)

REJECTED_SCHEMA: dict[str, pl.DataType] = {
    "answer": pl.Int64(),
    "open_time": TIME,
    "reasons": pl.String(),
    "fields": pl.String(),
}
"""`reasons`: names of rules, with spaces between. `fields`: JSON, all values as text."""
_MOMENTS = (to_ms(datetime.min.replace(tzinfo=UTC)), to_ms(datetime.max.replace(tzinfo=UTC)))
"""Milliseconds beyond these are no moment: microseconds sent for milliseconds, or a number so large
that it wraps around."""


class SplitRows(NamedTuple):
    """`valid`: bars (model.bar.BAR_SCHEMA and `answer`). `rejected`: rows (REJECTED_SCHEMA)."""

    valid: pl.DataFrame
    rejected: pl.DataFrame


def split_rows(
    rows: pl.DataFrame,
    timeframe: Timeframe,
    *,
    closed_before: datetime,
    columns: Sequence[str] = REQUIRED,
) -> SplitRows:
    """Apply every rule to every row; each row ends in exactly one of the two frames.

    `rows` is as `sources.base.BarsPage.rows`, with the columns of `add_request_columns`.
    `closed_before` is the venue's clock: a bar is closed when its end lies at or before it. Null
    breaks a rule in each of `columns`.
    """
    typed = rows.rename({name: SENT + name for name in COLUMN_NAMES}).with_columns(
        _typed(name, dtype) for name, dtype in BAR_SCHEMA.items()
    )
    rules = build_rules(timeframe, closed_before, columns)
    judged = typed.with_columns(
        rule.broken.fill_null(False).alias("broken_" + rule.name) for rule in rules
    )
    is_broken = pl.any_horizontal("broken_" + rule.name for rule in rules)
    broken = judged.filter(is_broken)
    valid = (judged.filter(~is_broken) if broken.height else judged).select("answer", *COLUMN_NAMES)
    if broken.is_empty():
        return SplitRows(valid, pl.DataFrame(schema=REJECTED_SCHEMA))
    reasons = pl.concat_str(
        [pl.when("broken_" + rule.name).then(pl.lit(rule.name)) for rule in rules],
        separator=" ",
        ignore_nulls=True,
    )
    fields = pl.struct(
        pl.col(SENT + name).cast(pl.String).alias(name) for name in COLUMN_NAMES
    ).struct.json_encode()
    return SplitRows(
        valid,
        broken.select("answer", "open_time", reasons.alias("reasons"), fields.alias("fields")),
    )


def reject_stored(
    bars: pl.DataFrame, timeframe: Timeframe, requested: Window, *, closed_before: datetime
) -> pl.DataFrame:
    """Return the bars (model.bar.BAR_SCHEMA) that break a rule, as REJECTED_SCHEMA, `answer` 0.

    One pass over the typed values decides whether any does; only then are they written as texts
    for all rules and the reasons.
    """
    asked = add_request_columns(bars, 0, requested)
    typed = asked.with_columns(pl.col(name).alias(SENT + name) for name in REQUIRED)
    rules = [rule for rule in build_rules(timeframe, closed_before) if not rule.is_about_text]
    if not typed.select(pl.any_horizontal(rule.broken.any() for rule in rules)).item():
        return pl.DataFrame(schema=REJECTED_SCHEMA)
    texts = [name for name in COLUMN_NAMES if name not in ("open_time", "trades")]
    sent = asked.with_columns(
        pl.col("open_time").dt.epoch("ms"), *(pl.col(name).cast(pl.String) for name in texts)
    )
    return split_rows(sent, timeframe, closed_before=closed_before).rejected


def add_request_columns(rows: pl.DataFrame, answer: int, requested: Window) -> pl.DataFrame:
    """Return rows with the number of their answer and the window that it was requested for."""
    return rows.with_columns(
        pl.lit(answer, pl.Int64).alias("answer"),
        pl.lit(requested.start, TIME).alias(REQUESTED_START),
        pl.lit(requested.end, TIME).alias(REQUESTED_END),
    )


def concat_answers(pages: Sequence[tuple[pl.DataFrame, Window]], first: int) -> pl.DataFrame:
    """Return the rows of answers, each with the window that it was requested for, as
    `add_request_columns` returns them. The answers are numbered from `first` on.
    """
    asked = pl.DataFrame(
        {
            "answer": range(first, first + len(pages)),
            REQUESTED_START: [window.start for _, window in pages],
            REQUESTED_END: [window.end for _, window in pages],
        },
        schema={"answer": pl.Int64(), REQUESTED_START: TIME, REQUESTED_END: TIME},
    )
    counts = pl.Series([rows.height for rows, _ in pages])
    every = pl.concat([rows for rows, _ in pages])
    return every.hstack(asked.select(pl.all().repeat_by(counts).explode()))


def reject_bars(bars: pl.DataFrame, reason: str) -> pl.DataFrame:
    """Return bars (with `answer`) that are rejected without a broken rule, as REJECTED_SCHEMA."""
    fields = pl.struct(pl.col(name).cast(pl.String) for name in COLUMN_NAMES).struct.json_encode()
    return bars.select(
        "answer", "open_time", pl.lit(reason).alias("reasons"), fields.alias("fields")
    )


def _typed(name: str, dtype: pl.DataType) -> pl.Expr:
    sent = pl.col(SENT + name)
    if name == "open_time":
        moment = pl.when(sent.is_between(*_MOMENTS)).then(sent * 1000)
        return moment.cast(TIME, strict=False).alias(name)
    return sent.cast(dtype, strict=False).alias(name)

"""Parity: compare rollups with the venue's own bars, store each outcome, trace each difference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import polars as pl

from marketdata_assets.flows.derive.rollup import RollupResult, requested_window
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.model.bar import COLUMN_NAMES, empty_bars
from marketdata_assets.model.gap import Gap, GapCause, GapReason
from marketdata_assets.model.intervals import align_inside
from marketdata_assets.model.partition import Partition, adjacent_partition
from marketdata_assets.model.table import Table, history_table, parity_table, raw_table
from marketdata_assets.model.timeframe import EPOCH, Timeframe
from marketdata_assets.model.window import Window
from marketdata_assets.quality.parity import (
    DIFFERENCES,
    ParityOutcome,
    compare_bars,
    select_stored,
)
from marketdata_assets.quality.parity_evidence import (
    Absence,
    DifferenceCause,
    FinerComparison,
    ParityEvidence,
)
from marketdata_assets.quality.trace import trace_difference
from marketdata_assets.quality.trace_text import format_windows
from marketdata_assets.settings.universe import Settings
from marketdata_assets.storage.lake import Lake
from marketdata_assets.transforms.rollup import roll_up

MAX_TRACED = 1000
"""Of more differences in a partition the rest is not traced: something larger is wrong."""
_MISSING = "missing at source: the venue has no {} there"
_ABSENCE_REASONS = {
    GapCause.MISSING_AT_SOURCE: _MISSING,
    GapCause.NO_TRADE: "no trade",
    GapCause.HALTED: "the venue was halted",
    GapCause.DELISTED: "the market had ended",
    GapReason.NO_BARS: _MISSING,
    GapReason.UNANSWERED: "not answered yet",
}
"""By a gap's cause, or by what the answers said where its cause is not known yet."""


def compare(toolbox: Toolbox, derived: Derived, timeframe: Timeframe) -> pl.DataFrame:
    """Judge every bar that both sides should have: asked for, closed, made from base bars that were
    asked for.

    Gives the rows of `quality.parity.compare_bars` with `cause` and `minutes`, and stores them as
    `parity/ohlcv_<timeframe>`. Where the venue's own bars are not stored there are none, and
    nothing is written. Raises Damaged, StoreFailed.
    """
    partition = derived.partition
    ours = derived.frames.get(timeframe, empty_bars())
    judged = _judged(toolbox, partition, timeframe, ours, derived.whole)
    causes = _causes(toolbox, derived, timeframe, judged)
    judged = judged.join(causes, on="open_time", how="left").with_columns(
        pl.col("cause", "minutes").fill_null("")
    )
    if judged.height:
        toolbox.lake.write_changed(parity(timeframe), partition, select_stored(judged))
    return judged


def _judged(
    toolbox: Toolbox, partition: Partition, timeframe: Timeframe, ours: pl.DataFrame, whole: Window
) -> pl.DataFrame:
    native, asked = _native(toolbox, partition, timeframe)
    made = Window(timeframe.ceil(whole.start), timeframe.floor(whole.end))
    judged = compare_bars(
        partition.market.venue,
        ours.select(NAMES),
        native,
        span=partition.opens(timeframe) & made & asked,
    )
    return _answered(toolbox, partition, timeframe, judged)


def _answered(
    toolbox: Toolbox, partition: Partition, timeframe: Timeframe, judged: pl.DataFrame
) -> pl.DataFrame:
    """Without bars of one side whose whole span the venue has not answered for on the other: the check
    `gaps` tells of them.
    """
    base = toolbox.settings.venues[partition.market.venue].base
    for outcome, table in (
        (ParityOutcome.ONLY_NATIVE, raw(base)),
        (ParityOutcome.ONLY_OURS, raw(timeframe)),
    ):
        alone = pl.col("outcome") == outcome
        if judged.filter(alone).is_empty():
            continue
        for gap in toolbox.ledger.gaps(table, partition):
            if gap.reason == "unanswered":
                inside = (pl.col("open_time") >= gap.window.start) & (
                    pl.col("open_time") + timeframe.width <= gap.window.end
                )
                judged = judged.filter(~(alone & inside))
    return judged


def _native(
    toolbox: Toolbox, partition: Partition, timeframe: Timeframe
) -> tuple[pl.DataFrame, Window]:
    """The venue's own bars, and the window of open times that they were asked for in; an empty one
    where none are stored.
    """
    state = toolbox.ledger.state(raw(timeframe), partition)
    stored = (
        None
        if state is None or state.bytes is None
        else toolbox.lake.read(raw(timeframe), partition)
    )
    if state is None or stored is None:
        return empty_bars(), Window(partition.month.start, partition.month.start)
    return stored, known(stored["open_time"], timeframe, Window(state.start, state.through))


# --------------------------------------------------------------------------------- tracing
def _causes(
    toolbox: Toolbox, derived: Derived, timeframe: Timeframe, judged: pl.DataFrame
) -> pl.DataFrame:
    """`open_time`, `cause` and `minutes` of each bar that differs. Only these are looked into."""
    differing = judged.filter(pl.col("outcome").is_in(DIFFERENCES))
    found = []
    if differing.height:
        evidence = _evidence(toolbox, derived, timeframe)
        untraced = DifferenceCause(f"not traced: more than {TRACED} bars differ")
        for i, row in enumerate(differing.iter_rows(named=True)):
            cause = trace_difference(row, evidence) if i < TRACED else untraced
            found.append(
                (row["open_time"], cause.message, format_windows(cause.windows, evidence.base))
            )
    schema = {"open_time": judged.schema["open_time"], "cause": pl.String(), "minutes": pl.String()}
    return pl.DataFrame(found, schema=schema, orient="row")


def _evidence(toolbox: Toolbox, derived: Derived, timeframe: Timeframe) -> ParityEvidence:
    partition = derived.partition
    base = toolbox.settings.venues[partition.market.venue].base
    first = partition.opens(timeframe).start
    months = [neighbour(partition, -1), partition] if first < partition.month.start else [partition]
    read = [toolbox.lake.read(raw(base), p, since=first) for p in months]
    bars = pl.concat([empty_bars(), *(frame for frame in read if frame is not None)])
    replaced = [toolbox.lake.read(history(base), p) for p in months]
    return ParityEvidence(
        base=base,
        timeframe=timeframe,
        bars=bars,
        absences=list(_absences(toolbox, raw(base), months)),
        native_absences=list(_absences(toolbox, raw(timeframe), [partition])),
        revisions=pl.concat(
            [
                pl.DataFrame(schema=history(base).schema),
                *(frame for frame in replaced if frame is not None),
            ]
        ),
        finer=_finer(toolbox, derived, timeframe, months, bars),
    )


def _finer(
    toolbox: Toolbox,
    derived: Derived,
    timeframe: Timeframe,
    months: list[Partition],
    bars: pl.DataFrame,
) -> FinerComparison | None:
    """The finest of the venue's own timeframes between the base and this one, judged."""
    venue = toolbox.settings.venues[derived.partition.market.venue]
    between = [
        tf
        for tf in venue.reference
        if tf.width < timeframe.width and not timeframe.width % tf.width
    ]
    if not between:
        return None
    finer = min(between, key=lambda tf: tf.width)
    ours = roll_up(bars, venue.base, [finer], whole=derived.whole)[finer]
    return FinerComparison(
        finer,
        pl.concat([_judged(toolbox, month, finer, ours, derived.whole) for month in months]),
    )


def _absences(toolbox: Toolbox, table: Table, months: list[Partition]) -> Iterator[Absence]:
    """What the ledger knows of bars that are not there."""
    listed = toolbox.ledger.listed(months[0].market)
    if listed:
        yield Absence(Window(EPOCH, table.timeframe.floor(listed)), "not listed yet")
    for partition in months:
        for gap in toolbox.ledger.gaps(table, partition):
            yield Absence(gap.window, _why(toolbox, table, partition, gap))


def _why(toolbox: Toolbox, table: Table, partition: Partition, gap: Gap) -> str:
    if gap.reason == "quarantined":
        refused = toolbox.ledger.quarantined(partition.market, gap.window)
        reasons = sorted({str(row["reasons"]) for row in refused if row["table"] == table.name})
        return f"refused by a rule: {', '.join(reasons)}" if reasons else "refused by a rule"

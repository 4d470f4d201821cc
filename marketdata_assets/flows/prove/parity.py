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
    GapCause.NOT_LISTED: "not listed yet",
    GapCause.DELISTED: "the market had ended",
    GapReason.NO_BARS: _MISSING,
    GapReason.NOT_SERVED: "the venue does not serve bars from then any more",
    GapReason.UNANSWERED: "not answered yet",
    GapReason.NOT_LISTED: "not answered yet",
}
"""By a gap's cause; by the reason where no cause is known yet."""


@dataclass(frozen=True, slots=True)
class ParityChecker:
    """Compares rolled-up partitions with the venue's own bars."""

    settings: Settings
    ledger: Ledger
    lake: Lake

    def compare(self, result: RollupResult, timeframe: Timeframe) -> pl.DataFrame:
        """Compare every bar that both sides should have: requested and closed.

        Returns the rows of `quality.parity.compare_bars` with `cause` and `minutes`, and stores
        them as `parity/ohlcv_<timeframe>`; no rows and nothing stored where the venue's own bars
        are not stored. Raises Damaged, StoreFailed.
        """
        ours = result.frames.get(timeframe, empty_bars())
        compared = self._compare(result.partition, timeframe, ours, requested=result.requested)
        causes = self._trace(result, timeframe, compared)
        compared = compared.join(causes, on="open_time", how="left")
        compared = compared.with_columns(pl.col("cause", "minutes").fill_null(""))
        if compared.height:
            stored = select_stored(compared)
            self.lake.write_if_changed(parity_table(timeframe), result.partition, stored)
        return compared

    def _compare(
        self, partition: Partition, timeframe: Timeframe, ours: pl.DataFrame, *, requested: Window
    ) -> pl.DataFrame:
        native, native_window = self._read_native(partition, timeframe)
        built = align_inside(requested, timeframe)
        span = partition.open_times(timeframe) & built & native_window
        venue = partition.market.venue
        compared = compare_bars(venue, ours.select(COLUMN_NAMES), native, span=span)
        return self._drop_unanswered(partition, timeframe, compared)

    def _drop_unanswered(
        self, partition: Partition, timeframe: Timeframe, compared: pl.DataFrame
    ) -> pl.DataFrame:
        """Leave out bars of one side where the other was not answered or is not served; `gaps`
        checks them.
        """
        base = self.settings.venues[partition.market.venue].base
        sides = ((ParityOutcome.ONLY_NATIVE, base), (ParityOutcome.ONLY_OURS, timeframe))
        opens, ends = pl.col("open_time"), timeframe.closes(pl.col("open_time"))
        for outcome, other in sides:
            is_alone = pl.col("outcome") == outcome
            if compared.filter(is_alone).is_empty():
                continue
            for gap in self.ledger.gaps.of(raw_table(other), partition):
                if gap.reason in (GapReason.UNANSWERED, GapReason.NOT_SERVED):
                    is_inside = (opens >= gap.window.start) & (ends <= gap.window.end)
                    compared = compared.filter(~(is_alone & is_inside))
        return compared

    def _read_native(
        self, partition: Partition, timeframe: Timeframe
    ) -> tuple[pl.DataFrame, Window]:
        """Return the venue's own bars and the window in which they were requested."""
        table = raw_table(timeframe)
        state = self.ledger.partitions.get(table, partition)
        is_stored = state is not None and state.bytes is not None
        stored = self.lake.read(table, partition) if is_stored else None
        if state is None or stored is None:
            return empty_bars(), Window(partition.month.start, partition.month.start)
        window = Window(state.start, state.through)
        return stored, requested_window(stored["open_time"], timeframe, window)

    def _trace(
        self, result: RollupResult, timeframe: Timeframe, compared: pl.DataFrame
    ) -> pl.DataFrame:
        """Return `open_time`, `cause` and `minutes` of each bar that differs."""
        differing = compared.filter(pl.col("outcome").is_in(DIFFERENCES))
        found = []
        if differing.height:
            evidence = self._evidence(result, timeframe)
            untraced = DifferenceCause(f"not traced: more than {MAX_TRACED} bars differ")
            for i, row in enumerate(differing.iter_rows(named=True)):
                cause = trace_difference(row, evidence) if i < MAX_TRACED else untraced
                minutes = format_windows(cause.windows, evidence.base)
                found.append((row["open_time"], cause.message, minutes))
        schema = {
            "open_time": compared.schema["open_time"],
            "cause": pl.String(),
            "minutes": pl.String(),
        }
        return pl.DataFrame(found, schema=schema, orient="row")

    def _evidence(self, result: RollupResult, timeframe: Timeframe) -> ParityEvidence:
        partition = result.partition
        base = self.settings.venues[partition.market.venue].base
        first, months = partition.open_times(timeframe).start, [partition]
        if first < partition.month.start:
            months.insert(0, adjacent_partition(partition, -1))
        inside = Window(first, partition.month.end)
        read = (self.lake.read(raw_table(base), month, inside=inside) for month in months)
        bars = pl.concat([empty_bars(), *(frame for frame in read if frame is not None)])
        read = (self.lake.read(history_table(base), month) for month in months)
        no_history = pl.DataFrame(schema=history_table(base).schema)
        revisions = pl.concat([no_history, *(frame for frame in read if frame is not None)])
        return ParityEvidence(
            base=base,
            timeframe=timeframe,
            bars=bars,
            absences=list(self._absences(raw_table(base), months)),
            native_absences=list(self._absences(raw_table(timeframe), [partition])),
            revisions=revisions,
            finer=self._compare_finer(result, timeframe, months, bars=bars),
        )

    def _compare_finer(
        self,
        result: RollupResult,
        timeframe: Timeframe,
        months: Sequence[Partition],
        *,
        bars: pl.DataFrame,
    ) -> FinerComparison | None:
        """Compare the finest of the venue's own timeframes between the base and this one."""
        venue = self.settings.venues[result.partition.market.venue]
        between = [
            tf for tf in venue.reference if tf.width < timeframe.width and timeframe.is_made_of(tf)
        ]
        if not between:
            return None
        finer = min(between, key=lambda tf: tf.width)
        ours = roll_up(bars, venue.base, [finer], whole=result.requested)[finer]
        compared = (
            self._compare(month, finer, ours, requested=result.requested) for month in months
        )
        return FinerComparison(finer, pl.concat(compared))

    def _absences(self, table: Table, months: Sequence[Partition]) -> Iterator[Absence]:
        """Yield the windows without bars, with what the ledger says of them."""
        first_bar = self.ledger.markets.first_bar(months[0].market)
        if first_bar:
            yield Absence(Window(EPOCH, table.timeframe.floor(first_bar)), "not listed yet")
        for partition in months:
            for gap in self.ledger.gaps.of(table, partition):
                yield Absence(gap.window, self._absence_reason(table, partition, gap))

    def _absence_reason(self, table: Table, partition: Partition, gap: Gap) -> str:
        if not gap.is_rejected:
            return _ABSENCE_REASONS[gap.cause or gap.reason].format(table.timeframe.name)
        rows = self.ledger.quarantine.rows(partition.market, gap.window)
        reasons = sorted({str(row["reasons"]) for row in rows if row["table"] == table.name})
        return f"refused by a rule: {', '.join(reasons)}" if reasons else "refused by a rule"

"""The checks of a rolled-up partition: `complete` and `matches_native`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any, NamedTuple

import polars as pl

from marketdata_assets.flows.derive.rollup import RollupResult
from marketdata_assets.flows.prove.parity import ParityChecker
from marketdata_assets.flows.prove.raw_checks import record_findings
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.model.bar import ROLLUP_SCHEMA, TIME, format_number
from marketdata_assets.model.finding import ROWS_SHOWN, Finding, Row
from marketdata_assets.model.gap import GapReason
from marketdata_assets.model.partition import Partition, adjacent_partition
from marketdata_assets.model.table import raw_table, rollup_table
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import Window, format_time
from marketdata_assets.quality.parity import DIFFERENCES, ParityOutcome
from marketdata_assets.settings.universe import Settings
from marketdata_assets.storage.lake import Lake

COMPLETE, MATCHES_NATIVE = "complete", "matches_native"
ROLLUP_CHECKS: dict[str, str] = {
    COMPLETE: (
        "Every bar that is made of fewer base bars than it could hold is explained by evidence of "
        "the venue's. If red: materialize the raw partition again."
    ),
    MATCHES_NATIVE: (
        "Our rollup equals the venue's own bar in every column that the venue gives. If red: the "
        "table names the bars, both values, and the base bars behind the difference; "
        "`parity.ohlcv_<timeframe>` has the outcome of every bar."
    ),
}
"""The description of each check by its name."""
_ABSENT: dict[str, pl.DataType] = {"open_time": TIME, "absent": pl.Int64()}


class _Absences(NamedTuple):
    """What the ledger says of base bars that the venue never had, and of the market's first bar."""

    base: Timeframe
    windows: Sequence[Window]
    first_bar: datetime | None


@dataclass(frozen=True, slots=True)
class RollupAuditor:
    """Computes the checks of rolled-up partitions and records in the ledger which failed."""

    settings: Settings
    ledger: Ledger
    lake: Lake

    def audit(self, result: RollupResult) -> dict[Timeframe, list[Finding]]:
        """Return the findings of every timeframe of the universe: `complete`, and `matches_native`
        where the venue's own bars are a reference.
        """
        partition, found = result.partition, {}
        read_absences = cache(lambda: self._absences(partition))
        for timeframe in self.settings.rollup_timeframes:
            frame = result.frames.get(timeframe, pl.DataFrame(schema=ROLLUP_SCHEMA))
            findings = [self._check_complete(timeframe, frame, read_absences)]
            if timeframe in self.settings.venues[partition.market.venue].reference:
                findings.append(self._check_matches_native(result, timeframe))
            table = rollup_table(timeframe)
            found[timeframe] = record_findings(
                self.settings, self.ledger, table, partition, findings=findings
            )
        return found

    def _check_complete(
        self,
        timeframe: Timeframe,
        frame: pl.DataFrame,
        read_absences: Callable[[], _Absences],
    ) -> Finding:
        """Find bars with fewer base bars than a full one that the venue's gaps do not explain."""
        present, expected = pl.col("bars_present"), pl.col("bars_expected")
        short = frame.filter(present < expected)
        absent = pl.DataFrame(schema=_ABSENT)
        if short.height:
            absent = _count_absent_bars(read_absences(), timeframe)
        unexplained = short.join(absent, on="open_time", how="left").filter(
            present + pl.col("absent").fill_null(0) < expected
        )
        rows: list[Row] = [
            {"open_time": format_time(open_time), "expected": expected, "present": present}
            for open_time, expected, present in unexplained.select(
                "open_time", "bars_expected", "bars_present"
            ).iter_rows()
        ]
        return Finding(
            COMPLETE,
            passed=not rows,
            message=(
                f"{short.height} bars are made of fewer base bars than they could hold, "
                f"{len(rows)} without an explanation"
            ),
            numbers={"bars": frame.height, "short": short.height, "unexplained": len(rows)},
            rows=rows[:ROWS_SHOWN],
        )

    def _absences(self, partition: Partition) -> _Absences:
        base = self.settings.venues[partition.market.venue].base
        months = (adjacent_partition(partition, -1), partition)
        gaps = [gap for month in months for gap in self.ledger.gaps.of(raw_table(base), month)]
        # what is not listed yet is counted once, up to the first bar
        known = [g for g in gaps if g.reason != GapReason.NOT_LISTED]
        windows = [g.window for g in known if g.cause or g.reason == GapReason.NO_BARS]
        return _Absences(base, windows, self.ledger.markets.first_bar(partition.market))

    def _check_matches_native(self, result: RollupResult, timeframe: Timeframe) -> Finding:
        """Compare our rollup with the venue's own bars; name the bars that cause a difference."""
        checker = ParityChecker(self.settings, self.ledger, self.lake)
        compared = checker.compare(result, timeframe)
        differing = compared.filter(pl.col("outcome").is_in(DIFFERENCES))
        within = compared.filter(pl.col("outcome") == ParityOutcome.WITHIN_TOLERANCE).height
        message = (
            f"{differing.height} of {compared.height} bars differ from the venue's own, "
            f"{within} lie within its tolerance"
        )
        if compared.is_empty():
            message = "no bars of the venue's own are stored to compare"
        rows = differing.head(ROWS_SHOWN).iter_rows(named=True)
        return Finding(
            MATCHES_NATIVE,
            passed=differing.is_empty(),
            message=message,
            numbers={
                "compared": compared.height,
                "different": differing.height,
                "within_tolerance": within,
            },
            rows=[_difference_row(row) for row in rows],
        )


def _count_absent_bars(known: _Absences, timeframe: Timeframe) -> pl.DataFrame:
    """Return, by open_time, how many base bars the venue never had."""
    base, windows, first_bar = known
    if first_bar:
        windows = [*windows, Window(timeframe.floor(first_bar), base.floor(first_bar))]
    absent: Counter[datetime] = Counter()
    for window in windows:
        moment = window.start
        while moment < window.end:
            absent[timeframe.floor(moment)] += 1
            moment = base.shift(moment, 1)
    columns = {"open_time": list(absent), "absent": list(absent.values())}
    return pl.DataFrame(columns, schema=_ABSENT)


def _difference_row(row: dict[str, Any]) -> Row:
    values = [
        f"{name} {format_number(row[name])} / {format_number(row[name + '_native'])}"
        for name in row["columns"].split()
    ]
    minutes = row["minutes"].split()
    shown = minutes[:ROWS_SHOWN]
    if len(minutes) > ROWS_SHOWN:
        shown.append(f"and {len(minutes) - ROWS_SHOWN} more")
    return {
        "open_time": format_time(row["open_time"]),
        "outcome": row["outcome"],
        "ours / the venue's": ", ".join(values),
        "cause": row["cause"],
        "minutes": " ".join(shown),
    }

"""The checks of a raw partition, computed from what is stored and not from what was sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from marketdata_assets.flows.fetch.open_partition import IngestResult
from marketdata_assets.flows.prove.anomalies import (
    ANOMALIES,
    as_row,
    find_partition_anomalies,
    needs_attention,
    summarize,
)
from marketdata_assets.ledger.checks import CheckFailure
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.ledger.records import RowAccount
from marketdata_assets.model.anomaly import AnomalyState
from marketdata_assets.model.finding import ROWS_SHOWN, Finding, FindingSeverity, Row
from marketdata_assets.model.gap import UNEXPLAINED, GapReason
from marketdata_assets.model.intervals import count_bars, find_gaps, subtract_windows
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import Table, raw_table
from marketdata_assets.model.window import Window, format_time
from marketdata_assets.quality.split import reject_stored
from marketdata_assets.settings.universe import Settings
from marketdata_assets.storage.lake import Lake

RAW_CHECKS: dict[str, str] = {
    "ohlc": (
        "Every stored bar keeps every rule of the table (prices, volumes, grid, window). If red: "
        "see `marketdata quarantine list`, then materialize the partition again."
    ),
    "duplicates": (
        "No open_time is stored twice. If red: materialize the partition again; it is rebuilt from "
        "the venue."
    ),
    "gaps": (
        "Every bar that is not stored is explained by evidence. If red: materialize the partition "
        "again; an unanswered gap is requested in three runs, then at growing distance. "
        "`marketdata gaps` explains each."
    ),
    "accounting": (
        "Rows received = stored + identical + quarantined. If red: this software has a defect; "
        "please report the metadata."
    ),
    ANOMALIES: (
        "Every bar that keeps the rules and is still suspicious (spikes, jumps, wicks, frozen "
        "prices, impossible volume) has been looked at by a person. If red: `marketdata anomalies` "
        "lists them with their bars; acknowledge what is real, fetch again what is not."
    ),
}
"""The description of each check by its name."""
BLOCKING_CHECKS = ("ohlc", "duplicates", "accounting")


@dataclass(frozen=True, slots=True)
class RawAuditor:
    """Computes the checks of raw partitions and records in the ledger which of them failed."""

    settings: Settings
    ledger: Ledger
    lake: Lake

    def audit(self, result: IngestResult) -> list[Finding]:
        """Return the findings in the order of RAW_CHECKS; only base bars have anomalies."""
        findings = [
            _check_ohlc(result),
            _check_duplicates(result),
            _check_gaps(result),
            _check_accounting(result.account),
        ]
        if result.timeframe == self.settings.venues[result.partition.market.venue].base:
            findings.append(self._check_anomalies(result))
        return record_findings(
            self.settings,
            self.ledger,
            raw_table(result.timeframe),
            result.partition,
            findings=findings,
        )

    def audit_gaps(self, result: IngestResult) -> Finding:
        """Return the finding `gaps` once more, by what the ledger says of the gaps now."""
        table = raw_table(result.timeframe)
        gaps = tuple(self.ledger.gaps.of(table, result.partition))
        finding = _check_gaps(replace(result, gaps=gaps))
        record_findings(self.settings, self.ledger, table, result.partition, findings=[finding])
        return finding

    def _check_anomalies(self, result: IngestResult) -> Finding:
        records = find_partition_anomalies(self.settings, self.ledger, self.lake, result=result)
        order = list(AnomalyState)
        records.sort(key=lambda r: (order.index(r.state), -r.anomaly.severity, r.anomaly.start))
        counts = {state.value: sum(r.state == state for r in records) for state in AnomalyState}
        alarming = sum(map(needs_attention, records))
        return Finding(
            ANOMALIES,
            passed=not alarming,
            message=summarize(records),
            numbers={**counts, "alarming": alarming},
            severity=FindingSeverity.WARNING,
            rows=[as_row(record) for record in records[:ROWS_SHOWN]],
        )


def record_findings(
    settings: Settings,
    ledger: Ledger,
    table: Table,
    partition: Partition,
    *,
    findings: list[Finding],
) -> list[Finding]:
    """Record in the ledger which findings failed; return them all."""
    failures = {
        f.check: None if f.passed else CheckFailure(f.blocking, f.message) for f in findings
    }
    ledger.checks.set(table, partition, failures, now=settings.now())
    return findings


def _check_ohlc(result: IngestResult) -> Finding:
    wanted = result.wanted
    rejected = reject_stored(result.bars, result.timeframe, wanted, closed_before=wanted.end)
    rows: list[Row] = [
        {"open_time": format_time(open_time), "reasons": reasons, "fields": fields}
        for _, open_time, reasons, fields in rejected.iter_rows()
    ]
    return Finding(
        "ohlc",
        passed=not rows,
        message=f"{len(rows)} bars break a rule",
        blocking=True,
        numbers={"broken": len(rows)},
        rows=rows[:ROWS_SHOWN],
    )


def _check_duplicates(result: IngestResult) -> Finding:
    repeated = result.bars.height - result.bars["open_time"].n_unique()
    return Finding(
        "duplicates",
        passed=repeated == 0,
        message=f"{repeated} open times are stored twice",
        blocking=True,
        numbers={"duplicates": repeated},
    )


def _check_accounting(account: RowAccount) -> Finding:
    return Finding(
        "accounting",
        passed=account.is_balanced,
        message="received = stored + identical + quarantined",
        blocking=True,
        numbers=asdict(account),
    )


def _check_gaps(result: IngestResult) -> Finding:
    unexplained = _unexplained_windows(result)
    missing = count_bars(unexplained, result.timeframe)
    explained = sum(gap.bars for gap in result.gaps if gap.is_settled)
    numbers = {"expected": result.wanted.count(result.timeframe), "present": result.bars.height}
    for gap in result.gaps:
        numbers[gap.reason.value] = numbers.get(gap.reason.value, 0) + gap.bars
    return Finding(
        "gaps",
        passed=not unexplained,
        message=f"{missing} bars are missing without an explanation, {explained} with one",
        numbers={**numbers, "unexplained": missing},
        rows=_gap_rows(result, unexplained)[:ROWS_SHOWN],
    )


def _unexplained_windows(result: IngestResult) -> list[Window]:
    """Return the missing windows that no gap explains; a doubt explains nothing."""
    explained = [
        gap.window for gap in result.gaps if gap.is_settled or gap.reason == GapReason.QUARANTINED
    ]
    missing = find_gaps(result.bars["open_time"], result.timeframe, result.wanted)
    return subtract_windows(missing, explained)


def _gap_rows(result: IngestResult, unexplained: Sequence[Window]) -> list[Row]:
    rows: list[Row] = [
        {
            "from": format_time(gap.window.start),
            "until": format_time(gap.window.end),
            "bars": gap.bars,
            "cause": str(gap.cause or UNEXPLAINED),
            "reason": gap.reason.value,
            "evidence": gap.explanation,
        }
        for gap in result.gaps
    ]
    starts = {gap.window.start for gap in result.gaps}
    for window in unexplained:
        if window.start not in starts:
            rows.append(
                {
                    "from": format_time(window.start),
                    "until": format_time(window.end),
                    "bars": window.count(result.timeframe),
                    "cause": UNEXPLAINED,
                    "reason": "not fetched yet",
                    "evidence": "",
                }
            )
    return rows

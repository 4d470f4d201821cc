"""What a run did to the partitions of its assets, published so that each partition has its events.

Dagster's own results of a step are about the whole step. An event that names a partition is what
the partition's page and the grids of assets and checks show.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import dagster as dg
import polars as pl

from marketdata_assets.charts.heat_map import draw_heat_map
from marketdata_assets.charts.lines import draw_sparkline
from marketdata_assets.dagster_ext.materializations import CheckTarget, newest_materializations
from marketdata_assets.defs.tags import KIND, RunKind
from marketdata_assets.errors import MarketDataError
from marketdata_assets.flows.read.coverage import DailyCoverage
from marketdata_assets.model.events import (
    CheckNotPassed,
    PartitionFailed,
    ProgressCallback,
    no_progress,
)
from marketdata_assets.model.finding import Finding, FindingSeverity
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.window import format_time

INLINE_MARKETS = 8
"""Dagster draws the coverage of so many markets in place, and hides a longer picture."""

RunContext = dg.AssetExecutionContext | dg.OpExecutionContext
StepResult = dg.MaterializeResult[Any] | dg.AssetCheckResult


class AssetResults:
    """Collects the results of one asset in one run.

    `on_progress` receives failures and checks that did not pass. With `skippable`, a refresh that
    changed nothing leaves no materialization.
    """

    def __init__(
        self,
        context: RunContext,
        key: dg.AssetKey,
        on_progress: ProgressCallback = no_progress,
        *,
        skippable: bool = False,
    ) -> None:
        self._context, self._key, self._on_progress = context, key, on_progress
        self._skippable, self._has_changes = skippable, False
        self._metadata: dict[Partition, Mapping[str, Any]] = {}
        self._failures: dict[Partition, MarketDataError] = {}
        self._findings: dict[str, dict[Partition, Finding]] = defaultdict(dict)

    @property
    def has_failures(self) -> bool:
        """Whether a partition failed."""
        return bool(self._failures)

    @property
    def stored_partitions(self) -> list[Partition]:
        """The partitions that did not fail."""
        return list(self._metadata)

    def add(
        self,
        partition: Partition,
        metadata: Mapping[str, Any],
        findings: Sequence[Finding] = (),
        *,
        changed: bool = True,
    ) -> None:
        """Add a partition that is stored: what its page shows, and what its checks found."""
        self._metadata[partition] = metadata
        self._has_changes |= changed
        for finding in findings:
            self._findings[finding.check][partition] = finding
            if not finding.passed:
                is_warning = finding.severity == FindingSeverity.WARNING
                check = f"{self._key.to_user_string()} {finding.check}"
                event = CheckNotPassed(check, partition.key, finding.message, is_warning)
                self._on_progress(event)

    def add_failure(self, partition: Partition, error: MarketDataError) -> None:
        """Add a partition that failed."""
        self._failures[partition] = error
        self._context.log.error(f"{partition.key}: {error}")
        self._on_progress(PartitionFailed(partition.key, str(error), error.exit_code))

    def revise(self, partition: Partition, finding: Finding) -> None:
        """Replace the finding of one check of a partition that was added before."""
        self._findings[finding.check][partition] = finding

    def add_coverage(self, coverage: DailyCoverage) -> None:
        """Show the coverage on every partition: of all markets, or of its own if they are many."""
        for partition, metadata in self._metadata.items():
            shares, key = coverage.shares, partition.market.key
            if len(shares) > INLINE_MARKETS:
                shares = {key: shares[key]} if key in shares else {}
            picture = dg.MetadataValue.md(draw_heat_map(shares, coverage.first_day))
            self._metadata[partition] = {**metadata, "coverage": picture}

    def yield_results(self, context: dg.AssetExecutionContext) -> Iterator[StepResult]:
        """Yield what the step returns to Dagster when no partition failed."""
        if not self._is_skipped():
            for partition, metadata in self._metadata.items():
                context.add_asset_metadata(dict(metadata), self._key, partition_key=partition.key)
            yield dg.MaterializeResult(asset_key=self._key)
        self._log_findings()
        for check in context.selected_asset_check_keys:
            if check.asset_key == self._key:
                yield self._summarize(check.name)

    def log_events(self) -> None:
        """Write the events of all stored partitions now: the step fails, or it has no assets."""
        for partition, metadata in self._metadata.items():
            self._context.log_event(
                dg.AssetMaterialization(self._key, partition=partition.key, metadata=dict(metadata))
            )
        self._log_findings()

    def raise_failures(self) -> None:
        """Raise Failure when a partition failed."""
        if self._failures:
            partition, error = next(iter(self._failures.items()))
            counts = f"{len(self._failures)} partitions failed and {len(self._metadata)} are stored"
            raise dg.Failure(f"{counts}; first {partition.key}: {error}", allow_retries=False)

    def _is_skipped(self) -> bool:
        """Whether this was a refresh that changed nothing.

        With an event for it, freshness badges would stay green over a feed that is dead.
        """
        is_refresh = self._context.run.tags.get(KIND) == RunKind.REFRESH
        if self._has_changes or not is_refresh or not self._skippable:
            return False
        shown = self._context.instance.get_materialized_partitions(self._key)
        return all(partition.key in shown for partition in self._metadata)

    def _log_findings(self) -> None:
        """Write the results of checks, after the materializations that they judge.

        The grid of a check counts only results that name the newest materialization.
        """
        if not self._findings:
            return
        keys = [partition.key for partition in self._metadata]
        targets = newest_materializations(self._context.instance, self._key, keys)
        for findings in self._findings.values():
            for partition, finding in findings.items():
                evaluation = self._evaluation(partition, finding, targets.get(partition.key))
                # An op takes such an event as well; its annotation does not name it.
                self._context.log_event(evaluation)  # type: ignore[arg-type]

    def _evaluation(
        self, partition: Partition, finding: Finding, target: CheckTarget | None
    ) -> dg.AssetCheckEvaluation:
        metadata: dict[str, Any] = {**finding.numbers, **finding.details}
        if finding.rows:
            records = [dg.TableRecord(dict(row)) for row in finding.rows]
            metadata["rows"] = dg.MetadataValue.table(records)
        return dg.AssetCheckEvaluation(
            asset_key=self._key,
            check_name=finding.check,
            passed=finding.passed,
            partition=partition.key,
            severity=_severity(finding),
            description=finding.message,
            metadata=metadata,
            blocking=finding.blocking,
            target_materialization_data=target,
        )

    def _summarize(self, check: str) -> dg.AssetCheckResult:
        """Return the result of a check over all partitions of the run."""
        findings = list(self._findings[check].values())
        bad = [finding for finding in findings if not finding.passed]
        totals: Counter[str] = Counter()
        for finding in findings:
            totals.update(finding.numbers)
        severity = dg.AssetCheckSeverity.WARN
        if bad and len(bad) == len(findings):
            # With an error while some partitions passed, nothing would be rolled up; the rollups
            # of those that did not pass fail by themselves.
            severity = _severity(bad[0])
        return dg.AssetCheckResult(
            check_name=check,
            asset_key=self._key,
            passed=not bad,
            severity=severity,
            description=bad[0].message if bad else None,
            metadata={"partitions": len(findings), "failed": len(bad), **totals},
        )


def publish(
    context: dg.AssetExecutionContext, results: Sequence[AssetResults]
) -> Iterator[StepResult]:
    """Yield the results of a step's assets.

    When a partition failed, the events of the others are written first; then the step fails.
    """
    if any(result.has_failures for result in results):
        log_and_raise(results)
    for result in results:
        yield from result.yield_results(context)


def log_and_raise(results: Sequence[AssetResults]) -> None:
    """Write all events; then raise Failure when a partition failed."""
    for result in results:
        result.log_events()
    for result in results:
        result.raise_failures()


@contextmanager
def as_dagster_failure(
    partitions: Sequence[Partition] = (), on_progress: ProgressCallback = no_progress
) -> Iterator[None]:
    """Turn an error of ours into Dagster's Failure: one line, without a traceback of our code.

    `on_progress` receives it as the failure of the first of the partitions.
    """
    try:
        yield
    except MarketDataError as error:
        if partitions:
            on_progress(PartitionFailed(partitions[0].key, str(error), error.exit_code))
        raise dg.Failure(str(error), allow_retries=False) from None


def bars_metadata(bars: pl.DataFrame) -> dict[str, Any]:
    """Return what a partition's page shows of any stored bars: count, first, last, and closes."""
    metadata: dict[str, Any] = {
        "rows": bars.height,
        "closes": dg.MetadataValue.md(draw_sparkline(bars["close"])),
        "dagster/partition_row_count": bars.height,
    }
    if bars.height:
        opens = bars["open_time"]
        metadata |= {"first_bar": format_time(opens[0]), "last_bar": format_time(opens[-1])}
    return metadata


def _severity(finding: Finding) -> dg.AssetCheckSeverity:
    is_error = finding.blocking or finding.severity == FindingSeverity.ERROR
    return dg.AssetCheckSeverity.ERROR if is_error else dg.AssetCheckSeverity.WARN

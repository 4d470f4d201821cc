"""The results of the pipeline (raw bars and rollups) as Dagster shows them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import dagster as dg

from marketdata_assets.charts import candles
from marketdata_assets.defs.results import AssetResults, RunContext, bars_metadata
from marketdata_assets.defs.specs import asset_key
from marketdata_assets.flows.derive.rollup import RollupResult
from marketdata_assets.flows.fetch.open_partition import IngestResult
from marketdata_assets.flows.operate.pipeline import (
    AuditedIngest,
    AuditedRollup,
    PipelineResult,
    RevisedFinding,
)
from marketdata_assets.flows.read.coverage import CoverageReporter
from marketdata_assets.model.events import ProgressCallback, no_progress
from marketdata_assets.model.table import Table, raw, rollup
from marketdata_assets.model.timeframe import Timeframe


class PipelineResults:
    """Collects what the pipeline yields, by raw and by rolled-up timeframe."""

    def __init__(
        self,
        context: RunContext,
        on_progress: ProgressCallback = no_progress,
        *,
        raws: Iterable[Timeframe] = (),
        rollups: Iterable[Timeframe] = (),
        skippable: bool = False,
    ) -> None:
        def results_of(table: Table) -> AssetResults:
            return AssetResults(context, asset_key(table), on_progress, skippable=skippable)

        self._raws = {timeframe: results_of(raw(timeframe)) for timeframe in raws}
        self._rollups = {timeframe: results_of(rollup(timeframe)) for timeframe in rollups}

    @property
    def assets(self) -> list[AssetResults]:
        """The results of each asset: raw ones first, in the given order."""
        return [*self._raws.values(), *self._rollups.values()]

    def add(self, result: PipelineResult) -> None:
        """Add a result to its asset; the result of a rollup belongs to all rolled-up assets."""
        if isinstance(result, AuditedIngest):
            self._add_ingest(result)
        elif isinstance(result, RevisedFinding):
            self._raws[result.timeframe].revise(result.partition, result.finding)
        else:
            self._add_rollup(result)

    def add_coverage(self, reporter: CoverageReporter) -> None:
        """Show on every partition which bars of its asset are stored or explained, by day."""
        for timeframe, results in self._raws.items():
            results.add_coverage(reporter.daily(raw(timeframe)))
        if self._rollups:  # they are built together: all have the coverage of the first
            coverage = reporter.daily(rollup(next(iter(self._rollups))))
            for results in self._rollups.values():
                results.add_coverage(coverage)

    def _add_ingest(self, audit: AuditedIngest) -> None:
        ingest = audit.result
        results = self._raws[ingest.timeframe]
        if ingest.error is not None:
            results.add_failure(ingest.partition, ingest.error)
            return
        changed = ingest.account.stored > 0
        results.add(ingest.partition, _raw_metadata(ingest), audit.findings, changed=changed)

    def _add_rollup(self, audit: AuditedRollup) -> None:
        partition, rollups = audit.partition, audit.result
        for timeframe, results in self._rollups.items():
            if audit.error is not None:
                results.add_failure(partition, audit.error)
            elif rollups is not None:
                metadata, findings = _rollup_metadata(rollups, timeframe), audit.findings[timeframe]
                changed = rollups.changed.get(timeframe, 0) > 0
                results.add(partition, metadata, findings, changed=changed)


def _raw_metadata(ingest: IngestResult) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        **bars_metadata(ingest.bars),
        "bytes": ingest.bytes,
        "requests": ingest.requests,
        "retries": ingest.retries,
        "seconds_waited_for_limits": round(ingest.seconds_waited, 3),
        "rows_received": ingest.account.received,
        "rows_quarantined": ingest.account.quarantined,
        "bars_corrected": ingest.replaced.height,
        "candles": dg.MetadataValue.md(candles(ingest.bars)),
    }
    if ingest.note:
        metadata["note"] = ingest.note
    return metadata


def _rollup_metadata(rollups: RollupResult, timeframe: Timeframe) -> dict[str, Any]:
    frame = rollups.frames.get(timeframe)
    if frame is None or frame.is_empty():
        return {"rows": 0, "dagster/partition_row_count": 0}
    return {**bars_metadata(frame), "rows_changed": rollups.changed.get(timeframe, 0)}

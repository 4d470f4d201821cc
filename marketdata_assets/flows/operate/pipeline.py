"""The work of a run: ingest and audit raw partitions, explain their gaps, roll them up and audit
that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from marketdata_assets.errors import CheckFailed, MarketDataError
from marketdata_assets.flows.derive.rollup import RollupBuilder, RollupResult
from marketdata_assets.flows.fetch.ingest import Ingester
from marketdata_assets.flows.fetch.open_partition import IngestResult
from marketdata_assets.flows.fetch.partition_store import PartitionStore
from marketdata_assets.flows.prove.gaps import GapExplainer
from marketdata_assets.flows.prove.raw_checks import RawAuditor
from marketdata_assets.flows.prove.rollup_checks import RollupAuditor
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.model.finding import Finding
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import raw_table
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import Window
from marketdata_assets.settings.universe import Settings
from marketdata_assets.sources.clients import VenueClients
from marketdata_assets.storage.bars import BarStorage


class AuditedIngest(NamedTuple):
    """One raw partition after ingest and audit; no findings when the ingest failed."""

    result: IngestResult
    findings: Sequence[Finding]


class RevisedFinding(NamedTuple):
    """A finding of a raw partition that replaces an earlier one of its check."""

    timeframe: Timeframe
    partition: Partition
    finding: Finding


class AuditedRollup(NamedTuple):
    """The rollups of one partition after their audit, or the error that prevented them."""

    partition: Partition
    result: RollupResult | None
    findings: Mapping[Timeframe, Sequence[Finding]]
    error: MarketDataError | None = None


PipelineResult = AuditedIngest | RevisedFinding | AuditedRollup


@dataclass(frozen=True, slots=True)
class Pipeline:
    """What a run does with its partitions."""

    settings: Settings
    ledger: Ledger
    storage: BarStorage
    venues: VenueClients

    def fetch(
        self, timeframe: Timeframe, partitions: Sequence[Partition], again: Window | None = None
    ) -> Iterator[AuditedIngest | RevisedFinding]:
        """Ingest and audit partitions; bars that open inside `again` are requested once more.

        When all are done, gaps are explained: what is missing in one market explains what is
        missing in the others. A partition whose gaps have another cause then is audited again.
        """
        ingester = Ingester(self.settings, self.ledger, self.storage.lake, venues=self.venues)
        results = ingester.ingest(timeframe, partitions, again)
        yield from self._audit(timeframe, partitions, results, send_requests=True)

    def audit_stored(
        self, timeframe: Timeframe, partitions: Sequence[Partition]
    ) -> Iterator[AuditedIngest | RevisedFinding]:
        """Audit what is stored, such as after an import; no venue is asked. Raises Damaged."""
        results = (
            self._store.read_result(raw_table(timeframe), partition) for partition in partitions
        )
        yield from self._audit(timeframe, partitions, results, send_requests=False)

    def roll_up(self, partitions: Sequence[Partition]) -> Iterator[AuditedRollup]:
        """Build and audit the rollups; a partition with a failed blocking check is left out."""
        failed = {c.partition: c for c in self.ledger.checks.failed() if c.blocking}
        for partition in partitions:
            if partition in failed:
                check = failed[partition]
                error = CheckFailed(
                    f"{check.table} {check.name} is red: {check.message}; "
                    "nothing is rolled up from it"
                )
                yield AuditedRollup(partition, None, {}, error)
        builder = RollupBuilder(self.settings, self.ledger, self.storage)
        auditor = RollupAuditor(self.settings, self.ledger, self.storage.lake)
        for result in builder.build([p for p in partitions if p not in failed]):
            yield AuditedRollup(result.partition, result, auditor.audit(result))

    @property
    def _store(self) -> PartitionStore:
        return PartitionStore(self.settings, self.ledger, self.storage.lake)

    def _audit(
        self,
        timeframe: Timeframe,
        partitions: Sequence[Partition],
        results: Iterator[IngestResult],
        *,
        send_requests: bool,
    ) -> Iterator[AuditedIngest | RevisedFinding]:
        auditor = RawAuditor(self.settings, self.ledger, self.storage.lake)
        unexplained = []
        for result in results:
            failed = result.error is not None
            yield AuditedIngest(result, [] if failed else auditor.audit(result))
            if not failed and any(gap.cause is None for gap in result.gaps):
                unexplained.append(replace(result, bars=result.bars.select("open_time")))
        explainer = GapExplainer(self.settings, self.ledger, self.storage.lake, venues=self.venues)
        explained = explainer.explain(partitions, send_requests=send_requests)
        for result in unexplained:
            if (raw_table(timeframe), result.partition) in explained:
                finding = auditor.audit_gaps(result)
                yield RevisedFinding(timeframe, result.partition, finding)

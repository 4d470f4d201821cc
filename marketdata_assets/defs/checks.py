"""Checks per partition, also in range runs: each finding is logged for its partition, the sum of them is the result."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import dagster as dg

from marketdata_assets.errors import MarketDataError
from marketdata_assets.flows.audit import BLOCKING, RAW_CHECKS, Finding
from marketdata_assets.flows.freshness import ERROR_BARS, WARN_BARS, Freshness, freshness
from marketdata_assets.lake.tables import Table, raw
from marketdata_assets.model.window import MINUTE, Partition, Timeframe, iso
from marketdata_assets.settings import Settings
from marketdata_assets.toolbox import Tell, open_toolbox

COMPLETE = (
    "Every bar made of fewer base bars than it could hold owes that to the venue, by evidence. If red: materialize the raw partition again."
)
MATCHES = "Our rollup equals the venue's own bar in every column it gives. If red: the table names the bars and both values."


def check_specs(table: Table, settings: Settings, grid: dg.MultiPartitionsDefinition) -> list[dg.AssetCheckSpec]:
    """The checks of one table."""
    key = list(table.key)
    if table.layer == "raw":
        return [
            dg.AssetCheckSpec(name, asset=key, description=words, blocking=name in BLOCKING, partitions_def=grid)
            for name, words in RAW_CHECKS.items()
        ]
    words = {"complete": COMPLETE}
    if any(table.timeframe in venue.reference for venue in settings.venues.values()):
        words["matches_native"] = MATCHES
    return [dg.AssetCheckSpec(name, asset=key, description=text, partitions_def=grid) for name, text in words.items()]


def freshness_check(settings: Settings, timeframe: Timeframe) -> dg.AssetChecksDefinition:
    """`freshness` of a raw asset: one result for all its markets, from the newest bar on disk."""
    key = list(raw(timeframe).key)
    words = (
        f"The newest stored bar of every market is at most {WARN_BARS} bars (warning) or {ERROR_BARS} bars (error) behind. "
        "If red: materialize the open month of the markets it names."
    )

    @dg.asset_check(asset=dg.AssetKey(key), name="freshness", description=words)
    def check() -> dg.AssetCheckResult:
        with open_toolbox(settings) as toolbox:
            return _freshness_result(freshness(toolbox, timeframe, settings.markets))

    return check


def _freshness_result(found: Sequence[Freshness]) -> dg.AssetCheckResult:
    late = sorted((f for f in found if f.late), key=lambda f: f.lag, reverse=True)
    rows = [
        dg.TableRecord(
            {"market": f.market.key, "newest bar ends": iso(f.through) if f.through else "none", "minutes behind": f.lag // MINUTE}
        )
        for f in sorted(found, key=lambda f: f.lag, reverse=True)
    ]
    worst = max((f.lag for f in found), default=timedelta(0))
    return dg.AssetCheckResult(
        passed=not late,
        severity=dg.AssetCheckSeverity.ERROR if any(f.stale for f in found) else dg.AssetCheckSeverity.WARN,
        description=f"{len(late)} of {len(found)} markets are late",
        metadata={"late": len(late), "most_minutes_behind": worst // MINUTE, "markets": dg.MetadataValue.table(rows) if rows else "none"},
    )


class Results:
    """Collects the results of one asset in one run, and says them so that every partition has its own."""

    def __init__(self, context: dg.AssetExecutionContext, key: dg.AssetKey, tell: Tell) -> None:
        self._context, self._key, self._tell = context, key, tell
        self._done: dict[Partition, Mapping[str, Any]] = {}
        self._failed: dict[Partition, MarketDataError] = {}
        self._findings: dict[str, list[Finding]] = defaultdict(list)

    def add(
        self, partition: Partition, metadata: Mapping[str, Any], findings: Sequence[Finding], error: MarketDataError | None = None
    ) -> None:
        """One partition: what it is now, what its checks found, or why it failed."""
        if error is not None:
            self._failed[partition] = error
            self._context.log.error(f"{partition.key}: {error}")
            self._tell({"failed": partition.key, "says": str(error), "exit_code": error.exit_code})
            return
        self._done[partition] = metadata
        for finding in findings:
            self._findings[finding.check].append(finding)
            self._context.log_event(self._evaluation(partition, finding))
            if not finding.passed:
                self._tell({"check": f"{self._key.to_user_string()} {finding.check}", "partition": partition.key, "says": finding.says})

    def finish(self) -> Iterator[dg.MaterializeResult[Any] | dg.AssetCheckResult]:
        """The results of the step. When a partition failed, the others are materialized all the same."""
        if self._failed:
            for partition, metadata in self._done.items():
                event = dg.AssetMaterialization(self._key, partition=partition.key, metadata=dict(metadata))
                self._context.log_event(event)
            raise dg.Failure(_failure(self._failed, len(self._done)), allow_retries=False)
        for partition, metadata in self._done.items():
            self._context.add_asset_metadata(dict(metadata), asset_key=self._key, partition_key=partition.key)
        yield dg.MaterializeResult(asset_key=self._key)
        for name in self._names():
            findings = self._findings.get(name, [])
            yield self._summary(name, findings)

    def _names(self) -> list[str]:
        return [check.name for check in self._context.selected_asset_check_keys if check.asset_key == self._key]

    def _evaluation(self, partition: Partition, finding: Finding) -> dg.AssetCheckEvaluation:
        return dg.AssetCheckEvaluation(
            asset_key=self._key,
            check_name=finding.check,
            passed=finding.passed,
            partition=partition.key,
            severity=_severity(finding),
            description=finding.says,
            metadata={**finding.numbers, **_table(finding)},
            blocking=finding.blocking,
        )

    def _summary(self, name: str, findings: Sequence[Finding]) -> dg.AssetCheckResult:
        bad = [f for f in findings if not f.passed]
        totals: dict[str, int] = defaultdict(int)
        for finding in findings:
            for key, value in finding.numbers.items():
                totals[key] += value
        return dg.AssetCheckResult(
            check_name=name,
            asset_key=self._key,
            passed=not bad,
            severity=_severity(bad[0]) if bad else dg.AssetCheckSeverity.WARN,
            description=bad[0].says if bad else None,
            metadata={"partitions": len(findings), "failed": len(bad), **totals},
        )


@contextmanager
def failure_told(tell: Tell, partitions: Sequence[Partition]) -> Iterator[None]:
    """An error of ours becomes Dagster's Failure, one line without a traceback of our code."""
    try:
        yield
    except MarketDataError as error:
        tell({"failed": partitions[0].key, "says": str(error), "exit_code": error.exit_code})
        raise dg.Failure(str(error), allow_retries=False) from None


def _severity(finding: Finding) -> dg.AssetCheckSeverity:
    return dg.AssetCheckSeverity.ERROR if finding.blocking else dg.AssetCheckSeverity.WARN


def _table(finding: Finding) -> dict[str, Any]:
    if not finding.table:
        return {}
    return {"rows": dg.MetadataValue.table([dg.TableRecord(dict(row)) for row in finding.table])}


def _failure(failed: Mapping[Partition, MarketDataError], done: int) -> str:
    first = next(iter(failed.items()))
    return f"{len(failed)} partitions failed and {done} are stored; first {first[0].key}: {first[1]}"

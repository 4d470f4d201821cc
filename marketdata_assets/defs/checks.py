"""Checks per partition, also in range runs: each finding is logged for its partition, the sum of them
is the result.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date, timedelta
from typing import Any

import dagster as dg
from dagster._core.definitions.asset_checks.asset_check_evaluation import (
    AssetCheckEvaluationTargetMaterializationData,
)

from marketdata_assets.charts.heat_map import draw_heat_map
from marketdata_assets.context import Tell, Toolbox, open_toolbox
from marketdata_assets.errors import MarketDataError
from marketdata_assets.flows.operate.freshness import Freshness, freshness
from marketdata_assets.flows.prove.anomalies import CHECK
from marketdata_assets.flows.prove.audit import BLOCKING, RAW_CHECKS, Finding
from marketdata_assets.flows.read.coverage import daily_coverage
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import Table
from marketdata_assets.model.timeframe import MINUTE
from marketdata_assets.model.window import format_time
from marketdata_assets.settings.universe import Settings

SHOWN = 200
"""How many markets a table in a check names, the worst first."""
INLINE = 8
"""Markets whose coverage is short enough for Dagster to draw it in its place, and not behind a
button.
"""
COMPLETE = "Every bar made of fewer base bars than it could hold owes that to the venue, by evidence. If red: materialize the raw partition again."
MATCHES = (
    "Our rollup equals the venue's own bar in every column it gives. If red: the table names the bars, both values, and the base bars "
    "behind the difference; `parity.ohlcv_<timeframe>` holds the outcome of every bar."
)


def check_specs(
    table: Table, settings: Settings, grid: dg.MultiPartitionsDefinition
) -> list[dg.AssetCheckSpec]:
    """The checks of one table."""
    key = list(table.key)
    if table.layer == "raw":
        return [
            dg.AssetCheckSpec(
                name, asset=key, description=words, blocking=name in BLOCKING, partitions_def=grid
            )
            for name, words in RAW_CHECKS.items()
            if name != CHECK
            or any(table.timeframe == venue.base for venue in settings.venues.values())
        ]
    words = {"complete": COMPLETE}
    if any(table.timeframe in venue.reference for venue in settings.venues.values()):
        words["matches_native"] = MATCHES
    return [
        dg.AssetCheckSpec(name, asset=key, description=text, partitions_def=grid)
        for name, text in words.items()
    ]


KIND, REFRESH, MISSED, IMPORT = "marketdata/kind", "refresh", "missed", "import"
"""A tag of runs, and its values: those that automation asks for, and those that show what files have
told.
"""
FRESHNESS, COVERAGE = "freshness", "coverage"


def market_checks(settings: Settings, table: Table) -> list[dg.AssetChecksDefinition]:
    """The checks of an asset that look at all its markets: `coverage`, and on raw assets `freshness`.

    The sensor `watch_markets` evaluates them without runs; the Execute button does it at once.
    """
    found = [_market_check(settings, table, COVERAGE, _coverage_words(table), coverage_result)]
    if table.layer == "raw":
        found.append(
            _market_check(
                settings, table, FRESHNESS, _freshness_words(settings, table), freshness_result
            )
        )
    return found


Target = AssetCheckEvaluationTargetMaterializationData
MarketResult = Callable[[Toolbox, Table], dg.AssetCheckResult]


def _market_check(
    settings: Settings, table: Table, name: str, words: str, evaluate: MarketResult
) -> dg.AssetChecksDefinition:
    @dg.asset_check(asset=dg.AssetKey(list(table.key)), name=name, description=words)
    def check() -> dg.AssetCheckResult:
        with open_toolbox(settings) as toolbox:
            return evaluate(toolbox, table)

    return check


def _freshness_words(settings: Settings, table: Table) -> str:
    limits = settings.limits(table.timeframe)
    return (
        f"The newest stored bar of every market ended at most {limits.warn // MINUTE} (warning) or {limits.error // MINUTE} (error) "
        "minutes ago. If red: the table names the markets; see `marketdata health`, then run the job `repair` for them."
    )


def _coverage_words(table: Table) -> str:
    made = "stored, rolled up" if table.layer == "rollup" else "stored"
    return (
        f"Every wanted bar of every market is {made} or explained by evidence; the picture shows market by day. "
        "If red: the sensor `backfill_missed` is at work; its ticks say what it waits for, `marketdata parked` what it gave up."
    )


def freshness_result(toolbox: Toolbox, table: Table) -> dg.AssetCheckResult:
    """`freshness` now, worst market first."""
    found = sorted(
        freshness(toolbox, table.timeframe, toolbox.settings.markets),
        key=lambda f: f.lag,
        reverse=True,
    )
    late, stale = [f for f in found if f.late], [f for f in found if f.stale]
    worst = max((f.lag for f in found), default=timedelta(0))
    return dg.AssetCheckResult(
        passed=not late,
        severity=dg.AssetCheckSeverity.ERROR if stale else dg.AssetCheckSeverity.WARN,
        description=f"{len(stale)} of {len(found)} markets are stale, {len(late) - len(stale)} are late",
        metadata={
            "most_minutes_behind": worst // MINUTE,
            "stale": len(stale),
            "late": len(late) - len(stale),
            "markets": dg.MetadataValue.table([_freshness_row(f) for f in found[:SHOWN]])
            if found
            else "none",
        },
    )


def _freshness_row(found: Freshness) -> dg.TableRecord:
    return dg.TableRecord(
        {
            "market": found.market.key,
            "state": "stale" if found.stale else "late" if found.late else "fresh",
            "newest bar ends": format_time(found.through) if found.through else "none",
            "minutes behind": found.lag // MINUTE,
            "warning at": found.limits.warn // MINUTE,
            "error at": found.limits.error // MINUTE,
        }
    )


def coverage_result(toolbox: Toolbox, table: Table) -> dg.AssetCheckResult:
    """`coverage` now, with its picture."""
    rows, first = daily_coverage(toolbox, table)
    holes = {
        market: sum(day < 1 for day in days if day is not None) for market, days in rows.items()
    }
    bad = {market: days for market, days in holes.items() if days}
    return dg.AssetCheckResult(
        passed=not bad,
        severity=dg.AssetCheckSeverity.WARN,
        description=f"{len(bad)} of {len(rows)} markets have days that are not whole, {sum(bad.values())} days in all",
        metadata={
            "days_not_whole": sum(bad.values()),
            "markets_not_whole": len(bad),
            "market_by_day": dg.MetadataValue.md(draw_heat_map(rows, first)),
        },
    )


class Results:
    """Collects the results of one asset in one run, and says them so that every partition has its
    own.
    """

    def __init__(
        self,
        context: dg.AssetExecutionContext,
        key: dg.AssetKey,
        tell: Tell,
        skippable: bool = False,
    ) -> None:
        self._context, self._key, self._tell, self._skippable = context, key, tell, skippable
        self._done: dict[Partition, Mapping[str, Any]] = {}
        self._failed: dict[Partition, MarketDataError] = {}
        self._findings: dict[str, list[tuple[Partition, Finding]]] = defaultdict(list)
        self._changed = False

    def add(
        self,
        partition: Partition,
        metadata: Mapping[str, Any],
        findings: Sequence[Finding],
        error: MarketDataError | None = None,
        changed: bool = True,
    ) -> None:
        """One partition: what it is now, what its checks found, or why it failed."""
        if error is not None:
            self._failed[partition] = error
            self._context.log.error(f"{partition.key}: {error}")
            self._tell({"failed": partition.key, "says": str(error), "exit_code": error.exit_code})
            return
        self._done[partition] = metadata
        self._changed |= changed
        for finding in findings:
            self._findings[finding.check].append((partition, finding))
            if not finding.passed:
                name = f"{self._key.to_user_string()} {finding.check}"
                mild = finding.severity == "warning"
                self._tell(
                    {"check": name, "partition": partition.key, "says": finding.says, "mild": mild}
                )

    def renew(self, partition: Partition, finding: Finding) -> None:
        """A check of one partition found something else in the meantime."""
        known = self._findings[finding.check]
        self._findings[finding.check] = [(p, finding if p == partition else f) for p, f in known]

    def cover(self, rows: Mapping[str, Sequence[float | None]], first: date) -> None:
        """Show the asset's coverage on each materialization: of all markets, or of its own where they
        are too many to read.
        """
        for partition, metadata in self._done.items():
            shown = (
                rows
                if len(rows) <= INLINE
                else {key: days for key, days in rows.items() if key == partition.market.key}
            )
            self._done[partition] = {
                **metadata,
                "coverage": dg.MetadataValue.md(draw_heat_map(shown, first)),
            }

    def finish(self) -> Iterator[dg.MaterializeResult[Any] | dg.AssetCheckResult]:
        """The results of the step, when no partition failed."""
        if not self._keeps_quiet():
            for partition, metadata in self._done.items():
                self._context.add_asset_metadata(
                    dict(metadata), asset_key=self._key, partition_key=partition.key
                )
            yield dg.MaterializeResult(asset_key=self._key)
        self._log_findings()
        for name in self._names():
            yield self._summary(name, [finding for _, finding in self._findings.get(name, [])])

    @property
    def failed(self) -> bool:
        """Whether a partition failed."""
        return bool(self._failed)

    @property
    def good(self) -> list[Partition]:
        """The partitions that are stored."""
        return list(self._done)

    def log_done(self) -> None:
        """Every stored partition as an event of its own, with its checks."""
        for partition, metadata in self._done.items():
            self._context.log_event(
                dg.AssetMaterialization(self._key, partition=partition.key, metadata=dict(metadata))
            )
        self._log_findings()

    def fail(self) -> None:
        """Raise the failure of the step, if any partition failed."""
        if self._failed:
            raise dg.Failure(_failure(self._failed, len(self._done)), allow_retries=False)

    def _keeps_quiet(self) -> bool:
        """A refresh that stored nothing new says nothing: no badge turns green on a feed that has
        died.
        """
        if self._changed or self._context.run.tags.get(KIND) != REFRESH or not self._skippable:
            return False
        shown = self._context.instance.get_materialized_partitions(self._key)
        return all(partition.key in shown for partition in self._done)

    def _names(self) -> list[str]:
        return [
            check.name
            for check in self._context.selected_asset_check_keys
            if check.asset_key == self._key
        ]

    def _log_findings(self) -> None:
        """After the materializations: the UI's grid counts a check only if it names the one it
        judged.
        """
        found = newest_materializations(
            self._context.instance, self._key, [partition.key for partition in self._done]
        )
        for findings in self._findings.values():
            for partition, finding in findings:
                self._context.log_event(
                    self._evaluation(partition, finding, found.get(partition.key))
                )

    def _evaluation(
        self, partition: Partition, finding: Finding, target: Target | None
    ) -> dg.AssetCheckEvaluation:
        return dg.AssetCheckEvaluation(
            asset_key=self._key,
            check_name=finding.check,
            passed=finding.passed,
            partition=partition.key,
            severity=_severity(finding),
            description=finding.says,
            metadata={**finding.numbers, **finding.shown, **_table(finding)},
            blocking=finding.blocking,
            target_materialization_data=target,
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
            # an error here would keep the rollups of all from being made; those of red partitions
            # fail by themselves
            severity=_severity(bad[0])
            if bad and len(bad) == len(findings)
            else dg.AssetCheckSeverity.WARN,
            description=bad[0].says if bad else None,
            metadata={"partitions": len(findings), "failed": len(bad), **totals},
        )


def newest_materialization(instance: dg.DagsterInstance, key: dg.AssetKey) -> Target | None:
    """What a check of the whole asset must name as judged."""
    records = instance.fetch_materializations(key, limit=1).records
    return _target(records[0]) if records else None


def _target(record: dg.EventLogRecord) -> Target:
    return Target(storage_id=record.storage_id, run_id=record.run_id, timestamp=record.timestamp)


def newest_materializations(
    instance: dg.DagsterInstance, key: dg.AssetKey, partitions: Sequence[str]
) -> dict[str, Target]:
    """What a check of each partition must name as judged."""
    kind = dg.DagsterEventType.ASSET_MATERIALIZATION
    ids = instance.event_log_storage.get_latest_storage_id_by_partition(key, kind, set(partitions))
    if not ids:
        return {}
    records = instance.fetch_materializations(
        dg.AssetRecordsFilter(key, storage_ids=list(ids.values())), limit=len(ids)
    ).records
    targets = {record.storage_id: _target(record) for record in records}
    return {partition: targets[id] for partition, id in ids.items() if id in targets}


def finished(
    results: Sequence[Results],
) -> Iterator[dg.MaterializeResult[Any] | dg.AssetCheckResult]:
    """The results of a step's assets. When a partition failed, the others are materialized all the
    same, and the step fails.
    """
    if any(result.failed for result in results):
        log_all(results)
    for result in results:
        yield from result.finish()


def log_all(results: Sequence[Results]) -> None:
    """Everything as events; then the first failure, if there is one."""
    for result in results:
        result.log_done()
    for result in results:
        result.fail()


@contextmanager
def failure_told(tell: Tell, partitions: Sequence[Partition]) -> Iterator[None]:
    """An error of ours becomes Dagster's Failure, one line without a traceback of our code."""
    try:
        yield
    except MarketDataError as error:
        if partitions:
            tell({"failed": partitions[0].key, "says": str(error), "exit_code": error.exit_code})
        raise dg.Failure(str(error), allow_retries=False) from None


def _severity(finding: Finding) -> dg.AssetCheckSeverity:
    return (
        dg.AssetCheckSeverity.ERROR
        if finding.blocking or finding.severity == "error"
        else dg.AssetCheckSeverity.WARN
    )


def _table(finding: Finding) -> dict[str, Any]:
    if not finding.table:
        return {}
    return {"rows": dg.MetadataValue.table([dg.TableRecord(dict(row)) for row in finding.table])}


def _failure(failed: Mapping[Partition, MarketDataError], done: int) -> str:
    first = next(iter(failed.items()))
    return (
        f"{len(failed)} partitions failed and {done} are stored; first {first[0].key}: {first[1]}"
    )

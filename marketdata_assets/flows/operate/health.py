"""Health: each market, venue and the daemon is healthy, degraded or unhealthy, with reasons."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum
from typing import NamedTuple

from marketdata_assets.flows.operate.freshness import market_freshness
from marketdata_assets.flows.prove.anomalies import ANOMALIES
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.model.table import raw_table
from marketdata_assets.model.timeframe import MINUTE
from marketdata_assets.model.window import format_time
from marketdata_assets.settings.universe import Settings
from marketdata_assets.storage.lake import Lake

DAEMON = "daemon"
SILENT_AFTER = timedelta(minutes=3)
"""A daemon whose last sensor tick is older than this counts as down."""
FAILURES_IN_A_ROW = 3
QUARANTINE_PERCENT = 1.0
LOOK_BACK = timedelta(hours=24)


class HealthStatus(StrEnum):
    """How a subject is, the best first."""

    HEALTHY = "healthy"
    DEGRADED = "degraded"
    UNHEALTHY = "unhealthy"


@dataclass(slots=True)
class Health:
    """One market, venue or daemon. `status` is the worst of its reasons."""

    kind: str
    subject: str
    status: HealthStatus = HealthStatus.HEALTHY
    reasons: list[str] = field(default_factory=list)

    def add(self, status: HealthStatus, reason: str) -> None:
        """Add a reason of that weight."""
        self.reasons.append(reason)
        if status == HealthStatus.UNHEALTHY or self.status == HealthStatus.HEALTHY:
            self.status = status

    def as_dict(self) -> dict[str, str | list[str]]:
        """Return it for JSON."""
        return {
            "kind": self.kind,
            "subject": self.subject,
            "status": self.status.value,
            "reasons": self.reasons,
        }


class _Reason(NamedTuple):
    """Why a market is not healthy."""

    market_key: str
    status: HealthStatus
    message: str


@dataclass(frozen=True, slots=True)
class HealthInspector:
    """Judges health by the ledger; sends no request."""

    settings: Settings
    ledger: Ledger
    lake: Lake
    clock: Callable[[], float]

    def inspect(self) -> list[Health]:
        """Return the daemon, then the venues, then the markets, in the universe's order."""
        markets = {m.key: Health("market", m.key) for m in self.settings.markets}
        for reason in self._market_reasons():
            if reason.market_key in markets:
                markets[reason.market_key].add(reason.status, reason.message)
        venues = [self._inspect_venue(name) for name in self.settings.venues]
        return [self._inspect_daemon(), *venues, *markets.values()]

    def _inspect_daemon(self) -> Health:
        health, last = Health(DAEMON, DAEMON), self.ledger.heartbeats.last(DAEMON)
        if last is None:
            health.add(HealthStatus.UNHEALTHY, "it never ran here: start `marketdata dev`")
        elif abs(self.settings.now() - last) > SILENT_AFTER:
            message = f"its last sensor tick was at {format_time(last)}: start `marketdata dev`"
            health.add(HealthStatus.UNHEALTHY, message)
        return health

    def _inspect_venue(self, name: str) -> Health:
        health, state, now = Health("venue", name), self.ledger.venues.health(name), self.clock()
        error = self.ledger.fetches.last_error(name) if state.failures else None
        why = f", the last one with: {error}" if error else ""
        if state.broken_until > 0:
            message = f"its circuit breaker is open after {state.failures} failed requests in a row"
            health.add(HealthStatus.UNHEALTHY, message + why)
        elif state.failures:
            health.add(HealthStatus.DEGRADED, f"its last {state.failures} requests failed{why}")
        if state.paused_until > now:
            seconds = state.paused_until - now
            message = f"it asked for {seconds:.0f} seconds without requests"
            health.add(HealthStatus.DEGRADED, message)
        return health

    def _market_reasons(self) -> Iterator[_Reason]:
        yield from self._late()
        for key, (count, _) in self.ledger.partitions.failure_streaks().items():
            often = count >= FAILURES_IN_A_ROW
            status = HealthStatus.UNHEALTHY if often else HealthStatus.DEGRADED
            yield _Reason(key, status, f"its last {count} ingests failed")
        for attempt in self.ledger.attempts.all().values():
            if attempt.parked_at:
                message = f"{attempt.partition.month_key} is parked: {attempt.reason}"
                yield _Reason(attempt.partition.market.key, HealthStatus.UNHEALTHY, message)
        for key, bars in self.ledger.gaps.open_bars().items():
            message = f"{bars} bars are missing and not explained yet"
            yield _Reason(key, HealthStatus.DEGRADED, message)
        yield from self._failed_checks()
        yield from self._rejections()

    def _failed_checks(self) -> Iterator[_Reason]:
        for check in self.ledger.checks.failed():
            if check.name != "gaps":  # counted in bars above
                status = HealthStatus.UNHEALTHY if check.blocking else HealthStatus.DEGRADED
                if check.name == ANOMALIES:  # what is hard to believe may be true
                    status = HealthStatus.HEALTHY
                where = f"{check.table} {check.partition.month_key} {check.name}"
                yield _Reason(check.partition.market.key, status, f"{where}: {check.message}")

    def _rejections(self) -> Iterator[_Reason]:
        since = self.settings.now() - LOOK_BACK
        for key, (rejected, received) in self.ledger.quarantine.rejection_rates(since).items():
            if received and 100 * rejected / received >= QUARANTINE_PERCENT:
                message = f"{rejected} of {received} rows went to quarantine in 24 hours"
                yield _Reason(key, HealthStatus.DEGRADED, message)

    def _late(self) -> Iterator[_Reason]:
        for timeframe in self.settings.raw_timeframes:
            for found in market_freshness(
                self.settings,
                self.ledger,
                self.lake,
                timeframe=timeframe,
                markets=self.settings.markets,
            ):
                if found.is_late:
                    minutes = f"{found.lag // MINUTE} minutes behind"
                    behind = minutes if found.through else "nothing is stored"
                    stale = found.is_stale
                    status = HealthStatus.UNHEALTHY if stale else HealthStatus.DEGRADED
                    yield _Reason(
                        found.market.key, status, f"{raw_table(timeframe).name}: {behind}"
                    )

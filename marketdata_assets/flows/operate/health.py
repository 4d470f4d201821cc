"""Health: every market, every venue and the daemon, each healthy, degraded or unhealthy, with the
reasons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum

from marketdata_assets.flows.operate.freshness import freshness
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.model.table import raw
from marketdata_assets.model.timeframe import MINUTE
from marketdata_assets.model.window import iso
from marketdata_assets.settings.universe import Settings
from marketdata_assets.storage.parquet import Lake

DAEMON = "daemon"
SILENT_AFTER = timedelta(minutes=3)
"""A daemon whose last sensor tick is older than this counts as down."""
FAILURES_IN_A_ROW = 3
QUARANTINE_PERCENT = 1.0
LOOK_BACK = timedelta(hours=24)


class Status(StrEnum):
    """How a subject is, the best first."""

    HEALTHY = "healthy"
    DEGRADED = "degraded"
    UNHEALTHY = "unhealthy"


@dataclass(slots=True)
class Health:
    """One market, venue or daemon. `status` is the worst of its reasons."""

    kind: str
    subject: str
    status: Status = Status.HEALTHY
    reasons: list[str] = field(default_factory=list)

    def add(self, status: Status, reason: str) -> None:
        """One more reason, of that weight."""
        self.reasons.append(reason)
        if status == Status.UNHEALTHY or self.status == Status.HEALTHY:
            self.status = status

    def as_dict(self) -> dict[str, str | list[str]]:
        """For JSON."""
        return {
            "kind": self.kind,
            "subject": self.subject,
            "status": self.status.value,
            "reasons": self.reasons,
        }


@dataclass(frozen=True, slots=True)
class HealthInspector:
    """."""

    settings: Settings
    ledger: Ledger
    lake: Lake
    clock: Callable[[], float]

    def inspect(self) -> list[Health]:
        """The daemon, then the venues, then the markets, in the universe's order. Reads the ledger; sends
        no request.
        """
        markets = {m.key: Health("market", m.key) for m in self.settings.markets}
        for key, status, reason in self._market_reasons():
            if key in markets:
                markets[key].add(status, reason)
        venues = [self._venue(name) for name in self.settings.venues]
        return [self._daemon(), *venues, *markets.values()]

    def _daemon(self) -> Health:
        found, beat = Health(DAEMON, DAEMON), self.ledger.last_beat(DAEMON)
        if beat is None:
            found.add(Status.UNHEALTHY, "it never ran here: start `marketdata dev`")
        elif abs(self.settings.now() - beat) > SILENT_AFTER:
            found.add(
                Status.UNHEALTHY, f"its last sensor tick was at {iso(beat)}: start `marketdata dev`"
            )
        return found

    def _venue(self, name: str) -> Health:
        found, held, clock = (
            Health("venue", name),
            self.ledger.venue_health(name),
            self.clock(),
        )
        if held.broken_until > 0:
            found.add(
                Status.UNHEALTHY,
                f"its circuit breaker is open after {held.failures} failed requests in a row",
            )
        elif held.failures:
            found.add(Status.DEGRADED, f"its last {held.failures} requests failed")
        if held.paused_until > clock:
            found.add(
                Status.DEGRADED, f"it asked for {held.paused_until - clock:.0f} seconds of silence"
            )
        return found

    def _market_reasons(self) -> Iterator[_Reason]:
        yield from self._late()
        yield from self._failing()
        for ask in self.ledger.asks().values():
            if ask.parked_at:
                yield (
                    ask.partition.market.key,
                    Status.UNHEALTHY,
                    f"{ask.partition.month_key} is parked: {ask.reason}",
                )
        for key, bars in self.ledger.open_gaps().items():
            yield key, Status.DEGRADED, f"{bars} bars are missing and not explained yet"
        yield from self._red()
        yield from self._refused()

    def _failing(self) -> Iterator[_Reason]:
        for key, (count, _) in self.ledger.failing().items():
            yield (
                key,
                Status.UNHEALTHY if count >= FAILURES_IN_A_ROW else Status.DEGRADED,
                f"its last {count} ingests failed",
            )

    def _red(self) -> Iterator[_Reason]:
        for check in self.ledger.red_checks():
            if check.name != "gaps":  # told in bars
                worst = Status.UNHEALTHY if check.blocking else Status.DEGRADED
                yield (
                    check.partition.market.key,
                    worst,
                    f"{check.table} {check.partition.month_key} {check.name}: {check.says}",
                )

    def _refused(self) -> Iterator[_Reason]:
        for key, (refused, brought) in self.ledger.quarantine_rate(
            self.settings.now() - LOOK_BACK
        ).items():
            if brought and 100 * refused / brought >= QUARANTINE_PERCENT:
                yield (
                    key,
                    Status.DEGRADED,
                    f"{refused} of {brought} rows went to quarantine in 24 hours",
                )

    def _late(self) -> Iterator[_Reason]:
        for timeframe in self.settings.raw_timeframes:
            for found in freshness(
                self.settings,
                self.ledger,
                self.lake,
                timeframe=timeframe,
                markets=self.settings.markets,
            ):
                if found.late:
                    behind = (
                        f"{found.lag // MINUTE} minutes behind"
                        if found.through
                        else "nothing is stored"
                    )
                    yield (
                        found.market.key,
                        Status.UNHEALTHY if found.stale else Status.DEGRADED,
                        f"{raw(timeframe).name}: {behind}",
                    )


_Reason = tuple[str, Status, str]
"""Market key, how bad, why."""

"""Health: every market, every venue and the daemon, each healthy, degraded or unhealthy, with the
reasons.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum

from marketdata_assets.context import Toolbox
from marketdata_assets.flows.operate.freshness import freshness
from marketdata_assets.model.table import raw_table
from marketdata_assets.model.timeframe import MINUTE
from marketdata_assets.model.window import format_time

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


def health(toolbox: Toolbox) -> list[Health]:
    """The daemon, then the venues, then the markets, in the universe's order. Reads the ledger; sends
    no request.
    """
    markets = {m.key: Health("market", m.key) for m in toolbox.settings.markets}
    for key, status, reason in _market_reasons(toolbox):
        if key in markets:
            markets[key].add(status, reason)
    venues = [_venue(toolbox, name) for name in toolbox.settings.venues]
    return [_daemon(toolbox), *venues, *markets.values()]


def _daemon(toolbox: Toolbox) -> Health:
    found, beat = Health(DAEMON, DAEMON), toolbox.ledger.last_beat(DAEMON)
    if beat is None:
        found.add(Status.UNHEALTHY, "it never ran here: start `marketdata dev`")
    elif abs(toolbox.settings.now() - beat) > SILENT_AFTER:
        found.add(
            Status.UNHEALTHY,
            f"its last sensor tick was at {format_time(beat)}: start `marketdata dev`",
        )
    return found


def _venue(toolbox: Toolbox, name: str) -> Health:
    found, held, clock = (
        Health("venue", name),
        toolbox.ledger.venue_health(name),
        toolbox.policy.clock(),
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


_Reason = tuple[str, Status, str]
"""Market key, how bad, why."""


def _market_reasons(toolbox: Toolbox) -> Iterator[_Reason]:
    yield from _late(toolbox)
    yield from _failing(toolbox)
    for ask in toolbox.ledger.asks().values():
        if ask.parked_at:
            yield (
                ask.partition.market.key,
                Status.UNHEALTHY,
                f"{ask.partition.month_key} is parked: {ask.reason}",
            )
    for key, bars in toolbox.ledger.open_gaps().items():
        yield key, Status.DEGRADED, f"{bars} bars are missing and not explained yet"
    yield from _red(toolbox)
    yield from _refused(toolbox)


def _failing(toolbox: Toolbox) -> Iterator[_Reason]:
    for key, (count, _) in toolbox.ledger.failing().items():
        yield (
            key,
            Status.UNHEALTHY if count >= FAILURES_IN_A_ROW else Status.DEGRADED,
            f"its last {count} ingests failed",
        )


def _red(toolbox: Toolbox) -> Iterator[_Reason]:
    for check in toolbox.ledger.red_checks():
        if check.name != "gaps":  # told in bars
            worst = Status.UNHEALTHY if check.blocking else Status.DEGRADED
            yield (
                check.partition.market.key,
                worst,
                f"{check.table} {check.partition.month_key} {check.name}: {check.says}",
            )


def _refused(toolbox: Toolbox) -> Iterator[_Reason]:
    for key, (refused, brought) in toolbox.ledger.quarantine_rate(
        toolbox.settings.now() - LOOK_BACK
    ).items():
        if brought and 100 * refused / brought >= QUARANTINE_PERCENT:
            yield (
                key,
                Status.DEGRADED,
                f"{refused} of {brought} rows went to quarantine in 24 hours",
            )


def _late(toolbox: Toolbox) -> Iterator[_Reason]:
    for timeframe in toolbox.settings.raw_timeframes:
        for found in freshness(toolbox, timeframe, toolbox.settings.markets):
            if found.late:
                behind = (
                    f"{found.lag // MINUTE} minutes behind"
                    if found.through
                    else "nothing is stored"
                )
                yield (
                    found.market.key,
                    Status.UNHEALTHY if found.stale else Status.DEGRADED,
                    f"{raw_table(timeframe).name}: {behind}",
                )

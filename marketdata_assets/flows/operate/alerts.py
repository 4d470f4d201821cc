"""Alerts: what is wrong now becomes incidents, each opened once, recovered once and sent to
channels.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from threading import Thread
from urllib.parse import quote

from marketdata_assets.errors import StoreFailed
from marketdata_assets.flows.operate.freshness import market_freshness
from marketdata_assets.flows.operate.health import FAILURES_IN_A_ROW
from marketdata_assets.ledger.incidents import IncidentEvent, Notification, Problem
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import raw_table
from marketdata_assets.model.timeframe import MINUTE
from marketdata_assets.model.window import format_time, month_of
from marketdata_assets.notify import (
    AlertEvent,
    AlertSeverity,
    Channel,
    Message,
    NotSent,
    open_channels,
)
from marketdata_assets.settings.universe import Settings
from marketdata_assets.storage.lake import Lake

ALERTS_FILE = "alerts.jsonl"
EVALUATIONS = 3
"""A check of the open month that does not block is a problem after so many failures in a row."""
FAILURES_A_CALL = 2
"""So many messages may fail at one channel before the others wait for the next call."""
BLOCKING_TRIES = 20
"""A notification that failed so often no longer holds back those behind it; it is still tried."""
SEND_SECONDS = 5.0
"""For so long a call waits for its messages to be sent."""
RUN = "run"


@dataclass(frozen=True, slots=True)
class AlertCenter:
    """Finds problems by the ledger and keeps the incidents about them."""

    settings: Settings
    ledger: Ledger
    lake: Lake

    def find_problems(self) -> list[Problem]:
        """Return open breakers, stale markets, failures, parked partitions, failed checks and
        damaged objects.
        """
        return [
            *self._open_breakers(),
            *self._stale_markets(),
            *self._failures_in_a_row(),
            *self._parked_partitions(),
            *self._failed_checks(),
            *self._damaged_objects(),
        ]

    def update_incidents(
        self, problems: Sequence[Problem], is_unknown: Callable[[str], bool]
    ) -> tuple[int, int]:
        """Open what is new, recover what is over, and send every channel what it has not received.

        `problems` is everything that is wrong now, except for open incidents whose key `is_unknown`
        says was not looked at. A channel that fails keeps its notifications for the next call.
        Returns how many incidents were opened and recovered. Raises StoreFailed.
        """
        urls = tuple(url.get_secret_value() for url in self.settings.alerts)
        channels = open_channels(self.settings.state / ALERTS_FILE, urls)
        with self.ledger.lock("alerts"):
            open_incidents = self.ledger.incidents.open()
            keys = {problem.key for problem in problems}
            opened = [problem for problem in problems if problem.key not in open_incidents]
            recovered = [
                incident
                for key, incident in open_incidents.items()
                if key not in keys and not is_unknown(key)
            ]
            if opened or recovered:
                names = [channel.name for channel in channels]
                self.ledger.incidents.settle(
                    opened, recovered, channels=names, now=self.settings.now()
                )
        self._send_beside(channels)
        return len(opened), len(recovered)

    def _send_beside(self, channels: Sequence[Channel]) -> None:
        """Send by a thread for each channel, and wait SEND_SECONDS for all of them: a channel that
        answers slowly goes on beside whatever comes next. Raises StoreFailed.
        """
        failures: list[StoreFailed] = []

        def send(channel: Channel) -> None:
            name = f"alerts-{quote(channel.name, safe='')}"
            try:
                with self.ledger.lock(name, wait=False) as is_free:
                    if is_free:
                        self._deliver(channel)
            except StoreFailed as error:
                failures.append(error)

        threads = [Thread(target=send, args=(channel,), daemon=True) for channel in channels]
        end = time.monotonic() + SEND_SECONDS
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        if failures:
            raise failures[0]

    def _deliver(self, channel: Channel) -> None:
        """Send a channel's notifications in order, until one fails. Those that have failed often
        come last, so that a message that is never accepted keeps no other one waiting.

        A channel that answers nothing costs FAILURES_A_CALL times the deadline of one message.
        """
        pending = self.ledger.incidents.pending(channel.name)
        failures = 0
        for notification in sorted(pending, key=lambda each: max(0, each.tries - BLOCKING_TRIES)):
            try:
                channel.send(_message(notification))
            except NotSent as error:
                self.ledger.incidents.mark_failed(notification, str(error))
                failures += 1
                if notification.tries < BLOCKING_TRIES or failures == FAILURES_A_CALL:
                    return
                continue
            self.ledger.incidents.mark_sent(notification, self.settings.now())

    def _open_breakers(self) -> Iterator[Problem]:
        for name in self.settings.venues:
            if self.ledger.venues.health(name).broken_until > 0:
                body = (
                    "Its circuit breaker is open: nothing is requested until it answers again. If "
                    "that lasts, look at the venue."
                )
                title = f"{name} does not answer"
                yield Problem(f"breaker|{name}", AlertSeverity.CRITICAL, title, body)

    def _stale_markets(self) -> Iterator[Problem]:
        """Yield one problem per stale market, once its open month has been requested."""
        stale: dict[str, list[str]] = defaultdict(list)
        for timeframe in self.settings.raw_timeframes:
            table = raw_table(timeframe)
            for found in market_freshness(
                self.settings,
                self.ledger,
                self.lake,
                timeframe=timeframe,
                markets=self.settings.markets,
            ):
                month = month_of(self.settings.span(found.market).end - MINUTE)
                partition = Partition(found.market, month)
                if not found.is_stale or not found.through:
                    continue
                if self.ledger.partitions.get(table, partition):
                    minutes = found.lag // MINUTE
                    ended = f"newest bar ended at {format_time(found.through)}"
                    stale[found.market.key].append(
                        f"{table.name}: {ended}, {minutes} minutes behind"
                    )
        for key, tables in stale.items():
            body = f"{'; '.join(tables)}. See `marketdata health` and the venue's status page."
            yield Problem(f"stale|{key}", AlertSeverity.ERROR, f"{key} is stale", body)

    def _failures_in_a_row(self) -> Iterator[Problem]:
        for key, (count, error) in self.ledger.partitions.failure_streaks().items():
            if count >= FAILURES_IN_A_ROW:
                title = f"{key} failed {count} times in a row"
                yield Problem(f"failing|{key}", AlertSeverity.WARNING, title, error)

    def _parked_partitions(self) -> Iterator[Problem]:
        for attempt in self.ledger.attempts.all().values():
            if attempt.parked_at:
                market, key = attempt.partition.market.key, attempt.partition.key
                body = (
                    f"{attempt.reason} ({attempt.attempts} attempts). Mend the cause, then "
                    f"`marketdata parked --unpark --market {market}`."
                )
                yield Problem(f"parked|{key}", AlertSeverity.ERROR, f"{key} is parked", body)

    def _failed_checks(self) -> Iterator[Problem]:
        open_month = month_of(self.settings.now())
        for check in self.ledger.checks.failed():
            key, is_open = check.partition.key, check.partition.month == open_month
            if check.blocking or check.times >= EVALUATIONS or not is_open:
                severity = AlertSeverity.ERROR if check.blocking else AlertSeverity.WARNING
                title = f"{check.table} {check.name} is red for {key}"
                name = f"check|{check.table}|{check.name}|{key}"
                yield Problem(name, severity, title, check.message)

    def _damaged_objects(self) -> Iterator[Problem]:
        for name, partition in self.ledger.objects.damaged():
            body = (
                "Its object in the lake is damaged or was changed from outside. `backfill_missed` "
                "sets it aside and fetches it again; look at the disk, and at who may write there."
            )
            title = f"{name} {partition.key} is damaged"
            yield Problem(f"damaged|{name}|{partition.key}", AlertSeverity.ERROR, title, body)


def run_problem(job: str, venue: str, message: str) -> Problem:
    """Return the problem of a run that failed for good; one job at one venue is one incident."""
    subject = f"{job} at {venue}" if venue else job
    body = f"{message}. The run's page in the UI has its log."
    title = f"A run of {subject} failed"
    return Problem(f"{RUN}|{job}|{venue}", AlertSeverity.WARNING, title, body)


def unknown_runs(succeeded: Collection[str]) -> Callable[[str], bool]:
    """Return `is_unknown`: incidents of runs stay open until a run of their key has `succeeded`."""
    return lambda key: key.startswith(RUN + "|") and key not in succeeded


def _message(notification: Notification) -> Message:
    incident = notification.incident
    problem, is_opening = incident.problem, notification.event == IncidentEvent.OPENED
    at = incident.opened_at if is_opening else incident.recovered_at or incident.opened_at
    title = problem.title if is_opening else f"Recovered: {problem.title}"
    over = f"It began at {format_time(incident.opened_at)} and is over."
    body = problem.body if is_opening else over
    severity = AlertSeverity(problem.severity)
    event = AlertEvent(notification.event)
    return Message(
        incident=problem.key, event=event, severity=severity, title=title, body=body, at=at
    )

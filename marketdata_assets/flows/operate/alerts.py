"""Alerts: what is wrong now becomes incidents, each opened once and recovered once, told to every
channel.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence

from marketdata_assets.context import Toolbox
from marketdata_assets.flows.operate.freshness import freshness
from marketdata_assets.flows.operate.health import FAILURES_IN_A_ROW
from marketdata_assets.ledger.incidents import OPENED, Letter, Problem
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

FILE = "alerts.jsonl"
TIMES = 3
"""A check of the open month that does not block is told when it was red so many times in a row."""
STUBBORN = 20
"""A letter that could not be sent so often does not hold up those behind it any more; it is still
tried.
"""
RUN = "run"


def problems(toolbox: Toolbox) -> list[Problem]:
    """All that is wrong now by the ledger: breakers, stale markets, failures in a row, parked
    partitions, red checks.
    """
    return [
        *_breakers(toolbox),
        *_stale(toolbox),
        *_failing(toolbox),
        *_parked(toolbox),
        *_red(toolbox),
    ]


def settle(
    toolbox: Toolbox, now_wrong: Sequence[Problem], goes_on: Callable[[str], bool]
) -> tuple[int, int]:
    """Open what is new, end what is over, tell every channel what it was not told; how many opened and
    recovered.

    `now_wrong` is the whole picture, but for open incidents of whose key `goes_on` says that nobody
    looked. A channel that fails keeps its letters for the next call; the others go on.
    """
    channels = open_channels(toolbox.settings.state / FILE, toolbox.settings.alerts)
    with toolbox.ledger.lock("alerts"):
        was = toolbox.incidents.open()
        keys = {problem.key for problem in now_wrong}
        opened = [problem for problem in now_wrong if problem.key not in was]
        ended = [incident for key, incident in was.items() if key not in keys and not goes_on(key)]
        if opened or ended:
            toolbox.incidents.settle(
                opened, ended, [c.name for c in channels], toolbox.settings.now()
            )
        for channel in channels:
            _deliver(toolbox, channel)
    return len(opened), len(ended)


def run_problem(job: str, venue: str, says: str) -> Problem:
    """A run that failed for good. The same job at the same venue is the same incident."""
    about = f"{job} at {venue}" if venue else job
    return Problem(
        f"{RUN}|{job}|{venue}",
        AlertSeverity.WARNING,
        f"A run of {about} failed",
        f"{says}. The run's page in the UI has its log.",
    )


def _deliver(toolbox: Toolbox, channel: Channel) -> None:
    """All unsent letters of one channel, in order, until one cannot be sent; it is kept for the next
    time.
    """
    for letter in toolbox.incidents.unsent(channel.name):
        try:
            channel.send(_message(letter))
        except NotSent as error:
            toolbox.incidents.not_sent(letter, str(error))
            if letter.tries < STUBBORN:
                return
            continue
        toolbox.incidents.sent(letter, toolbox.settings.now())


def _message(letter: Letter) -> Message:
    incident = letter.incident
    problem, opened = incident.problem, letter.event == OPENED
    at = incident.opened_at if opened else incident.recovered_at or incident.opened_at
    title = problem.title if opened else f"Recovered: {problem.title}"
    body = problem.body if opened else f"It began at {format_time(incident.opened_at)} and is over."
    return Message(
        incident=problem.key,
        event=AlertEvent(letter.event),
        severity=AlertSeverity(problem.severity),
        title=title,
        body=body,
        at=at,
    )


# --------------------------------------------------------------------------------- what is wrong no
def _breakers(toolbox: Toolbox) -> Iterator[Problem]:
    for name in toolbox.settings.venues:
        held = toolbox.ledger.venue_health(name)
        if held.broken_until > 0:
            body = "Its circuit breaker is open: nothing is asked until it answers again. If that lasts, look at the venue."
            yield Problem(
                f"breaker|{name}", AlertSeverity.CRITICAL, f"{name} does not answer", body
            )


def _stale(toolbox: Toolbox) -> Iterator[Problem]:
    """One for a market, whatever of it is stale; none before its open month was asked for once."""
    stale: dict[str, list[str]] = defaultdict(list)
    for timeframe in toolbox.settings.raw_timeframes:
        for found in freshness(toolbox, timeframe, toolbox.settings.markets):
            month = month_of(toolbox.settings.span(found.market).end - MINUTE)
            if (
                found.stale
                and found.through
                and toolbox.ledger.state(raw_table(timeframe), Partition(found.market, month))
            ):
                behind = f"newest bar ended at {format_time(found.through)}, {found.lag // MINUTE} minutes behind"
                stale[found.market.key].append(f"{raw_table(timeframe).name}: {behind}")
    for key, tables in stale.items():
        body = f"{'; '.join(tables)}. See `marketdata health` and the venue's status page."
        yield Problem(f"stale|{key}", AlertSeverity.ERROR, f"{key} is stale", body)


def _failing(toolbox: Toolbox) -> Iterator[Problem]:
    for key, (count, error) in toolbox.ledger.failing().items():
        if count >= FAILURES_IN_A_ROW:
            yield Problem(
                f"failing|{key}",
                AlertSeverity.WARNING,
                f"{key} failed {count} times in a row",
                error,
            )


def _parked(toolbox: Toolbox) -> Iterator[Problem]:
    for ask in toolbox.ledger.asks().values():
        if ask.parked_at:
            market, key = ask.partition.market.key, ask.partition.key
            body = f"{ask.reason} ({ask.attempts} attempts). Mend the cause, then `marketdata parked --unpark --market {market}`."
            yield Problem(f"parked|{key}", AlertSeverity.ERROR, f"{key} is parked", body)


def _red(toolbox: Toolbox) -> Iterator[Problem]:
    month = month_of(toolbox.settings.now())
    for check in toolbox.ledger.red_checks():
        if check.blocking or check.times >= TIMES or check.partition.month != month:
            severity = AlertSeverity.ERROR if check.blocking else AlertSeverity.WARNING
            title = f"{check.table} {check.name} is red for {check.partition.key}"
            yield Problem(
                f"check|{check.table}|{check.name}|{check.partition.key}",
                severity,
                title,
                check.says,
            )


def failed_runs_go_on(over: Collection[str]) -> Callable[[str], bool]:
    """For `settle`: incidents of runs stay open until a run of the same key in `over` succeeded."""
    return lambda key: key.startswith(RUN + "|") and key not in over

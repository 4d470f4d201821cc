"""Incidents open once, recover once and reach every channel; health reports its reasons."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from pydantic import SecretStr

from marketdata_assets.context import open_context
from marketdata_assets.flows.operate import alerts
from marketdata_assets.flows.operate.alerts import AlertCenter, run_problem, unknown_runs
from marketdata_assets.flows.operate.health import HealthInspector
from marketdata_assets.flows.operate.prune import delete_old_records
from marketdata_assets.ledger.checks import CheckFailure
from marketdata_assets.ledger.incidents import Problem
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.ledger.records import IngestFailure
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import raw_table
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.notify import Message, NotSent
from marketdata_assets.settings.universe import Settings
from marketdata_assets.sources.sandbox.server import SandboxExchange
from marketdata_tests.conftest import Universe
from marketdata_tests.processes import wait_until
from marketdata_tests.steps import at, run_derive, run_ingest, serving

RAW = raw_table(TIMEFRAMES["1m"])
NOW = "2024-01-10T00:00:00Z"
BTC = Partition.parse("binance:BTC-USDT|2024-01-01")
STALE = Problem("stale|x", "error", "x is stale", "its newest bar is old")


@pytest.fixture
def settings(
    either_database: None, sandbox: tuple[SandboxExchange, str], universe: Universe
) -> Settings:
    return universe(sandbox[1], symbols="[BTC/USDT, ETH/USDT]", since="2024-01-09", now=NOW)


@pytest.fixture
def full_lake(settings: Settings) -> Settings:
    run_ingest(settings)
    run_derive(settings)
    return settings


def at_time(settings: Settings, now: str) -> Settings:
    assert settings.clock
    return settings.model_copy(
        update={"clock": settings.clock.model_copy(update={"start": at(now)})}
    )


def alert_lines(settings: Settings) -> list[dict[str, str]]:
    file = Path(settings.state, "alerts.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def update_incidents(
    settings: Settings, problems: list[Problem], is_ongoing: Any = lambda key: False
) -> tuple[int, int]:
    with open_context(settings) as context:
        return context.bind(AlertCenter).update_incidents(problems, is_ongoing)


def find_problems(settings: Settings) -> dict[str, Problem]:
    with open_context(settings) as context:
        return {problem.key: problem for problem in context.bind(AlertCenter).find_problems()}


def record_failure(ledger: Ledger, settings: Settings) -> None:
    """Write down that an ingest of BTC failed."""
    failure = IngestFailure(RAW, BTC, BTC.month, error="HTTP 403", fetches=[], now=settings.now())
    ledger.partitions.record_failure(failure)


def set_check(
    ledger: Ledger, partition: Partition, name: str, failure: CheckFailure | None
) -> None:
    ledger.checks.set(RAW, partition, {name: failure}, now=at(NOW))


# --------------------------------------------------------------------------------- incidents
def test_an_incident_sends_one_alert_at_its_begin_and_one_at_its_end(settings: Settings) -> None:
    assert update_incidents(settings, [STALE]) == (1, 0)
    assert update_incidents(settings, [STALE]) == (0, 0)
    assert update_incidents(at_time(settings, "2024-01-10T02:00:00Z"), []) == (0, 1)
    assert update_incidents(settings, []) == (0, 0)
    opened, recovered = alert_lines(settings)
    assert (opened["event"], opened["severity"], opened["title"], opened["at"]) == (
        "opened",
        "error",
        "x is stale",
        NOW,
    )
    assert (recovered["event"], recovered["title"], recovered["at"]) == (
        "recovered",
        "Recovered: x is stale",
        "2024-01-10T02:00:00Z",
    )
    assert update_incidents(settings, [STALE]) == (1, 0)  # a recurrence is a new incident
    assert len(alert_lines(settings)) == 3


def test_a_failed_run_recovers_when_a_run_of_its_kind_succeeds(settings: Settings) -> None:
    problem = run_problem("ingest", "binance", "Run 12345678")
    assert update_incidents(settings, [problem], unknown_runs(set())) == (1, 0)
    assert update_incidents(settings, [], unknown_runs({"run|ingest|kraken"})) == (0, 0)
    assert update_incidents(settings, [], unknown_runs({problem.key})) == (0, 1)


def test_a_channel_that_is_down_gets_alerts_later_and_delays_no_other(settings: Settings) -> None:
    received: list[dict[str, Any]] = []
    down = True

    async def hook(request: web.Request) -> web.Response:
        if down:
            return web.Response(status=503)
        received.append(await request.json())
        return web.Response()

    with serving(hook) as url:
        secret = SecretStr(url.replace("http://", "json://") + "/secret-token")
        hooked = settings.model_copy(update={"alerts": (secret,)})
        assert update_incidents(hooked, [STALE]) == (1, 0)
        assert update_incidents(hooked, []) == (0, 1)
        assert [line["event"] for line in alert_lines(settings)] == ["opened", "recovered"]
        with open_context(hooked) as context:
            ((channel, (waiting, why)),) = context.ledger.incidents.backlogs().items()
        assert (channel, waiting) == ("json-1", 1)  # the second waits behind the first
        assert "secret-token" not in why
        down = False
        assert update_incidents(hooked, []) == (0, 0)
    assert [message["title"] for message in received] == ["x is stale", "Recovered: x is stale"]
    with open_context(hooked) as context:
        assert context.ledger.incidents.backlogs() == {}
    assert len(alert_lines(settings)) == 2


def test_a_channel_that_never_accepts_costs_two_messages_a_call(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many are due and however often they have failed; a new one is not kept behind."""
    tried: list[str] = []

    class Dead:
        name = "dead"

        def send(self, message: Message) -> None:
            tried.append(message.incident)
            raise NotSent("dead does not answer")

    monkeypatch.setattr(alerts, "open_channels", lambda file, urls: [Dead()])
    problems = [Problem(f"stale|{i}", "error", "stale", "") for i in range(4)]
    new = Problem("stale|new", "error", "stale", "")
    with open_context(settings) as context:
        center = context.bind(AlertCenter)
        center.update_incidents(problems, lambda key: False)
        for _ in range(6 * alerts.BLOCKING_TRIES):
            tried.clear()
            center.update_incidents([*problems, new], lambda key: False)
            assert 1 <= len(tried) <= alerts.FAILURES_A_CALL
            if new.key in tried:
                return
    pytest.fail("a new message was never tried")


def test_a_channel_that_hangs_holds_no_call_and_no_other_channel(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 alerts are due on it. It is sent to beside the calls, by one thread at a time."""
    answer, hanging, sent = threading.Event(), threading.Semaphore(0), list[str]()

    class Hanging:
        name = "hangs"

        def send(self, message: Message) -> None:
            hanging.release()
            answer.wait(60)
            sent.append(message.incident)

    class Quick:
        name = "quick"

        def send(self, message: Message) -> None:
            sent.append(f"quick {message.incident}")

    monkeypatch.setattr(alerts, "open_channels", lambda file, urls: [Hanging(), Quick()])
    monkeypatch.setattr(alerts, "SEND_SECONDS", 0.2)
    problems = [Problem(f"stale|{i}", "error", "stale", "") for i in range(40)]
    with open_context(settings) as context:
        center = context.bind(AlertCenter)
        for _ in range(3):
            center.update_incidents(problems, lambda key: False)
    assert hanging.acquire(timeout=10)
    assert not hanging.acquire(blocking=False), "two threads send to one channel"
    assert all(name.startswith("quick") for name in sent)
    answer.set()
    wait_until(lambda: len(sent) == 80, 20, "all are sent")


def test_old_incidents_are_removed_and_open_ones_stay(settings: Settings) -> None:
    other = Problem("stale|y", "error", "y is stale", "")
    update_incidents(settings, [STALE, other])
    update_incidents(settings, [other])
    later = at_time(settings, "2024-01-30T00:00:00Z")
    with open_context(later) as context:

        def delete_incidents(days: float, dry_run: bool = False) -> int:
            counts = delete_old_records(
                context.settings, context.ledger, context.clock, days=days, dry_run=dry_run
            )
            return counts["incidents"]

        assert delete_incidents(30) == 0
        assert delete_incidents(14, dry_run=True) == 1
        assert len(context.ledger.incidents.history(9)) == 2
        assert delete_incidents(14) == 1
        remaining = context.ledger.incidents.history(9)
        assert [incident.problem.key for incident in remaining] == ["stale|y"]


# --------------------------------------------------------------------------------- problems
def test_a_complete_lake_has_no_problem(full_lake: Settings) -> None:
    assert find_problems(full_lake) == {}


def test_a_market_is_stale_by_its_newest_bar(full_lake: Settings) -> None:
    assert find_problems(at_time(full_lake, "2024-01-10T01:00:00Z")) == {}
    problems = find_problems(at_time(full_lake, "2024-01-10T01:01:00Z"))
    assert set(problems) == {"stale|binance:BTC-USDT", "stale|binance:ETH-USDT"}
    assert (
        "raw/ohlcv_1m: newest bar ended at 2024-01-10T00:00:00Z, 61 minutes behind"
        in problems["stale|binance:BTC-USDT"].body
    )


def test_the_limits_of_freshness_come_from_the_universe(
    sandbox: Any, universe: Universe, full_lake: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MARKETDATA_FRESHNESS", "{1m: {warn: 1, error: 5}}")
    strict = universe(
        sandbox[1], symbols="[BTC/USDT, ETH/USDT]", since="2024-01-09", now="2024-01-10T00:06:00Z"
    )
    assert len(find_problems(strict)) == 2


def test_three_failures_of_a_market_and_an_open_breaker_are_problems(full_lake: Settings) -> None:
    with open_context(full_lake) as context:
        for _ in range(3):
            record_failure(context.ledger, full_lake)
        for _ in range(30):
            context.ledger.venues.record("binance", False, context.clock())
    problems = find_problems(full_lake)
    assert set(problems) == {"breaker|binance", "failing|binance:BTC-USDT"}
    assert problems["breaker|binance"].severity == "critical"
    assert problems["failing|binance:BTC-USDT"].body == "HTTP 403"
    with open_context(full_lake) as context:
        context.ledger.venues.record("binance", True, context.clock())
    assert set(find_problems(full_lake)) == {"failing|binance:BTC-USDT"}


def test_parked_partitions_and_red_checks_are_problems(full_lake: Settings) -> None:
    past = Partition.parse("binance:BTC-USDT|2023-12-01")
    with open_context(full_lake) as context:
        context.ledger.attempts.add([(past, "never fetched")], full_lake.now())
        context.ledger.attempts.park([(past, "failed: HTTP 403")], full_lake.now())
        set_check(context.ledger, past, "gaps", CheckFailure(False, "7 bars are missing"))
        set_check(context.ledger, BTC, "gaps", CheckFailure(False, "2 bars are missing"))
        set_check(context.ledger, BTC, "ohlc", CheckFailure(True, "1 bars break a rule"))
    problems = find_problems(full_lake)
    assert {key: problem.severity for key, problem in problems.items()} == {
        f"parked|{past.key}": "error",
        f"check|raw/ohlcv_1m|gaps|{past.key}": "warning",
        f"check|raw/ohlcv_1m|ohlc|{BTC.key}": "error",
    }
    # gaps of the open month are a problem only when they stay
    with open_context(full_lake) as context:
        for _ in range(2):
            set_check(context.ledger, BTC, "gaps", CheckFailure(False, "2 bars are missing"))
    assert f"check|raw/ohlcv_1m|gaps|{BTC.key}" in find_problems(full_lake)
    with open_context(full_lake) as context:
        for name in ("gaps", "ohlc"):
            set_check(context.ledger, BTC, name, None)
            set_check(context.ledger, past, name, None)
    assert set(find_problems(full_lake)) == {f"parked|{past.key}"}


# --------------------------------------------------------------------------------- health
def statuses(settings: Settings) -> dict[str, tuple[str, list[str]]]:
    with open_context(settings) as context:
        return {
            h.subject: (h.status.value, h.reasons) for h in context.bind(HealthInspector).inspect()
        }


def test_a_complete_lake_is_healthy(full_lake: Settings) -> None:
    with open_context(full_lake) as context:
        context.ledger.heartbeats.record("daemon", at("2024-01-09T23:59"))
    healthy = ("healthy", [])
    assert statuses(full_lake) == {
        "daemon": healthy,
        "binance": healthy,
        "binance:BTC-USDT": healthy,
        "binance:ETH-USDT": healthy,
    }


def test_health_reports_every_reason(full_lake: Settings) -> None:
    with open_context(full_lake) as context:
        context.ledger.heartbeats.record("daemon", at("2024-01-09T23:00"))
        context.ledger.venues.record("binance", False, context.clock())
        record_failure(context.ledger, full_lake)
        set_check(context.ledger, BTC, "ohlc", CheckFailure(True, "1 bars break a rule"))
    found = statuses(at_time(full_lake, "2024-01-10T00:20:00Z"))
    assert found["daemon"] == (
        "unhealthy",
        ["its last sensor tick was at 2024-01-09T23:00:00Z: start `marketdata dev`"],
    )
    assert found["binance"] == ("degraded", ["its last 1 requests failed"])
    assert found["binance:ETH-USDT"] == ("degraded", ["raw/ohlcv_1m: 20 minutes behind"])
    status, reasons = found["binance:BTC-USDT"]
    assert status == "unhealthy"
    assert reasons == [
        "raw/ohlcv_1m: 20 minutes behind",
        "its last 1 ingests failed",
        "raw/ohlcv_1m 2024-01-01 ohlc: 1 bars break a rule",
    ]


def test_a_universe_that_never_ran_is_unhealthy(settings: Settings) -> None:
    found = statuses(settings)
    assert found["daemon"][0] == "unhealthy"
    assert found["binance"] == ("healthy", [])
    assert found["binance:BTC-USDT"] == ("unhealthy", ["raw/ohlcv_1m: nothing is stored"])

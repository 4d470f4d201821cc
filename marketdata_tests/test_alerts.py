"""Incidents: opened once, recovered once, told to every channel however long that takes; and health
with its reasons.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from pydantic import SecretStr

from marketdata_assets.context import open_context
from marketdata_assets.flows.operate.alerts import AlertCenter, failed_runs_go_on, run_problem
from marketdata_assets.flows.operate.health import HealthInspector
from marketdata_assets.flows.operate.prune import forget
from marketdata_assets.ledger.incidents import Problem
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import raw_table
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.settings.universe import Settings
from marketdata_assets.sources.sandbox.server import SandboxExchange
from marketdata_tests.conftest import Universe
from marketdata_tests.steps import at, run_derive, run_ingest, serving
from marketdata_tests.test_missed import at_time

RAW = raw_table(TIMEFRAMES["1m"])
NOW = "2024-01-10T00:00:00Z"
BTC = Partition.parse("binance:BTC-USDT|2024-01-01")
WRONG = Problem("stale|x", "error", "x is stale", "its newest bar is old")


@pytest.fixture
def settings(
    either_database: None, sandbox: tuple[SandboxExchange, str], universe: Universe
) -> Settings:
    return universe(sandbox[1], symbols="[BTC/USDT, ETH/USDT]", since="2024-01-09", now=NOW)


@pytest.fixture
def filled(settings: Settings) -> Settings:
    run_ingest(settings)
    run_derive(settings)
    return settings


def lines(settings: Settings) -> list[dict[str, str]]:
    file = Path(settings.state, "alerts.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def settled(
    settings: Settings, wrong: list[Problem], goes_on: Any = lambda key: False
) -> tuple[int, int]:
    with open_context(settings) as context:
        return context.bind(AlertCenter).update_incidents(wrong, goes_on)


def found(settings: Settings) -> dict[str, Problem]:
    with open_context(settings) as context:
        return {problem.key: problem for problem in context.bind(AlertCenter).find_problems()}


# --------------------------------------------------------------------------------- incidents
def test_one_alert_when_it_begins_and_one_when_it_is_over(settings: Settings) -> None:
    assert settled(settings, [WRONG]) == (1, 0)
    assert settled(settings, [WRONG]) == (0, 0)
    assert settled(at_time(settings, "2024-01-10T02:00:00Z"), []) == (0, 1)
    assert settled(settings, []) == (0, 0)
    opened, recovered = lines(settings)
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
    assert settled(settings, [WRONG]) == (1, 0)  # the same again is a new incident
    assert len(lines(settings)) == 3


def test_runs_recover_when_a_run_of_the_same_kind_succeeds(settings: Settings) -> None:
    problem = run_problem("ingest", "binance", "Run 12345678")
    assert settled(settings, [problem], failed_runs_go_on(set())) == (1, 0)
    assert settled(settings, [], failed_runs_go_on({"run|ingest|kraken"})) == (0, 0)
    assert settled(settings, [], failed_runs_go_on({problem.key})) == (0, 1)


def test_a_channel_that_is_down_is_told_later_and_holds_up_nobody(settings: Settings) -> None:
    told: list[dict[str, Any]] = []
    down = True

    async def hook(request: web.Request) -> web.Response:
        if down:
            return web.Response(status=503)
        told.append(await request.json())
        return web.Response()

    with serving(hook) as url:
        secret = SecretStr(url.replace("http://", "json://") + "/secret-token")
        hooked = settings.model_copy(update={"alerts": (secret,)})
        assert settled(hooked, [WRONG]) == (1, 0)
        assert settled(hooked, []) == (0, 1)
        assert [line["event"] for line in lines(settings)] == ["opened", "recovered"]
        with open_context(hooked) as context:
            ((channel, (waiting, why)),) = context.ledger.incidents.backlogs().items()
        assert (channel, waiting) == ("json-1", 1)  # the second waits behind the first
        assert "secret-token" not in why
        down = False
        assert settled(hooked, []) == (0, 0)
    assert [message["title"] for message in told] == ["x is stale", "Recovered: x is stale"]
    with open_context(hooked) as context:
        assert context.ledger.incidents.backlogs() == {}
    assert len(lines(settings)) == 2


def test_old_incidents_are_forgotten_and_open_ones_never(settings: Settings) -> None:
    other = Problem("stale|y", "error", "y is stale", "")
    settled(settings, [WRONG, other])
    settled(settings, [other])
    later = at_time(settings, "2024-01-30T00:00:00Z")
    with open_context(later) as context:
        assert forget(context.settings, context.ledger, context.clock, days=30)["incidents"] == 0
        assert (
            forget(context.settings, context.ledger, context.clock, days=14, dry_run=True)[
                "incidents"
            ]
            == 1
        )
        assert len(context.ledger.incidents.history(9)) == 2
        assert forget(context.settings, context.ledger, context.clock, days=14)["incidents"] == 1
        assert [incident.problem.key for incident in context.ledger.incidents.history(9)] == [
            "stale|y"
        ]


# --------------------------------------------------------------------------------- what is wrong
def test_nothing_is_wrong_with_what_is_whole(filled: Settings) -> None:
    assert found(filled) == {}


def test_a_stale_market_by_its_newest_bar(filled: Settings) -> None:
    assert found(at_time(filled, "2024-01-10T01:00:00Z")) == {}
    wrong = found(at_time(filled, "2024-01-10T01:01:00Z"))
    assert set(wrong) == {"stale|binance:BTC-USDT", "stale|binance:ETH-USDT"}
    assert (
        "raw/ohlcv_1m: newest bar ended at 2024-01-10T00:00:00Z, 61 minutes behind"
        in wrong["stale|binance:BTC-USDT"].body
    )


def test_limits_come_from_the_universe(
    sandbox: Any, universe: Universe, filled: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MARKETDATA_FRESHNESS", "{1m: {warn: 1, error: 5}}")
    strict = universe(
        sandbox[1], symbols="[BTC/USDT, ETH/USDT]", since="2024-01-09", now="2024-01-10T00:06:00Z"
    )
    assert len(found(strict)) == 2


def test_a_market_that_fails_three_times_and_a_breaker(filled: Settings) -> None:
    with open_context(filled) as context:
        for _ in range(3):
            context.ledger.fail(RAW, BTC, BTC.month, "it says no", [], filled.now())
        for _ in range(30):
            context.ledger.venues.record("binance", False, context.policy.clock())
    wrong = found(filled)
    assert set(wrong) == {"breaker|binance", "failing|binance:BTC-USDT"}
    assert wrong["breaker|binance"].severity == "critical"
    assert wrong["failing|binance:BTC-USDT"].body == "it says no"
    with open_context(filled) as context:
        context.ledger.venues.record("binance", True, context.policy.clock())
    assert set(found(filled)) == {"failing|binance:BTC-USDT"}


def test_parked_partitions_and_red_checks(filled: Settings) -> None:
    past = Partition.parse("binance:BTC-USDT|2023-12-01")
    with open_context(filled) as context:
        context.ledger.attempts.add([(past, "never fetched")], filled.now())
        context.ledger.attempts.park([(past, "failed: it says no")], filled.now())
        context.ledger.set_check(RAW, past, "gaps", (False, "7 bars are missing"), filled.now())
        context.ledger.set_check(RAW, BTC, "gaps", (False, "2 bars are missing"), filled.now())
        context.ledger.set_check(RAW, BTC, "ohlc", (True, "1 bars break a rule"), filled.now())
    wrong = found(filled)
    assert {key: problem.severity for key, problem in wrong.items()} == {
        f"parked|{past.key}": "error",
        f"check|raw/ohlcv_1m|gaps|{past.key}": "warning",
        f"check|raw/ohlcv_1m|ohlc|{BTC.key}": "error",
    }
    with open_context(filled) as context:  # the open month's gaps are told when they stay
        for _ in range(2):
            context.ledger.set_check(RAW, BTC, "gaps", (False, "2 bars are missing"), filled.now())
    assert f"check|raw/ohlcv_1m|gaps|{BTC.key}" in found(filled)
    with open_context(filled) as context:
        for name in ("gaps", "ohlc"):
            context.ledger.set_check(RAW, BTC, name, None, filled.now())
            context.ledger.set_check(RAW, past, name, None, filled.now())
    assert set(found(filled)) == {f"parked|{past.key}"}


# --------------------------------------------------------------------------------- health
def statuses(settings: Settings) -> dict[str, tuple[str, list[str]]]:
    with open_context(settings) as context:
        return {
            h.subject: (h.status.value, h.reasons) for h in context.bind(HealthInspector).inspect()
        }


def test_health_of_what_is_whole(filled: Settings) -> None:
    with open_context(filled) as context:
        context.ledger.heartbeats.record("daemon", at("2024-01-09T23:59"))
    whole = ("healthy", [])
    assert statuses(filled) == {
        "daemon": whole,
        "binance": whole,
        "binance:BTC-USDT": whole,
        "binance:ETH-USDT": whole,
    }


def test_health_says_why(filled: Settings) -> None:
    with open_context(filled) as context:
        context.ledger.heartbeats.record("daemon", at("2024-01-09T23:00"))
        context.ledger.venues.record("binance", False, context.policy.clock())
        context.ledger.fail(RAW, BTC, BTC.month, "it says no", [], filled.now())
        context.ledger.set_check(RAW, BTC, "ohlc", (True, "1 bars break a rule"), filled.now())
    found = statuses(at_time(filled, "2024-01-10T00:20:00Z"))
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


def test_health_of_a_universe_that_never_ran(settings: Settings) -> None:
    found = statuses(settings)
    assert found["daemon"][0] == "unhealthy"
    assert found["binance"] == ("healthy", [])
    assert found["binance:BTC-USDT"] == ("unhealthy", ["raw/ohlcv_1m: nothing is stored"])

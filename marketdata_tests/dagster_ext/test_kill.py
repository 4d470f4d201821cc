"""SIGKILL at random moments of a backfill: no bar is lost, doubled or half-written.

What is stored can be read after every kill. MARKETDATA_TEST_KILLS sets how many kills (default 3),
MARKETDATA_TEST_SEED at which moments.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from marketdata_assets.context import open_context
from marketdata_assets.flows.read.bars import BarReader
from marketdata_assets.flows.read.coverage import CoverageReporter
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.model.window import Window, parse_time
from marketdata_assets.settings.universe import Settings
from marketdata_assets.sources.sandbox.bars import generate_bars
from marketdata_assets.sources.sandbox.server import SandboxExchange
from marketdata_tests.conftest import Universe

KILLS = int(os.environ.get("MARKETDATA_TEST_KILLS", "3"))
SPAN = Window(parse_time("2023-11-01"), parse_time("2024-01-01"))
SYMBOLS = {"BTC/USDT": "BTCUSDT", "ETH/USDT": "ETHUSDT"}
RUN_STATUSES = """
from marketdata_assets.dagster_ext.runs import open_instance
with open_instance() as instance:
    print(*{run.status.value for run in instance.get_runs()})
"""
"""Opens the instance, which ends killed runs: the last backfill may have had nothing to do."""


def start_backfill() -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "marketdata_assets.cli.main", "backfill"]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )


def kill_after_first_request(exchange: SandboxExchange, delay: float, at_worker: bool) -> None:
    """Start a backfill, and kill it or a worker of it `delay` seconds after its first request."""
    before = bar_requests(exchange)
    process = start_backfill()
    while process.poll() is None and bar_requests(exchange) == before:
        threading.Event().wait(0.02)
    try:
        process.wait(delay)
    except subprocess.TimeoutExpired:
        backfill = psutil.Process(process.pid)
        workers = backfill.children() if at_worker else []
        (workers[0] if workers else backfill).kill()
    process.communicate(timeout=60)


def bar_requests(exchange: SandboxExchange) -> int:
    return sum("klines" in seen.path for seen in exchange.requests)


def assert_readable_and_true(settings: Settings, whole: bool) -> None:
    """Every stored bar is the exchange's; with `whole`, every bar of the exchange is stored."""
    with open_context(settings) as context:
        for market in settings.markets:
            for name in ("1m", "1h", "1d"):
                expected = generate_bars(SYMBOLS[market.symbol], name, SPAN)
                found = (
                    context.bind(BarReader)
                    .read(market, TIMEFRAMES[name], SPAN)
                    .select(expected.columns)
                )
                expected = (
                    expected
                    if whole
                    else expected.join(found.select("open_time"), on="open_time", how="semi")
                )
                assert found.equals(expected), f"{market} {name}"


@pytest.mark.timeout(120 + 40 * KILLS)
def test_kill_at_random_moments(
    sandbox: tuple[SandboxExchange, str], universe: Universe, tmp_path: Path
) -> None:
    exchange, url = sandbox
    settings = universe(
        url,
        symbols="[BTC/USDT, ETH/USDT]",
        since="2023-11-01",
        until="2024-01-01",
        extra="reference: [1h]",
    )
    dice = random.Random(os.environ.get("MARKETDATA_TEST_SEED"))
    for _ in range(KILLS):
        kill_after_first_request(exchange, dice.uniform(0, 4), at_worker=dice.random() < 0.3)
        assert_readable_and_true(settings, whole=False)
    last = start_backfill()
    _, errors = last.communicate(timeout=120)
    assert last.returncode == 0, errors.decode()
    assert_readable_and_true(settings, whole=True)
    assert not list((tmp_path / "lake" / ".writing").iterdir())
    with open_context(settings) as context:
        assert all(
            row["received"] == row["stored"] + row["identical"] + row["quarantined"]
            for row in context.ledger.partitions.accounts()
        )
        assert all(
            c.not_fetched == 0 for c in context.bind(CoverageReporter).report(settings.markets)
        )
    environment = {**os.environ, "DAGSTER_HOME": str(tmp_path / "state" / "dagster")}
    status = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN_STATUSES],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(status.stdout.split()) <= {"SUCCESS", "FAILURE"}

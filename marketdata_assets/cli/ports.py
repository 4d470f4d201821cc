"""TCP ports on loopback: which are free, and whether a server answers."""

from __future__ import annotations

import json
import socket
import subprocess
import urllib.request
from collections.abc import Callable

from marketdata_assets.errors import BadInput, StoreFailed

_STARTUP_SECONDS = 120
_CHECK_SECONDS = 0.1


def find_free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def check_port_free(port: int) -> None:
    """Raise BadInput where something listens on the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise BadInput(f"port {port} is taken; choose another with --port") from None


def get_url(url: str) -> None:
    """Raise OSError unless the URL answers."""
    with urllib.request.urlopen(url, timeout=5):  # noqa: S310 - loopback, written here
        pass


def reload_location(url: str, name: str) -> None:
    """Make a web server load a code location again. Raises OSError."""
    query = (
        "mutation($name: String!) "
        "{reloadRepositoryLocation(repositoryLocationName: $name) {__typename}}"
    )
    body = json.dumps({"query": query, "variables": {"name": name}}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/graphql", body, headers)  # noqa: S310 - written here
    with urllib.request.urlopen(request, timeout=60):  # noqa: S310
        pass


def connect(port: int) -> None:
    """Raise OSError unless a server listens on the port."""
    with socket.create_connection(("127.0.0.1", port), timeout=5):
        pass


def wait_until_ready(probe: Callable[[], None], server: subprocess.Popen[str]) -> None:
    """Wait until `probe` raises no OSError. Raises StoreFailed where the server ends or is slow."""
    for _ in range(round(_STARTUP_SECONDS / _CHECK_SECONDS)):
        try:
            return probe()
        except OSError:
            pass
        try:
            server.wait(_CHECK_SECONDS)
        except subprocess.TimeoutExpired:
            continue
        raise StoreFailed("a server ended while it started; its messages are above")
    raise StoreFailed(
        f"a server did not answer within {_STARTUP_SECONDS} s; its messages are above"
    )

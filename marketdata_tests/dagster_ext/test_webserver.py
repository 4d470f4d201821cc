"""The guard before Dagster's web server: which requests it passes on."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any

import pytest

from marketdata_assets.dagster_ext.webserver import WebGuard

OURS = {"host": "127.0.0.1:3000"}
JSON = {**OURS, "content-type": "application/json"}
TOKEN = "a-token-of-24-characters"
REPORT = "/report_asset_materialization/raw/ohlcv_1m"


def answer(
    method: str, path: str, headers: dict[str, str], query: str = "", token: str | None = None
) -> str:
    """Return `passed`, the status of the refusal, or `closed` for a websocket (method WS)."""
    sent: list[MutableMapping[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "passed"})

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.request"}

    scope = {
        "type": "websocket" if method == "WS" else "http",
        "method": method,
        "path": path,
        "query_string": query.encode(),
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }
    guard = WebGuard(app, ["ui.example.com"], token)
    asyncio.run(guard(scope, receive, send))
    kind = sent[0]["type"]
    if kind == "websocket.close":
        return "closed"
    return "passed" if kind == "passed" else str(sent[0]["status"])


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        ("GET", "/", OURS),
        ("GET", "/", {"host": "localhost:3000"}),
        ("GET", "/", {"host": "[::1]:3000"}),
        ("GET", "/", {"host": "10.0.0.7:3000"}),
        ("GET", "/", {"host": "ui.example.com"}),
        ("GET", "/graphql", {**OURS, "accept": "text/html"}),
        ("POST", "/graphql", JSON),
        ("POST", "/graphql", {**JSON, "origin": "http://127.0.0.1:3000"}),
        ("POST", "/graphql", {**JSON, "content-type": "application/json; charset=utf-8"}),
        ("POST", "/graphql", {**JSON, "origin": "https://ui.example.com"}),  # a proxy in front
        ("WS", "/graphql", {**OURS, "origin": "http://127.0.0.1:3000"}),
        ("WS", "/graphql", OURS),
        ("GET", "/server_info", {"host": "web"}),
    ],
)
def test_our_own_page_and_a_proxy_are_served(
    method: str, path: str, headers: dict[str, str]
) -> None:
    assert answer(method, path, headers) == "passed"


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        ("GET", "/", {"host": "rebound.example:3000"}),
        ("GET", "/", {"host": "localhost.rebound.example"}),
        ("GET", "/", {}),
        ("GET", "/", {"host": ""}),
        ("POST", "/graphql", {**JSON, "host": "rebound.example"}),
        ("POST", "/graphql", {**JSON, "origin": "http://other.example"}),
        ("POST", "/graphql", {**JSON, "origin": "null"}),
        ("POST", "/graphql", {**JSON, "origin": "http://127.0.0.1:8000"}),
        ("POST", "/graphql", {**JSON, "origin": "http://localhost:8000"}),
        ("POST", "/graphql", {**OURS, "content-type": "text/plain"}),
        ("POST", "/graphql", {**OURS, "content-type": "text/plain; application/json"}),
        ("POST", "/graphql", {**OURS, "content-type": "application/x-www-form-urlencoded"}),
        ("POST", "/graphql", {**OURS, "content-type": "application/graphql"}),
        ("POST", "/graphql", OURS),
        ("POST", "/graphql/", {**OURS, "content-type": "text/plain"}),
        ("POST", REPORT, JSON),
        ("POST", "/" + REPORT, JSON),
        ("WS", "/graphql", {**OURS, "origin": "http://other.example"}),
        ("WS", "/graphql", {"host": "rebound.example", "origin": "http://rebound.example"}),
    ],
)
def test_what_another_page_can_send_is_refused(
    method: str, path: str, headers: dict[str, str]
) -> None:
    assert answer(method, path, headers) == ("closed" if method == "WS" else "403")


def test_a_mutation_in_an_address_is_refused() -> None:
    """An image of another page is enough to send it."""
    assert answer("GET", "/graphql", OURS, "query=mutation%7BwipeAssets%7D") == "403"
    assert answer("GET", "/graphql", OURS, "query=") == "403"


def test_reports_need_the_token() -> None:
    bearing = {**JSON, "authorization": f"Bearer {TOKEN}"}
    assert answer("POST", REPORT, bearing, token=TOKEN) == "passed"
    assert answer("POST", REPORT, {**bearing, "origin": "http://other.example"}, token=TOKEN) == (
        "403"
    )
    assert answer("POST", REPORT, bearing) == "403"
    for wrong in ("", "Bearer ", "Bearer other", f"Basic {TOKEN}x", f"bearer {TOKEN}é"):
        assert answer("POST", REPORT, {**JSON, "authorization": wrong}, token=TOKEN) == "403"

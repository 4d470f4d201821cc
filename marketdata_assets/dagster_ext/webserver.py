"""Dagster's web server behind a guard: a page of another site that is open in the same browser can
neither change nor read anything.

    python -m marketdata_assets.dagster_ext.webserver -w FILE -h HOST -p PORT

takes the options of `dagster-webserver`.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import os
import re
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

# The command of `dagster-webserver`, which has no other place for middleware.
from dagster_webserver import cli
from starlette.responses import PlainTextResponse

GUARD = "MARKETDATA_WEB_GUARD"
"""The variable with the universe's `web:` as JSON: `{"hosts": [...], "token": ...}`."""
LOOPBACK_NAME = "localhost"
_REPORT = re.compile(r"(^|/)report_asset_")
_PROBE = "/server_info"
"""Versions of Dagster only: load balancers ask for it by whatever name they use."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class WebGuard:
    """Refuses requests that our own page would not make.

    * `Host` is localhost, an address, or one of `hosts`: a name that an attacker lets resolve to
      this machine (DNS rebinding) is none of them.
    * `Origin`, which browsers send with every POST and websocket, is the same host and port, or one
      of `hosts` where a proxy stands in front.
    * GraphQL comes as JSON in a POST, which no form of another page can send.
    * `/report_asset_*` needs `Authorization: Bearer <token>`; without a token it is closed.
    """

    def __init__(self, app: App, hosts: Collection[str] = (), token: str | None = None) -> None:
        self._app, self._token = app, token
        self._hosts = {LOOPBACK_NAME, *map(str.lower, hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 403 or 415, close the websocket, or pass the request on."""
        problem = self._find_problem(scope) if scope["type"] in ("http", "websocket") else None
        if problem is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": problem[:120]})
        else:
            await PlainTextResponse(f"{problem}\n", status_code=403)(scope, receive, send)

    def _find_problem(self, scope: Scope) -> str | None:
        headers: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
        path = scope["path"]
        if path == _PROBE and scope.get("method") in ("GET", "HEAD"):
            return None
        host = headers.get("host", [""])
        if len(host) != 1 or not self._is_our_host(_host_of(f"//{host[0]}")):
            return "This name is not one of this server's; add it to `web: {hosts: [...]}`."
        for origin in headers.get("origin", ()):
            same = urlsplit(origin).netloc.lower() == host[0].lower()
            if not same and _host_of(origin) not in self._hosts - {LOOPBACK_NAME}:
                return "Pages of another origin may not use this server (`web: {hosts: [...]}`)."
        if _REPORT.search(path):
            return self._find_token_problem(headers.get("authorization", [""])[0])
        if scope["type"] == "http" and path.rstrip("/").endswith("/graphql"):
            return _find_graphql_problem(scope, headers)
        return None

    def _is_our_host(self, host: str) -> bool:
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return host in self._hosts
        return True

    def _find_token_problem(self, authorization: str) -> str | None:
        if not self._token:
            return "Reports from outside are closed; `web: {token: ...}` opens them."
        given = authorization.removeprefix("Bearer ").encode()
        if hmac.compare_digest(given, self._token.encode()):
            return None
        return "The header `Authorization: Bearer <token>` with the token of `web:` is needed."


def _find_graphql_problem(scope: Scope, headers: dict[str, list[str]]) -> str | None:
    if scope["method"] == "POST":
        kind = headers.get("content-type", [""])[0].partition(";")[0].strip().lower()
        return None if kind == "application/json" else "GraphQL is sent as `application/json`."
    if "query" in parse_qs(scope.get("query_string", b"").decode("latin-1"), True):
        return "GraphQL is sent in a POST, as `application/json`."
    return None


def _host_of(url: str) -> str:
    """Return the host of a URL in lower case, without its port; empty where it has none."""
    try:
        return (urlsplit(url).hostname or "").lower()
    except ValueError:
        return ""


def main() -> None:
    """Run `dagster-webserver` behind the guard that the environment describes."""
    config = json.loads(os.environ.get(GUARD, "{}"))
    command: Any = cli
    create_app = command.create_app_from_workspace_process_context

    def create_guarded_app(*arguments: Any, **options: Any) -> Any:
        return WebGuard(create_app(*arguments, **options), **config)

    command.create_app_from_workspace_process_context = create_guarded_app
    command.main()


if __name__ == "__main__":
    main()

"""What stands between ccxt and the network: answers that ccxt would let pass are refused here.

ccxt turns an answer that is no JSON, or holds nothing, into an empty list of bars. Here it becomes
Garbled, and so does an answer that grows too large.
"""

from __future__ import annotations

import json
import ssl
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import aiohttp

from marketdata_assets.errors import BadInput, Garbled, VenueRefused
from marketdata_assets.network import ca_file

MAX_BYTES = 32 * 1024 * 1024
"""The longest decoded body of an answer."""


@dataclass(slots=True)
class HttpAnswer:
    """Status and headers (names in lower case) of the request that runs in this task."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)


CURRENT_ANSWER: ContextVar[HttpAnswer] = ContextVar("answer")
_INVALID = object()


class LimitedResponse(aiohttp.ClientResponse):
    """A response whose decoded body may not pass MAX_BYTES, so that no answer fills the memory."""

    async def read(self) -> bytes:
        """Return the body; raises Garbled when it is too large."""
        if self._body is None:
            parts: list[bytes] = []
            size = 0
            async for part in self.content.iter_chunked(1 << 16):
                size += len(part)
                if size > MAX_BYTES:
                    self.close()
                    raise Garbled(f"the answer is larger than {MAX_BYTES >> 20} MiB")
                parts.append(part)
            self._body = b"".join(parts)
        return self._body


async def _refuse_redirect(
    _: aiohttp.ClientSession, __: Any, parameters: aiohttp.TraceRequestRedirectParams
) -> None:
    """Stop before a request goes where nobody pointed it. Raises VenueRefused."""
    there = urlsplit(parameters.response.headers.get("Location", "")).hostname
    raise VenueRefused(
        f"HTTP {parameters.response.status}, it redirects to {there or 'another path'}, which is "
        "not followed; write the right address in base_url"
    )


def open_session(proxy: str | None) -> aiohttp.ClientSession:
    """Return a session that goes through a proxy, or through those of the environment.

    It trusts the system's certificates and those of `network.ca_file`. Raises BadInput.
    """
    context, trace = ssl.create_default_context(), aiohttp.TraceConfig()
    trace.on_request_redirect.append(_refuse_redirect)
    if path := ca_file():
        context.load_verify_locations(path)
    if proxy and proxy.startswith("socks"):
        from aiohttp_socks import ProxyConnector

        url = proxy.replace("socks5h://", "socks5://")
        return aiohttp.ClientSession(
            connector=ProxyConnector.from_url(url, rdns=True, ssl=context),
            response_class=LimitedResponse,
            trace_configs=[trace],
        )
    if proxy is None and any(value.startswith("socks") for value in getproxies().values()):
        raise BadInput(
            "environment: HTTP_PROXY or HTTPS_PROXY names a SOCKS proxy, which only works as "
            "`proxy:` of a venue; write it there and unset the variable"
        )
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(ssl=context),
        response_class=LimitedResponse,
        trace_configs=[trace],
        proxy=proxy,
        trust_env=proxy is None,
    )


class StrictAnswers:
    """Mixed in before a ccxt class; ccxt calls its methods with every answer."""

    def on_rest_response(self, *response: Any) -> Any:
        """Keep status and headers; return the body. Raises Garbled.

        ccxt sends status, reason, URL, method, headers, body, and what was sent.
        """
        code, _, _, _, headers, body, *_ = response
        answer = CURRENT_ANSWER.get()
        answer.status, answer.headers = code, {k.lower(): v for k, v in headers.items()}
        if code < 400 and body[:1] not in ("{", "["):
            content = "it is empty" if not body.strip() else "it is text"
            raise Garbled(f"the answer is not JSON: {content}")
        return body

    def parse_json(self, text: str) -> Any:
        """Return what the text holds; None for an error page that is no JSON. Raises Garbled."""
        try:
            value = self.on_json_response(text)  # type: ignore[attr-defined]
        except (ValueError, RecursionError):
            value = _INVALID
        if (CURRENT_ANSWER.get().status or 0) >= 400:
            return None if value is _INVALID else value
        if value is _INVALID:
            raise Garbled("the answer is not JSON: it is cut short or broken")
        if value in ({}, None):
            raise Garbled("the answer holds nothing")
        return value

    def parse_ohlcvs(self, ohlcvs: Any, market: Any = None, *_: Any) -> list[list[Any]]:
        """Return every bar of a list, unsorted and unfiltered, with the venue's own row behind
        ccxt's six values. Raises Garbled for no list.
        """
        if not isinstance(ohlcvs, list):
            raise Garbled("the answer holds no list of bars")
        parse = self.parse_ohlcv  # type: ignore[attr-defined]
        return [[*parse(row, market), row] for row in ohlcvs]


class StrictAnswersAsText(StrictAnswers):
    """For venues that send numbers and not text: every digit is kept, with no float in between."""

    @staticmethod
    def on_json_response(text: str) -> Any:
        """Return what the text holds, with fractions as text."""
        return json.loads(text, parse_float=str)


def replace_host(urls: Any, base_url: str, hostname: str) -> Any:
    """Return ccxt's tree of URLs with `base_url` for scheme and host; paths stay."""
    if isinstance(urls, dict):
        return {key: replace_host(value, base_url, hostname) for key, value in urls.items()}
    if isinstance(urls, str) and urls.startswith("http"):
        return base_url + urlsplit(urls.replace("{hostname}", hostname or "host")).path
    return urls

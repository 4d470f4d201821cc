"""A proxy on loopback between boto and an S3 server. It damages requests and answers as networks
and servers do.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Any
from urllib.parse import unquote, urlsplit


class Ending(Enum):
    """How an answer ends."""

    WHOLE = auto()
    LOST = auto()
    """The connection is closed before the first byte."""
    RESET = auto()
    """The connection is reset before the first byte."""
    HALF = auto()
    """The connection is closed after half of the body."""
    STALLED = auto()
    """Nothing follows after half of the body, until the client gives up."""
    SLOW = auto()
    """All bytes arrive, a few at a time."""
    BENT = auto()
    """One bit of the body is flipped."""
    SILENT = auto()
    """Nothing is sent, until the client gives up."""


@dataclass(frozen=True)
class Fault:
    """The damage to one request.

    `is_applied`: the server receives the request. `answer` replaces the server's answer. `ending`
    is how the answer ends. `hidden` are headers that the server does not receive.
    """

    is_applied: bool = True
    answer: bytes | None = None
    ending: Ending = Ending.WHOLE
    hidden: tuple[str, ...] = ()


@dataclass(frozen=True)
class ProxyRequest:
    """One request that the proxy received."""

    method: str
    path: str
    headers: dict[str, str]
    fault: Fault | None = None


def refusal(status: int, code: str, *headers: str) -> bytes:
    """Return an error answer of S3; its text holds a canary that no error of ours may repeat."""
    text = (
        f"<Code>{code}</Code><Message>CANARY of {code}\nline two</Message><RequestId>1</RequestId>"
    )
    return answer(
        status,
        f'<?xml version="1.0"?><Error>{text}</Error>'.encode(),
        "Content-Type: application/xml",
        *headers,
    )


def answer(status: int, body: bytes, *headers: str) -> bytes:
    """Return an HTTP answer."""
    lines = [
        f"HTTP/1.1 {status} x",
        *headers,
        f"Content-Length: {len(body)}",
        "Connection: close",
        "",
        "",
    ]
    return "\r\n".join(lines).encode() + body


HOP_HEADERS = ("Expect", "Connection")
PASSING = {
    "503": Fault(is_applied=False, answer=refusal(503, "ServiceUnavailable")),
    "slow down": Fault(is_applied=False, answer=refusal(503, "SlowDown")),
    "500 after apply": Fault(answer=refusal(500, "InternalError")),
    "lost response": Fault(ending=Ending.LOST),
    "reset before": Fault(is_applied=False, ending=Ending.RESET),
    "reset after": Fault(ending=Ending.RESET),
    "slow": Fault(ending=Ending.SLOW),
    "truncated": Fault(ending=Ending.HALF),
    "bent": Fault(ending=Ending.BENT),
    "stalled": Fault(ending=Ending.STALLED),
    "silent": Fault(ending=Ending.SILENT),
}
"""Faults after which a second attempt succeeds."""


@dataclass
class Proxy:
    """A proxy before the server at `host` and `port`. `fault` returns the damage to each request;
    None: no damage.
    """

    host: str
    port: int
    tls: ssl.SSLContext | None = None
    fault: Callable[[ProxyRequest], Fault | None] = lambda request: None
    requests: list[ProxyRequest] = field(default_factory=list)
    own_port: int = 0
    _server: Any = None
    _tasks: set[Any] = field(default_factory=set)
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)

    @property
    def url(self) -> str:
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self.own_port}"

    def first(self, count: int, fault: Fault, method: str = "") -> None:
        """Damage the next `count` requests (of one method); the others pass."""
        left = [fault] * count
        self.requests.clear()
        self.fault = lambda request: (
            left.pop() if left and request.method.startswith(method) else None
        )

    def always(self, fault: Fault | None) -> None:
        """Damage every request from now on."""
        self.requests.clear()
        self.fault = lambda request: fault

    def up(self) -> None:
        """Accept connections, at the port of before."""
        self._run(self._up())

    def down(self) -> None:
        """Stop to accept connections."""
        self._run(self._down())

    def _run(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _up(self) -> None:
        self._server = await asyncio.start_server(
            self._handle, "127.0.0.1", self.own_port, ssl=self.tls
        )
        self.own_port = self._server.sockets[0].getsockname()[1]

    async def _down(self) -> None:
        self._server.close()

    def vanish_at(self, count: int, method: str, fault: Fault) -> None:
        """Damage the count-th request of that method, and accept no connection from then on."""
        self.requests.clear()

        def last(request: ProxyRequest) -> Fault | None:
            earlier = sum(r.method == method for r in self.requests)
            if request.method != method or earlier + 1 < count:
                return None
            self._server.close()
            return fault

        self.fault = last

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # asyncio alone does not keep a task whose peer has hung up
        self._tasks.add(asyncio.current_task())
        try:
            with suppress(OSError, asyncio.IncompleteReadError):  # the client hung up
                await self._answer(reader, writer)
        finally:
            writer.close()
            self._tasks.discard(asyncio.current_task())

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        (method, path, _), headers = _parse(head)
        if "expect" in headers:
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await _read_body(reader, headers)
        request = ProxyRequest(method, unquote(path), headers)
        fault = self.fault(request) or Fault()
        self.requests.append(replace(request, fault=fault if fault != Fault() else None))
        content = b""
        if fault.is_applied:
            kept = _remove_headers(head, ("Expect", "Connection", *fault.hidden))
            content = await self._forward(kept + body)
        content = content if fault.answer is None else fault.answer
        await _send(fault.ending, content, reader, writer)

    async def _forward(self, request: bytes) -> bytes:
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            writer.write(request)
            return await reader.read()
        finally:
            writer.close()


def _parse(head: bytes) -> tuple[list[str], dict[str, str]]:
    first, *lines = head.decode("latin-1").strip().split("\r\n")
    return first.split(" "), {
        name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
    }


def _remove_headers(head: bytes, names: tuple[str, ...]) -> bytes:
    for name in names:
        head = re.sub(rb"\r\n%s:[^\r]*" % name.encode(), b"", head, flags=re.IGNORECASE)
    return head[:-4] + b"\r\nConnection: close\r\n\r\n"


async def _read_body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    if headers.get("transfer-encoding") != "chunked":
        return await reader.readexactly(int(headers.get("content-length", 0)))
    found, size = b"", 1
    while size:
        line = await reader.readuntil(b"\r\n")
        size = int(line, 16)
        found += line + await reader.readexactly(size + 2)
    return found


async def _send(
    ending: Ending, content: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    body = content.find(b"\r\n\r\n") + 4
    middle = (body + len(content)) // 2
    if ending is Ending.BENT and middle > body:
        content = content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]
    if ending in (Ending.HALF, Ending.STALLED):
        content = content[:middle]
    if ending is Ending.RESET:
        writer.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
    if ending in (Ending.WHOLE, Ending.HALF, Ending.BENT, Ending.STALLED):
        writer.write(content)
    if ending in (Ending.SILENT, Ending.STALLED):
        await reader.read()
    if ending is Ending.SLOW:
        size = 1 + len(content) // 50
        for start in range(0, len(content), size):
            writer.write(content[start : start + size])
            await writer.drain()
            await asyncio.sleep(0.001)


@contextmanager
def open_proxy(url: str, tls: ssl.SSLContext | None = None) -> Iterator[Proxy]:
    """Run a proxy before the server at `url`, in a thread of this process."""
    parts = urlsplit(url)
    proxy = Proxy(str(parts.hostname), int(parts.port or 80), tls)
    loop = proxy._loop
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        proxy.up()
        yield proxy
        proxy.down()
    finally:
        asyncio.run_coroutine_threadsafe(_cancel_all(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.sleep(0.01)  # connections that were closed just now need another round

"""A loopback proxy between boto and an S3 server that simulates network and server faults."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass(frozen=True)
class Fault:
    """The treatment of one request.

    `applied`: whether the server receives the request. `answer` replaces the server's answer.
    `ending` is how the answer is sent: whole, lost (the connection closes without a byte), reset,
    half (of the body), stalled (after half of the body), slow (in small pieces), bent (with one
    flipped bit in the body), silent (nothing until the client gives up). `hide` names headers that
    the server does not receive.
    """

    applied: bool = True
    answer: bytes | None = None
    ending: str = "whole"
    hide: tuple[str, ...] = ()


@dataclass(frozen=True)
class Seen:
    """One request that the proxy received."""

    method: str
    path: str
    headers: dict[str, str]
    fault: Fault | None = None


def refusal(status: int, code: str, *headers: str) -> bytes:
    """Return an error answer of S3; its message holds text that our errors must not repeat."""
    fields = (
        f"<Code>{code}</Code><Message>CANARY of {code}\nline two</Message><RequestId>1</RequestId>"
    )
    return answer(
        status,
        f'<?xml version="1.0"?><Error>{fields}</Error>'.encode(),
        "Content-Type: application/xml",
        *headers,
    )


def answer(status: int, body: bytes, *headers: str) -> bytes:
    """Return an HTTP answer as bytes."""
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
    "503": Fault(applied=False, answer=refusal(503, "ServiceUnavailable")),
    "slow down": Fault(applied=False, answer=refusal(503, "SlowDown")),
    "500 after apply": Fault(answer=refusal(500, "InternalError")),
    "lost response": Fault(ending="lost"),
    "reset before": Fault(applied=False, ending="reset"),
    "reset after": Fault(ending="reset"),
    "slow": Fault(ending="slow"),
    "truncated": Fault(ending="half"),
    "bent": Fault(ending="bent"),
    "stalled": Fault(ending="stalled"),
    "silent": Fault(ending="silent"),
}
"""Faults after which a second attempt succeeds."""


@dataclass
class Proxy:
    """A proxy before one server; `fault` returns the treatment of a request, None for no fault."""

    host: str
    port: int
    tls: ssl.SSLContext | None = None
    fault: Callable[[Seen], Fault | None] = lambda seen: None
    seen: list[Seen] = field(default_factory=list)
    own_port: int = 0
    _server: Any = None
    _tasks: set[Any] = field(default_factory=set)
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)

    @property
    def url(self) -> str:
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self.own_port}"

    def first(self, count: int, fault: Fault, method: str = "") -> None:
        """Apply the fault to the next `count` requests (of one method) and clear `seen`."""
        left = [fault] * count
        self.seen.clear()
        self.fault = lambda seen: left.pop() if left and seen.method.startswith(method) else None

    def always(self, fault: Fault | None) -> None:
        """Apply the fault to every request and clear `seen`."""
        self.seen.clear()
        self.fault = lambda seen: fault

    def up(self) -> None:
        """Listen."""
        self._run(self._up())

    def down(self) -> None:
        """Stop listening."""
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
        """Apply the fault to the count-th request of this method and stop listening."""
        self.seen.clear()

        def last(seen: Seen) -> Fault | None:
            if seen.method != method or sum(s.method == method for s in self.seen) + 1 < count:
                return None
            self._server.close()
            return fault

        self.fault = last

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # asyncio keeps only a weak reference to a task whose peer has closed the connection
        self._tasks.add(asyncio.current_task())
        try:
            # the client closed the connection
            with suppress(OSError, asyncio.IncompleteReadError):
                await self._answer(reader, writer)
        finally:
            writer.close()
            self._tasks.discard(asyncio.current_task())

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        (method, path, _), headers = _parse_head(head)
        if "expect" in headers:
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await _read_body(reader, headers)
        seen = Seen(method, unquote(path), headers)
        fault = self.fault(seen) or Fault()
        self.seen.append(Seen(method, unquote(path), headers, fault if fault != Fault() else None))
        response = (
            await self._forward(_remove_headers(head, (*HOP_HEADERS, *fault.hide)) + body)
            if fault.applied
            else b""
        )
        await _send(
            fault.ending, response if fault.answer is None else fault.answer, reader, writer
        )

    async def _forward(self, request: bytes) -> bytes:
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            writer.write(request)
            return await reader.read()
        finally:
            writer.close()


def _parse_head(head: bytes) -> tuple[list[str], dict[str, str]]:
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
    ending: str, response: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    cut = response.find(b"\r\n\r\n") + 4
    middle = (cut + len(response)) // 2
    if ending == "bent" and middle > cut:
        response = response[:middle] + bytes([response[middle] ^ 4]) + response[middle + 1 :]
    if ending in ("half", "stalled"):
        response = response[:middle]
    if ending == "reset":
        writer.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
    if ending in ("whole", "half", "bent", "stalled"):
        writer.write(response)
    if ending in ("silent", "stalled"):
        await reader.read()
    if ending == "slow":
        for i in range(0, len(response), 1 + len(response) // 50):
            writer.write(response[i : i + 1 + len(response) // 50])
            await writer.drain()
            await asyncio.sleep(0.001)


@contextmanager
def proxied(url: str, tls: ssl.SSLContext | None = None) -> Iterator[Proxy]:
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
    await asyncio.sleep(0.01)  # one more round of the loop closes the transports

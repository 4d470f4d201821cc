"""A proxy on loopback: HTTP with and without CONNECT, or SOCKS5, by the first byte it receives.

It knows the host `exchange.test`, which no name server knows, as the server it stands before.
"""

from __future__ import annotations

import asyncio
import base64
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

HOST = "exchange.test"
SOCKS5, CONNECT, NAME = 5, 1, 3


class Proxy:
    """Forwards to `upstream`, `(host, port)`, what is wanted of HOST, and refuses other names."""

    def __init__(self, upstream: tuple[str, int], user: str = "", password: str = "") -> None:
        self.upstream, self.user, self.password = upstream, user, password
        self.wanted: list[str] = []
        """The hosts that clients named."""
        self.port = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                first = await reader.readexactly(1)
                serve = self._serve_socks if first[0] == SOCKS5 else self._serve_http
                await serve(first, reader, writer)
        finally:
            await _close(writer)

    async def _serve_socks(
        self, first: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        methods = await reader.readexactly((await reader.readexactly(1))[0])
        method = 2 if self.user else 0
        writer.write(bytes([SOCKS5, method if method in methods else 0xFF]))
        if method == 2:
            _, size = await reader.readexactly(2)
            user = await reader.readexactly(size)
            password = await reader.readexactly((await reader.readexactly(1))[0])
            is_known = (user.decode(), password.decode()) == (self.user, self.password)
            writer.write(bytes([1, 0 if is_known else 1]))
            if not is_known:
                return
        *_, kind = await reader.readexactly(4)
        assert kind == NAME, "the proxy looks names up"
        host = (await reader.readexactly((await reader.readexactly(1))[0])).decode()
        struct.unpack("!H", await reader.readexactly(2))
        self.wanted.append(host)
        is_known = host == HOST
        writer.write(bytes([SOCKS5, 0 if is_known else 4, 0, 1, 0, 0, 0, 0, 0, 0]))
        if is_known:
            await self._join(b"", reader, writer)

    async def _serve_http(
        self, first: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        head = first + await reader.readuntil(b"\r\n\r\n")
        line, *headers = head.decode().split("\r\n")
        method, target, version = line.split(" ")
        parts = urlsplit(target if method != "CONNECT" else f"//{target}")
        self.wanted.append(str(parts.hostname))
        token = base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
        if self.user and f"proxy-authorization: basic {token}".lower() not in head.decode().lower():
            writer.write(b"HTTP/1.1 407 Who are you\r\ncontent-length: 0\r\n\r\n")
        elif method == "CONNECT":
            writer.write(b"HTTP/1.1 200 Connected\r\n\r\n")
            await self._join(b"", reader, writer)
        else:
            path = parts.path + (f"?{parts.query}" if parts.query else "")
            kept = [h for h in headers if not h.lower().startswith(("proxy-", "connection"))]
            lines = [f"{method} {path} {version}", "connection: close", *kept]
            await self._join("\r\n".join(lines).encode(), reader, writer)

    async def _join(
        self, begun: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        there, back = await asyncio.open_connection(*self.upstream)
        back.write(begun)
        await asyncio.gather(_copy(reader, back), _copy(there, writer))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        with suppress(ConnectionError):
            while part := await reader.read(1 << 16):
                writer.write(part)
                await writer.drain()
    finally:
        await _close(writer)


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()


@contextmanager
def running_proxy(url: str, user: str = "", password: str = "") -> Iterator[Proxy]:
    """Run a proxy before the server of a URL; its port is `proxy.port`."""
    parts, loop = urlsplit(url), asyncio.new_event_loop()
    proxy = Proxy((str(parts.hostname), int(parts.port or 80)), user, password)
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(
        asyncio.start_server(proxy.handle, "127.0.0.1", 0), loop
    ).result()
    proxy.port = server.sockets[0].getsockname()[1]

    async def stop() -> None:
        server.close()
        tasks = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    try:
        yield proxy
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

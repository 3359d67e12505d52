"""One request to llama-server over its UNIX socket, and what became of it.

httptools and asyncio by themselves: for a request httpx takes 0.66 ms of CPU time, this 0.1 ms, and on eight
connections that is the larger part of what the gateway may add (docs/benchmarks/gateway.md).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import cast

import httptools

Headers = Sequence[tuple[bytes, bytes]]

CONNECT_TIMEOUT_S = 5.0
HIGH_WATER = 256 * 1024  # bytes that wait for a slow client before the server is read no further
_HOP_BY_HOP = {
    b"connection",
    b"content-length",
    b"host",
    b"keep-alive",
    b"proxy-authenticate",
    b"proxy-authorization",
    b"te",
    b"trailer",
    b"transfer-encoding",
    b"upgrade",
    b"expect",
    # The gateway's keys are nothing to llama-server, and no browser's origin reaches it.
    b"authorization",
    b"x-api-key",
    b"cookie",
    b"origin",
    # What the gateway counts in an answer must be readable.
    b"accept-encoding",
}


class Lost(Exception):
    """The server went away. `sent` tells whether the request had reached it."""

    def __init__(self, message: str, *, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent


class _Exchange(asyncio.Protocol):
    """One connection: the parser's callbacks, and what its reader waits for."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.head = asyncio.get_running_loop().create_future()
        self.chunks: deque[bytes] = deque()
        self.size = 0
        self.complete = False
        self.lost = ""
        self.transport: asyncio.Transport | None = None
        self._more: asyncio.Future[None] | None = None
        self._bounded = False  # the answer says where its body ends; otherwise the connection's end does
        self._parser = httptools.HttpResponseParser(self)

    # asyncio's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(f"it answered with what is not HTTP: {error}")
            self.close()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is None and self.head.done() and not self._bounded:
            self.complete = True
        elif not self.complete:
            self._end(str(exc) if exc else "it closed the connection")
        self._wake()

    # the parser's callbacks

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header of the answer."""
        name = name.lower()
        self._bounded = self._bounded or name in (b"content-length", b"transfer-encoding")
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """The head is there."""
        self.status = self._parser.get_status_code()
        if self.status >= 200 and not self.head.done():
            self.head.set_result(None)
        elif self.status < 200:
            self.headers.clear()

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self.chunks.append(body)
        self.size += len(body)
        if self.size > HIGH_WATER and self.transport:
            self.transport.pause_reading()

    def on_message_complete(self) -> None:
        """The whole answer is there."""
        self.complete = self.status >= 200

    # the reader

    async def next_chunk(self) -> bytes | None:
        """The next piece of the body; None at its end. Raises Lost."""
        while not self.chunks:
            if self.complete:
                return None
            if self.lost:
                raise Lost(self.lost, sent=True)
            self._more = asyncio.get_running_loop().create_future()
            await self._more
        chunk = self.chunks.popleft()
        self.size -= len(chunk)
        if self.size <= HIGH_WATER and self.transport and not self.transport.is_closing():
            self.transport.resume_reading()
        return chunk

    def close(self) -> None:
        """Drop the connection at once: an orderly goodbye would wait for bytes that nobody wants."""
        if self.transport:
            self.transport.abort()

    def _end(self, why: str) -> None:
        self.lost = self.lost or why
        if not self.head.done():
            self.head.set_exception(Lost(self.lost, sent=True))
            self.head.exception()  # seen: whoever was to read it may have gone

    def _wake(self) -> None:
        if self._more and not self._more.done():
            self._more.set_result(None)


class Answer:
    """A response of llama-server whose body is still to come. Close it: that ends a generation that runs."""

    def __init__(self, exchange: _Exchange) -> None:
        self._exchange = exchange
        self.status = exchange.status
        self.headers = [(name, value) for name, value in exchange.headers if name not in _HOP_BY_HOP]

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes. Raises Lost when the server goes away in the middle."""
        while (chunk := await self._exchange.next_chunk()) is not None:
            yield chunk

    def close(self) -> None:
        """Close the connection; a generation that still runs is cancelled by that."""
        self._exchange.close()


class Upstream:
    """llama-server behind the path of its socket.

    A connection per request: a kept one may be closed by the server while the next request is on its way.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    async def send(self, method: str, target: str, headers: Headers, body: bytes) -> Answer:
        """Send a request and wait for the head of its answer. Raises Lost."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                transport, exchange = await loop.create_unix_connection(_Exchange, self.path)
        except (OSError, TimeoutError) as error:
            raise Lost(str(error) or type(error).__name__, sent=False) from None
        try:
            lines = [
                f"{method} {target} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n".encode("latin-1"),
                *(name + b": " + value + b"\r\n" for name, value in headers if name not in _HOP_BY_HOP),
                f"content-length: {len(body)}\r\n\r\n".encode(),
            ]
            transport.writelines([b"".join(lines), body])
            await exchange.head
        except BaseException:
            exchange.close()
            raise
        return Answer(exchange)

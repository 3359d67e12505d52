"""One request to llama-server over its UNIX socket, and what became of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import httpx

Headers = Sequence[tuple[bytes, bytes]]

CONNECT_TIMEOUT_S = 5.0
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


class Answer:
    """A response of llama-server whose body is still to come. Close it: that ends a generation that runs."""

    def __init__(self, response: httpx.Response) -> None:
        self._response = response
        self.status = response.status_code
        self.headers = [
            (name.lower(), value) for name, value in response.headers.raw if name.lower() not in _HOP_BY_HOP
        ]

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes. Raises Lost when the server goes away in the middle."""
        stream = self._response.stream
        assert isinstance(stream, httpx.AsyncByteStream)
        try:
            async for chunk in stream:
                yield chunk
        except httpx.TransportError as error:
            raise Lost(str(error) or type(error).__name__, sent=True) from None

    async def read(self, limit: int) -> bytes:
        """The whole body. Raises Lost when the server goes away, or sends more than `limit` bytes."""
        parts, size = [], 0
        async for chunk in self.chunks():
            parts.append(chunk)
            size += len(chunk)
            if size > limit:
                raise Lost(f"the answer is larger than {limit} bytes", sent=True)
        return b"".join(parts)

    async def close(self) -> None:
        """Close the connection; a generation that still runs is cancelled by that."""
        await self._response.aclose()


class Upstream:
    """llama-server behind the path of its socket.

    A connection per request: a kept one may be closed by the server while the next request is on its way.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._transport = httpx.AsyncHTTPTransport(
            uds=path, limits=httpx.Limits(max_keepalive_connections=0), verify=False
        )

    async def send(self, method: str, target: str, headers: Headers, body: bytes) -> Answer:
        """Send a request and wait for the head of its answer. Raises Lost."""
        kept = [(name, value) for name, value in headers if name not in _HOP_BY_HOP]
        request = httpx.Request(
            method,
            f"http://localhost{target}",
            headers=[*kept, (b"host", b"localhost"), (b"connection", b"close")],
            content=body,
            extensions={"timeout": {"connect": CONNECT_TIMEOUT_S}},
        )
        try:
            return Answer(await self._transport.handle_async_request(request))
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise Lost(str(error) or type(error).__name__, sent=False) from None
        except httpx.TransportError as error:
            raise Lost(str(error) or type(error).__name__, sent=True) from None

    async def close(self) -> None:
        """Close what is open."""
        await self._transport.aclose()

"""Bodies of requests: bounded in bytes, in time and together, before anything looks into them."""

from __future__ import annotations

import asyncio
from typing import Any

from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from ocr_pipeline.api.errors import Refusal, invalid

MULTIPLE = 3  # measured: a body of 199 MB, its texts and its photos' bytes take up to 2.6 times its size
PARSE_INLINE = 64 * 1024  # larger ones are parsed beside the event loop


class Bodies:
    """Reads bodies. `max_buffered` bounds the memory of all at once, MULTIPLE times their size."""

    def __init__(self, max_buffered: int, timeout_s: float) -> None:
        self._left = max_buffered
        self._most = max_buffered
        self._timeout_s = timeout_s

    @property
    def buffered(self) -> int:
        """Memory that is counted now."""
        return self._most - self._left

    async def json(self, request: Request, limit: int) -> tuple[Any, int]:
        """The parsed body and its size, which stays counted until `release`. Raises Refusal."""
        declared = request.headers.get("content-length", "")
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise invalid("COMPRESSED_BODY", "compressed bodies are not read; send it as it is", 415)
        if declared.isdigit() and int(declared) > limit:
            raise _too_large(limit)
        body = bytearray()
        try:
            async with asyncio.timeout(self._timeout_s):
                async for chunk in request.stream():
                    if len(body) + len(chunk) > limit:
                        raise _too_large(limit)
                    self._take(len(chunk))
                    body += chunk
            size = len(body)
            if size <= PARSE_INLINE:
                return parse(body), size
            return await asyncio.to_thread(parse, body), size
        except BaseException as error:
            self.release(len(body))
            if isinstance(error, TimeoutError):
                raise Refusal(
                    408, "BODY_TIMEOUT", f"the body took more than {self._timeout_s:.0f} s"
                ) from None
            if isinstance(error, ClientDisconnect):
                raise Refusal(499, "CLIENT_LEFT", "the client left") from None
            raise

    def release(self, size: int) -> None:
        """A body is out of memory."""
        self._left += size * MULTIPLE

    def _take(self, size: int) -> None:
        if size * MULTIPLE > self._left:
            many = "too much is being sent at once"
            raise Refusal(429, "TOO_MUCH_BUFFERED", f"{many}; try again", retry_after_s=5)
        self._left -= size * MULTIPLE


def parse(body: bytes | bytearray) -> Any:
    """JSON. Raises Refusal: not JSON, or nested too deeply."""
    if not body:
        raise invalid("NO_BODY", "the body is empty; send JSON")
    try:
        return from_json(body, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise invalid("BAD_JSON", f"the body is not JSON: {' '.join(str(error).split())[:160]}") from None


def _too_large(limit: int) -> Refusal:
    return invalid("BODY_TOO_LARGE", f"the body is larger than {limit} bytes; send smaller photos", 413)

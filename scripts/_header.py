"""GGUF headers from files and over HTTP. Of a file of any size at most 32 MB are read."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from pathlib import Path

import httpx
from llama_common import gguf
from llama_common.gguf import Header, HeaderError

TIMEOUT = httpx.Timeout(30.0, connect=10.0)  # seconds
MAX_REDIRECTS = 5


class NoHeader(Exception):
    """The header cannot be read; the message is one line."""


def read_file(path: Path) -> Header:
    """The header of a file of this machine. Raises NoHeader."""
    try:
        return gguf.read_file(path)
    except (OSError, HeaderError) as error:
        raise NoHeader(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def read_url(client: httpx.Client, url: str, size: int, headers: Mapping[str, str] | None = None) -> Header:
    """The header of a file of `size` bytes, by HTTP ranges. Raises NoHeader."""

    def fetch(start: int, end: int) -> bytes:
        asked = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity", **(headers or {})}
        with client.stream("GET", url, headers=asked) as response:
            if response.status_code != 206:
                raise NoHeader(f"{url}: answered {response.status_code} to a request for a range")
            pieces, length = [], 0
            for piece in response.iter_bytes():
                pieces.append(piece)
                length += len(piece)
                if length > end - start:
                    raise NoHeader(f"{url}: sent more than the range that was asked for")
            return b"".join(pieces)

    try:
        return gguf.read(fetch, size)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise NoHeader(f"{url}: {error or type(error).__name__}") from None
    except HeaderError as error:
        raise NoHeader(f"{url}: {error}") from None


def client(trust: ssl.SSLContext | bool = True) -> httpx.Client:
    """What `read_url` asks with. It follows redirects, to which a token is not taken along."""
    return httpx.Client(timeout=TIMEOUT, follow_redirects=True, max_redirects=MAX_REDIRECTS, verify=trust)

"""A real HTTP server that misbehaves as told: it cuts, stalls, lies about lengths, refuses Range, redirects.

It counts the body bytes that it handed to the kernel and keeps every request, so that a test can state what a
download cost. Standard library only; no test framework in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PIECE_BYTES = 64 * 1024
SLOW_PIECE_BYTES = 8 * 1024


@dataclass
class Served:
    """One file and how it is served. Offsets are absolute positions in the file, sizes in bytes."""

    content: bytes
    cut_at: list[int] = field(default_factory=list)
    """At each of these offsets, once, in order, the connection is closed."""
    stall_at: list[int] = field(default_factory=list)
    """At each of these offsets, once, in order, nothing more comes while the connection stays open."""
    stall_seconds: float = 30.0
    ranges: bool = True
    """False: Range is ignored, every answer is 200 with the whole file."""
    claimed_length: int | None = None
    """What Content-Length (and the total in Content-Range) says instead of the truth."""
    chunked: bool = False
    """True: no Content-Length, the body comes in chunks."""
    redirect_to: str | None = None
    statuses: list[int] = field(default_factory=list)
    """Each is the answer to one request, before any file is served."""
    bytes_per_s: float = float("inf")
    etag: str | None = "auto"
    """'auto' is a strong ETag of the content; None sends none."""

    @property
    def entity_tag(self) -> str | None:
        """The ETag that is sent."""
        return f'"{hashlib.sha256(self.content).hexdigest()[:32]}"' if self.etag == "auto" else self.etag


@dataclass(frozen=True)
class Request:
    """What one client asked."""

    path: str
    range: str | None
    if_range: str | None
    authorization: str | None


class FlakyServer(ThreadingHTTPServer):
    """`files` maps a path ("/a.gguf") to what is served there."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, address: str = "127.0.0.1", port: int = 0) -> None:
        super().__init__((address, port), _Handler)
        self.files: dict[str, Served] = {}
        self.requests: list[Request] = []
        self.bytes_served: dict[str, int] = {}
        self.counting = threading.Lock()
        self.stopping = threading.Event()

    @property
    def url(self) -> str:
        """The server's root, without a slash at the end."""
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is what these tests are about: no traceback."""

    def count(self, path: str, size: int) -> None:
        """Add to the bytes served for a path."""
        with self.counting:
            self.bytes_served[path] = self.bytes_served.get(path, 0) + size


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FlakyServer

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is the base class's
        """Nothing on stderr: the requests are kept in the server."""

    def setup(self) -> None:
        super().setup()
        # What a killed client never read must stay small, or counted bytes would say more than arrived.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 128 * 1024)

    def do_GET(self) -> None:
        """Answer as the file's `Served` says."""
        path = self.path.partition("?")[0]
        headers = self.headers
        with self.server.counting:
            self.server.requests.append(
                Request(
                    self.path, headers.get("Range"), headers.get("If-Range"), headers.get("Authorization")
                )
            )
        served = self.server.files.get(path)
        if served is None:
            self._empty(404)
        elif served.statuses:
            self._empty(served.statuses.pop(0))
        elif served.redirect_to is not None:
            self._empty(302, Location=served.redirect_to)
        else:
            self._send(path, served)

    def _empty(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, path: str, served: Served) -> None:
        size = len(served.content)
        total = served.claimed_length if served.claimed_length is not None else size
        start = self._start(served)
        if start is not None and start >= size:
            self._empty(416, Content_Range=f"bytes */{total}")
            return
        self.send_response(200 if start is None else 206)
        if start is not None:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        if served.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(total - (start or 0)))
        if served.ranges:
            self.send_header("Accept-Ranges", "bytes")
        if served.entity_tag:
            self.send_header("ETag", served.entity_tag)
        self.end_headers()
        self._body(path, served, start or 0)

    def _start(self, served: Served) -> int | None:
        """The first byte asked for, None for the whole file."""
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        condition = self.headers.get("If-Range")
        if asked is None or not served.ranges or (condition is not None and condition != served.entity_tag):
            return None
        return int(asked[1])

    def _body(self, path: str, served: Served, position: int) -> None:
        size = len(served.content)
        most = PIECE_BYTES if served.bytes_per_s == float("inf") else SLOW_PIECE_BYTES
        while position < size:
            stops = [at for at in (*served.cut_at[:1], *served.stall_at[:1]) if at >= position]
            end = min([position + most, size, *stops])
            piece = served.content[position:end]
            if piece:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if served.chunked else piece)
                self.server.count(path, len(piece))
                position = end
                if served.bytes_per_s != float("inf"):
                    time.sleep(len(piece) / served.bytes_per_s)
            if served.stall_at[:1] == [position]:
                served.stall_at.pop(0)
                self.server.stopping.wait(served.stall_seconds)
                self.close_connection = True
                return
            if served.cut_at[:1] == [position]:
                served.cut_at.pop(0)
                self.close_connection = True
                return
        if served.chunked:
            self.wfile.write(b"0\r\n\r\n")
        if served.claimed_length is not None and served.claimed_length > size:
            self.close_connection = True


@contextlib.contextmanager
def running(address: str = "127.0.0.1", port: int = 0) -> Iterator[FlakyServer]:
    """A server that answers until the block ends."""
    server = FlakyServer(address, port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stopping.set()
        server.shutdown()
        server.server_close()
        thread.join()

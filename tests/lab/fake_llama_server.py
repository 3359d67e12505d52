#!/usr/bin/python3
"""Takes llama-server's place while units and lmswitch are developed: same flags, /health, /props, /slots, no model.

FAKE_LOAD_S (seconds of "Loading model"), FAKE_DIE_S (dies that long after its start) set how it behaves.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

STARTED = time.monotonic()
LOAD_S = float(os.environ.get("FAKE_LOAD_S", "0.5"))


def option(flag: str, default: str) -> str:
    """The value after a flag on the command line."""
    return sys.argv[sys.argv.index(flag) + 1] if flag in sys.argv else default


class Handler(BaseHTTPRequestHandler):
    """Answers the way llama-server does."""

    def do_GET(self) -> None:
        """One of the three status pages."""
        if time.monotonic() - STARTED < LOAD_S:
            self.answer(503, {"error": {"code": 503, "message": "Loading model"}})
            return
        context = int(option("--ctx-size", "4096"))
        pages: dict[str, object] = {
            "/health": {"status": "ok"},
            "/props": {"default_generation_settings": {"n_ctx": context}},
            "/slots": [{"id": 0, "is_processing": False}],
        }
        self.answer(200 if self.path in pages else 404, pages.get(self.path, {}))

    def answer(self, status: int, body: object) -> None:
        """Send one JSON answer."""
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def address_string(self) -> str:
        """A UNIX socket's client has no address."""
        return "client"


class UnixServer(ThreadingHTTPServer):
    """The same over a UNIX socket, which is not removed at exit: as llama-server does."""

    address_family = socket.AF_UNIX

    def server_bind(self) -> None:
        """Bind without looking up a host name."""
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = "localhost", 0


def die() -> None:
    """End as a server does that cannot load its model."""
    time.sleep(float(os.environ["FAKE_DIE_S"]))
    print("fake: failed to load model", file=sys.stderr, flush=True)
    os._exit(1)


if __name__ == "__main__":
    if "FAKE_DIE_S" in os.environ:
        threading.Thread(target=die, daemon=True).start()
    host = option("--host", "127.0.0.1")
    print(f"fake: {' '.join(sys.argv[1:])}", flush=True)
    if host.endswith(".sock"):
        server: ThreadingHTTPServer = UnixServer(host, Handler)  # type: ignore[arg-type]
    else:
        server = ThreadingHTTPServer((host, int(option("--port", "8080"))), Handler)
    server.serve_forever()

"""Runs on the LLM box: a client that goes away in the middle of its stream, as llama-server sees it.

usage: python3 - PORT SOCKET [pipelined] < gone_client.py
Starts a long stream at the gateway, drops the connection after the first tokens (pipelined: with another
request sent behind the first), and looks at /slots of
llama-server on its socket until nothing is processed. Prints one JSON object: status, busy (whether a slot
worked while the client was there), seconds (from the drop to the first look that found none working; null
when that took too long). Standard library only.
"""

from __future__ import annotations

import http.client
import json
import socket
import sys
import time
from typing import Any

PATIENCE_S = 30.0
LOOK_INTERVAL_S = 0.01
BODY = {
    "messages": [{"role": "user", "content": "Count to a million."}],
    "max_tokens": 3000,  # at the speed of a small model on two cores half a minute and more
    "ignore_eos": True,
    "stream": True,
}


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a UNIX socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=PATIENCE_S)
        self.path = path

    def connect(self) -> None:
        """Connect."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


def working(path: str) -> list[dict[str, Any]]:
    """The slots in which something is processed."""
    connection = UnixConnection(path)
    connection.request("GET", "/slots")
    slots = json.loads(connection.getresponse().read())
    connection.close()
    return [slot for slot in slots if slot["is_processing"]]


def main() -> None:
    """Ask, leave, look."""
    port, path = int(sys.argv[1]), sys.argv[2]
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    client.request("POST", "/v1/chat/completions", json.dumps(BODY), {"Content-Type": "application/json"})
    answer = client.getresponse()
    for _ in range(10):
        answer.readline()
    if "pipelined" in sys.argv:
        client.sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    busy = working(path)
    answer.close()
    client.close()
    left = time.monotonic()
    seconds = None
    while time.monotonic() - left < PATIENCE_S:
        if not working(path):
            seconds = round(time.monotonic() - left, 3)
            break
        time.sleep(LOOK_INTERVAL_S)
    print(json.dumps({"status": answer.status, "busy": bool(busy), "seconds": seconds}))


if __name__ == "__main__":
    main()

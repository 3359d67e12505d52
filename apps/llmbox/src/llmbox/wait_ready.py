"""`llmbox-wait-ready`: the ExecStartPost= of every preset unit; ends when /health answers 200.

It makes a finished `systemctl start` mean "ready". It ends at once when the process of the server is gone:
one that dies while it loads is reported in a moment, not after the whole timeout. Standard library and raw
sockets: it runs at every start and must itself start in a few milliseconds.
Exit codes: 0 ready, 1 not ready (one line on standard error says why), 2 bad usage.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import time

# Between two questions: a small model is there in a moment, and each wait is a client's.
# Later 2 % of the time that it has taken so far.
INTERVAL_S, INTERVAL_SHARE, LONGEST_INTERVAL_S = 0.005, 0.02, 0.1
ANSWER_TIMEOUT_S = 2.0
USAGE = "usage: llmbox-wait-ready --pid PID --listen HOST:PORT|/path.sock --timeout SECONDS"


def pause(elapsed_s: float) -> float:
    """Seconds until the next question to a server that has been starting for so many."""
    return min(INTERVAL_S + INTERVAL_SHARE * elapsed_s, LONGEST_INTERVAL_S)


def health_status(listen: str, timeout_s: float = ANSWER_TIMEOUT_S) -> int | None:
    """HTTP status of GET /health at `listen` (`host:port` or a socket's path); None: no answer yet."""
    try:
        with _connect(listen, timeout_s) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            head = b""
            while b"\r\n" not in head and len(head) < 4096:
                chunk = connection.recv(4096)
                if not chunk:
                    return None
                head += chunk
        return int(head.split(b" ", 2)[1])
    except (OSError, ValueError, IndexError):
        return None


def _connect(listen: str, timeout_s: float) -> socket.socket:
    if listen.startswith("/"):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(timeout_s)
            connection.connect(listen)
        except OSError:
            connection.close()
            raise
        return connection
    return socket.create_connection(reachable(listen), timeout=timeout_s)


def reachable(listen: str) -> tuple[str, int]:
    """Host and port to connect to for a listen address: a wildcard is reached through the loopback."""
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    wildcards = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104  (compared, not bound)
    return wildcards.get(host, host), int(port)


def wait(pid: int, listen: str, timeout_s: float) -> str | None:
    """Wait until the server at `listen` is ready. Returns None, or the reason why it never will be."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return f"llama-server (pid {pid}) ended before it was ready; its own last lines say why"
    poll = select.poll()
    poll.register(process, select.POLLIN)
    started = time.monotonic()
    status: int | None = None
    try:
        while time.monotonic() - started < timeout_s:
            status = health_status(listen)
            elapsed = time.monotonic() - started
            if poll.poll(0 if status == 200 else pause(elapsed) * 1000):
                return (
                    f"llama-server (pid {pid}) ended after {time.monotonic() - started:.1f} s, before it was "
                    "ready; its own last lines say why"
                )
            if status == 200:
                return None
    finally:
        os.close(process)
    seen = "no answer" if status is None else f"HTTP {status}"
    return (
        f"not ready after {timeout_s:.0f} s: {seen} from /health at {listen}; raise start_timeout of this "
        "preset in the inventory if it only needs longer to load"
    )


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script."""
    words = sys.argv[1:] if argv is None else argv
    options = dict(zip(words[::2], words[1::2], strict=False))
    if len(words) != 6 or set(options) != {"--pid", "--listen", "--timeout"}:
        print(USAGE, file=sys.stderr)
        return 2
    try:
        pid, timeout_s = int(options["--pid"]), float(options["--timeout"])
        if not options["--listen"].startswith("/"):
            reachable(options["--listen"])
    except ValueError:
        print(USAGE, file=sys.stderr)
        return 2
    reason = wait(pid, options["--listen"], timeout_s)
    if reason:
        print(f"llmbox-wait-ready: {reason}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

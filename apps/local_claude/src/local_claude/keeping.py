"""A server that is started for one session: its keeper, its log, and the wait until it answers."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from local_claude import keeper
from local_claude.backends import LOCAL
from local_claude.errors import EXIT_NOT_STARTED, LocalClaudeError, one_line
from local_claude.wire import Server, Trouble

POLL_S = 0.1
TELL_EVERY_S = 5.0
STOP_TIMEOUT_S = 6.0


@dataclass(frozen=True)
class Order:
    """What to start: its name, its words, variables that nobody else may see, its log, files to remove.

    `what` is the same for the same server on another port; "" when that matters to nobody.
    """

    name: str
    argv: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict, repr=False)
    log: Path | None = None
    first_line: str | None = field(default=None, repr=False)
    remove: tuple[Path, ...] = ()
    what: str = ""


class Kept:
    """A server and its keeper, which stops it when this process, or the claude in its place, is gone."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self._told = b""
        self._keeper = subprocess.Popen(
            [sys.executable, "-I", keeper.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        said = {
            "argv": order.argv,
            "env": order.environment,
            "log": str(order.log or ""),
            "parent": os.getpid(),
            "first_line": order.first_line,
            "remove": [str(path) for path in order.remove],
        }
        assert self._keeper.stdin is not None
        self._keeper.stdin.write(f"{json.dumps(said)}\n".encode())
        self._keeper.stdin.close()

    def stop(self) -> None:
        """End the server now."""
        self._keeper.send_signal(signal.SIGTERM)
        try:
            self._keeper.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._keeper.kill()
        for path in self.order.remove:  # the keeper does, unless it ended before it knew of them
            path.unlink(missing_ok=True)

    def wait_ready(
        self, ready: Callable[[], bool], timeout_s: float, tell: Callable[[str], None], fix: str
    ) -> None:
        """Return when `ready` says so. Raises LocalClaudeError when the server ends, or takes too long."""
        began = told = time.monotonic()
        while True:
            self._check(fix)
            try:
                if ready():
                    return
            except Trouble:
                pass
            now = time.monotonic()
            if now - began > timeout_s:
                raise LocalClaudeError(
                    EXIT_NOT_STARTED, f"{self.order.name} does not answer after {timeout_s:g} s", fix
                )
            if now - told >= TELL_EVERY_S:
                told = now
                tell(f"{self.order.name}: {now - began:.0f} s, not ready yet")
            time.sleep(POLL_S)

    def _check(self, fix: str) -> None:
        """Raise LocalClaudeError when the keeper has told of an end."""
        assert self._keeper.stdout is not None
        while select.select([self._keeper.stdout], [], [], 0)[0]:
            piece = os.read(self._keeper.stdout.fileno(), 65536)
            if not piece:
                raise LocalClaudeError(EXIT_NOT_STARTED, f"{self.order.name} could not be kept", fix)
            *lines, self._told = (self._told + piece).split(b"\n")
            for line in lines:
                self._judge(json.loads(line), fix)

    def _judge(self, event: dict[str, Any], fix: str) -> None:
        if "failed" in event:
            raise LocalClaudeError(EXIT_NOT_STARTED, f"{self.order.name}: {event['failed']}", fix)
        if "ended" in event:
            for line in event["tail"]:
                print(f"  | {one_line(line)}", file=sys.stderr)
            where = f" (all of it: {self.order.log})" if self.order.log else ""
            raise LocalClaudeError(
                EXIT_NOT_STARTED, f"{self.order.name} ended with {event['ended']}{where}", fix
            )


def free_port() -> int:
    """A port of this machine that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((LOCAL, 0))
        port: int = probe.getsockname()[1]
        return port


def answers(server: Server, path: str) -> Callable[[], bool]:
    """Whether a GET is answered with 200."""
    return lambda: server.get(path).status == 200

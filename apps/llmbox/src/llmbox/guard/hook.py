"""The command that is told of events. In a thread of its own: it may hang, and nothing else waits for it."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Sequence
from typing import Any

from llmbox.guard.command import Command, Unreadable, first_line

WAITING = 20  # events at most, while the command deals with one
KILL_S = 0.5  # until a child that was killed is gone, where it can be

log = logging.getLogger(__name__)


class Hook:
    """Runs the command for one event after the other; one that does not end is abandoned."""

    def __init__(self, argv: Sequence[str], timeout_s: float) -> None:
        self._argv = list(argv)
        self._command = Command(timeout_s)
        self._waiting: queue.Queue[tuple[dict[str, Any], str]] = queue.Queue(WAITING)

    def start(self) -> None:
        """Begin; nobody waits for the thread's end."""
        if self._argv:
            threading.Thread(target=self._forever, name="hook", daemon=True).start()

    def tell(self, event: dict[str, Any], file: str) -> None:
        """Have the command told of an event, which is written in this file ("": in none). Returns at once."""
        if not self._argv:
            return
        try:
            self._waiting.put_nowait((event, file))
        except queue.Full:
            log.error("hook %s: not told of the event %s: too many wait", self._argv[0], event["kind"])

    def _forever(self) -> None:
        while True:
            event, file = self._waiting.get()
            try:
                self.run(event, file)
            except Exception:
                log.exception("hook %s", self._argv[0])

    def run(self, event: dict[str, Any], file: str) -> None:
        """Run the command for one event; its failure is told and changes nothing."""
        environment = {name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"}
        environment["GPU_GUARD_EVENT"] = file
        environment["GPU_GUARD_KIND"] = event["kind"]
        environment["GPU_GUARD_REASON"] = str(event.get("reason") or "").replace("\0", "")
        try:
            code, out, err = self._command.run(self._argv, environment)
        except Unreadable as error:
            log.error("hook %s: %s", self._argv[0], error)
            time.sleep(KILL_S)
            return
        if code != 0:
            said = first_line(err, out)
            log.error("hook %s: exit code %d%s", self._argv[0], code, f": {said}" if said else "")

"""The main loop of the guard, and the threads in which it looks."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmbox.guard import latch
from llmbox.guard.card import Reading
from llmbox.guard.command import Unreadable
from llmbox.guard.enforce import Enforcer
from llmbox.guard.judge import Judge, Verdict
from llmbox.guard.kernel_log import News, Xid
from llmbox.guard.settings import Settings
from llmbox.notify import notify

TICK_S = 0.2
AT_ONCE = 20  # looks after a full page of the kernel log: its flood may not take a core for itself
WRITE_S = 1.0  # between two of its notes of how things are
PRIORITY = {"ok": logging.INFO, "starting": logging.INFO, "warning": logging.WARNING}

log = logging.getLogger(__name__)


class Look(threading.Thread):
    """Looks again and again, in a thread that nobody waits for; what it finds lies in `found`."""

    def __init__(self, look: Callable[[], Any], interval_s: float) -> None:
        super().__init__(daemon=True)
        self._look = look
        self._interval_s = interval_s
        self.found: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.ending = threading.Event()

    def run(self) -> None:
        """Look until it is to end, and once at least; at once where the last look has not shown all."""
        at_once = 0
        while True:
            began = time.monotonic()
            found: Any
            try:
                found = self._look()
            except Unreadable as error:
                found = error
            except Exception as error:  # whatever it is, it is no reading
                log.exception("a look failed")
                found = Unreadable(f"{type(error).__name__}: {error}")
            self.found.put((began, found))
            more = isinstance(found, News) and found.more and at_once < AT_ONCE
            at_once = at_once + 1 if more else 0
            if self.ending.wait(0 if more else self._interval_s):
                return

    def news(self) -> list[tuple[float, Any]]:
        """What has been found since the last call, and when each look began."""
        return [self.found.get_nowait() for _ in range(self.found.qsize())]


class Guard:
    """The main loop: it never waits for anything but its own next tick.

    `kernel_log` makes the look that goes on at a cursor.
    """

    def __init__(
        self,
        limits: Settings,
        runtime: Path,
        card: Callable[[], Reading],
        kernel_log: Callable[[str], Callable[[], News]],
        enforcer: Enforcer,
    ) -> None:
        former = latch.read(runtime / latch.STATE) or {}
        self._cursor = str(former.get("cursor") or "")
        self._looks = (
            Look(card, limits.interval),
            Look(kernel_log(self._cursor), limits.interval),
        )
        self._runtime = runtime
        self._enforcer = enforcer
        self._level = "starting"
        self._written = 0.0
        self._stopped = ""
        self._latched = False
        self.ending = False
        now = time.monotonic()
        self._judge = Judge(limits, now, int(former.get("cards") or 0))
        self._restarts = int(former.get("restarts") or 0)
        self._xid = str(former.get("xid") or "")
        blind_s, killed = now - float(former.get("updated") or now), not former.get("ended")
        if former and (killed or blind_s < limits.hold):
            self._judge.resume(float(former.get("since") or now), now)
            self._say_restart(blind_s, killed=killed)
        if (closed := latch.read(runtime / latch.LATCH)) is not None:
            self._stopped, self._latched = str(closed.get("reason") or "unknown"), True
            enforcer.stop(self._stopped)

    def run(self) -> None:
        """Watch until `ending`."""
        for look in self._looks:
            look.start()
        self._enforcer.start()
        notify("READY=1")
        while not self.ending:
            self.tick()
            notify("WATCHDOG=1")
            time.sleep(TICK_S)
        notify("STOPPING=1")
        for look in self._looks:
            look.ending.set()
        self._enforcer.end()
        self._write_state(self._judge.verdict(time.monotonic()), time.monotonic(), ended=True)

    def tick(self) -> None:
        """Take in what was found, and act on the verdict."""
        now = time.monotonic()
        card, kernel_log = self._looks
        for began, found in card.news():
            self._judge.card(found, began, now)
        for began, found in kernel_log.news():
            self._tell_xids(self._judge.log(found, began, now))
            self._cursor = found.cursor if isinstance(found, News) else self._cursor
        if self._latched and latch.read(self._runtime / latch.LATCH) is None:
            log.warning("the card is in service again: it was cleared")
            self._judge.clear(now)
            self._enforcer.serve()
            self._enforcer.event("clear", reason=self._stopped)
            self._stopped, self._latched = "", False
        verdict = self._judge.verdict(now)
        changed = self._say(verdict)
        acts = verdict.stop and not self._stopped
        if acts:
            self._stopped = verdict.reason
            log.critical("the card is taken out of service: %s", verdict.reason)
        if self._stopped and not self._latched:
            try:
                latch.close(self._runtime, self._stopped, time.time())
                self._latched = True
            except OSError as error:
                log.critical("%s cannot be written: %s", latch.LATCH, error)
        if acts:
            self._enforcer.stop(verdict.reason)
            reading = self._judge.reading
            self._enforcer.event(
                "stop",
                reason=verdict.reason,
                temperature=reading and reading.temperature,
                monotonic={"since": verdict.since, "due": verdict.due, "acted": time.monotonic()},
            )
        if now - self._written >= WRITE_S or changed:
            self._write_state(verdict, now)

    def _say(self, verdict: Verdict) -> bool:
        """One line in the journal when the level changes. Returns whether it did."""
        changed = verdict.level != self._level
        self._level = verdict.level
        if changed:
            said = f"{verdict.level}: {verdict.reason}" if verdict.reason else verdict.level
            log.log(PRIORITY.get(verdict.level, logging.ERROR), "%s", said)
        return changed

    def _tell_xids(self, xids: list[Xid]) -> None:
        for xid in xids:
            self._xid = f"Xid {xid.number}: {xid.text}"
            log.warning("the kernel log tells of %s", self._xid)

    def _say_restart(self, blind_s: float, *, killed: bool) -> None:
        """There was a guard a moment ago; one that was killed is an event, one told to end is not."""
        what = "was killed or hung" if killed else "was told to end"
        said = f"the guard {what}, and was started again; nobody watched for {blind_s:.1f} s"
        log.warning("%s", said)
        if killed:
            self._restarts += 1
            self._enforcer.event("restart", reason=said)

    def _write_state(self, verdict: Verdict, now: float, *, ended: bool = False) -> None:
        self._written = now
        reading = self._judge.reading
        state = {
            "level": verdict.level,
            "reason": verdict.reason,
            "temperature": reading.temperature if reading else None,
            "throttle": reading.throttle if reading else None,
            "xid": self._xid,
            "cards": self._judge.cards,
            "restarts": self._restarts,
            "cursor": self._cursor,
            "since": self._judge.since,
            "updated": now,
            "ended": ended,
        }
        try:
            latch.write(self._runtime / latch.STATE, state)
        except OSError as error:
            log.error("%s cannot be written: %s", latch.STATE, error)

"""What follows from a verdict: requests are refused, presets stopped, an event is written, a command run.

All of it may take long or hang, so it runs in a thread of its own, and the command in yet another: a stop
waits for no command. It is done again and again while the card is out of service: a gateway that starts anew
is told again, a preset that somebody starts is stopped.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from llmbox.errors import LlmboxError
from llmbox.guard import latch
from llmbox.guard.hook import Hook
from llmbox.guard.settings import Settings
from llmbox.presets import PresetsFile
from llmbox.status import iso
from llmbox.systemd import UnitState

AGAIN_S = 1.0
STOP_MARGIN_S = 10.0

log = logging.getLogger(__name__)


class Manager(Protocol):
    """What is needed of systemd (llmbox.systemd.Systemd, or a fake)."""

    def look(self, units: list[str]) -> Mapping[str, UnitState]: ...
    def stop(self, unit: str, *, timeout_s: float) -> str: ...


class Enforcer:
    """Does what the main loop says last. `block` tells the gateway; it returns whether one was told."""

    def __init__(
        self,
        settings: Settings,
        presets: PresetsFile,
        manager: Manager,
        block: Callable[[str], bool],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._presets = presets
        self._manager = manager
        self._block = block
        self._clock = clock
        self._reason = ""
        self._told = True  # unknown: the gateway is told once that it may serve
        self._events: list[dict[str, Any]] = []
        self._trouble = ""
        self._hook = Hook(settings.hook, settings.hook_timeout)
        self._wake = threading.Event()
        self._ending = False

    def start(self) -> None:
        """Begin; nobody waits for the thread's end."""
        self._hook.start()
        threading.Thread(target=self._forever, name="enforcer", daemon=True).start()

    def end(self) -> None:
        """Begin nothing more."""
        self._ending = True
        self._wake.set()

    def stop(self, reason: str) -> None:
        """Take the card out of service, and keep it there."""
        self._reason = reason
        self._wake.set()

    def serve(self) -> None:
        """Put it back into service."""
        self._reason = ""
        self._wake.set()

    def event(self, kind: str, **what: Any) -> None:
        """Have an event written down, and the command told, after what has to be done at once."""
        self._events.append({"kind": kind, "time": iso(self._clock()), **what})
        self._wake.set()

    def _forever(self) -> None:
        while not self._ending:
            try:
                self.once()
            except Exception:
                log.exception("what follows from the verdict failed; trying again in %g s", AGAIN_S)
            self._wake.wait(AGAIN_S)
            self._wake.clear()

    def once(self) -> None:
        """One round."""
        events = list(
            self._events
        )  # before the reason: what an event tells of has been done when it is written
        stopped: list[str] = []
        if self._reason:
            self._told = self._block(latch.told(self._reason)) or self._told
            stopped = self._stop_presets()
        elif self._told:
            self._told = not self._block("")
        for event in events:
            if event["kind"] == "stop":
                event.setdefault("stopped", stopped)
                event.setdefault("trouble", self._trouble)
            self._record(event)
            self._events.remove(event)

    def _stop_presets(self) -> list[str]:
        """Stop every preset that is up, or about to be. Returns those that were."""
        stopped = []
        trouble = ""
        try:
            states = self._manager.look([preset.unit for preset in self._presets.exclusive])
            for preset in self._presets.exclusive:
                state = states[preset.unit]
                if state.active in ("inactive", "failed"):
                    continue
                log.warning("stopping the preset %s", preset.name)
                said = self._manager.stop(preset.unit, timeout_s=2 * preset.stop_timeout + STOP_MARGIN_S)
                if said:
                    trouble = f"the preset {preset.name} could not be stopped: {said}"
                else:
                    stopped.append(preset.name)
        except LlmboxError as error:
            trouble = f"the presets could not be stopped: {error}"
        if trouble and trouble != self._trouble:
            log.critical("%s", trouble)
        self._trouble = trouble
        return stopped

    def _record(self, event: dict[str, Any]) -> None:
        """Write an event down, and have the command told, of one that cannot be written, too."""
        file = ""
        try:
            file = str(self._write(event))
        except OSError as error:
            told = json.dumps(event, ensure_ascii=False)
            log.error("the event cannot be written in %s: %s: %s", self._settings.events_dir, error, told)
        self._hook.tell(event, file)

    def _write(self, event: dict[str, Any]) -> Path:
        folder = Path(self._settings.events_dir)
        stamp = event["time"].replace(":", "").replace("-", "")
        file = next(
            name
            for number in range(1000)
            if not (name := folder / f"{stamp}-{event['kind']}{f'-{number}' if number else ''}.json").exists()
        )
        latch.write(file, event)
        with suppress(OSError):
            for old in sorted(folder.glob("*.json"))[: -self._settings.events_keep]:
                old.unlink()
        return file

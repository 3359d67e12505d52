"""A stand-in for the machine behind the gateway: presets that start, fail and die when a test says so."""

from __future__ import annotations

import asyncio

from llmbox.gateway.board import Busy, Moved, Seen


class FakeBox:
    """Runs at most one `preset` at a time under ever new process IDs; `log` tells what was done to it."""

    def __init__(self, preset: str | None = "a", load_s: float = 0.0) -> None:
        self.preset = preset
        self.pid = 100
        self.load_s = load_s
        self.failing: dict[str, str] = {}
        self.refused: dict[str, str] = {}
        self.reason = ""
        self.unloaded: str | None = None
        self.locked = 0
        self.coming = False
        self.log: list[str] = []
        self._gone = asyncio.Event()

    async def look(self) -> Seen:
        """What runs."""
        if self.coming:
            return Seen("coming", self.preset)
        if self.preset is None:
            return Seen("down", None, reason=self.reason, unloaded=self.unloaded)
        return Seen("ready", self.preset, self.pid)

    async def refusal(self, preset: str) -> str:
        """What is known against a preset before anything is touched."""
        return self.refused.get(preset, "")

    async def gone(self, pid: int) -> None:
        """Return when that process has ended."""
        while pid == self.pid and self.preset is not None and not self.coming:
            await self._gone.wait()

    async def switch(self, preset: str) -> Moved:
        """Go over to `preset`; the former one comes back when it is among the failing ones."""
        if self.locked:
            self.locked -= 1
            raise Busy
        self.log.append(f"switch {preset}")
        await asyncio.sleep(self.load_s)
        if preset in self.failing:
            if self.preset:
                self.become(self.preset)
            return Moved(False, self.failing[preset])
        self.become(preset)
        return Moved(True, parts={"stop": 0.0, "load": self.load_s})

    async def unload(self, preset: str) -> None:
        """Stop what runs until the next request."""
        if self.locked:
            self.locked -= 1
            raise Busy
        self.log.append(f"unload {preset}")
        self.become(None)
        self.unloaded = preset

    async def prefetch(self, preset: str) -> None:
        """Read the model's file."""
        self.log.append(f"prefetch {preset}")

    def become(self, preset: str | None) -> None:
        """Another process, or none, from now on."""
        self.preset, self.pid, self.unloaded = preset, self.pid + 1, None
        self._gone.set()
        self._gone = asyncio.Event()

    def die(self) -> None:
        """The process dies, and systemd starts it again when the test sets `coming` back."""
        self.coming = True
        self.pid += 1
        self._gone.set()
        self._gone = asyncio.Event()

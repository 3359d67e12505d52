"""The box as the board sees it: the units of the presets, moved by the same library and lock as lmswitch."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from llmbox import idle
from llmbox.errors import Locked
from llmbox.gateway.board import Busy, Moved, Seen
from llmbox.guard import latch
from llmbox.lock import held
from llmbox.prefetch import prefetch
from llmbox.presets import BoxPreset, PresetsFile
from llmbox.server import LlamaServer
from llmbox.switch import Switcher
from llmbox.systemd import Systemd, UnitState
from llmbox.wait_ready import health_status

log = logging.getLogger(__name__)


class LogReporter:
    """What a switch has to say, for the journal; its progress is too much for that."""

    live = False

    def progress(self, name: str, elapsed_s: float, doing: str) -> None:
        """Nobody looks."""

    def note(self, text: str, lines: list[str] | None = None) -> None:
        """One line, and those that belong to it."""
        log.warning("%s", "\n  | ".join([text, *(lines or [])]))


def health(listen: str) -> str:
    """`ok`, `loading` or `silent`: see LlamaServer.health."""
    with LlamaServer(listen) as server:
        return server.health()


def newcomer(listen: str) -> Callable[[], bool]:
    """The question, for every few milliseconds, whether a server answers that has bound the path since.

    The one before it is not asked: with each connection it takes longer to end.
    """
    before = _identity(listen)

    def answers() -> bool:
        bound = _identity(listen)
        return bound not in (None, before) and health_status(listen) == 200

    return answers


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return found.st_ino, found.st_ctime_ns


class SystemdBox:
    """The box behind llmbox.systemd. Everything that takes time runs in a thread."""

    def __init__(self, presets: PresetsFile, systemd: Systemd, runtime: Path) -> None:
        self.presets = {preset.name: preset for preset in presets.exclusive}
        self.systemd = systemd
        self.runtime = runtime
        self._active: str | None = None
        self.switcher = Switcher(
            presets, systemd, health, LogReporter(), watch=newcomer, barred=lambda: latch.refusal(runtime)
        )

    async def look(self) -> Seen:
        """What runs, and whether it answers."""
        return await asyncio.to_thread(self._look)

    def _look(self) -> Seen:
        states = self.systemd.show([preset.unit for preset in self.presets.values()])
        seen, unit = choose(self.presets, states)
        self._active = seen.preset if seen.state == "ready" else None
        if seen.state == "ready":
            idle.remember(self.runtime, None)
        if seen.state == "ready" and seen.preset and health(self.presets[seen.preset].listen) != "ok":
            return Seen("coming", seen.preset)
        if seen.state == "down":
            lines = self.systemd.last_lines(unit, 3) if unit else []
            unloaded = idle.recall(self.runtime)
            return replace(
                seen,
                reason="; ".join([seen.reason, *lines]),
                unloaded=unloaded if unloaded in self.presets else None,
            )
        return seen

    async def refusal(self, preset: str) -> str:
        """Why a switch to this preset would not even begin; empty when nothing is known against it."""
        return await asyncio.to_thread(self.switcher.refusal, preset)

    async def gone(self, pid: int) -> None:
        """Return when the process has ended."""
        try:
            process = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(process, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(process)
            os.close(process)

    async def switch(self, preset: str) -> Moved:
        """Make `preset` serve, under the lock. Raises Busy when lmswitch has it."""
        return await asyncio.shield(asyncio.to_thread(self._switch, preset))

    def _switch(self, preset: str) -> Moved:
        try:
            with held(self.runtime, f"{preset} (gateway)"):
                outcome = self.switcher.switch(preset)
        except Locked as error:
            log.info("%s", error)
            raise Busy from None
        if not outcome.ok:
            return Moved(False, "; ".join([outcome.message, *outcome.reason[-3:]]))
        log.info("%s", outcome.message)
        idle.remember(self.runtime, None)
        process = outcome.process
        if process is None or not process.pid:  # it was ready already, or has ended since
            return Moved(True)
        self._active = preset
        return Moved(True, parts=outcome.parts, seen=Seen("ready", preset, process.pid))

    async def unload(self, preset: str) -> None:
        """Stop the preset until the next request. Raises Busy when lmswitch has the lock."""
        await asyncio.shield(asyncio.to_thread(self._unload, preset))

    def _unload(self, preset: str) -> None:
        try:
            with held(self.runtime, "off (gateway)"):
                idle.remember(self.runtime, preset)  # first: this process may end while the preset stops
                log.info("%s", self.switcher.off().message)
        except Locked:
            raise Busy from None

    async def prefetch(self, preset: str) -> None:
        """Read the preset's model into the page cache; what cannot be read is llama-server's to report."""
        stop = threading.Event()
        present = self.presets[self._active].model_files if self._active else []
        try:
            with suppress(OSError):
                for path in self.presets[preset].model_files:
                    done = await asyncio.to_thread(prefetch, path, protect=present, stop=stop.is_set)
                    log.info(
                        "%s: read %d bytes of %s, %d were in memory",
                        preset,
                        done.read,
                        path.name,
                        done.resident,
                    )
        finally:
            stop.set()


def choose(
    presets: Mapping[str, BoxPreset], states: Mapping[str, UnitState]
) -> tuple[Seen, UnitState | None]:
    """What systemd's states mean for requests, and the unit that failed when one did."""
    units = {preset.unit: name for name, preset in presets.items()}
    failed: UnitState | None = None
    coming: str | None = None
    for unit, name in units.items():
        state = states[unit]
        if state.active == "active":
            return Seen("ready", name, state.main_pid), None
        if state.occupied or state.sub == "auto-restart":
            coming = coming or name
        elif state.failed and (failed is None or state.since_s > failed.since_s):
            failed = state
    if coming:
        return Seen("coming", coming), None
    if failed:
        return Seen("down", units[failed.unit], reason=failed.ending or "it failed"), failed
    return Seen("down"), None

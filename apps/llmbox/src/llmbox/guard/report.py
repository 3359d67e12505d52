"""What the guard says, for `gpu-guard status` and `lmswitch status`: read from its files."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path

from llmbox.guard import latch

SETTINGS_FILE = "/etc/llmbox/gpu-guard.json"
UNIT = "gpu-guard.service"
FRESH_S = 15.0  # a guard that lives has written its state since, on a busy machine, too


@dataclass(frozen=True)
class Report:
    """The guard's state. `stopped` says why the card is out of service, empty when it is not."""

    running: bool
    level: str = ""
    reason: str = ""
    stopped: str = ""
    temperature: int | None = None
    throttle: int | None = None
    xid: str = ""
    restarts: int = 0

    @property
    def serves(self) -> bool:
        """Whether somebody watches, and the card is in service and not critical."""
        return self.running and not self.stopped and self.level in ("ok", "warning")

    def as_json(self) -> dict[str, object]:
        """For programs."""
        return asdict(self)


def settings_file() -> Path:
    """The guard's settings; LLMBOX_GPU_GUARD names other ones for tests."""
    return Path(os.environ.get("LLMBOX_GPU_GUARD") or SETTINGS_FILE)


def installed() -> bool:
    """Whether this box is meant to have a guard: one without an NVIDIA card has none."""
    return settings_file().exists()


def report(runtime: Path, now: float) -> Report:
    """What the files say; `now` is the monotonic clock, which the guard writes down, too."""
    stopped = latch.read(runtime / latch.LATCH)
    why = "" if stopped is None else str(stopped.get("reason") or "it is not said why")
    state = latch.read(runtime / latch.STATE) or {}
    age = now - float(state.get("updated") or 0)
    if state.get("ended") or age > FRESH_S or not state:
        return Report(running=False, stopped=why, restarts=int(state.get("restarts") or 0))
    return Report(
        running=True,
        level=str(state.get("level")),
        reason=str(state.get("reason") or ""),
        stopped=why,
        temperature=state.get("temperature"),
        throttle=state.get("throttle"),
        xid=str(state.get("xid") or ""),
        restarts=int(state.get("restarts") or 0),
    )


def text(found: Report) -> str:
    """The same in one line."""
    if not found.running:
        said = f"nobody watches it: {UNIT} does not run; start it with: systemctl --user start {UNIT}"
    else:
        warm = "" if found.temperature is None else f"{found.temperature} °C, "
        said = f"{warm}{found.level}" + (f": {found.reason}" if found.reason else "")
    if found.stopped:
        said = f"out of service: {found.stopped}; now: {said}; {latch.CLEAR}"
    if found.xid:
        said += f"; last error: {found.xid}"
    if found.restarts:
        said += f"; the guard was killed or hung {found.restarts} times since boot"
    return said

"""What is up on this box: the preset, its state, and the build that really runs."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmbox.guard import report
from llmbox.presets import BoxPreset, PresetsFile
from llmbox.systemd import TRIAL_UNIT, UnitState

_RELEASE = re.compile(r"/releases/(([0-9a-f]{40})-[^/]+)/")
GIB = 1024**3
ON_TRIAL = f"a measurement tries other flags or releases; to end it: systemctl --user stop {TRIAL_UNIT}"


@dataclass(frozen=True)
class Probe:
    """What a llama-server said of itself: see llmbox.server.LlamaServer."""

    health: str = "silent"
    context: int | None = None
    in_flight: int = 0


@dataclass(frozen=True)
class Status:
    """The state of the box. `preset`, `context` and `detail` are for people, the rest is for --json."""

    active: str | None
    state: str
    since: str = ""
    build: str = ""
    commit: str = ""
    in_flight: int = 0
    queued: int = 0
    preset: BoxPreset | None = None
    context: int | None = None
    detail: str = ""
    last_switch: str = ""
    release: str = ""
    on_trial: bool = False
    guard: report.Report | None = None

    def as_json(self) -> dict[str, object]:
        """Exactly the keys that tools rely on; for a preset with a draft also that (see draft_json), on a box
        with a GPU guard what that says, and while a preset is on trial that it is.
        """
        draft = draft_json(self.preset, self.release)
        return {
            "active": self.active,
            "state": self.state,
            "since": self.since,
            "build": self.build,
            "commit": self.commit,
            "in_flight": self.in_flight,
            "queued": self.queued,
            **({"draft": draft} if draft else {}),
            **({"gpu_guard": self.guard.as_json()} if self.guard else {}),
            **({"on_trial": True} if self.on_trial else {}),
        }


def preset_state(unit: UnitState, health: str) -> str:
    """One word for a preset: stopped, loading, ready, draining or failed."""
    if unit.failed:
        return "failed"
    if unit.active in {"active", "reloading"}:
        return {"ok": "ready", "loading": "loading"}.get(health, "failed")
    return {"activating": "loading", "deactivating": "draining"}.get(unit.active, "stopped")


def collect(
    presets: PresetsFile,
    states: Mapping[str, UnitState],
    probe: Callable[[str], Probe],
    executable: Callable[[int], str],
    queue: Mapping[str, Any] | None = None,
    guard: report.Report | None = None,
) -> Status:
    """The status of the box from systemd's states, the server's own answers and the running executable.

    `queue` are the gateway's figures (llmbox.gateway.control.status), None without one; `guard` is what the
    GPU guard says, None on a box without one.
    """
    figures = queue or {}
    on_trial = TRIAL_UNIT in states and states[TRIAL_UNIT].occupied
    queued, last_switch = int(figures.get("queued", 0)), switch_text(figures.get("last_switch") or {})
    rank = {"active": 0, "reloading": 0, "activating": 1, "deactivating": 2, "failed": 3}
    shown = [
        preset for preset in presets.exclusive if states[preset.unit].occupied or states[preset.unit].failed
    ]
    if not shown:
        foreign = [unit for unit in presets.foreign_units if unit in states and states[unit].occupied]
        detail = (
            f"{foreign[0]} has the card; stop it with: systemctl --user stop {foreign[0]}" if foreign else ""
        )
        return Status(
            None,
            "stopped",
            queued=queued,
            last_switch=last_switch,
            detail=detail,
            on_trial=on_trial,
            guard=guard,
        )
    preset = min(shown, key=lambda one: 3 if states[one.unit].failed else rank[states[one.unit].active])
    unit = states[preset.unit]
    asked = probe(preset.listen) if unit.active == "active" else Probe()
    state = preset_state(unit, asked.health)
    detail = unit.ending if unit.failed else ""
    if state == "failed" and unit.active == "active":
        detail = f"the unit runs but nothing answers on {preset.listen}; look with: lmswitch logs"
    elif state == "failed":
        detail = f"{detail or 'it failed'}; look with: lmswitch logs {preset.name}"
    release = release_name(executable(unit.main_pid) if unit.main_pid else "", preset.command[0])
    return Status(
        active=preset.name,
        state=state,
        since=iso(unit.since_s),
        build=preset.build,
        commit=release.partition("-")[0],
        in_flight=int(figures.get("in_flight", asked.in_flight)),
        queued=queued,
        last_switch=last_switch,
        preset=preset,
        context=asked.context,
        detail=detail,
        release=release,
        on_trial=on_trial,
        guard=guard,
    )


def switch_text(switch: Mapping[str, Any]) -> str:
    """The last switch in one line: from where to where, how it ended, seconds of its parts."""
    if not switch:
        return ""
    parts = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in switch["parts"].items())
    ended = "" if switch["ok"] else " failed"
    return f"{switch['from'] or 'nothing'} to {switch['to'] or 'nothing'}{ended}: {parts}"


def draft_json(preset: BoxPreset | None, release: str) -> dict[str, object] | None:
    """What writes ahead for a preset, and what was measured of it; None without a draft and without `auto`.

    `fresh`: the measurement was of the release that runs; None when nothing was measured.
    """
    if preset is None or preset.draft == "none":
        return None
    choice = preset.draft_choice
    return {
        "setting": preset.draft,
        "type": preset.draft_type,
        "choice": choice,
        "fresh": choice.get("release") == release if choice else None,
    }


def draft_text(preset: BoxPreset, release: str) -> str:
    """The same in one line; "" for a preset that wants no draft."""
    if preset.draft == "none":
        return ""
    if preset.draft != "auto":
        return f"{preset.draft} ({preset.draft_type or 'draft-simple'}), not measured: the inventory names it"
    choice = preset.draft_choice
    if not choice:
        return "none: auto has not been measured; run scripts/choose_draft.py on the controller"
    what = choice.get("draft") or "its own head"
    other = "" if choice.get("release") == release else "; that was another release: measure again"
    return f"{what}, {choice.get('verdict')} {choice.get('measured')}: {choice.get('reason')}{other}"


def release_name(running: str, installed: str) -> str:
    """The llama.cpp release in a path: of the running executable, otherwise of the installed one."""
    for path in (running, str(Path(installed).resolve())):
        found = _RELEASE.search(path)
        if found:
            return found.group(1)
    return ""


def iso(seconds: float) -> str:
    """Seconds since the epoch as ISO 8601 in UTC, "" for 0."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if seconds else ""


def ago(since: str, now: datetime) -> str:
    """How long ago an ISO time was, in the largest two units that say something."""
    if not since:
        return ""
    seconds = max(0, int((now - datetime.fromisoformat(since)).total_seconds()))
    for unit, size, lesser, small in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if seconds >= size:
            return f"{seconds // size} {unit} {seconds % size // small} {lesser}"
    return f"{seconds} s"


def screen(status: Status, now: datetime, models_disk: Path | None = None) -> str:
    """The status for a person: one screen, every number with its unit."""
    preset = status.preset
    if preset is None:
        free = status.detail or "the card is free; see what there is with: lmswitch list"
        lines = [f"no preset is active: {free}"]
    else:
        since = f"since {status.since} ({ago(status.since, now)})" if status.since else ""
        context = f"{preset.context} tokens"
        if status.context is not None and status.context != preset.context:
            context = f"{status.context} tokens (the preset asks for {preset.context})"
        rows = [
            ("state", f"{status.state} {since}".strip()),
            ("preset", preset.description),
            ("build", f"{status.build} at {status.commit[:12] or 'an unknown commit'}"),
            ("model", preset.model),
            ("context", context),
            *([("draft", text)] if (text := draft_text(preset, status.release)) else []),
            ("listens", preset.listen),
            ("in flight", f"{status.in_flight} requests, {status.queued} queued"),
        ]
        lines = [status.active or "", *(f"  {key:<10}{value}" for key, value in rows)]
        if status.last_switch:
            lines.append(f"  {'switched':<10}{status.last_switch}")
        if status.detail:
            lines.append(f"  {'why':<10}{status.detail}")
    if status.guard is not None:
        lines.append(f"  {'card':<10}{report.text(status.guard)}")
    if status.on_trial:
        lines.append(f"  {'trial':<10}{ON_TRIAL}")
    if models_disk is not None and models_disk.is_dir():
        disk = shutil.disk_usage(models_disk)
        lines.append(f"  {'disk':<10}{disk.free / GIB:.1f} GiB free of {disk.total / GIB:.1f} GiB for models")
    return "\n".join(lines)

"""What a switch is: start the wanted preset; if it does not become ready, say why and go back to the former.

No process or network of its own: systemd and the servers come in through two small protocols, so that every
path is tested against fakes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from llmbox import gate
from llmbox.presets import BoxPreset, PresetsFile
from llmbox.systemd import Process, UnitState

REASON_LINES = 12
MARGIN_S = 20.0
PROGRESS_INTERVAL_S = 0.5


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM, raised by the signal handlers of lmswitch."""


class Manager(Protocol):
    """What a switch needs of systemd (llmbox.systemd.Systemd, or a fake)."""

    def show(self, units: list[str]) -> Mapping[str, UnitState]: ...
    def look(self, units: list[str]) -> Mapping[str, UnitState]: ...
    def process(self, unit: str) -> Process: ...
    def reset_failed(self, unit: str) -> None: ...
    def start(
        self, unit: str, *, timeout_s: float, restart: bool = False, on_tick: Callable[[], bool] = ...
    ) -> str: ...
    def start_soon(self, unit: str) -> None: ...
    def stop(self, unit: str, *, timeout_s: float) -> str: ...
    def last_lines(self, state: UnitState, count: int) -> list[str]: ...
    def suspend(self) -> str: ...


class Reporter(Protocol):
    """Where a switch says what it does while it does it. `live`: somebody looks at the progress meanwhile."""

    live: bool

    def progress(self, name: str, elapsed_s: float, doing: str) -> None: ...
    def note(self, text: str, lines: list[str] | None = None) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """How a verb ended. `serving` is the preset (or foreign unit) that is up now, None when nothing is."""

    ok: bool
    message: str
    preset: str | None = None
    serving: str | None = None
    changed: bool = False
    seconds: float = 0.0
    reason: list[str] = field(default_factory=list)
    process: Process | None = None  # of the preset that has just become ready
    parts: Mapping[str, float] = field(default_factory=dict)  # seconds: stop and load, both within ready

    def as_json(self) -> dict[str, object]:
        """The object that --json prints."""
        return {
            "ok": self.ok,
            "preset": self.preset,
            "serving": self.serving,
            "changed": self.changed,
            "seconds": round(self.seconds, 2),
            "message": self.message,
            "reason": self.reason,
        }


class Switcher:
    """The verbs that change what serves.

    `watch` gives, before a start at a listen address, the question whether the new server answers there.
    With it a switch is over when that is so; without it when systemd's own wait has found it, a moment later.
    `barred` says why nothing may be started now (the GPU guard has the card out of service), else "".
    """

    def __init__(
        self,
        presets: PresetsFile,
        manager: Manager,
        health: Callable[[str], str],
        reporter: Reporter,
        clock: Callable[[], float] = time.monotonic,
        watch: Callable[[str], Callable[[], bool]] = lambda _listen: lambda: False,
        barred: Callable[[], str] = lambda: "",
    ) -> None:
        self.presets = presets
        self.manager = manager
        self.health = health
        self.reporter = reporter
        self.clock = clock
        self.watch = watch
        self.barred = barred

    def serves(self, name: str) -> bool:
        """Whether this preset is up and answers."""
        wanted = self.presets.presets[name]
        return (
            self.manager.look([wanted.unit])[wanted.unit].active == "active"
            and self.health(wanted.listen) == "ok"
        )

    def switch(self, name: str, *, restart: bool = False) -> Outcome:
        """Make `name` the preset that serves. Going to the one that is ready already changes nothing."""
        wanted = self.presets.presets[name]
        began = self.clock()
        states = self.manager.look(self._units())
        former = self._occupant(states)
        state = states[wanted.unit]
        if refused := self._barred(wanted, state):
            return Outcome(False, refused, name, self._name(former))
        if state.active == "active" and not restart:
            if self.health(wanted.listen) == "ok":
                return Outcome(True, f"{name} is ready already", name, name, seconds=self.clock() - began)
            self.reporter.note(f"{name} is up but does not answer on {wanted.listen}: restarting it")
            restart = True
        if refused := self._unfit(wanted, former):
            return Outcome(False, refused, name, self._name(former))
        back_to = former if former != wanted.unit else None
        try:
            self.manager.reset_failed(wanted.unit)
            said = self._start(wanted, began, restart=restart and former == wanted.unit, former=back_to)
        except Interrupted:
            return self._give_up(wanted, back_to, began)
        if not said:
            if back_to and self.manager.look([back_to])[back_to].failed:  # killed: it did not stop in time
                self.manager.reset_failed(back_to)
            process = self.manager.process(wanted.unit)
            seconds = self.clock() - began
            stop = min(max(0.0, process.started_s - began), seconds)
            parts = {"stop": stop, "load": seconds - stop, "ready": seconds}
            message = f"{name} is ready ({seconds:.1f} s)"
            return Outcome(True, message, name, name, True, seconds, process=process, parts=parts)
        return self._failed(wanted, back_to, began, said)

    def refusal(self, name: str) -> str:
        """What `switch` would refuse this preset with before it touches a unit; empty when it would not."""
        wanted = self.presets.presets[name]
        states = self.manager.look(self._units())
        return self._barred(wanted, states[wanted.unit]) or self._unfit(wanted, self._occupant(states))

    def _barred(self, wanted: BoxPreset, state: UnitState) -> str:
        if state.load == "not-found":
            return f"{wanted.name}: its unit {wanted.unit} is missing; run the playbook llm_server.yml"
        barred = self.barred()
        return f"{wanted.name} is refused: {barred}" if barred else ""

    def _unfit(self, wanted: BoxPreset, former: str | None) -> str:
        refused = gate.refusal(wanted)
        serving = self._name(former)
        left = f"{serving} still serves" if serving else "nothing serves"
        return f"{wanted.name} is refused: {refused}; {left}" if refused else ""

    def off(self, keep: Callable[[str], None] | None = None) -> Outcome:
        """Stop whatever preset is up, and any that waits to be restarted.

        `keep` is told, before anything is stopped, which preset is to come back later; it may raise.
        """
        began = self.clock()
        states = self.manager.look(self._preset_units())
        if keep and (former := self._occupant(self.manager.look(self._units()))) and self._is_preset(former):
            keep(self._preset(former).name)
        stopped = []
        for unit, state in states.items():
            if not (state.occupied or state.failed):
                continue
            preset = self._preset(unit)
            if state.occupied:
                self.reporter.note(f"stopping {preset.name}")
                stopped.append(preset.name)
            said = self.manager.stop(unit, timeout_s=preset.stop_timeout + MARGIN_S)
            if said:
                return Outcome(False, f"{preset.name} could not be stopped: {said}", preset.name, preset.name)
            self.manager.reset_failed(unit)
        seconds = self.clock() - began
        if not stopped:
            foreign = self._occupant(self.manager.look(self._units()))
            if foreign:
                left = (
                    f"off: no preset was running; {foreign} is, stop it with: systemctl --user stop {foreign}"
                )
                return Outcome(True, left, serving=foreign, seconds=seconds)
            return Outcome(True, "off: nothing was running", seconds=seconds)
        said = f"off: stopped {', '.join(stopped)} ({seconds:.1f} s)"
        return Outcome(True, said, stopped[0], None, True, seconds, parts={"stop": seconds})

    def sleep(self, remember: Callable[[str | None], None] = lambda _preset: None) -> Outcome:
        """Stop the active preset, then suspend the machine; over when it is awake again.

        When it does not sleep, go back to what was serving. `remember` is told, before anything is stopped,
        which preset that is. When nothing serves it is not: what it knows of is still to come back.
        """
        began = self.clock()
        former = self._occupant(self.manager.look(self._units()))
        stopped = self.off(remember)
        if not stopped.ok:
            return stopped
        said = self.manager.suspend()
        if not said:
            return Outcome(
                True,
                "the machine slept, and is awake again; what served starts with: lmswitch resume",
                stopped.preset,
                None,
                stopped.changed,
                self.clock() - began,
                parts=stopped.parts,
            )
        self.reporter.note(f"the machine was not suspended: {said}")
        serving = self._return_to(former)
        if former and serving and self._is_preset(former):
            remember(None)
        return Outcome(
            False,
            f"sleep failed: {said}; {self._serves(serving)}",
            stopped.preset,
            serving,
            reason=[said],
            seconds=self.clock() - began,
        )

    def _start(self, wanted: BoxPreset, began: float, *, restart: bool, former: str | None) -> str:
        former_preset = self._preset(former) if former and self._is_preset(former) else None
        limit = wanted.start_timeout + (former_preset.stop_timeout if former_preset else 0) + MARGIN_S
        last = -PROGRESS_INTERVAL_S
        answers = self.watch(wanted.listen)

        def tick() -> bool:
            nonlocal last
            elapsed = self.clock() - began
            if self.reporter.live and elapsed - last >= PROGRESS_INTERVAL_S:
                last = elapsed
                self.reporter.progress(wanted.name, elapsed, self._doing(wanted, former))
            return answers()

        return self.manager.start(wanted.unit, timeout_s=limit, restart=restart, on_tick=tick)

    def _doing(self, wanted: BoxPreset, former: str | None) -> str:
        """What is going on, in words: it costs one look and at most one request."""
        if former and self.manager.look([former])[former].occupied:
            return f"stopping {self._name(former)}"
        return {"ok": "ready", "loading": "loading the model", "silent": "starting"}[
            self.health(wanted.listen)
        ]

    def _failed(self, wanted: BoxPreset, back_to: str | None, began: float, said: str) -> Outcome:
        state = self.manager.show([wanted.unit])[wanted.unit]
        lines = self.manager.last_lines(state, REASON_LINES)
        after = self.clock() - began
        why = state.ending or said
        self.reporter.note(
            f"{wanted.name} failed after {after:.1f} s: {why}; its last lines:", lines or [said]
        )
        self.manager.stop(wanted.unit, timeout_s=wanted.stop_timeout + MARGIN_S)
        serving = self._return_to(back_to)
        return Outcome(
            False,
            f"{wanted.name} failed after {after:.1f} s: {why}; {self._serves(serving)}",
            wanted.name,
            serving,
            True,
            self.clock() - began,
            lines or [said],
        )

    def _give_up(self, wanted: BoxPreset, back_to: str | None, began: float) -> Outcome:
        """Hand the way back to systemd first, then wait for it, so that a second Ctrl-C harms nothing."""
        if self.barred():
            back_to = None
        to = self._name(back_to)
        if back_to:
            self.manager.reset_failed(back_to)
            self.manager.start_soon(back_to)
            self.reporter.note(f"interrupted: the switch to {wanted.name} is given up, going back to {to}")
        else:
            self.reporter.note(f"interrupted: the switch to {wanted.name} is given up, stopping it")
        try:
            if not back_to:
                self.manager.stop(wanted.unit, timeout_s=wanted.stop_timeout + MARGIN_S)
            serving = self._return_to(back_to)
        except Interrupted:
            return Outcome(
                False,
                f"interrupted: {to or 'nothing'} will serve; systemd sees to it, look with: lmswitch status",
                wanted.name,
                to,
                True,
                self.clock() - began,
                ["interrupted twice"],
            )
        return Outcome(
            False,
            f"interrupted: the switch to {wanted.name} was given up; {self._serves(serving)}",
            wanted.name,
            serving,
            True,
            self.clock() - began,
            ["interrupted"],
        )

    def _return_to(self, unit: str | None) -> str | None:
        """Start what ran before. Returns its name when it serves again."""
        if unit is None:
            return None
        name = self._name(unit)
        if barred := self.barred():
            self.reporter.note(f"{name} is not started again: {barred}")
            return None
        self.reporter.note(f"going back to {name}")
        self.manager.reset_failed(unit)
        if self._is_preset(unit):
            said = self._start(self._preset(unit), self.clock(), restart=False, former=None)
        else:
            said = self.manager.start(unit, timeout_s=MARGIN_S)
        if said:
            self.reporter.note(f"{name} did not come back: {said}")
        return None if said else name

    def _serves(self, serving: str | None) -> str:
        return f"{serving} serves again" if serving else "nothing serves now; start one with: lmswitch PRESET"

    def _occupant(self, states: Mapping[str, UnitState]) -> str | None:
        """The unit that holds the card: a preset before a foreign unit, one going up before one that goes."""
        up = [unit for unit in self._units() if states[unit].occupied]
        # Nothing up: a preset that crashed and is about to be started again is what serves otherwise.
        up = up or [unit for unit in self._preset_units() if states[unit].sub == "auto-restart"]
        return min(
            up,
            key=lambda unit: (not self._is_preset(unit), states[unit].active == "deactivating"),
            default=None,
        )

    def _preset_units(self) -> list[str]:
        return [preset.unit for preset in self.presets.exclusive]

    def _units(self) -> list[str]:
        return [*self._preset_units(), *self.presets.foreign_units]

    def _is_preset(self, unit: str) -> bool:
        return unit in self._preset_units()

    def _preset(self, unit: str) -> BoxPreset:
        return next(preset for preset in self.presets.exclusive if preset.unit == unit)

    def _name(self, unit: str | None) -> str | None:
        return self._preset(unit).name if unit and self._is_preset(unit) else unit

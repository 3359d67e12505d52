"""A switch against a fake systemd: success, failure and the way back, interruption, foreign units, sleep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from llmbox.presets import PresetsFile
from llmbox.switch import Interrupted, Switcher
from llmbox.systemd import Process, UnitState

FOREIGN = "lmstudio.service"


def presets() -> PresetsFile:
    """Two exclusive presets, a system service, and a foreign unit."""

    def entry(name: str, **more: Any) -> dict[str, Any]:
        return {
            "description": name,
            "build": "upstream",
            "model": "tiny",
            "context": 4096,
            "listen": "127.0.0.1:1234",
            "unit": f"llama-{name}.service",
            "command": ["/opt/llama-server"],
            **more,
        }

    return PresetsFile.model_validate(
        {
            "version": 1,
            "user": "llm",
            "foreign_units": [FOREIGN],
            "presets": {
                "coder": entry("coder", aliases=["c"]),
                "gemma": entry("gemma"),
                "vision": entry("vision", scope="system"),
            },
        }
    )


class FakeSystemd:
    """A service manager whose units are exclusive and die or hang as told. `calls` is what it was asked."""

    def __init__(self) -> None:
        names = ["llama-coder.service", "llama-gemma.service", FOREIGN]
        self.states = {name: UnitState(name) for name in names}
        self.calls: list[str] = []
        self.refuses: dict[str, str] = {}
        self.raises: dict[str, type[BaseException]] = {}
        self.suspend_says = ""
        self.forgiven: set[str] = set()

    def up(self, unit: str) -> None:
        """Make this the active unit."""
        for name, state in self.states.items():
            active = "active" if name == unit else "inactive"
            self.states[name] = replace(state, active=active, sub="running" if name == unit else "dead")

    def active(self) -> list[str]:
        """Units that are up."""
        return [name for name, state in self.states.items() if state.active == "active"]

    def show(self, units: list[str]) -> dict[str, UnitState]:
        """States by unit."""
        return {unit: self.states[unit] for unit in units}

    look = show

    def process(self, unit: str) -> Process:
        """The process of a unit that is up."""
        return Process(4711 if self.states[unit].active == "active" else 0, 1.5)

    def reset_failed(self, unit: str) -> None:
        """Clear the unit's start limit."""
        self.calls.append(f"reset-failed {unit}")
        self.forgiven.add(unit)

    def start(
        self,
        unit: str,
        *,
        timeout_s: float,
        restart: bool = False,
        on_tick: Callable[[], bool] = lambda: False,
    ) -> str:
        """Start as told: succeed, fail, be interrupted. One that was not forgiven has reached its limit."""
        self.calls.append(f"{'restart' if restart else 'start'} {unit}")
        if unit not in self.forgiven:
            return "start request repeated too quickly"
        self.forgiven.discard(unit)
        if on_tick():
            self.calls.append(f"not waited for {unit}")
        if unit in self.raises:
            raise self.raises.pop(unit)
        self.up(unit)
        if unit in self.refuses:
            self.states[unit] = replace(
                self.states[unit],
                active="activating",
                sub="auto-restart",
                result="exit-code",
                ending="it exited",
            )
        return self.refuses.get(unit, "")

    def start_soon(self, unit: str) -> None:
        """Submit the job."""
        self.calls.append(f"start-soon {unit}")
        if unit not in self.forgiven:
            return
        self.up(unit)

    def stop(self, unit: str, *, timeout_s: float) -> str:
        """Stop the unit."""
        self.calls.append(f"stop {unit}")
        self.states[unit] = replace(self.states[unit], active="inactive", sub="dead")
        return ""

    def last_lines(self, state: UnitState, count: int) -> list[str]:
        """The journal of a failed run."""
        self.calls.append(f"journal {state.unit}")
        return ["error: failed to load model"]

    def suspend(self) -> str:
        """Suspend as told."""
        self.calls.append("suspend")
        return self.suspend_says


class Notes:
    """A reporter that remembers, in the same list as the fake systemd's calls."""

    live = True

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls
        self.texts: list[str] = []

    def progress(self, name: str, elapsed_s: float, doing: str) -> None:
        """Remember what went on."""
        self.texts.append(f"{name} {doing}")

    def note(self, text: str, lines: list[str] | None = None) -> None:
        """Remember what was said, and when."""
        self.calls.append(f"note {text}")
        self.texts.append(text)
        self.texts += lines or []


@pytest.fixture
def systemd() -> FakeSystemd:
    """A service manager with nothing active."""
    return FakeSystemd()


def make(
    systemd: FakeSystemd, health: str = "ok", barred: Callable[[], str] = lambda: ""
) -> tuple[Switcher, Notes]:
    """A switcher whose servers all answer `health`."""
    notes = Notes(systemd.calls)
    return Switcher(presets(), systemd, lambda _listen: health, notes, barred=barred), notes


def test_switch_starts_the_unit_after_clearing_its_start_limit(systemd: FakeSystemd) -> None:
    outcome = make(systemd)[0].switch("coder")
    assert outcome.ok and outcome.changed and outcome.serving == "coder"
    assert outcome.process == Process(4711, 1.5)
    assert systemd.calls.index("reset-failed llama-coder.service") < systemd.calls.index(
        "start llama-coder.service"
    )


def test_a_switch_tells_what_it_took(systemd: FakeSystemd) -> None:
    ticks = iter([1.0, 1.1, 4.0])  # its begin, a look at the progress, its end; the process began at 1.5
    switcher = Switcher(presets(), systemd, lambda _: "ok", Notes(systemd.calls), lambda: next(ticks))
    assert switcher.switch("coder").parts == {"stop": 0.5, "load": 2.5, "ready": 3.0}


def test_with_a_watch_a_switch_is_over_when_the_new_server_answers(systemd: FakeSystemd) -> None:
    systemd.up("llama-gemma.service")
    watched: list[str] = []

    def watch(listen: str) -> Callable[[], bool]:
        watched.append(f"{listen} before {systemd.active()[0]} is stopped")
        return lambda: True

    switcher = Switcher(presets(), systemd, lambda _: "ok", Notes(systemd.calls), watch=watch)
    assert switcher.switch("coder").ok
    assert watched == ["127.0.0.1:1234 before llama-gemma.service is stopped"]
    assert "not waited for llama-coder.service" in systemd.calls


def test_the_ready_preset_is_not_restarted(systemd: FakeSystemd) -> None:
    systemd.up("llama-coder.service")
    outcome = make(systemd)[0].switch("coder")
    assert outcome.ok and not outcome.changed
    assert "already" in outcome.message
    assert not [call for call in systemd.calls if "start" in call]


def test_restart_restarts_even_the_ready_preset(systemd: FakeSystemd) -> None:
    systemd.up("llama-coder.service")
    assert make(systemd)[0].switch("coder", restart=True).ok
    assert "restart llama-coder.service" in systemd.calls


def test_a_preset_that_is_up_but_silent_is_restarted(systemd: FakeSystemd) -> None:
    systemd.up("llama-coder.service")
    outcome = make(systemd, health="silent")[0].switch("coder")
    assert outcome.ok and "restart llama-coder.service" in systemd.calls


def test_failure_tells_the_reason_before_the_former_is_started_again(systemd: FakeSystemd) -> None:
    systemd.up("llama-gemma.service")
    systemd.refuses["llama-coder.service"] = "Job failed."
    switcher, notes = make(systemd)
    outcome = switcher.switch("coder")
    assert not outcome.ok and outcome.serving == "gemma"
    assert outcome.reason == ["error: failed to load model"]
    assert "error: failed to load model" in notes.texts
    order = [call for call in systemd.calls if not call.startswith("reset-failed")]
    told = next(index for index, call in enumerate(order) if call.startswith("note coder failed"))
    assert told < order.index("stop llama-coder.service") < order.index("start llama-gemma.service")
    assert systemd.active() == ["llama-gemma.service"]


def test_failure_without_a_former_leaves_nothing_that_restarts(systemd: FakeSystemd) -> None:
    systemd.refuses["llama-coder.service"] = "Job failed."
    outcome = make(systemd)[0].switch("coder")
    assert not outcome.ok and outcome.serving is None
    assert "nothing serves now" in outcome.message
    assert systemd.states["llama-coder.service"].sub == "dead"


def test_failure_of_both_says_that_nothing_serves(systemd: FakeSystemd) -> None:
    systemd.up("llama-gemma.service")
    systemd.refuses |= {"llama-coder.service": "no", "llama-gemma.service": "no"}
    outcome = make(systemd)[0].switch("coder")
    assert not outcome.ok and outcome.serving is None and "nothing serves now" in outcome.message


def test_a_foreign_unit_comes_back_too(systemd: FakeSystemd) -> None:
    systemd.up(FOREIGN)
    systemd.refuses["llama-coder.service"] = "Job failed."
    outcome = make(systemd)[0].switch("coder")
    assert outcome.serving == FOREIGN and systemd.active() == [FOREIGN]


def test_ctrl_c_goes_back_to_the_former(systemd: FakeSystemd) -> None:
    systemd.up("llama-gemma.service")
    systemd.raises["llama-coder.service"] = Interrupted
    outcome = make(systemd)[0].switch("coder")
    assert not outcome.ok and outcome.serving == "gemma" and "given up" in outcome.message
    assert systemd.active() == ["llama-gemma.service"]


def test_a_second_ctrl_c_finds_the_way_back_with_systemd(systemd: FakeSystemd) -> None:
    systemd.up("llama-gemma.service")
    systemd.raises = {"llama-coder.service": Interrupted, "llama-gemma.service": Interrupted}
    outcome = make(systemd)[0].switch("coder")
    assert not outcome.ok and "systemd sees to it" in outcome.message
    assert "start-soon llama-gemma.service" in systemd.calls and systemd.active() == ["llama-gemma.service"]


def test_ctrl_c_without_a_former_stops_what_was_started(systemd: FakeSystemd) -> None:
    systemd.raises["llama-coder.service"] = Interrupted
    outcome = make(systemd)[0].switch("coder")
    assert outcome.serving is None and "stop llama-coder.service" in systemd.calls


def test_a_missing_unit_is_refused_before_anything_stops(systemd: FakeSystemd) -> None:
    systemd.up("llama-gemma.service")
    systemd.states["llama-coder.service"] = UnitState("llama-coder.service", load="not-found")
    outcome = make(systemd)[0].switch("coder")
    assert not outcome.ok and outcome.serving == "gemma" and systemd.calls == []


def test_off_stops_the_active_preset_and_a_restarting_one(systemd: FakeSystemd) -> None:
    systemd.up("llama-gemma.service")
    systemd.states["llama-coder.service"] = UnitState(
        "llama-coder.service", active="activating", sub="auto-restart"
    )
    outcome = make(systemd)[0].off()
    assert outcome.ok and outcome.preset == "gemma" and outcome.serving is None
    assert outcome.parts == {"stop": outcome.seconds}
    assert {"stop llama-gemma.service", "stop llama-coder.service"} <= set(systemd.calls)


def test_off_leaves_foreign_units_alone(systemd: FakeSystemd) -> None:
    systemd.up(FOREIGN)
    outcome = make(systemd)[0].off()
    assert outcome.ok and not outcome.changed and systemd.active() == [FOREIGN]
    assert outcome.serving == FOREIGN and f"systemctl --user stop {FOREIGN}" in outcome.message


def test_sleep_stops_before_it_suspends(systemd: FakeSystemd) -> None:
    systemd.up("llama-gemma.service")
    remembered: list[str | None] = []

    def remember(preset: str | None) -> None:
        assert "stop llama-gemma.service" not in systemd.calls
        remembered.append(preset)

    assert make(systemd)[0].sleep(remember).ok
    assert remembered == ["gemma"]
    assert systemd.calls.index("stop llama-gemma.service") < systemd.calls.index("suspend")
    assert systemd.active() == []


def test_a_refused_sleep_brings_the_former_back(systemd: FakeSystemd) -> None:
    systemd.up("llama-gemma.service")
    systemd.suspend_says = "a password is required"
    remembered: list[str | None] = []
    outcome = make(systemd)[0].sleep(remembered.append)
    assert remembered == ["gemma", None]
    assert not outcome.ok and outcome.serving == "gemma" and "a password is required" in outcome.message
    assert systemd.active() == ["llama-gemma.service"]


def test_a_former_that_had_to_be_killed_does_not_stay_failed(
    systemd: FakeSystemd, monkeypatch: pytest.MonkeyPatch
) -> None:
    systemd.up("llama-gemma.service")
    switcher, _ = make(systemd)
    up = systemd.up

    def kill_the_former(unit: str) -> None:
        up(unit)
        killed = UnitState("llama-gemma.service", active="failed", sub="failed")
        systemd.states[killed.unit] = killed

    monkeypatch.setattr(systemd, "up", kill_the_former)
    assert switcher.switch("coder").ok
    assert systemd.calls[-1] == "reset-failed llama-gemma.service"


def test_progress_says_what_goes_on(systemd: FakeSystemd) -> None:
    systemd.up("llama-gemma.service")
    switcher, notes = make(systemd, health="loading")
    switcher.switch("coder")
    assert notes.texts == ["coder stopping gemma"]


def test_a_crashed_preset_that_systemd_starts_again_is_the_one_to_go_back_to(systemd: FakeSystemd) -> None:
    gemma = "llama-gemma.service"
    systemd.states[gemma] = UnitState(gemma, active="activating", sub="auto-restart", result="signal")
    systemd.refuses["llama-coder.service"] = "it failed"
    outcome = make(systemd)[0].switch("coder")
    assert not outcome.ok and outcome.serving == "gemma" and systemd.active() == [gemma]


def test_nothing_is_started_while_the_card_is_out_of_service(systemd: FakeSystemd) -> None:
    switcher = make(systemd, barred=lambda: "the card is hot")[0]
    outcome = switcher.switch("coder")
    assert not outcome.ok and outcome.message == "coder is refused: the card is hot"
    assert switcher.refusal("coder") == outcome.message
    assert not any(call.startswith(("start", "reset")) for call in systemd.calls)


def test_a_switch_that_the_guard_breaks_off_does_not_go_back_to_the_former_preset(
    systemd: FakeSystemd,
) -> None:
    systemd.up("llama-gemma.service")
    systemd.refuses["llama-coder.service"] = "the start ended as 'canceled'"
    reasons = iter(["", "the card is hot"])
    outcome = make(systemd, barred=lambda: next(reasons))[0].switch("coder")
    assert not outcome.ok and outcome.serving is None and systemd.active() == []


def test_a_switch_that_is_interrupted_then_goes_back_to_nothing(systemd: FakeSystemd) -> None:
    systemd.up("llama-gemma.service")
    systemd.raises["llama-coder.service"] = Interrupted
    reasons = iter(["", "the card is hot"])
    outcome = make(systemd, barred=lambda: next(reasons))[0].switch("coder")
    assert outcome.serving is None and "start-soon llama-gemma.service" not in systemd.calls

"""What a play says of firewall rules that no new connection confirmed."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ansible.errors import AnsibleConnectionFailure  # type: ignore[import-untyped]

from plugins.action import firewall_rules as action

CONFIRM_S = 30.0


class Host:
    """A host on which rules were loaded that let nobody in, until its timer puts the former ones back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, attempt_s: float, answers_after_s: float) -> None:
        self.now, self.attempt_s, self.answers_after_s = 0.0, attempt_s, answers_after_s
        self.did: list[str] = []
        monkeypatch.setattr("time.monotonic", lambda: self.now)
        monkeypatch.setattr("time.sleep", self.wait)
        monkeypatch.setattr("ansible.plugins.action.ActionBase.run", lambda *_: {})

    def wait(self, seconds: float) -> None:
        self.now += seconds

    def phase(self, module_args: dict[str, Any], **_: object) -> dict[str, Any]:
        phase: str = module_args["phase"]
        self.did.append(phase)
        if phase == "apply":
            return {"changed": True, "pending": True, "connection": "10.0.0.2 50000 10.0.0.1 22"}
        if self.now < self.answers_after_s:
            self.wait(self.attempt_s)
            raise AnsibleConnectionFailure("timed out")
        return {"changed": True, "pending": False}

    def play(self) -> dict[str, Any]:
        plugin = action.ActionModule.__new__(action.ActionModule)
        plugin._task = SimpleNamespace(args={"confirm_timeout": CONFIRM_S})
        plugin._connection = SimpleNamespace(reset=lambda: None)
        plugin._execute_module = self.phase
        result: dict[str, Any] = plugin.run()
        return result


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float], Host]:
    return lambda attempt_s, answers_after_s: Host(monkeypatch, attempt_s, answers_after_s)


def test_rules_that_a_new_connection_confirms_are_kept(host: Callable[[float, float], Host]) -> None:
    box = host(1, 0)
    assert box.play() == {"changed": True, "connection": "10.0.0.2 50000 10.0.0.1 22"}
    assert box.did == ["apply", "confirm"]


@pytest.mark.parametrize("attempt_s", [2, 45, 120])
def test_the_host_is_seen_with_its_former_rules(
    host: Callable[[float, float], Host], attempt_s: float
) -> None:
    """However long the attempt took that failed: a slow machine gives up later than the host's timer."""
    result = host(attempt_s, CONFIRM_S + 1).play()
    assert result["failed"] and not result["changed"]
    assert "no new connection came through from 10.0.0.2; fix: firewall_allow.ssh" in result["msg"]
    assert "the host has its former rules again" in result["msg"]


def test_a_host_that_stays_silent_is_said(host: Callable[[float, float], Host]) -> None:
    box = host(10, 1e9)
    assert "the host does not answer, though its former rules should be back" in box.play()["msg"]
    assert box.now < CONFIRM_S + 60, "it is not waited for for ever"

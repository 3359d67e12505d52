"""The controller side of role llama_cpp: what the play shows, and in which order it asks the host."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest

from plugins.action import llama_cpp_build as action

COMMIT = "3f2a" * 10


def test_a_line_says_build_commit_percent_and_time() -> None:
    step = {"phase": "compile", "done": 120, "total": 285, "elapsed": 100.2}
    assert (
        action.progress_line("upstream", COMMIT, step)
        == "llama.cpp upstream 3f2a3f2a3f2a: 42 % (120/285), 1 min 40 s"
    )
    step = {"phase": "fetch", "done": None, "total": None, "elapsed": 3}
    assert action.progress_line("upstream", COMMIT, step) == "llama.cpp upstream 3f2a3f2a3f2a: fetch, 3 s"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59.6, "1 min 0 s"), (100, "1 min 40 s"), (3900, "1 h 5 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert action.duration(seconds) == text


def test_only_news_is_shown() -> None:
    reporter = action.Reporter()
    shown = [
        reporter.worth({"phase": phase, "done": done, "total": 100}, now)
        for phase, done, now in [
            ("compile", 1, 0.0),
            ("compile", 3, 1.0),
            ("compile", 6, 2.0),
            ("compile", 7, 40.0),
            ("smoke test", 0, 41.0),
        ]
    ]
    assert shown == [True, False, True, True, True]


class Host:
    """Answers the phases from a script and records what was asked."""

    def __init__(
        self, probes: list[dict[str, Any]], follows: list[dict[str, Any]], running: bool = False
    ) -> None:
        self.asked: list[str] = []
        self.said: list[str] = []
        self.warned: list[str] = []
        self._probes, self._follows, self._running = probes, follows, running

    def plugin(self, check_mode: bool = False, **args: Any) -> Any:
        plugin = action.ActionModule.__new__(action.ActionModule)
        plugin._task = SimpleNamespace(args={"follow_interval": 0, **args}, check_mode=check_mode)
        plugin._vars, plugin._tool = {"inventory_hostname": "box"}, "tool"
        plugin._execute_module = self.answer
        plugin._display = SimpleNamespace(display=self.said.append, warning=self.warned.append)
        return plugin

    def answer(
        self, module_name: str, module_args: dict[str, Any], task_vars: dict[str, Any]
    ) -> dict[str, Any]:
        if module_name == "ansible.builtin.apt":
            self.asked.append(f"apt {' '.join(module_args['name'])}")
            return {"changed": True}
        phase = module_args["phase"]
        self.asked.append(" ".join(filter(None, (phase, module_args.get("build")))))
        if phase == "probe":
            return self._probes.pop(0)
        if phase == "follow":
            return self._follows.pop(0)
        if phase == "start":
            found, self._running = self._running, False
            return {"unit": "llama-build-new.service", "release": "new", "found_running": found}
        return {"changed": True}


def probe(action_: str, missing: list[str] | None = None) -> dict[str, Any]:
    """A host with one build."""
    current = "new" if action_ == "none" else None
    entry: dict[str, Any] = {
        "build": "up",
        "commit": COMMIT,
        "current": current,
        "release": "new",
        "action": action_,
        "reason": "r",
        "still_served": [],
        "without_gateway": "",
    }
    return {
        "changed": action_ != "none" or bool(missing),
        "missing_packages": missing or [],
        "plan": [entry],
        "unused": [],
    }


RUNNING = {"state": "running", "phase": "compile", "done": 1, "total": 2, "elapsed": 1}
FAILED = {"state": "failed", "reason": "ninja: a.cpp:1: error: no", "journal": ["[1/2] x", "error"]}


def test_nothing_to_do_is_one_call() -> None:
    host = Host([probe("none")], [])
    result = host.plugin()._converge()
    assert host.asked == ["probe"]
    assert result["changed"] is False


def test_check_mode_only_looks() -> None:
    host = Host([probe("build", ["ninja-build"])], [])
    result = host.plugin(check_mode=True)._converge()
    assert host.asked == ["probe"]
    assert result["changed"] is True
    assert host.said == ["  [box] would install ninja-build", "  [box] would build up 3f2a3f2a3f2a: r"]
    assert (result["diff"]["before"], result["diff"]["after"]) == ("up: none\n", "up: new\n")


@pytest.mark.parametrize("check_mode", [False, True])
@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({"current": "old"}, True),
        ({"current": "old", "release": None}, True),
        ({"current": "new", "still_served": ["old"]}, True),
        ({"current": "new"}, False),
        ({"current": None}, False),
    ],
)
def test_what_could_not_be_compared_is_not_built_and_the_others_are(
    change: dict[str, Any], refused: bool, check_mode: bool
) -> None:
    for activate in (False, True):
        probed = probe("build", ["ninja-build"])
        other = {**probed["plan"][0], "build": "other"}
        probed["plan"][0] |= {**change, "without_gateway": "llama-vision.service …"}
        probed["plan"].append(other)
        host = Host([probed, copy.deepcopy(probed)], [{"state": "ready"}] * 2)
        assert host.plugin(check_mode, activate=activate)._converge()["changed"]
        if not check_mode:
            left = refused and not activate
            assert ("start up" not in host.asked) == ("activate up" not in host.asked) == left
            assert {"start other", "activate other"} <= {*host.asked}
        else:
            assert any("build other" in line for line in host.said)


def test_a_first_build_installs_starts_follows_and_activates() -> None:
    host = Host([probe("build", ["ninja-build"]), probe("none")], [RUNNING, {"state": "ready"}])
    result = host.plugin()._converge()
    assert host.asked == [
        "probe",
        "apt ninja-build",
        "prepare",
        "start up",
        "follow up",
        "follow up",
        "activate up",
        "probe",
    ]
    assert result["changed"] is True
    assert result["replaced"] == {"up": None}
    assert any("50 % (1/2)" in line for line in host.said)


UNUSED = [
    {"build": "gone", "bytes": 3 << 29, "in_use": False},
    {"build": "serves", "bytes": 1 << 30, "in_use": True},
]


def test_unused_builds_are_a_warning_as_long_as_nobody_asks_for_more() -> None:
    host = Host([{**probe("none"), "unused": UNUSED}], [])
    result = host.plugin(root="/opt/llama.cpp")._converge()
    assert host.asked == ["probe"] and result["changed"] is False
    assert host.warned == [
        "/opt/llama.cpp: llama_cpp_builds does not name gone (1.5 GiB), serves (1.0 GiB);"
        " llama_cpp_remove_unused: true removes it"
    ]


def test_unused_builds_are_removed_on_request_but_for_one_that_runs() -> None:
    seen = {**probe("none"), "unused": UNUSED, "changed": True}
    dry = Host([seen], [])
    predicted = dry.plugin(check_mode=True, root="/r", remove_unused="yes")._converge()
    assert dry.asked == ["probe"] and dry.said == ["  [box] would remove gone"]
    assert (predicted["diff"]["before"], predicted["diff"]["after"]) == (
        "up: new\ngone (unused)\n",
        "up: new\n",
    )

    host = Host([seen, probe("none")], [])
    result = host.plugin(root="/r", remove_unused=True)._converge()
    assert host.asked == ["probe", "prepare", "remove", "probe"]
    assert (result["changed"], result["removed"], result["unused"]) == (True, ["gone"], ["serves"])
    assert "serves (1.0 GiB); a process still runs it" in host.warned[0]


def test_a_failed_build_is_one_line_and_the_end_of_its_journal() -> None:
    host = Host([probe("build")], [RUNNING, FAILED])
    with pytest.raises(action.StepFailed) as failed:
        host.plugin()._converge()
    assert failed.value.result["msg"] == (
        "build up (3f2a3f2a3f2a) failed: ninja: a.cpp:1: error: no;"
        " all of it: journalctl -u llama-build-new.service"
    )
    assert failed.value.result["journal"] == ["[1/2] x", "error"]
    assert host.asked.count("start up") == 1


def test_the_failure_of_a_build_that_another_play_started_is_retried_once() -> None:
    host = Host([probe("build"), probe("none")], [FAILED, {"state": "ready"}], running=True)
    host.plugin()._converge()
    assert host.asked.count("start up") == 2
    assert any("which runs already" in line for line in host.said)


def test_a_line_from_the_module_is_handed_on() -> None:
    host = Host([{"failed": True, "msg": "no room; fix: free some"}], [])
    with pytest.raises(action.StepFailed, match="no room"):
        host.plugin()._converge()


def test_a_task_that_names_a_phase_has_only_that_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host([], [])
    monkeypatch.setattr("ansible.plugins.action.ActionBase.run", lambda *_: {})
    plugin = host.plugin(phase="roll_back", build="up")
    assert plugin.run(None, {}) == {"changed": True}
    assert host.asked == ["roll_back up"]

"""The end of an update: which release is current, what is kept on the box, what the play says."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from plugins.action import llama_cpp_update as action
from scripts._ask_host import Unreachable
from scripts._verdict import Behaviour, Comparison, Verdict
from tests.unit.test_verdict import WORLDS, world

OLD, NEW = f"{'a' * 40}-1", f"{'b' * 40}-2"
ENTRY = {
    "commit": "b" * 40,
    "current": OLD,
    "release": NEW,
    "still_served": [],
    "without_gateway": "",
}


class Play:
    """The plugin on a box of which only the phases that it is asked for are kept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, found: Any) -> None:
        self.phases: list[dict[str, Any]] = []
        self.said: list[str] = []
        self.answers: dict[str, dict[str, Any]] = {}
        self.compared: list[str] = []
        self._found = found
        monkeypatch.setattr(action, "compare", self.compare)
        monkeypatch.setattr("scripts._llm_box.LlmBox.of", lambda variables: variables)
        monkeypatch.setattr("ansible.plugins.action.ActionBase.run", lambda *_: {})

    def compare(self, host: Any, box: Any, build: str, releases: tuple[str, str], tell: Any) -> Any:
        self.compared.append(build)
        assert releases == (OLD, NEW)
        if isinstance(self._found, Exception):
            raise self._found
        return self._found

    def execute(self, module_name: str, module_args: dict[str, Any], task_vars: Any) -> dict[str, Any]:
        assert module_name == "llama_cpp_build"
        self.phases.append(module_args)
        return self.answers.get(module_args["phase"], {"changed": True, "restarted": "coder"})

    def run(self, *, check: bool = False, **builds: dict[str, Any]) -> dict[str, Any]:
        plugin = action.ActionModule.__new__(action.ActionModule)
        plugin._task = SimpleNamespace(
            args={
                "builds": builds or {"up": ENTRY},
                "variables": {"llm_user_name": "llm"},
                "root": "/opt/llama.cpp",
                "user": "llama-build",
                "keep_releases": 2,
            },
            check_mode=check,
        )
        plugin._execute_module = self.execute
        plugin._display = SimpleNamespace(display=self.said.append)
        result: dict[str, Any] = plugin.run(None, {"inventory_hostname": "box"})
        return result

    @property
    def did(self) -> list[tuple[str, str]]:
        return [(one["phase"], one["release"]) for one in self.phases]


@pytest.mark.parametrize(("found", "word", "reason"), [c[1:] for c in WORLDS], ids=[c[0] for c in WORLDS])
def test_in_each_world_the_right_release_is_current_and_the_play_says_why(
    monkeypatch: pytest.MonkeyPatch, found: Comparison, word: str, reason: str
) -> None:
    play = Play(monkeypatch, [world(), found])
    result = play.run()
    assert result["verdicts"]["up"]["verdict"] == word and result["changed"]
    assert any(line.strip().removeprefix("[box]").strip().startswith(reason) for line in play.said)
    if word == "keep":
        assert play.did == [("accept", NEW)] and not result.get("failed")
        assert play.phases[0]["serving_user"] == "llm"
    else:
        assert play.did == [("reject", NEW)] and result["failed"]
        assert play.phases[0]["reason"].startswith(reason)
        assert f"aaaaaaaaaaaa stays, bbbbbbbbbbbb is rejected: {reason}" in result["msg"]
        assert f"fix: put commit {'a' * 40} of llama_cpp_builds.up back" in result["msg"]
        assert "\n" not in result["msg"]


def test_releases_of_one_commit_are_told_apart_and_the_commit_is_not_what_to_put_back() -> None:
    """Other cmake_options, say: the commit is in the inventory already."""
    commit = "a" * 40
    line = action.stays("up", f"{commit}-111", f"{commit}-222", Verdict("roll back", ("slower",)))
    assert line.startswith(
        "up: roll back: aaaaaaaaaaaa-111 stays, aaaaaaaaaaaa-222 is rejected: slower; fix: "
    )
    assert "put back what was changed, cmake_options of llama_cpp_builds.up or" in line and commit not in line


def test_undecided_the_old_release_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    play = Play(monkeypatch, [world(noise=0.15)])
    result = play.run()
    assert result["failed"] and play.did == [("reject", NEW)]
    assert "up: undecided: aaaaaaaaaaaa stays" in result["msg"]


@pytest.mark.parametrize("trouble", ["another trial is under way; wait", "coder is refused: the GPU guard"])
def test_what_could_not_be_measured_is_not_rejected(monkeypatch: pytest.MonkeyPatch, trouble: str) -> None:
    """Else site.yml would refuse a release against which nothing was found."""
    play = Play(monkeypatch, [world(), Comparison("x", trouble=trouble)])
    result = play.run()
    assert result["failed"] and play.did == [] and result["verdicts"]["up"]["verdict"] == "undecided"
    assert result["msg"] == (
        f"up: undecided: aaaaaaaaaaaa stays, nothing is rejected: x could not be measured: {trouble};"
        " with that put right run this playbook again"
    )


def test_with_nothing_to_compare_with_nothing_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else site.yml, which brings the preset, would refuse the commit that it needs."""
    play = Play(monkeypatch, [Comparison("x", known=False)])
    result = play.run()
    assert result["failed"] and play.did == []
    assert result["msg"] == (
        "up: undecided: aaaaaaaaaaaa stays, nothing is rejected: x: nothing to compare with: the box does not"
        " know it yet; fix: run site.yml, which takes the new release without a comparison"
    )


def test_a_release_that_fails_when_it_takes_over_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    play = Play(monkeypatch, [world()])
    said = "new does not serve: x; old is current again"
    play.answers["accept"] = {"failed": True, "tried": True, "msg": said}
    result = play.run()
    assert result["failed"] and play.did == [("accept", NEW)]  # the box rejects it in the same step
    assert f"aaaaaaaaaaaa stays, bbbbbbbbbbbb is rejected: {said}; fix: put" in result["msg"]


@pytest.mark.parametrize("more", [{"tried": False}, {}])
def test_what_the_box_refuses_when_a_release_takes_over_is_not_held_against_it(
    monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    play = Play(monkeypatch, [world()])
    said = "new cannot take over: coder is refused: the GPU guard has the card; old is current again"
    play.answers["accept"] = {"failed": True, "msg": said, **more}
    result = play.run()
    assert result["failed"] and play.did == [("accept", NEW)]
    assert result["verdicts"]["up"]["verdict"] == "undecided"
    assert result["msg"] == (
        f"up: undecided, nothing is rejected: {said}; with that put right run this playbook again"
    )


def test_a_box_that_cannot_be_compared_on_rejects_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    play = Play(monkeypatch, Unreachable("no answer over ssh"))
    result = play.run()
    assert result["failed"] and play.did == []
    assert result["msg"] == "up: not compared, aaaaaaaaaaaa stays: no answer over ssh"


def test_nothing_new_is_said_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    play = Play(monkeypatch, [])
    first = {**ENTRY, "current": None}  # a build's first release became current when it was built
    result = play.run(up={**ENTRY, "current": NEW}, other=first)
    assert (result["changed"], play.did, play.compared) == (False, [], [])
    assert "nothing new" in play.said[0]


def test_a_run_that_died_before_its_restart_is_completed_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """The release is current, the one before it serves on."""
    play = Play(monkeypatch, [])
    owed = {**ENTRY, "current": NEW, "still_served": [OLD]}
    assert play.run(check=True, up=owed)["changed"] and play.did == []
    assert "would restart what serves with up: aaaaaaaaaaaa still does" in play.said[-1]
    result = play.run(up=owed)
    assert (result["changed"], play.did, play.compared) == (True, [("accept", NEW)], [])
    assert "up: bbbbbbbbbbbb was current, and serves coder now" in play.said[-1]


def test_a_release_that_is_taken_back_after_a_kill_is_rejected_and_what_the_box_refuses_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the next site.yml would make it current again, and nothing would serve."""
    play = Play(monkeypatch, [])
    owed = {**ENTRY, "current": NEW, "still_served": [OLD]}
    said = "new does not serve: coder failed; old is current again"
    play.answers["accept"] = {"failed": True, "tried": True, "msg": said}
    result = play.run(up=owed)
    assert play.did == [("accept", NEW)]
    assert f"up: roll back: aaaaaaaaaaaa stays, bbbbbbbbbbbb is rejected: {said}; fix: put" in result["msg"]
    assert result["changed"] and result["verdicts"] == {"up": {"verdict": "roll back", "reasons": [said]}}
    play.phases.clear()
    play.answers["accept"] = {"failed": True, "tried": False, "msg": "coder is refused"}
    result = play.run(up=owed)
    assert play.did == [("accept", NEW)]
    assert result["verdicts"]["up"]["verdict"] == "undecided"
    assert result["msg"].startswith("up: undecided, nothing is rejected: coder is refused; ")


def test_a_dry_run_says_what_it_would_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    play = Play(monkeypatch, [])
    assert play.run(check=True) == {"changed": True, "verdicts": {}}
    assert "would compare up bbbbbbbbbbbb with aaaaaaaaaaaa" in play.said[0]
    assert play.compared == []


def test_one_build_that_is_rejected_keeps_no_other_from_its_own_verdict(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    play = Play(monkeypatch, [Comparison("coder", new=Behaviour(start="x"))])
    result = play.run(up=ENTRY, other=ENTRY)
    assert play.compared == ["up", "other"]
    assert "up: roll back" in result["msg"] and "other: roll back" in result["msg"]


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("more", [{}, {"current": NEW, "still_served": [OLD]}])
def test_what_a_system_preset_runs_keeps_no_other_build_from_its_own_verdict(
    monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], check: bool
) -> None:
    play = Play(monkeypatch, [world()])
    vision = {**ENTRY, "without_gateway": "llama-vision.service of the system serves …; fix: x", **more}
    result = play.run(check=check, vision=vision, up=ENTRY)
    assert play.compared == ([] if check else ["up"]) and play.did == ([] if check else [("accept", NEW)])
    assert result["failed"] and result["changed"]
    line = f"vision: {vision['current'][:12]} stays: llama-vision.service of the system"
    assert result["msg"].startswith(line)
    result = play.run(check=check, vision=vision)
    assert result["failed"] and not result["changed"] and not any("nothing new" in one for one in play.said)


def test_with_the_play_its_comparison_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    parents, died = iter([1, 1, 2]), threading.Event()
    monkeypatch.setattr(action, "WATCH_S", 0.001)
    monkeypatch.setattr("os.getppid", lambda: next(parents, 2))
    monkeypatch.setattr("os._exit", lambda _: died.set())
    with action.dying_with_the_play():
        assert died.wait(10)

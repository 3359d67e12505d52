"""verify_agent: which presets are tried, exit codes, the report, and what it says when it cannot run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from scripts import _agent_run, verify_agent
from scripts._agent_judge import RESULTS
from scripts._agent_run import Recorded
from scripts._inventory import Host
from scripts._measure import NotMeasured
from tests.unit.test_agent_judge import recordings
from tests.unit.test_verify_health import VARIABLES

RUN = ["--inventory", "inventory/lab"]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """A host with one preset for agents; the runs are recordings, by the name in `run`."""
    presets = {name: {**data, "agent": name == "two", "context": 32768, "parallel": 1}
               for name, data in VARIABLES["llama_presets"].items()}  # fmt: skip
    host = Host("box", frozenset({"llm_servers"}), {**VARIABLES, "llama_presets": presets})
    world: dict[str, Any] = {"run": "good", "asked": [], "refused": "", "hosts": [host, Host("other")]}
    program = tmp_path / "claude"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)

    @contextmanager
    def reached(*_: object) -> Iterator[str]:
        yield "http://box"

    def record(place: object, program: Path, url: str, preset: str, context: int, *_: object) -> Recorded:
        world["asked"].append((program.name, url, preset, context))
        return recordings()[world["run"]]

    def wake(self: Any) -> None:
        if world["refused"]:
            raise NotMeasured(world["refused"])

    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(verify_agent, "load", lambda *_, **__: world["hosts"])
    monkeypatch.setattr(verify_agent, "reach", reached)
    monkeypatch.setattr(_agent_run, "record", record)
    monkeypatch.setattr("scripts._measure.Meter.wake", wake)
    return world


def test_a_host_without_a_preset_for_agents_is_named(
    world: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (box, _) = world["hosts"]
    presets = {name: {**data, "agent": False} for name, data in box.variables["llama_presets"].items()}
    world["hosts"] = [Host(box.name, box.groups, {**box.variables, "llama_presets": presets})]
    assert verify_agent.main(RUN) != 0 and not world["asked"]
    assert "no preset has `agent: true`; fix: give one with --preset NAME" in "".join(capsys.readouterr())


def test_presets_for_agents_are_tried(world: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    assert verify_agent.main([*RUN, "--json", str(file)]) == 0
    assert world["asked"] == [("claude", "http://box", "two", 32768)]
    report = json.loads(file.read_text())
    assert report["ok"] and [host["host"] for host in report["hosts"]] == ["box"]
    assert [check["name"] for check in report["hosts"][0]["checks"]] == [f"two.{name}" for name in RESULTS]
    assert set(report["hosts"][0]["checks"][0]) == {"name", "ok", "value", "unit", "limit", "detail"}


def test_a_model_that_falls_short_is_exit_code_1_and_told_where(
    world: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    world["run"] = "prose"
    assert verify_agent.main([*RUN, "--preset", "one"]) == 1
    out = capsys.readouterr().out
    assert "box: one.files = 0 read, 0 written, wanted 1 read, 2 written: not one tool call arrived" in out
    assert "turn 1: prose instead of a tool call" in out


def test_a_preset_that_does_not_start_fell_short_with_its_reason(
    world: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    world["refused"] = "HTTP 503: two does not start"
    assert verify_agent.main(RUN) == 1
    assert capsys.readouterr().out.count("HTTP 503: two does not start") == len(RESULTS)
    assert world["asked"] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--claude", "/nowhere/claude"],
            "/nowhere/claude: no such program; install it with `npm install -g",
        ),
        (["--preset", "three"], "--preset three: no such preset; give one of one, two"),
        (["--json", "/nowhere/report.json"], "--json /nowhere/report.json: No such file"),
    ],
)
def test_what_cannot_run_is_one_line_and_exit_code_2(
    arguments: list[str], said: str, world: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify_agent.main([*RUN, *arguments]) == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith(f"verify_agent: {said}") and world["asked"] == []


def test_limits_must_be_positive(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("seconds", "turns", "tokens"):
        with pytest.raises(SystemExit) as ended:
            verify_agent.main([*RUN, f"--{name}", "0"])
        assert ended.value.code == 2 and f"--{name}" in capsys.readouterr().err


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """How the client is started: its command line, its environment, its settings, and the place it had."""
    seen: dict[str, Any] = {}

    def follow(command: list[str], place: _agent_run.Place, env: dict[str, str], *_: object) -> Any:
        settings = (place.root / "settings.json").read_text()
        seen.update(command=command, env=env, settings=settings, root=place.root)
        return [], 0, "", ""

    monkeypatch.setattr(_agent_run, "follow", follow)
    monkeypatch.setattr(_agent_run, "final", lambda *_: None)
    monkeypatch.setenv("ANTHROPIC_API_KEY", "the-users-own")
    with _agent_run.throw_away() as place:
        _agent_run.record(place, Path("claude"), "http://h:1", "m", 32768, "secret-key", _agent_run.Limits())
    return seen


def test_the_key_is_in_the_environment_only(started: dict[str, Any]) -> None:
    """What is written into the throw-away directory, and every command line, is without it."""
    env, command = started["env"], started["command"]
    assert env["ANTHROPIC_AUTH_TOKEN"] == "secret-key"
    assert "the-users-own" not in env.values()
    assert not any("secret-key" in word for word in command) and "secret-key" not in started["settings"]
    assert env["CLAUDE_CONFIG_DIR"] == str(started["root"] / "config") and not started["root"].exists()


def test_the_client_has_no_tools_but_its_own(started: dict[str, Any]) -> None:
    """MCP servers that the machine's settings name would be started, and judged with the model."""
    assert "--strict-mcp-config" in started["command"] and "--mcp-config" not in started["command"]

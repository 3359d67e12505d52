"""The agent's smoke test with the real Claude Code: scripted models, then a real tiny one behind the gateway.

What falls short with each script: tests/unit/test_agent_judge.py, which judges recordings of the same runs.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from scripts import _agent_run
from scripts._agent_judge import RESULTS, judge
from scripts._agent_run import Limits, Recorded
from tests import support
from tests.lab.test_gateway_claude_code import claude as claude  # the fixture
from tests.lab.test_lmswitch import Box
from tests.lab.test_lmswitch import box as box  # the fixture
from tests.lab.tool_template import tool_template
from tests.scripted_anthropic import SCRIPTS, serving
from tests.unit.test_agent_judge import EXPECTED

LIMITS = Limits(seconds=240, turns=10, tokens=100_000)
TINY_SECONDS = 420


def play(name: str, claude: Path) -> Recorded:
    """One run with a scripted model; nothing of it is left."""
    with serving(SCRIPTS[name]) as server, _agent_run.throw_away() as place:
        recorded = _agent_run.record(place, claude, server.url, "scripted", 65536, "", LIMITS)
        assert server.requests, recorded.stderr
    assert not place.root.exists()
    assert leftovers(place.root) == []
    return recorded


def leftovers(root: Path) -> list[int]:
    return _agent_run._leftovers(root)


def held_to(recorded: Recorded, name: str) -> None:
    """The results are those that the script deserves."""
    short, first = EXPECTED[name]
    found = judge(recorded)
    assert tuple(one.name for one in found) == RESULTS
    assert {one.name for one in found if not one.ok} == short, found
    assert all(first in one.detail for one in found if not one.ok), found


def test_a_good_model_passes_and_the_users_own_files_stay(claude: Path) -> None:
    own = [Path.home() / ".claude.json", Path.home() / ".claude"]
    before = [path.stat().st_mtime_ns if path.exists() else None for path in own]
    held_to(play("good", claude), "good")
    assert before == [path.stat().st_mtime_ns if path.exists() else None for path in own]


def test_prose_instead_of_a_tool_call(claude: Path) -> None:
    held_to(play("prose", claude), "prose")


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(SCRIPTS.keys() - {"good", "prose"}))
def test_a_bad_model_falls_short_where_it_should(name: str, claude: Path) -> None:
    recorded = play(name, claude)
    held_to(recorded, name)
    if name == "loop":
        assert recorded.stopped == "10 turns" and recorded.seconds < LIMITS.seconds


@pytest.mark.long
def test_the_wall_clock_ends_a_run(claude: Path) -> None:
    """A server that takes a request and never answers."""
    from threading import Event

    gate = Event()

    def silent(_: object) -> object:
        gate.wait(60)
        return SCRIPTS["empty"](None)  # type: ignore[arg-type]

    try:
        with serving(silent) as server, _agent_run.throw_away() as place:  # type: ignore[arg-type]
            limits = Limits(seconds=15, turns=10, tokens=100_000)
            recorded = _agent_run.record(place, claude, server.url, "scripted", 65536, "", limits)
            gate.set()
    finally:
        gate.set()
    assert recorded.stopped == "15 s" and recorded.seconds < 15 + 10 + _agent_run.FINAL_TIMEOUT_S
    assert "stopped at the limit of 15 s" in judge(recorded)[-1].detail
    assert leftovers(place.root) == []


@pytest.mark.long
def test_a_tiny_model_falls_short_and_is_told_where(claude: Path, box: Box, tmp_path: Path) -> None:
    """The program itself, on the lab's live preset for agents."""
    preset = next(name for name, data in box.wanted.config.llama_presets.items() if data.agent)
    file = tmp_path / "report.json"
    with tool_template(box, preset, "Qwen3-Coder"):
        done = subprocess.run(
            [
                *(str(support.BIN / "python"), "scripts/verify_agent.py"),
                *("--inventory", str(support.LAB_INVENTORY), "--limit", support.LLM),
                *("--claude", str(claude), "--seconds", str(TINY_SECONDS), "--json", str(file)),
            ],
            cwd=support.ROOT,
            env={**os.environ, **support.environment()},
            capture_output=True,
            text=True,
            timeout=TINY_SECONDS + 300,
            check=False,
        )
    assert done.returncode == 1, (done.stdout, done.stderr)
    (host,) = json.loads(file.read_text())["hosts"]
    assert [check["name"] for check in host["checks"]] == [f"{preset}.{name}" for name in RESULTS]
    short = [check for check in host["checks"] if not check["ok"]]
    assert short and all(check["detail"] for check in short)
    assert host["error"] is None and "Traceback" not in done.stderr
    print(done.stdout)

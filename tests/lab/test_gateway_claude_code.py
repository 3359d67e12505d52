"""The real Claude Code against the gateway: it is answered, and a second turn reuses what the first read."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab import config
from scripts import _rote_model
from tests import support
from tests.lab.test_lmswitch import Box
from tests.lab.test_lmswitch import box as box  # the fixture
from tests.lab.tool_template import calling, tool_template

VERSION = "2.1.330"
INSTALL_TIMEOUT_S = 600
TURN_TIMEOUT_S = 900
SAID = "made by a tool"
OUTPUT_TOKENS = 200
TOOLS_TOKENS = 5_000  # the descriptions of its own tools are longer than this, everything else is shorter


@pytest.fixture(scope="session")
def claude() -> Path:
    """The program, installed once into the user's cache."""
    if not shutil.which("npm"):
        pytest.skip("npm is not installed, which Claude Code comes through; fix: apt-get install npm")
    folder = config.from_environment().cache / "claude-code" / VERSION
    program = folder / "node_modules/.bin/claude"
    if not program.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["npm", "install", "--no-audit", "--no-fund", "--silent", f"@anthropic-ai/claude-code@{VERSION}"],
            cwd=folder,
            check=True,
            timeout=INSTALL_TIMEOUT_S,
        )
    return program


class Agent:
    """Claude Code with a configuration of its own, and what the gateway wrote about its requests."""

    def __init__(self, program: Path, url: str, preset: str, folder: Path, on_host: Any) -> None:
        self.program, self.folder, self.on_host = program, folder, on_host
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "CLAUDE_CONFIG_DIR": str(folder / "config"),
            "ANTHROPIC_BASE_URL": url,
            "ANTHROPIC_AUTH_TOKEN": "none",
            "ANTHROPIC_API_KEY": "none",  # what counts with --bare
            "ANTHROPIC_MODEL": preset,
            "ANTHROPIC_DEFAULT_OPUS_MODEL": preset,
            "ANTHROPIC_DEFAULT_SONNET_MODEL": preset,
            "ANTHROPIC_DEFAULT_HAIKU_MODEL": preset,
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(OUTPUT_TOKENS),
            "API_TIMEOUT_MS": str(TURN_TIMEOUT_S * 1000),
        }

    def turn(self, prompt: str, *options: str) -> dict[str, Any]:
        """One turn without a terminal, which must end well. Returns its result."""
        done = subprocess.run(
            [self.program, "--print", prompt, "--output-format", "json", *options],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TURN_TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        assert found["type"] == "result" and not found["is_error"], found
        return found

    def audited(self) -> list[dict[str, Any]]:
        """The gateway's lines about messages, oldest first."""
        home = support.expected().home
        lines = self.on_host(support.LLM, f"sudo cat {home}/.local/state/llmbox/audit.jsonl").check().stdout
        entries = [json.loads(line) for line in lines.splitlines()]
        return [entry for entry in entries if entry["path"] == "/v1/messages"]


@pytest.fixture
def agent(claude: Path, box: Box, tmp_path: Path) -> Iterator[Agent]:
    """Claude Code on the preset that is made for agents, through a template that shows tools to the model."""
    presets = box.wanted.config.llama_presets
    preset = next(name for name, data in presets.items() if data.agent)
    url = box.wanted.url(box.hostvars["ansible_host"])
    with tool_template(box, preset, "Qwen3-Coder"):
        yield Agent(claude, url, preset, tmp_path, box.on_host)


def test_a_tool_is_called_and_its_answer_comes_back(claude: Path, box: Box, tmp_path: Path) -> None:
    """Call, grammar, stream, the tool run by Claude Code, its answer in the next request: all of it."""
    presets = box.wanted.config.llama_presets
    preset = next(name for name, data in presets.items() if data.agent)
    url = box.wanted.url(box.hostvars["ansible_host"])
    made = {"command": f"echo {SAID} > made.txt", "description": "Write a file"}
    with calling(box, preset, tmp_path, "Bash", made):
        agent = Agent(claude, url, preset, tmp_path, box.on_host)
        before = len(agent.audited())
        result = agent.turn(
            "Make it.", "--bare", "--tools", "Bash", "--allowedTools", "Bash", "--max-turns", "3"
        )
        asked = agent.audited()[before:]
    assert (tmp_path / "made.txt").read_text() == f"{SAID}\n", result
    assert result["result"] == _rote_model.ANSWER and result["num_turns"] == 2, result
    assert [entry["status"] for entry in asked] == [200, 200]


def two_turns(agent: Agent, *options: str) -> int:
    """A turn and the next one, which finds its prompt in the cache. Returns the first's tokens."""
    before = len(agent.audited())
    first = agent.turn("Say hello.", *options)
    asked = agent.audited()[before:]
    assert asked and all(entry["status"] == 200 for entry in asked), (first, asked)
    prompt: int = max(entry["prompt_tokens"] for entry in asked)

    second = agent.turn("And again.", "--continue", *options)
    again = agent.audited()[before + len(asked) :]
    assert again and all(entry["status"] == 200 for entry in again), (second, again)
    reused = max(entry["cached_tokens"] or 0 for entry in again)
    assert reused >= 0.9 * prompt, f"the second turn reused {reused} of {prompt} tokens"
    times = [sum(entry["seconds"] for entry in entries) for entries in (asked, again)]
    print(
        f"first turn {prompt} tokens in {times[0]:.0f} s; second reused {reused} "
        f"of {max(entry['prompt_tokens'] for entry in again)} in {times[1]:.0f} s"
    )
    return prompt


def test_two_turns_without_tools(agent: Agent) -> None:
    assert two_turns(agent, "--bare", "--tools", "") < TOOLS_TOKENS


@pytest.mark.long
def test_two_turns_with_all_tools(agent: Agent) -> None:
    assert two_turns(agent) > TOOLS_TOKENS, "the descriptions of the tools did not reach the model"

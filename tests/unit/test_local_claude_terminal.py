"""local-claude at a real terminal: what a person chooses with the arrow keys, and how it leaves that."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.lab.isolated_modes import CTRL_C, DOWN, ENTER, Terminal
from tests.unit import scripted_llm
from tests.unit.scripted_llm import ScriptedLlm
from tests.unit.test_local_claude import world as world  # the fixture
from tests.unit.test_local_claude_llama import models as models  # the fixture

UP, ESCAPE = b"\x1b[A", b"\x1b"
ASKS = "(arrow keys, Enter; q gives up)"
CLAUDE = """\
#!/bin/sh
[ "$1" = --help ] && exit
echo "claude with $ANTHROPIC_MODEL;" $(stty -a | tr ' ' '\\n' | grep -xE 'icanon|echo') .
exit 7
"""


def three() -> ScriptedLlm:
    """A gateway that has one more: of two, up and down are the same."""
    answers = scripted_llm.gateway()
    status, listed = answers["/v1/models"]  # type: ignore[misc]
    more = {"id": "qwen", "owned_by": "llmbox", "state": "stopped"}
    return ScriptedLlm({**answers, "/v1/models": (status, {**listed, "data": [*listed["data"], more]})})


@pytest.fixture
def typed(world: Path) -> Iterator[Callable[..., Terminal]]:
    """`typed(*words) -> Terminal` where local-claude runs; claude tells its model and how the terminal is."""
    (world / "bin/claude").write_text(CLAUDE)
    opened: list[Terminal] = []

    def begin(*words: str) -> Terminal:
        command = [sys.executable, "-m", "local_claude.cli", *words]
        opened.append(Terminal(command, world / "project"))
        return opened[-1]

    yield begin
    for one in opened:
        with suppress(OSError):
            os.killpg(one.pid, 9)
        os.close(one.descriptor)


@pytest.mark.parametrize(
    ("keys", "model"),
    [
        ([], "coder"),
        ([(DOWN, "gemma4")], "gemma4"),
        ([(UP, "qwen")], "qwen"),
        ([(DOWN, "gemma4"), (DOWN, "qwen"), (DOWN, "coder")], "coder"),
    ],
    ids=["as it is", "down", "up and around", "down and around"],
)
def test_a_model_is_chosen(keys: list[tuple[bytes, str]], model: str, typed: Callable[..., Terminal]) -> None:
    with three() as server:
        terminal = typed("--port", str(server.port), "--skip-checks")
        terminal.see(ASKS)
        terminal.see("> coder")  # the one that runs
        for key, marked in keys:
            terminal.see(f"> {marked}", terminal.press(key))
        since = terminal.press(ENTER)
        terminal.see(f"claude with {model}; icanon echo .", since)
        terminal.wait(terminal.ended, "end")
    assert terminal.code == 7


@pytest.mark.parametrize("key", [b"q", ESCAPE, CTRL_C, b"\x04"], ids=["q", "escape", "Ctrl-C", "Ctrl-D"])
def test_a_person_gives_up(key: bytes, typed: Callable[..., Terminal]) -> None:
    with three() as server:
        terminal = typed("--port", str(server.port), "--skip-checks")
        terminal.see("> coder")
        terminal.see("local-claude: no model was chosen; fix: --model names one", terminal.press(key))
        terminal.wait(terminal.ended, "end")
    assert terminal.code == 74 and "Traceback" not in terminal.seen()


def test_who_only_prints_is_asked_nothing(typed: Callable[..., Terminal]) -> None:
    with three() as server:
        terminal = typed("--port", str(server.port), "--skip-checks", "-p", "x")
        terminal.see("claude with coder;")
        terminal.wait(terminal.ended, "end")
    assert ASKS.replace(" ", "") not in terminal.seen()


def test_a_file_is_chosen(
    models: Path, monkeypatch: pytest.MonkeyPatch, typed: Callable[..., Terminal]
) -> None:
    monkeypatch.setenv("LOCAL_CLAUDE_LLAMA_SERVER", str(models / "llama-server"))
    monkeypatch.setenv("LOCAL_CLAUDE_MODELS", str(models / "m"))
    terminal = typed("--backend", "llama", "--draft", "none", "--dry-run")
    terminal.see("> one")
    terminal.see("> two-00001-of-00002", terminal.press(DOWN))
    terminal.see(f"--model {models}/m/two-00001-of-00002.gguf", terminal.press(ENTER))
    terminal.wait(terminal.ended, "end")
    assert terminal.code == 0

"""local-claude: what a session assumes, starts, stops and says where servers tell less than they might."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from local_claude import cli, options, session, translator
from local_claude.keeping import Kept
from local_claude.servers import KINDS as SERVER_KINDS
from local_claude.servers import Found, Model
from local_claude.wire import Server

from tests.unit import scripted_llm
from tests.unit.scripted_llm import Answer, ScriptedLlm
from tests.unit.test_local_claude import started
from tests.unit.test_local_claude import world as world  # the fixture
from tests.unit.test_local_claude_servers import KINDS


def studio(*loaded: int | None) -> Answer:
    """LM Studio's list: a model for each of these, loaded with that context, None for not loaded."""
    models = [
        {
            "type": "llm",
            "key": f"m{number}",
            "max_context_length": 262144,
            "loaded_instances": []
            if context is None
            else [{"id": f"m{number}", "config": {"context_length": context} if context else {}}],
        }
        for number, context in enumerate(loaded)
    ]
    return 200, {"models": models}


@pytest.mark.parametrize(("later", "tokens"), [(65536, "65536"), (40000, "40000"), (None, "32768")])
def test_a_context_that_is_told_only_once_the_model_is_loaded(
    later: int | None, tokens: str, world: Path
) -> None:
    """The check of tool calls loads it. Of a server that never tells the least is assumed, not a million."""
    with ScriptedLlm(KINDS["LM Studio"][0]) as server:

        def loads(body: Any) -> Any:
            server.answers["/api/v1/models"] = studio(later)
            called: Any = scripted_llm.called()
            return called(body)

        server.answers |= {"/api/v1/models": studio(None), "/v1/messages": loads}
        became = started("--port", str(server.port), "--model", "m0", "-p", "hi")
    assert became.variables["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == tokens


def test_a_context_that_turns_out_too_small(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ScriptedLlm(KINDS["LM Studio"][0]) as server:

        def loads(body: Any) -> Any:
            server.answers["/api/v1/models"] = studio(8192)
            called: Any = scripted_llm.called()
            return called(body)

        server.answers |= {"/api/v1/models": studio(None), "/v1/messages": loads}
        assert cli.main(["--port", str(server.port), "--model", "m0", "-p", "hi"]) == 75
    assert "8192 tokens, below the 32768" in capsys.readouterr().err


def test_of_several_loaded_models_none_is_taken_unasked(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ScriptedLlm(KINDS["LM Studio"][0]) as server:
        server.answers["/api/v1/models"] = studio(65536, 65536)
        assert cli.main(["--port", str(server.port), "-p", "hi"]) == 74
        assert '"m0", "m1"' in capsys.readouterr().err
        server.answers["/api/v1/models"] = studio(None, 65536)
        became = started("--port", str(server.port), "--skip-checks", "-p", "x")
    assert became.variables["ANTHROPIC_MODEL"] == "m1"


def test_quiet_keeps_warnings(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = {**KINDS["Ollama"][0], "/v1/messages": scripted_llm.says("Ready.")}
    with ScriptedLlm(answers) as server:
        started("--quiet", "--port", str(server.port), "--model", "qwen:7b", "-p", "x")
    told = capsys.readouterr().err.splitlines()
    assert told and all(line.startswith("local-claude: warn ") for line in told), told


@pytest.mark.parametrize(
    ("build", "often"), [("b1-a", "once for each server, model and version"), ("", "every time: it tells no")]
)
def test_how_often_the_long_check_is_done_is_said(
    build: str, often: str, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And done: a server without a version may be another one tomorrow."""
    with ScriptedLlm(scripted_llm.gateway(build=build)) as server:
        for _ in range(2):
            started("--port", str(server.port), "-p", "x")
        asked = sum(path == "/v1/messages" for _, path, _ in server.asked)
    assert f"checking tool calls and prompt cache ({often}" in capsys.readouterr().err
    assert asked == (2 if build else 4)


def test_another_request_between_the_two_of_the_check_is_no_broken_cache(world: Path) -> None:
    calls = iter([0, 0, 120])  # tokens found: of the first prompt, of the second, of the second again
    with ScriptedLlm(scripted_llm.gateway()) as server:
        server.answers["/v1/messages"] = lambda body: scripted_llm.called(cached=next(calls))(body)  # type: ignore[operator]
        started("--port", str(server.port), "-p", "x")
    assert next(calls, None) is None


def test_a_server_of_another_machine_is_never_started_here(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (world / "bin/apfel").write_text(f"#!/bin/sh\ntouch {world}/started\n")
    (world / "bin/apfel").chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    assert cli.main(["--backend", "apfel", "--host", "127.0.0.1", "--port", port, "-p", "x"]) == 71
    assert "nothing listens there" in capsys.readouterr().err and not (world / "started").exists()


class Remembered(Kept):
    """A server that tells when it is stopped."""

    def __init__(self, name: str, stopped: list[str]) -> None:
        self.name, self.stopped = name, stopped

    def stop(self) -> None:
        self.stopped.append(self.name)


def test_what_was_started_last_is_stopped_first() -> None:
    """LiteLLM before the server that it asks. When claude runs nobody comes here, and the keepers go on."""
    stopped: list[str] = []
    with pytest.raises(KeyboardInterrupt), session.stopped_unless_claude_runs() as kept:
        kept += [Remembered("apfel", stopped), Remembered("LiteLLM", stopped)]
        raise KeyboardInterrupt
    assert stopped == ["LiteLLM", "apfel"]


def test_no_result_is_kept_of_a_server_behind_litellm(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has another port each time: what is kept would never be found, and push out what is."""
    proxy = Server("http", "127.0.0.1", 5, "sk-1")
    monkeypatch.setattr(session, "speaks_messages", lambda *_: False)
    monkeypatch.setattr(translator, "start", lambda *_: (Remembered("LiteLLM", []), proxy))
    found = Found(Server("http", "127.0.0.1", 4), SERVER_KINDS["openai"], "1.0", (Model("m"),))
    kept: list[Kept] = []
    behind = session.in_front(found, found.models[0], options.parse([]), world, kept)
    assert (behind.server, behind.version, len(kept)) == (proxy, "", 1)

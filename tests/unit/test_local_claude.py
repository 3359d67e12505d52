"""local-claude: the command line, what is recognised and checked, what claude is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from local_claude import cli, environment, launch, options
from local_claude.errors import LocalClaudeError
from local_claude.options import Options

from tests.unit import scripted_llm
from tests.unit.scripted_llm import ScriptedLlm

KEPT_OUT = {
    *("pydantic", "httpx", "llama_common", "asyncio", "ssl_", "requests", "yaml", "litellm", "logging"),
    *("argparse", "dataclasses", "inspect", "unicodedata", "subprocess", "textwrap"),
}


class Became(BaseException):
    """claude would run now."""

    def __init__(self, launched: launch.Launch) -> None:
        self.command = launched.command
        self.variables = dict(launched.variables)


@pytest.fixture(autouse=True)
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own with a claude that is never run, and nothing of the machine's environment."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/claude"
    program.write_text("#!/bin/sh\necho '  --exclude-dynamic-system-prompt-sections  x'\n")
    program.chmod(0o755)
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    for name in (
        "LLMBOX_KEY",
        "http_proxy",
        "https_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "all_proxy",
        "NO_PROXY",
        "no_proxy",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("LOCAL_CLAUDE_DIR", str(tmp_path / "claude-local"))

    def go(self: launch.Launch) -> None:
        raise Became(self)

    monkeypatch.setattr(launch.Launch, "go", go)
    return tmp_path


def started(*words: str) -> Became:
    """What claude would become with this command line."""
    with pytest.raises(Became) as caught:
        refused = cli.main(list(words))
        pytest.fail(f"it ended with {refused}")
    return caught.value


# --- the command line ---


@pytest.mark.parametrize(
    ("words", "own", "rest"),
    [
        ([], [], []),
        (["-p", "hi"], [], ["-p", "hi"]),
        (["--model", "coder", "-p", "--model", "x"], ["--model", "coder"], ["-p", "--model", "x"]),
        (["--model=coder", "fix it"], ["--model=coder"], ["fix it"]),
        (["--port", "1234", "--resume", "ID"], ["--port", "1234"], ["--resume", "ID"]),
        (["--quiet", "--", "--help"], ["--quiet"], ["--help"]),
        (["--model", "doctor", "-p", "doctor"], ["--model", "doctor"], ["-p", "doctor"]),
        (["--quiet", "--", "doctor"], ["--quiet"], ["doctor"]),
    ],
)
def test_the_first_word_that_is_not_its_own_begins_claude_s(
    words: list[str], own: list[str], rest: list[str]
) -> None:
    assert options.split(words) == (own, False, rest)


@pytest.mark.parametrize("words", [["doctor", "--port", "1", "-q"], ["--port", "1", "doctor", "-q"]])
def test_doctor_is_meant_wherever_it_stands_among_its_own_options(words: list[str]) -> None:
    assert options.split(words) == (["--port", "1"], True, ["-q"])


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--backend", "cloud"], '--backend "cloud" is none'),
        (["--port", "12x4"], '--port "12x4" is no number'),
        (["--port", "0"], "is no number"),
        (["--port", "99999"], "is no port"),
        (["--model"], "--model needs a value"),
        (["--host", "--quiet"], "--host needs a value"),
        (["--quiet=1"], "--quiet takes no value"),
        (["--port=-1"], "is no number"),
        (["--model", "a\nb"], '--model "a\\nb" cannot be a name'),
        (["--host", "a b"], '--host "a b" is no host name'),
        (["--host", "http://h/chat"], "is no address"),
        (["--host", "h:1", "--port", "2"], "names the port 1"),
        (["--context", "65536"], "--context goes with a llama-server"),
        (["--backend", "llama", "--port", "8080"], "takes a free port"),
        (["--backend", "remote-llama"], "needs to know where"),
        (["doctor", "-p"], 'doctor takes no "-p"'),
    ],
)
def test_a_command_that_cannot_be_meant(
    words: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert part in said and "; fix: " in said and said.count("\n") == 1


def test_help_names_backends_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    for word in ("--backend", "lmstudio", "apfel", " 75  ", "LLMBOX_KEY"):
        assert word in said


# --- a start that goes well ---


@pytest.fixture
def serving() -> Iterator[Callable[..., ScriptedLlm]]:
    """`serving(answers) -> ScriptedLlm`, closed afterwards."""
    with_it: list[ScriptedLlm] = []

    def serve(answers: dict[str, Any]) -> ScriptedLlm:
        with_it.append(ScriptedLlm(answers))
        return with_it[-1]

    yield serve
    for one in with_it:
        one.close()


def test_claude_gets_the_environment_and_the_settings(
    serving: Callable[..., ScriptedLlm], world: Path
) -> None:
    server = serving(scripted_llm.gateway())
    became = started("--port", str(server.port), "-p", "hi")
    variables = became.variables
    assert variables["ANTHROPIC_BASE_URL"] == f"http://127.0.0.1:{server.port}"
    assert variables["CLAUDE_CONFIG_DIR"] == str(world / "claude-local")
    for name in ("ANTHROPIC_MODEL", "ANTHROPIC_DEFAULT_HAIKU_MODEL", "CLAUDE_CODE_SUBAGENT_MODEL"):
        assert variables[name] == "coder"
    assert variables["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == "98304"
    assert variables["ANTHROPIC_API_KEY"] == "" and variables["ANTHROPIC_AUTH_TOKEN"]
    assert became.command[0] == str(world / "bin/claude")
    assert became.command[1] == "--settings" and became.command[-2:] == ("-p", "hi")
    assert launch.SHARED_PROMPT in became.command
    settings = json.loads(Path(became.command[2]).read_text())
    assert settings["env"]["ANTHROPIC_BASE_URL"] == variables["ANTHROPIC_BASE_URL"]
    assert Path(became.command[2]).stat().st_mode & 0o777 == 0o600
    assert not (world / ".claude").exists()


def test_a_passed_check_is_not_repeated(serving: Callable[..., ScriptedLlm]) -> None:
    server = serving(scripted_llm.gateway())
    words = ("--port", str(server.port), "-p", "hi")
    started(*words)
    asked = sum(path == "/v1/messages" for _, path, _ in server.asked)
    assert asked == 2
    started(*words)
    assert sum(path == "/v1/messages" for _, path, _ in server.asked) == asked
    started("--recheck", *words)
    assert sum(path == "/v1/messages" for _, path, _ in server.asked) == 2 * asked
    server.answers["/props"] = scripted_llm.gateway(build="b11500-def")["/props"]
    started(*words)
    assert sum(path == "/v1/messages" for _, path, _ in server.asked) == 3 * asked
    assert started("--model", "g", *words).variables["ANTHROPIC_MODEL"] == "gemma4", "its alias"
    assert sum(path == "/v1/messages" for _, path, _ in server.asked) == 4 * asked, "another model"
    other = serving(scripted_llm.gateway())
    started("--port", str(other.port), "-p", "hi")
    assert sum(path == "/v1/messages" for _, path, _ in other.asked) == asked, "another server"


def test_a_gateway_s_model_has_the_context_that_its_server_was_given(
    serving: Callable[..., ScriptedLlm], capsys: pytest.CaptureFixture[str]
) -> None:
    """The list says what the preset asks for; what serves may have been started with less."""
    for real, code in ((40960, 0), (8192, 75)):
        server = serving({**scripted_llm.gateway(), "/props": scripted_llm.gateway(context=real)["/props"]})
        words = ("--port", str(server.port), "-p", "hi")
        if code:
            assert cli.main(list(words)) == code and f"{real} tokens, below" in capsys.readouterr().err
        else:
            assert started(*words).variables["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == str(real)


@pytest.mark.parametrize("at", ['"x"', "null", "[]", "1" + "0" * 400, "NaN", "-1"])
def test_a_damaged_file_of_checks_is_no_harm(
    at: str, serving: Callable[..., ScriptedLlm], world: Path
) -> None:
    file = world / "claude-local/local-claude/checks.json"
    file.parent.mkdir(parents=True)
    file.write_text(f'{{"a": {{"at": {at}}}}}')
    server = serving(scripted_llm.gateway())
    started("--port", str(server.port), "-p", "hi")
    assert '"a"' not in file.read_text() and "tool calls" in file.read_text()


@pytest.mark.parametrize(
    "results",
    [
        *([], [5], ["x"], [{}], {"name": "x"}, 7, None),
        *([{"state": state}] for state in ("weird", "fail", 5, None)),
        *([{name: 5}] for name in ("name", "detail", "fix")),
        [{"unknown": 1}],
    ],
    ids=repr,
)
def test_kept_results_of_another_shape_are_done_again(
    results: Any, serving: Callable[..., ScriptedLlm], world: Path
) -> None:
    """Written by another version, or by hand: no traceback, and nothing that counts as passed."""
    server = serving(scripted_llm.gateway())
    words = ("--port", str(server.port), "-p", "hi")
    started(*words)
    file = world / "claude-local/local-claude/checks.json"
    kept = json.loads(file.read_text())
    (entry,) = kept.values()
    if isinstance(results, list) and results and results[0] and isinstance(results[0], dict):
        results = [entry["results"][0] | results[0]]
    entry["results"] = results
    file.write_text(json.dumps(kept))
    asked = len(server.asked)
    started(*words)
    assert ("POST", "/v1/messages") in [one[:2] for one in server.asked[asked:]]


def test_the_key_goes_to_the_server_and_nowhere_else(
    serving: Callable[..., ScriptedLlm],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    world: Path,
) -> None:
    monkeypatch.setenv("LLMBOX_KEY", "hush-hush")
    server = serving(scripted_llm.gateway())
    became = started("--port", str(server.port), "-p", "hi")
    assert became.variables["ANTHROPIC_AUTH_TOKEN"] == "hush-hush"
    assert all(headers["authorization"] == "Bearer hush-hush" for headers in server.headers)
    for words in ("--print-env", "--dry-run"):
        assert cli.main(["--port", str(server.port), words]) == 0
    seen = capsys.readouterr()
    assert "hush-hush" not in seen.out + seen.err + " ".join(became.command)
    written = [path for path in (world / "claude-local").rglob("*") if path.is_file()]
    assert written and all("hush-hush" not in path.read_text() for path in written)


def test_specstory_asks_for_the_version_and_adds_a_session(
    serving: Callable[..., ScriptedLlm], world: Path
) -> None:
    """`specstory run claude -c "local-claude ..." --resume ID` : `local-claude -v` first, then all of it."""
    assert started("-v").command == (str(world / "bin/claude"), "-v")
    server = serving(scripted_llm.gateway())
    words = ("--host", "127.0.0.1", "--port", str(server.port), "--model", "coder", "--resume", "0b5c-4f1e")
    assert started(*words).command[-2:] == ("--resume", "0b5c-4f1e")


@pytest.mark.parametrize(
    "word",
    [
        *("--version", "mcp", "--help", "doctor", "setup-token", "project", "purge", "upgrade"),
        *("attach", "logs", "respawn", "stop"),
    ],
)
def test_what_asks_no_model_needs_no_server(word: str, world: Path) -> None:
    """And asks nobody else by itself: the settings of a server are not there to keep it from that."""
    became = started("--port", "9", "--", word)
    assert became.command == (str(world / "bin/claude"), word)
    assert became.variables == {
        "CLAUDE_CONFIG_DIR": str(world / "claude-local"),
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "CLAUDE_CODE_DISABLE_OFFICIAL_MARKETPLACE_AUTOINSTALL": "1",
        "CLAUDE_CODE_ENABLE_TELEMETRY": "",
        "DISABLE_AUTOUPDATER": "1",
    }


def test_settings_of_the_caller_are_kept_and_ours_win(serving: Callable[..., ScriptedLlm]) -> None:
    server = serving(scripted_llm.gateway())
    given = {"permissions": {"deny": ["Bash"]}, "env": {"ANTHROPIC_BASE_URL": "http://x", "OTHER": "1"}}
    became = started("--port", str(server.port), "-p", "hi", "--settings", json.dumps(given))
    assert became.command.count("--settings") == 1
    settings = json.loads(Path(became.command[2]).read_text())
    assert settings["permissions"] == given["permissions"] and settings["env"]["OTHER"] == "1"
    assert settings["env"]["ANTHROPIC_BASE_URL"].endswith(str(server.port))


def test_fetching_a_page_tells_nobody_else_its_host(serving: Callable[..., ScriptedLlm]) -> None:
    server = serving(scripted_llm.gateway())
    given = {"skipWebFetchPreflight": False, "model": "x"}
    became = started("--port", str(server.port), "--", "--settings", json.dumps(given))
    settings = json.loads(Path(became.command[2]).read_text())
    assert settings["skipWebFetchPreflight"] is True and settings["model"] == "x"


def test_the_user_s_own_instructions_are_not_sent(
    serving: Callable[..., ScriptedLlm], world: Path, tmp_path: Path
) -> None:
    """Below the home folder claude would take them for the project's. What the caller excludes too."""
    (tmp_path / "dotfiles").mkdir()
    (world / ".claude").symlink_to(tmp_path / "dotfiles")
    server = serving(scripted_llm.gateway())
    given = json.dumps({"claudeMdExcludes": ["/srv/team/CLAUDE.md"]})
    became = started("--port", str(server.port), "--", "--settings", given)
    assert json.loads(Path(became.command[2]).read_text())["claudeMdExcludes"] == [
        "/srv/team/CLAUDE.md",
        *(f"{world}/.claude/{name}" for name in ("CLAUDE.md", "rules/**")),
        *(f"{tmp_path}/dotfiles/{name}" for name in ("CLAUDE.md", "rules/**")),
    ]


def test_a_chat_gets_its_key_without_a_question_and_without_a_file(
    serving: Callable[..., ScriptedLlm], monkeypatch: pytest.MonkeyPatch, world: Path
) -> None:
    """--bare takes no token; about a key in ANTHROPIC_API_KEY claude asks, and suggests not to use it."""
    monkeypatch.setenv("LLMBOX_KEY", "hush-hush")
    became = started("--chat-only", "--port", str(serving(scripted_llm.gateway()).port))
    settings = json.loads(Path(became.command[2]).read_text())
    assert became.variables["ANTHROPIC_API_KEY"] == settings["env"]["ANTHROPIC_API_KEY"] == ""
    helper = settings["apiKeyHelper"].split()
    told = subprocess.run(helper, env=became.variables, capture_output=True, check=True)
    assert told.stdout == b"hush-hush\n"
    written = [path for path in (world / "claude-local").rglob("*") if path.is_file()]
    assert written and all("hush-hush" not in path.read_text() for path in written)


@pytest.mark.parametrize(
    ("key", "token", "code"), [("hush-hush", "hush-hush", 0), ("", "local-claude", 0), (None, "", 1)]
)
def test_what_is_printed_sets_the_same_in_a_shell(
    key: str | None,
    token: str,
    code: int,
    serving: Callable[..., ScriptedLlm],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    world: Path,
) -> None:
    """Pasted into a shell with the key it works; into one without it says so, and sets nothing instead."""
    server = serving(scripted_llm.gateway())
    monkeypatch.setenv("LLMBOX_KEY", "hush-hush" if key is None else key)
    words = ["--port", str(server.port), "--model", "coder"]
    became = started(*words)
    capsys.readouterr()
    assert cli.main([*words, "--print-env"]) == 0
    lines = capsys.readouterr().out
    assert all(line.startswith("export ") for line in lines.splitlines()), "and nothing is run"
    given = {"PATH": "/usr/bin:/bin"} | ({} if key is None else {"LLMBOX_KEY": key})
    shell = ["sh", "-ec", f"{lines}\nexec env -0"]
    done = subprocess.run(shell, env=given, capture_output=True, text=True, check=False)
    assert bool(done.returncode) == bool(code) and ("LLMBOX_KEY" in done.stderr) == bool(code), done.stderr
    if not code:
        found = dict(line.split("=", 1) for line in done.stdout.split("\0") if line)
        assert found["ANTHROPIC_AUTH_TOKEN"] == token
        assert {name: found[name] for name in became.variables} == became.variables


def test_a_key_that_is_nobody_s_is_not_printed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That of LiteLLM, say, which has ended by the time anybody could use it."""
    monkeypatch.setenv("LLMBOX_KEY", "mine")
    line = launch.exports({"ANTHROPIC_AUTH_TOKEN": "sk-random"})
    assert line.startswith("# ANTHROPIC_AUTH_TOKEN ") and "sk-random" not in line and "\n" not in line


def test_what_is_printed_as_a_command_is_what_would_run(
    serving: Callable[..., ScriptedLlm], capsys: pytest.CaptureFixture[str], world: Path
) -> None:
    """Run by a shell, long after: claude gets the same words, and a file that is still there."""
    server = serving(scripted_llm.gateway())
    words = ["--port", str(server.port), "-p", "a 'b'\nc"]
    became = started(*words)
    capsys.readouterr()
    assert cli.main(["--dry-run", *words]) == 0
    lines = capsys.readouterr().out
    age(world)
    started(*words)
    (world / "bin/claude").write_text('#!/bin/sh\nprintf "%s\\0" "$0" "$@"\n')
    done = subprocess.run(["sh", "-ec", lines], capture_output=True, text=True, check=True)
    ran = done.stdout.split("\0")[:-1]
    assert (ran[:2], ran[3:]) == ([*became.command[:2]], [*became.command[3:]])
    assert Path(ran[2]).read_text() == Path(became.command[2]).read_text()
    assert ran[2] != became.command[2] and str(os.getpid()) not in ran[2], "it belongs to no session"


# --- what a session leaves ---


def age(world: Path, days: float = 2) -> None:
    """As if all that was written in the folder of settings had been written days ago."""
    for path in (world / "claude-local/local-claude").iterdir():
        os.utime(path, (time.time() - days * 24 * 3600,) * 2)


def test_settings_of_sessions_that_have_ended_are_removed(
    serving: Callable[..., ScriptedLlm], world: Path
) -> None:
    words = ("--port", str(serving(scripted_llm.gateway()).port), "-p", "hi")
    own = Path(started(*words).command[2])
    assert own.stem.endswith(f"-{os.getpid()}")
    with subprocess.Popen(["/bin/true"]) as ended:
        ended.wait()
    kinds = {
        "settings-0123456789abcdef.json": True,  # as earlier versions named them
        "settings-0123456789012345.json": True,
        f"settings-0123456789abcdef-{ended.pid}.json": True,
        f"litellm-{ended.pid}.yaml": True,
        f"llama-server-{ended.pid}.log": True,
        f"settings-0123456789abcdef-{os.getppid()}.json": False,  # runs
        "settings-0123456789abcdef-1.json": False,  # somebody else's process
        "claude-options.json": False,
        "printed-0123456789abcdef.json": False,
        "mine.json": False,
    }
    for name in kinds:
        (own.parent / name).write_text("{}")
    started(*words)
    assert kinds.keys() <= {path.name for path in own.parent.iterdir()}, "what is new may be in use"
    age(world)
    started(*words)
    left = {path.name for path in own.parent.iterdir()}
    assert {name: name not in left for name in kinds} == kinds and own.name in left


# --- what is imported before claude runs ---


def test_a_start_imports_nothing_heavy() -> None:
    """Start-up is what is imported: the list is held short, a clock on a busy machine proves nothing."""
    code = "import sys, local_claude.cli, local_claude.session; print('\\n'.join(sys.modules))"
    listed = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True, timeout=60
    ).stdout.split()
    assert not {name.partition(".")[0] for name in listed} & KEPT_OUT
    own = [name for name in listed if name.startswith("local_claude")]
    assert set(own) <= {
        "local_claude",
        *(
            f"local_claude.{name}"
            for name in ("backends", "checks", "cli", "environment", "errors", "launch")
        ),
        *(f"local_claude.{name}" for name in ("options", "servers", "session", "wire")),
    }


def test_options_default_to_what_help_says() -> None:
    assert options.parse([]) == Options()
    with pytest.raises(LocalClaudeError):
        options.parse(["--backend", ""])


@pytest.mark.parametrize(
    ("context", "output", "window"),
    [
        (2048, "512", None),
        (32768, "4096", None),
        (99_999, "12499", None),
        (100_000, "12500", "100000"),
        (262144, "16384", "262144"),
    ],
)
def test_limits_follow_from_the_real_context(context: int, output: str, window: str | None) -> None:
    found = environment.variables("http://x", "", "m", context)
    assert found["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == str(context)
    assert found["CLAUDE_CODE_MAX_OUTPUT_TOKENS"] == output
    assert found.get("CLAUDE_CODE_AUTO_COMPACT_WINDOW") == window


def test_the_whole_environment() -> None:
    """Every name is written out: each is one that Claude Code reads, and one less lets something out."""
    assert environment.variables("http://x", "", "m", 98304) == {
        "ANTHROPIC_BASE_URL": "http://x",
        "ANTHROPIC_AUTH_TOKEN": "local-claude",
        "ANTHROPIC_MODEL": "m",
        "ANTHROPIC_DEFAULT_OPUS_MODEL": "m",
        "ANTHROPIC_DEFAULT_SONNET_MODEL": "m",
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": "m",
        "ANTHROPIC_DEFAULT_FABLE_MODEL": "m",
        "CLAUDE_CODE_SUBAGENT_MODEL": "m",
        "ANTHROPIC_API_KEY": "",
        "ANTHROPIC_CUSTOM_HEADERS": "",
        "ANTHROPIC_SMALL_FAST_MODEL": "",
        "ANTHROPIC_UNIX_SOCKET": "",
        "CLAUDE_CODE_API_BASE_URL": "",
        "CLAUDE_CODE_ENABLE_TELEMETRY": "",
        "CLAUDE_CODE_OAUTH_TOKEN": "",
        "CLAUDE_CODE_USE_ANTHROPIC_AWS": "",
        "CLAUDE_CODE_USE_ANTHROPIC_GOOGLE_CLOUD": "",
        "CLAUDE_CODE_USE_BEDROCK": "",
        "CLAUDE_CODE_USE_FOUNDRY": "",
        "CLAUDE_CODE_USE_GATEWAY": "",
        "CLAUDE_CODE_USE_MANTLE": "",
        "CLAUDE_CODE_USE_VERTEX": "",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "CLAUDE_CODE_DISABLE_OFFICIAL_MARKETPLACE_AUTOINSTALL": "1",
        "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
        "DISABLE_AUTOUPDATER": "1",
        "API_TIMEOUT_MS": "1800000",
        "API_FORCE_IDLE_TIMEOUT": "0",
        "CLAUDE_STREAM_IDLE_TIMEOUT_MS": "1800000",
        "CLAUDE_STREAM_FIRST_BYTE_TIMEOUT_MS": "1800000",
        "CLAUDE_CODE_DISABLE_AUTO_MEMORY": "1",
        "CLAUDE_CODE_DISABLE_BUNDLED_SKILLS": "1",
        "CLAUDE_CODE_DISABLE_WORKFLOWS": "1",
        "CLAUDE_CODE_DISABLE_CRON": "1",
        "CLAUDE_CODE_DISABLE_ARTIFACT": "1",
        "CLAUDE_CODE_MAX_CONTEXT_TOKENS": "98304",
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": "12288",
    }


def test_what_is_a_matter_of_taste_stays_the_user_s() -> None:
    wanted = environment.variables("http://x", "", "m", 65536)
    own = {"CLAUDE_CODE_DISABLE_BUNDLED_SKILLS": "0", "ANTHROPIC_BASE_URL": "http://elsewhere"}
    found = environment.kept(wanted, own)
    assert found["CLAUDE_CODE_DISABLE_BUNDLED_SKILLS"] == "0" and found["ANTHROPIC_BASE_URL"] == "http://x"

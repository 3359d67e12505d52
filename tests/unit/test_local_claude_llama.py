"""local-claude: which llama-server is started, with which model, draft and flags; here and over SSH."""

from __future__ import annotations

import ast
import inspect
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from llama_common import gguf as gguf_header
from local_claude import cli, keeper, llama, options, started, survey
from local_claude.errors import LocalClaudeError
from local_claude.llama import GgufFile

from tests.support import ROOT
from tests.unit import scripted_llm
from tests.unit.test_local_claude import started as claude
from tests.unit.test_local_claude import world as world  # the fixture
from tests.unit.test_local_claude_keeper import GONE_S, alive, gone

GIB = 2**30
START_S = 60.0
QWEN = {"model": "gpt2", "pre": "qwen2", "eos_token_id": 151645, "add_eos_token": True}


def file(
    name: str, gib: float, tokens: int = 151936, digest: str = "a" * 64, **tokenizer: Any
) -> dict[str, Any]:
    """A model as the survey tells of it."""
    values = {f"tokenizer.ggml.{key}": value for key, value in {**QWEN, **tokenizer}.items()}
    values |= {"general.architecture": "qwen3moe", "qwen3moe.context_length": 262144}
    lengths = {"tokenizer.ggml.tokens": [tokens, digest]}
    return {"path": f"/m/{name}.gguf", "size": int(gib * GIB), "values": values, "lengths": lengths}


CODER = file("coder-30b", 17)
FILES = [
    CODER,
    file("coder-1.7b", 1.2),
    file("anything-0.6b", 0.4),  # its name says nothing, its header does
    file("coder-tiny", 0.1, model="llama"),  # of the same family by its name, with other tokens
    file("coder-odd", 0.05, tokens=32000),
]


def plan(*words: str, files: list[dict[str, Any]] = FILES) -> llama.Plan:
    """What would be started with these options."""
    found = {"program": "/bin/llama-server", "help": "", "files": files}
    return llama.plan(found, options.parse(["--backend", "llama", *words]), lambda _: None)


def test_the_draft_is_the_smallest_with_the_same_tokens() -> None:
    made = plan("--model", "coder-30b")
    assert made.draft == "/m/anything-0.6b.gguf"
    command = made.command("127.0.0.1:1234")
    assert command[command.index("--spec-draft-model") + 1] == made.draft
    assert plan("--model", "coder-30b", "--draft", "none").draft is None
    assert plan("--model", "coder-30b", "--draft", "coder-1.7b").draft == "/m/coder-1.7b.gguf"
    assert plan("--model", "coder-tiny").draft is None


def test_a_draft_of_its_own_choice_is_less_than_half_as_large() -> None:
    """It must be read beside the model for every token; a person may name a larger one."""
    small = file("coder-1.7b", 1.2)
    large, close = file("coder-a", 2.5), file("coder-b", 2.3)
    assert plan("--model", "coder-a", files=[large, small]).draft == small["path"]
    assert plan("--model", "coder-b", files=[close, small]).draft is None
    assert plan("--model", "coder-b", "--draft", "coder-1.7b", files=[close, small]).draft == small["path"]


@pytest.mark.parametrize(
    ("draft", "reason"),
    [
        (file("x", 1, model="llama"), "its kind is llama beside gpt2"),
        (file("x", 1, eos_token_id=2), "the end of a text is token 2 beside 151645"),
        (file("x", 1, add_eos_token=False), "one adds a token at the end of a text"),
        (file("x", 1, pre="other"), ""),  # a draft is handed tokens, never a text
        (file("x", 1, tokens=151936 - 129), "151807 tokens beside 151936"),
        (file("x", 1, tokens=151936 - 128), ""),
        (file("x", 1, digest="b" * 64), "151936 tokens that are not the same"),
        (file("x", 1, digest=""), "a file without a tokenizer"),
        (file("x", 1, model="m" * 65), "a file without a tokenizer"),
    ],
)
def test_two_tokenizers(draft: dict[str, Any], reason: str) -> None:
    found = GgufFile.of(CODER).unlike(GgufFile.of(draft))
    assert (reason in found) if reason else not found


def test_without_a_preset_the_context_is_an_agent_s() -> None:
    command = plan("--model", "coder-30b").command("127.0.0.1:1234")
    assert command[command.index("--ctx-size") + 1] == "65536"
    assert "--jinja" in command and command[command.index("--parallel") + 1] == "1"
    command = plan("--model", "coder-30b", "--context", "40000").command("127.0.0.1:1234")
    assert command[command.index("--ctx-size") + 1] == "39936"


@pytest.mark.parametrize("words", [("--preset", "coder"), ("--model", "coder"), ("--model", "coder-30b")])
def test_a_preset_that_matches_gives_the_flags(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"context": 98304, "kv_cache_type": "q4_0", "n_cpu_moe": 16, "threads": 12}
    written = {"version": 1, "presets": {"coder": {"file": "coder-30b.gguf", **keys}}}
    (tmp_path / "presets.json").write_text(json.dumps(written))
    monkeypatch.setenv("LOCAL_CLAUDE_PRESETS", str(tmp_path / "presets.json"))
    made = plan(*words)
    command = made.command("127.0.0.1:1234")
    assert made.alias == "coder" and made.model == "/m/coder-30b.gguf"
    for flag, value in (("--ctx-size", "98304"), ("--n-cpu-moe", "16"), ("--cache-type-v", "q4_0")):
        assert command[command.index(flag) + 1] == value


@pytest.mark.parametrize(
    ("words", "files", "code", "part"),
    [
        ((), FILES, 74, "several models"),
        ((), [], 74, "no GGUF file"),
        (("--model", "qwen"), FILES, 74, 'no GGUF file "qwen"'),
        (("--preset", "coder"), FILES, 74, '--preset "coder" is not in'),
        (("--model", "coder-30b", "--draft", "x"), FILES, 74, '--draft "x" is not there'),
        (("--model", "coder-30b", "--draft", "coder-odd"), FILES, 74, "cannot be a draft"),
    ],
)
def test_what_cannot_be_started(
    words: tuple[str, ...], files: list[dict[str, Any]], code: int, part: str
) -> None:
    with pytest.raises(LocalClaudeError) as caught:
        plan(*words, files=files)
    assert caught.value.code == code and part in caught.value.problem


@pytest.mark.parametrize("text", ["", "[]", '{"presets": []}', '{"presets": {"coder": {"context": "many"}}}'])
def test_a_broken_file_of_presets(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "presets.json").write_text(text)
    monkeypatch.setenv("LOCAL_CLAUDE_PRESETS", str(tmp_path / "presets.json"))
    with pytest.raises(LocalClaudeError) as caught:
        plan("--preset", "coder", "--model", "coder-30b")
    assert caught.value.code == 79


# --- the survey ---


def gguf(path: Path, **values: str | int) -> None:
    """A GGUF file of nothing but a header."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    pairs = b"".join(
        text(key.replace("__", "."))
        + (struct.pack("<I", 8) + text(value) if isinstance(value, str) else struct.pack("<II", 4, value))
        for key, value in values.items()
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(values)) + pairs + bytes(64))


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder of models, and what is none."""
    gguf(tmp_path / "m/a/one.gguf", general__architecture="llama", llama__context_length=4096)
    gguf(tmp_path / "m/two-00001-of-00002.gguf", general__architecture="qwen3")
    gguf(tmp_path / "m/two-00002-of-00002.gguf", general__architecture="qwen3")
    gguf(tmp_path / "m/eyes.gguf", general__architecture="clip")
    (tmp_path / "m/broken.gguf").write_bytes(b"GGUF")
    (tmp_path / "m/notes.txt").touch()
    program = tmp_path / "llama-server"
    program.write_text("#!/bin/sh\necho '--jinja   use jinja'\n")
    program.chmod(0o755)
    return tmp_path


def test_the_survey_reads_headers(models: Path) -> None:
    found = survey.survey(str(models / "llama-server"), str(models / "m"))
    assert found["program"] == str(models / "llama-server") and "--jinja" in found["help"]
    assert [Path(entry["path"]).name for entry in found["files"]] == ["one.gguf", "two-00001-of-00002.gguf"]
    assert GgufFile.of(found["files"][0]).context == 4096


def test_the_survey_leaves_out_the_chat_template(tmp_path: Path) -> None:
    """Nobody asks for it, it is long, and all of this may come over SSH."""
    gguf(tmp_path / "one.gguf", general__architecture="llama", tokenizer__chat_template="{{ messages }}")
    found = survey.describe(tmp_path / "one.gguf")
    assert found is not None and found["values"] == {"general.architecture": "llama"}


def test_a_split_model_is_as_large_as_all_its_parts(tmp_path: Path) -> None:
    """Else the largest model of all, whose first part is a header, is the smallest draft."""
    for number in (1, 2, 3):
        gguf(tmp_path / f"big-0000{number}-of-00003.gguf", general__architecture="qwen3")
    with (tmp_path / "big-00003-of-00003.gguf").open("ab") as file:
        file.truncate(10_000)
    gguf(tmp_path / "mixture-of-experts.gguf", general__architecture="qwen3")
    small = (tmp_path / "mixture-of-experts.gguf").stat().st_size
    found = {Path(entry["path"]).name: entry["size"] for entry in survey.survey("", str(tmp_path))["files"]}
    assert found == {"big-00001-of-00003.gguf": 10_000 + 2 * small, "mixture-of-experts.gguf": small}


def test_the_survey_is_the_same_on_the_other_side(
    models: Path, monkeypatch: pytest.MonkeyPatch, world: Path
) -> None:
    """ssh is played by a program that leaves its own words away and runs the command in a shell."""
    ssh = world / "bin/ssh"
    ssh.write_text('#!/bin/sh\nfor command; do :; done\nexec /bin/sh -c "$command"\n')
    ssh.chmod(0o755)
    monkeypatch.setenv("LOCAL_CLAUDE_REMOTE_LLAMA_SERVER", str(models / "llama-server"))
    monkeypatch.setenv("LOCAL_CLAUDE_REMOTE_MODELS", str(models / "m"))
    here = survey.survey(str(models / "llama-server"), str(models / "m"))
    assert started.far_survey("box") == json.loads(json.dumps(here))


# What python 3.7 has of the names that are imported one by one.
OLD_NAMES = {
    "__future__": {"annotations"},
    "collections.abc": {"Callable", "Iterable", "Iterator", "Mapping"},
    "dataclasses": {"dataclass"},
    "llama_common": {"gguf"},
    "local_claude": {"keeper"},
    "pathlib": {"Path"},
    "typing": {"Any", "TYPE_CHECKING"},
}
NEW_METHODS = {"removeprefix", "removesuffix", "is_relative_to", "readlink", "hardlink_to", "with_stem"}


def old_enough(source: str) -> None:
    """Fails for what python 3.7 cannot read, import or call; annotations are never looked at."""
    tree = ast.parse(source, feature_version=(3, 7))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    imports = [
        node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and id(node) not in typing_only
    ]
    for node in imports:
        new = {name.name for name in node.names} - OLD_NAMES.get(node.module or "", set())
        assert not new, f"{node.module} has {new} only later, or OLD_NAMES does not know it"
    called = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    given = {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword)}
    assert not called & NEW_METHODS and not given & {"missing_ok", "strict", "process_group", "slots"}


@pytest.mark.parametrize("module", [gguf_header, keeper, survey], ids=lambda module: module.__name__)
def test_what_runs_on_the_other_side_runs_with_its_older_python(module: ModuleType) -> None:
    """That of macOS is 3.9, and what `ssh mac python3` finds."""
    source = inspect.getsource(module)
    assert "from __future__ import annotations" in source
    old_enough(source)


@pytest.mark.parametrize("program", ["_FIRST", "_KEEP", "_SURVEY"])
def test_what_comes_first_on_the_other_side_does_as_well(program: str) -> None:
    old_enough(getattr(started, program))


@pytest.mark.parametrize(
    "new",
    [
        *("if (a := 1): pass", "match a:\n case 1: pass", "def f(a, /): pass"),
        *("from itertools import pairwise", "from typing import Final"),
        *("a.removeprefix('b')", "a.unlink(missing_ok=True)", "zip(a, b, strict=True)"),
    ],
)
def test_what_is_too_new_is_seen(new: str) -> None:
    with pytest.raises((SyntaxError, AssertionError)):
        old_enough(new)


@pytest.mark.parametrize(
    ("said", "fix"),
    [
        ("llm@box: Permission denied (publickey).", "ssh-copy-id box"),
        ("Host key verification failed.", "accept its key"),
        ("ssh: Could not resolve hostname box", "~/.ssh/config"),
        ("bash: line 1: exec: python3: not found", "install python3"),
        ("", "ssh box true"),
    ],
)
def test_what_ssh_says(said: str, fix: str, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ssh = world / "bin/ssh"
    ssh.write_text(f"#!/bin/sh\nprintf '%s' '{said}' >&2; exit 255\n")
    ssh.chmod(0o755)
    assert cli.main(["--backend", "remote-llama", "--host", "box", "-p", "hi"]) == 78
    line = capsys.readouterr().err.splitlines()[-1]
    assert fix in line.partition("; fix: ")[2], line


@pytest.mark.parametrize("host", ["-oProxyCommand=id", "a b", "box;id"])
def test_nothing_else_gets_to_ssh(host: str, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--backend", "remote-llama", f"--host={host}", "-p", "hi"]) == 2
    assert "is nothing for ssh" in capsys.readouterr().err


def test_the_connection_is_its_own_and_asks_nothing() -> None:
    words = " ".join(started.ssh())
    for option in ("BatchMode=yes", "ControlPath=none", "ServerAliveInterval=5", "ForwardAgent=no"):
        assert option in words
    assert subprocess.run(["sh", "-nc", started.far_command()], check=False).returncode == 0


def test_without_llama_common_the_line_says_how_to_get_it(world: Path) -> None:
    """As pipx installs it: what starts a llama-server is an extra, everything else goes without."""
    start = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'apps/local_claude/src')!r}); "
        "from local_claude import cli; sys.exit(cli.main(sys.argv[1:]))"
    )
    python = [sys.executable, "-I", "-S", "-c", start]  # without site-packages
    for words in (
        ["--backend", "llama"],
        ["--backend", "remote-llama", "--host", "box"],
        ["--backend", "llama", "--dry-run"],
    ):
        refused = subprocess.run([*python, *words], capture_output=True, text=True, check=False, timeout=60)
        assert refused.returncode == 78 and refused.stderr.count("\n") == 1, refused.stderr
        assert (
            "; fix: type where the checkout is: pipx inject local-claude ./apps/llama_common"
            in refused.stderr
        )
    with scripted_llm.ScriptedLlm(scripted_llm.gateway()) as server:
        words = ["--port", str(server.port), "--print-env"]
        subprocess.run([*python, *words], capture_output=True, check=True, timeout=60)


def test_a_dry_run_starts_nothing(
    models: Path, monkeypatch: pytest.MonkeyPatch, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_CLAUDE_LLAMA_SERVER", str(models / "llama-server"))
    monkeypatch.setenv("LOCAL_CLAUDE_MODELS", str(models / "m"))
    assert cli.main(["--backend", "llama", "--model", "one", "--dry-run"]) == 0
    assert f"--model {models}/m/a/one.gguf" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGKILL, -9), (signal.SIGTERM, -15), (signal.SIGHUP, -1), (signal.SIGINT, 130)],
)
def test_who_ends_it_while_its_server_loads_leaves_nothing(
    number: int, code: int, models: Path, world: Path
) -> None:
    """Before claude runs; `claude is killed` and so on are the same after it."""
    program, told = models / "llama-server", models / "pid"
    program.write_text(
        f"#!/bin/sh\n[ $1 = --help ] && exec echo '--jinja   use jinja'\necho $$ > {told}\nexec sleep 600\n"
    )
    words = ["--backend", "llama", "--model", "one", "--skip-checks", "-p", "x"]
    one = subprocess.Popen(
        [sys.executable, "-m", "local_claude.cli", *words],
        env={
            **os.environ,
            "LOCAL_CLAUDE_LLAMA_SERVER": str(program),
            "LOCAL_CLAUDE_MODELS": str(models / "m"),
        },
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # Behind nohup, or in the background of a script, signals are ignored, and a child inherits that.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL) if number != signal.SIGKILL else None,
    )
    try:
        until = time.monotonic() + START_S
        while not (told.exists() and told.read_text().strip()):
            assert one.poll() is None and time.monotonic() < until
            time.sleep(0.02)
        server = int(told.read_text())
        (keeper,) = map(int, Path(f"/proc/{one.pid}/task/{one.pid}/children").read_text().split())
        assert alive(server) and alive(keeper)
        one.send_signal(number)
        assert one.wait(GONE_S) == code
        gone(server, keeper)
    finally:
        one.kill()
    left = {path.suffix for path in (world / "claude-local/local-claude").iterdir()}
    assert ".log" not in left


SERVES = """\
#!{python}
import os, signal, sys
if "--help" in sys.argv:
    sys.exit(print("--jinja   use jinja"))
sys.path.insert(0, {root!r})
from tests.unit import scripted_llm
answers = scripted_llm.gateway()
called = answers["/v1/messages"]

def counted(body):
    with open({asked!r}, "a") as file:
        print(os.getpid(), file=file)
    return called(body)

listed = scripted_llm.models({{"id": "one", "owned_by": "llamacpp"}})
answers |= {{"/health": (200, {{}}), "/v1/models": listed, "/v1/messages": counted}}
server = scripted_llm.ScriptedLlm(answers, int(sys.argv[sys.argv.index("--port") + 1]))
signal.pause()
"""


def test_what_was_checked_is_found_again_on_another_port(
    models: Path, monkeypatch: pytest.MonkeyPatch, world: Path
) -> None:
    asked = models / "asked"
    asked.touch()
    script = SERVES.format(python=sys.executable, root=str(ROOT), asked=str(asked))
    (models / "llama-server").write_text(script)
    monkeypatch.setenv("LOCAL_CLAUDE_LLAMA_SERVER", str(models / "llama-server"))
    monkeypatch.setenv("LOCAL_CLAUDE_MODELS", str(models / "m"))
    urls = set()
    for context, trips in (("40960", 1), ("40960", 1), ("49152", 2)):  # another command is another server
        became = claude("--backend", "llama", "--model", "one", "--context", context)
        urls.add(became.variables["ANTHROPIC_BASE_URL"])
        assert len(asked.read_text().split()) == 2 * trips
    assert len(urls) == 3


@pytest.mark.parametrize("asked", ["ssh", "claude", "llama-server"])
def test_who_is_killed_while_it_asks_leaves_no_one_that_it_asks(asked: str, world: Path) -> None:
    """The survey of another host, and programs for their own options: before anything is started."""
    told = world / "pid"
    (world / f"bin/{asked}").write_text(f"#!/bin/sh\necho $$ > {told}\nexec sleep 600\n")
    (world / f"bin/{asked}").chmod(0o755)
    with scripted_llm.ScriptedLlm(scripted_llm.gateway()) as server:
        words = {
            "ssh": ["--backend", "remote-llama", "--host", "box"],
            "claude": ["--port", str(server.port), "--skip-checks"],
            "llama-server": ["--backend", "llama"],
        }[asked]
        one = subprocess.Popen(
            [sys.executable, "-m", "local_claude.cli", *words, "-p", "x"],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            until = time.monotonic() + START_S
            while not (told.exists() and told.read_text().strip()):
                assert one.poll() is None and time.monotonic() < until
                time.sleep(0.02)
        finally:
            one.kill()
            one.wait()
        left = int(told.read_text())
        try:
            gone(left)
        finally:
            if alive(left):
                os.kill(left, signal.SIGKILL)

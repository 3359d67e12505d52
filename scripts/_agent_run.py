"""Claude Code in a throw-away directory, on a task whose outcome can be told from what lies there afterwards.

The client has a home, a configuration and temporary files of its own in that directory. Where the kernel has
Landlock, neither it nor what the model has it run can write anywhere else or connect to another port.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from scripts import _confine

HERE = Path(__file__).resolve().parent
PROMPT = (
    "Create a small FastAPI app with one /health endpoint, add a pytest test for it, run pytest, "
    "and fix any failures."
)
CONTRACT = "test_contract.py"
# A test that is there before: what it expects is told by pytest's output only, so that a first run fails.
CONTRACT_TEXT = '''"""What others rely on: the service tells which build it is. Not to be changed."""

from fastapi.testclient import TestClient

from main import app


def test_health_tells_the_build(expected_build: str) -> None:
    answer = TestClient(app).get("/health")
    assert answer.status_code == 200
    assert answer.json().get("build") == expected_build
'''
ALLOWED = (
    *("Read", "Write", "Edit", "Glob", "Grep"),
    *(f"Bash({command}:*)" for command in ("pytest", "python -m pytest", "python3 -m pytest", "ls", "cat")),
)
MAX_OUTPUT_TOKENS = 8192
GRACE_S = 5.0
FINAL_TIMEOUT_S = 120.0
LINE_LIMIT = 8 * 1024 * 1024
TEXT_LIMIT = 256 * 1024
FILES_LIMIT = 200


@dataclass(frozen=True)
class Limits:
    """What a run may use. Seconds; tokens are those that the server had to read or write."""

    seconds: float = 1800.0
    turns: int = 30
    tokens: int = 600_000


@dataclass(frozen=True)
class TestRun:
    """One run of pytest, as pytest itself tells it."""

    __test__ = False  # pytest: no test

    run: str
    exit: int
    passed: int = 0
    failed: int = 0
    error: int = 0


@dataclass(frozen=True)
class Recorded:
    """All that a run left. `stopped` names the limit that ended it; `final` is our own run of pytest."""

    work: str
    events: tuple[Mapping[str, Any], ...] = ()
    exit_code: int | None = 0
    stopped: str = ""
    stderr: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    runs: tuple[TestRun, ...] = ()
    final: TestRun | None = None
    seconds: float = 0.0


@dataclass
class Meter:
    """What a run has used so far, from its stream."""

    turns: set[str] = field(default_factory=set)
    tokens: int = 0
    _current: int = 0

    def take(self, event: Mapping[str, Any]) -> None:
        """Count one line of the stream."""
        inner = event.get("event")
        if event.get("type") != "stream_event" or not isinstance(inner, dict):
            return
        if inner.get("type") == "message_start":
            message = inner.get("message") or {}
            self.turns.add(str(message.get("id")) + str(len(self.turns)))
            usage = message.get("usage") or {}
            self.tokens += int(usage.get("input_tokens") or 0)
            self.tokens += int(usage.get("cache_creation_input_tokens") or 0)
            self._current = 0
        elif inner.get("type") == "message_delta":
            written = int((inner.get("usage") or {}).get("output_tokens") or 0)
            self.tokens += max(0, written - self._current)
            self._current = max(written, self._current)

    def breach(self, limits: Limits, seconds: float) -> str:
        """The limit that is passed, or nothing."""
        if seconds > limits.seconds:
            return f"{limits.seconds:g} s"
        if len(self.turns) > limits.turns:
            return f"{limits.turns} turns"
        return f"{limits.tokens} tokens" if self.tokens > limits.tokens else ""


@dataclass(frozen=True)
class Place:
    """A throw-away directory, and the folders in it."""

    root: Path

    @property
    def work(self) -> Path:
        """Where the client works."""
        return self.root / "work"

    @property
    def witness(self) -> Path:
        """The plugin of pytest and what it wrote."""
        return self.root / "witness"

    def prepare(self) -> None:
        """Make the folders, the test that is there before, and commands that run this Python."""
        for folder in ("work", "witness", "home", "config", "tmp", "bin"):
            (self.root / folder).mkdir()
        (self.work / CONTRACT).write_text(CONTRACT_TEXT)
        shutil.copyfile(HERE / "_agent_witness.py", self.witness / "llmbox_witness.py")
        (self.witness / "build.txt").write_text(f"build-{secrets.token_hex(4)}\n")
        for name, words in (("python", ""), ("python3", ""), ("pytest", "-m pytest ")):
            script = self.root / "bin" / name
            script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {words}"$@"\n')
            script.chmod(0o755)

    def environment(self, extra: Mapping[str, str]) -> dict[str, str]:
        """Nothing of the user's but the way to programs."""
        return {
            "PATH": f"{self.root / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "HOME": str(self.root / "home"),
            "TMPDIR": str(self.root / "tmp"),
            "CLAUDE_CODE_TMPDIR": str(self.root / "tmp"),
            "CLAUDE_CONFIG_DIR": str(self.root / "config"),
            "LANG": "C.UTF-8",
            "NO_PROXY": "*",
            "PYTHONPATH": str(self.witness),
            "PYTEST_PLUGINS": "llmbox_witness",
            "PYTHONDONTWRITEBYTECODE": "1",
            **extra,
        }

    def runs(self) -> tuple[TestRun, ...]:
        """What pytest wrote down so far."""
        try:
            lines = (self.witness / "runs.jsonl").read_text().splitlines()
        except OSError:
            return ()
        found = []
        for line in lines[-FILES_LIMIT:]:
            with contextlib.suppress(ValueError, TypeError):
                found.append(TestRun(**json.loads(line)))
        return tuple(found)

    def files(self) -> dict[str, str]:
        """The text of what lies in the working directory, by path."""
        found: dict[str, str] = {}
        for path in sorted(self.work.rglob("*")):
            name = str(path.relative_to(self.work))
            hidden = any(part.startswith(".") or part == "__pycache__" for part in Path(name).parts)
            if hidden or path.is_symlink() or not path.is_file() or len(found) >= FILES_LIMIT:
                continue
            with contextlib.suppress(OSError), path.open(errors="replace") as stream:
                found[name] = stream.read(TEXT_LIMIT)
        return found


@contextlib.contextmanager
def throw_away(*, keep: bool = False) -> Iterator[Place]:
    """A place that is gone afterwards, unless it is to be kept."""
    root = Path(tempfile.mkdtemp(prefix="llmbox-agent-")).resolve()
    try:
        place = Place(root)
        place.prepare()
        yield place
    finally:
        if not keep:
            shutil.rmtree(root, ignore_errors=True)


def settings(url: str, model: str, context: int) -> dict[str, Any]:
    """The client's settings. What stands here under `env` wins over the environment."""
    output = min(MAX_OUTPUT_TOKENS, max(256, context // 8))
    kinds = (f"ANTHROPIC_DEFAULT_{kind}_MODEL" for kind in ("OPUS", "SONNET", "HAIKU"))
    names = ("ANTHROPIC_MODEL", "CLAUDE_CODE_SUBAGENT_MODEL", *kinds)
    return {
        "env": {
            "ANTHROPIC_BASE_URL": url,
            **dict.fromkeys(names, model),
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
            "CLAUDE_CODE_MAX_CONTEXT_TOKENS": str(context),
            "CLAUDE_CODE_AUTO_COMPACT_WINDOW": str(context),
            "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(output),
            "CLAUDE_CODE_MAX_RETRIES": "2",
            "DISABLE_AUTOUPDATER": "1",
        },
        "permissions": {"allow": list(ALLOWED), "defaultMode": "acceptEdits"},
    }


def confinement(place: Place, url: str) -> list[str]:
    """The words before a command that hold it to the place; none where the kernel cannot."""
    if not _confine.abi():
        return []
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    confine = HERE / "_confine.py"
    return [sys.executable, "-I", str(confine), "--write", str(place.root), "--port", str(port), "--"]


def record(
    place: Place,
    program: Path,
    url: str,
    model: str,
    context: int,
    token: str,
    limits: Limits,
    tell: Callable[[str], None] = lambda _: None,
) -> Recorded:
    """Let the client do the task. Raises OSError when it cannot be started."""
    file = place.root / "settings.json"
    file.write_text(json.dumps(settings(url, model, context), indent=1))
    command = [
        *confinement(place, url),
        *(str(program), "--print", PROMPT, "--settings", str(file), "--model", model),
        *("--output-format", "stream-json", "--verbose", "--include-partial-messages"),
        *("--strict-mcp-config", "--no-session-persistence", "--permission-mode", "acceptEdits"),
    ]
    timeout = str(int(limits.seconds * 1000))
    env = place.environment({"ANTHROPIC_AUTH_TOKEN": token or "none", "API_TIMEOUT_MS": timeout})
    began = time.monotonic()
    events, code, stopped, stderr = follow(command, place, env, limits, tell)
    seconds = time.monotonic() - began
    runs, files = place.runs(), place.files()
    return Recorded(
        str(place.work), tuple(events), code, stopped, stderr, files, runs, final(place, url), seconds
    )


def follow(
    command: Sequence[str],
    place: Place,
    env: Mapping[str, str],
    limits: Limits,
    tell: Callable[[str], None],
) -> tuple[list[Mapping[str, Any]], int | None, str, str]:
    """Run the client, read its stream until it ends or passes a limit: events, exit code, limit, stderr."""
    meter, events, stopped = Meter(), list[Mapping[str, Any]](), ""
    began = time.monotonic()
    with (place.root / "stderr").open("w+") as errors:
        process = subprocess.Popen(
            command,
            cwd=place.work,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
        lines: queue.Queue[bytes | None] = queue.Queue(1000)
        reader = threading.Thread(target=_read, args=(process.stdout, lines), daemon=True)
        reader.start()
        try:
            while True:
                left = limits.seconds - (time.monotonic() - began)
                try:
                    line = lines.get(timeout=max(0.0, left))
                except queue.Empty:
                    stopped = meter.breach(limits, limits.seconds + 1)
                    break
                if line is None:
                    break
                event = _parsed(line)
                turns = len(meter.turns)
                meter.take(event)
                if kept(event):
                    events.append(event)
                if len(meter.turns) > turns:
                    tell(f"turn {len(meter.turns)}, {meter.tokens} tokens, {time.monotonic() - began:.0f} s")
                if stopped := meter.breach(limits, time.monotonic() - began):
                    break
        finally:
            code = _end(process, place, wait=not stopped)
            _drain(reader, lines)
        errors.seek(0)
        return events, code, stopped, errors.read(TEXT_LIMIT)


def kept(event: Mapping[str, Any]) -> bool:
    """Whether a line of the stream is worth keeping: not each piece of a text."""
    if event.get("type") != "stream_event":
        return bool(event)
    return (event.get("event") or {}).get("type") in ("message_start", "message_delta")


def final(place: Place, url: str) -> TestRun | None:
    """Our own runs of pytest on what lies there, with the first test as it was: the first one that fails, or
    the last. None: one did not end.

    The second run has that test alone and nothing else that the client wrote for pytest: a fixture of its own
    in conftest.py would stand before the one that knows the build.
    """
    contract = place.work / CONTRACT
    if contract.is_dir() and not contract.is_symlink():
        shutil.rmtree(contract)
    contract.unlink(missing_ok=True)
    contract.write_text(CONTRACT_TEXT)
    found = None
    for words in ((), ("--noconftest", "-c", os.devnull, f"--rootdir={place.work}", CONTRACT)):
        found = _pytest(place, url, words)
        if found is None or found.exit:
            break
    return found


def _pytest(place: Place, url: str, words: Sequence[str]) -> TestRun | None:
    before = len(place.runs())
    program = [str(place.root / "bin/pytest"), "-q", "-p", "no:cacheprovider", *words]
    command = [*confinement(place, url), *program]
    process = subprocess.Popen(
        command,
        cwd=place.work,
        env=place.environment({}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        process.wait(FINAL_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(process, place, wait=False)
    return next(iter(place.runs()[before:]), None)


def _read(stream: Any, lines: queue.Queue[bytes | None]) -> None:
    with contextlib.suppress(OSError, ValueError):
        while line := stream.readline(LINE_LIMIT):
            lines.put(line)
    lines.put(None)


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _drain(reader: threading.Thread, lines: queue.Queue[bytes | None]) -> None:
    """Let the reader come to its end, though nobody wants its lines any more."""
    deadline = time.monotonic() + GRACE_S
    while reader.is_alive() and time.monotonic() < deadline:
        with contextlib.suppress(queue.Empty):
            lines.get(timeout=0.05)


def _end(process: subprocess.Popen[bytes], place: Place, *, wait: bool) -> int | None:
    """End the client and whatever it started. Its exit code; None when it did not end by itself."""
    if wait:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    code = process.poll()
    if code is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pid in _leftovers(place.root):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    return code


def _leftovers(root: Path) -> list[int]:
    """Processes with the environment that only what was started here has, in whatever session they are."""
    mark = f"HOME={root / 'home'}".encode()
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in environ.read_bytes().split(b"\0"):
                found.append(int(environ.parent.name))
    return found

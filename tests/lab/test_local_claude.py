"""local-claude with real things around it: Claude Code, llama-server, ssh, a network without a way out."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pty
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from lab import config
from tests import support
from tests.lab.test_gateway_claude_code import OUTPUT_TOKENS, TURN_TIMEOUT_S
from tests.lab.test_gateway_claude_code import claude as claude  # the fixture
from tests.lab.test_lmswitch import Box
from tests.lab.test_lmswitch import box as box  # the fixture
from tests.lab.tool_template import tool_template

LOCAL_CLAUDE = support.BIN / "local-claude"
GONE_S = 5.0
START_S = 60.0
SILENT_S = 40.0
MODEL = "smollm2-135m-instruct-q4_1"
SERVERS = "pgrep -fa '[l]lama-server .*/tmp/local-claude-' || true"


# --- isolation: what is the user's stays as it is, and nothing goes anywhere else ---

INSIDE = """
ip link set lo up
sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1 2>/dev/null
ip link add out type veth peer name sink && ip link set sink up
ip addr add 192.0.2.1/24 dev out && ip link set out up arp off
ip route add default dev out
exec {python} {script}
"""
SCRIPT = """
import json, os, subprocess, sys
sys.path.insert(0, {root!r})
from tests.unit import scripted_llm
from tests.unit.test_local_claude_servers import KINDS

def text(body):
    if body and body.get("tools") and len(body["tools"]) == 1 and body["tools"][0]["name"] == "report":
        return scripted_llm.called()(body)
    message = {{
        "id": "m", "type": "message", "role": "assistant", "model": "m", "stop_reason": "end_turn",
        "content": [{{"type": "text", "text": "Hello."}}], "usage": {{"input_tokens": 1, "output_tokens": 1}},
    }}
    if not (body or {{}}).get("stream"):
        return 200, message
    events = [
        {{"type": "message_start", "message": {{**message, "content": [], "stop_reason": None}}}},
        {{"type": "content_block_start", "index": 0, "content_block": {{"type": "text", "text": ""}}}},
        {{"type": "content_block_delta", "index": 0, "delta": {{"type": "text_delta", "text": "Hello."}}}},
        {{"type": "content_block_stop", "index": 0}},
        {{"type": "message_delta", "delta": {{"stop_reason": "end_turn"}}, "usage": {{"output_tokens": 1}}}},
        {{"type": "message_stop"}},
    ]
    lines = "".join(f"event: {{one['type']}}\\ndata: {{json.dumps(one)}}\\n\\n" for one in events)
    return 200, lines.encode(), {{"Content-Type": "text/event-stream"}}

found = {{}}
for name, kind, *words in {modes!r}:
    answers = {{**KINDS[kind][0], "/v1/messages": text, "/v1/messages?beta=true": text}}
    with scripted_llm.ScriptedLlm(answers) as server:
        done = subprocess.run(
            [{program!r}, "--port", str(server.port), *words, "-p", "Say hello."],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
        )
    found[name] = [done.returncode, done.stdout.strip(), done.stderr[-2000:]]
sent = next(line.split()[10] for line in open("/proc/net/dev") if line.split()[0] == "out:")
udp = [line.split() for line in open("/proc/net/snmp") if line.startswith("Udp:")]
print(json.dumps({{"modes": found, "sent": int(sent), "udp": int(udp[1][udp[0].index("OutDatagrams")])}}))
"""
MODES = (
    ("remote", "gateway"),
    ("chat only", "gateway", "--chat-only"),
    ("without checks", "llama-server", "--skip-checks"),
    ("lmstudio", "LM Studio", "--backend", "lmstudio", "--model", "qwen/qwen3-coder-30b"),
    ("ollama", "Ollama", "--backend", "ollama", "--model", "qwen:7b"),
    ("vllm", "vLLM", "--backend", "vllm"),
)


def digest(home: Path) -> dict[str, str]:
    """What is the user's own: ~/.claude and ~/.claude.json, byte for byte."""
    files = [home / ".claude.json", *(path for path in (home / ".claude").rglob("*") if path.is_file())]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_user_s_own_stays_and_nothing_leaves(claude: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / ".claude/projects").mkdir(parents=True)
    (home / ".claude/settings.json").write_text('{"env": {"ANTHROPIC_BASE_URL": "http://192.0.2.99"}}')
    (home / ".claude/.credentials.json").write_text('{"claudeAiOauth": {"accessToken": "mine"}}')
    (home / ".claude.json").write_text('{"numStartups": 7, "hasCompletedOnboarding": true}')
    (home / "project").mkdir()
    before = digest(home)
    script = SCRIPT.format(root=str(support.ROOT), modes=MODES, program=str(LOCAL_CLAUDE))
    (tmp_path / "script.py").write_text(script)
    inside = INSIDE.format(python=sys.executable, script=tmp_path / "script.py")
    done = subprocess.run(
        ["unshare", "--net", "sh", "-ec", inside],
        cwd=home / "project",
        env={"PATH": f"{claude.parent}:{os.environ['PATH']}", "HOME": str(home)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for name, (code, said, told) in found["modes"].items():
        assert (code, said) == (0, "Hello."), (name, said, told)
    assert (found["sent"], found["udp"]) == (0, 0), "packets for another host, or questions to a name server"
    assert digest(home) == before
    assert (home / ".claude-local/projects").is_dir()


# --- life cycle: what was started there is gone with the session, however that ends ---


@pytest.fixture
def far(box: Box, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a client whose ssh knows the LLM box, which has a model that this user may read."""
    lab = config.from_environment()
    folder = tmp_path / "bin"
    folder.mkdir()
    options = [option for option in lab.ssh_options() if "Control" not in option]
    ssh = folder / "ssh"
    words = shlex.join(["/usr/bin/ssh", *options, "-i", str(lab.ssh_key), "-l", config.SUDO_USER])
    ssh.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    # What takes claude's place tells what it was given, and lasts.
    (folder / "claude").write_text(
        textwrap.dedent(
            f"""\
            #!{sys.executable}
            import json, os, signal, sys, time
            if "--help" in sys.argv:
                sys.exit()
            interrupts = []
            signal.signal(signal.SIGINT, lambda *_: interrupts.append(1))
            given = {{name: os.environ[name] for name in ("ANTHROPIC_BASE_URL", "ANTHROPIC_AUTH_TOKEN")}}
            open({str(tmp_path / "given.tmp")!r}, "w").write(json.dumps(given | {{"pid": os.getpid()}}))
            os.rename({str(tmp_path / "given.tmp")!r}, {str(tmp_path / "given")!r})
            while len(interrupts) < 2:
                time.sleep(0.05)
            sys.exit(7)
            """
        )
    )
    for program in folder.iterdir():
        program.chmod(0o755)
    home = box.wanted.home
    box.run(
        f"mkdir -p /tmp/lc-models && sudo cp {home}/models/gguf/{MODEL}.gguf /tmp/lc-models/"
        " && sudo chmod -R a+rX /tmp/lc-models"
    ).check()
    box.lmswitch("off").check()
    server = json.loads(box.run(f"cat {box.wanted.presets_json}").check().stdout)["presets"][box.first][
        "command"
    ][0]
    yield {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "LOCAL_CLAUDE_REMOTE_MODELS": "/tmp/lc-models",
        "LOCAL_CLAUDE_REMOTE_LLAMA_SERVER": server,
    }
    box.run("rm -rf /tmp/lc-models")


class Session:
    """local-claude that has become claude, with a llama-server on the LLM box."""

    def __init__(self, environment: dict[str, str], folder: Path, box: Box) -> None:
        self.box, self.folder = box, folder
        (folder / "given").unlink(missing_ok=True)
        address = box.hostvars["ansible_host"]
        words = ["--backend", "remote-llama", "--host", address, "--context", "2048", "--skip-checks"]
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.execve(LOCAL_CLAUDE, [str(LOCAL_CLAUDE), *words], environment)  # noqa: S606 - as a shell would
        os.set_blocking(self.terminal, False)
        self.said = b""
        self.wait(lambda: (folder / "given").exists(), START_S)
        self.given = json.loads((folder / "given").read_text())

    def wait(self, done: Callable[[], bool], seconds: float) -> float:
        """Seconds until `done`; the test fails after `seconds`."""
        began = time.monotonic()
        while not done():
            with contextlib.suppress(BlockingIOError, OSError):
                self.said += os.read(self.terminal, 65536)
            assert time.monotonic() - began < seconds, self.said.decode("utf-8", "replace")[-3000:]
            time.sleep(0.05)
        return time.monotonic() - began

    def children(self) -> list[int]:
        """Everything below the process that is claude now: the keeper and ssh."""
        found: list[int] = []
        todo = [self.pid]
        while todo:
            pid = todo.pop()
            with contextlib.suppress(OSError):
                below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
                todo += map(int, below)
                found += map(int, below)
        return found

    def answers(self) -> int:
        """The status of a request to the server that claude was given."""
        headers = {"Authorization": f"Bearer {self.given['ANTHROPIC_AUTH_TOKEN']}"}
        url = f"{self.given['ANTHROPIC_BASE_URL']}/props"
        return httpx.get(url, headers=headers, timeout=10, trust_env=False).status_code

    def there(self) -> str:
        """llama-servers of sessions on the box, and their folders."""
        return self.box.run(f"{SERVERS}; ls -d /tmp/local-claude-* 2>/dev/null || true").stdout.strip()

    def reap(self) -> int:
        """The exit status of what local-claude became."""
        return os.waitpid(self.pid, 0)[1]


def ends(session: Session, seconds: float = GONE_S) -> float:
    """Everything of the session is gone, here and there, within this time."""
    left = session.children()
    took = session.wait(lambda: not session.there(), seconds + 1)  # a look takes time too
    session.wait(lambda: not any(Path(f"/proc/{pid}/exe").exists() and alive(pid) for pid in left), GONE_S)
    return took


def alive(pid: int) -> bool:
    """Whether it runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def session(far: dict[str, str], box: Box, tmp_path: Path) -> Iterator[Session]:
    """A session that runs; whatever is left of it afterwards is killed."""
    one = Session(far, tmp_path, box)
    assert one.given["pid"] == one.pid, "claude takes the place of local-claude"
    assert "llama-server" in one.there() and one.answers() == 200
    yield one
    for pid in [one.pid, *one.children()]:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(OSError):
        os.waitpid(one.pid, 0)
    os.close(one.terminal)


def test_claude_is_killed(session: Session) -> None:
    os.kill(session.pid, signal.SIGKILL)
    left = session.children()
    assert os.WTERMSIG(session.reap()) == signal.SIGKILL
    print(f"gone after {ends(session):.1f} s")
    assert not any(alive(pid) for pid in left)


@pytest.mark.long
def test_ctrl_c_twice(session: Session) -> None:
    os.write(session.terminal, b"\x03")
    time.sleep(0.3)
    assert session.answers() == 200, "the server does not get the terminal's Ctrl-C"
    os.write(session.terminal, b"\x03")
    assert os.WEXITSTATUS(session.reap()) == 7, "the exit code is claude's"
    print(f"gone after {ends(session):.1f} s")


@pytest.mark.long
def test_the_ssh_connection_is_killed(session: Session) -> None:
    ssh = [pid for pid in session.children() if "ssh" in Path(f"/proc/{pid}/comm").read_text()]
    assert ssh
    for pid in ssh:
        os.kill(pid, signal.SIGKILL)
    print(f"gone after {ends(session):.1f} s")
    assert alive(session.pid), "claude goes on, and tells that its server is gone"


@pytest.mark.long
def test_the_keeper_is_killed(session: Session) -> None:
    keeper = session.children()[0]
    os.kill(keeper, signal.SIGKILL)
    print(f"gone after {ends(session):.1f} s")


@pytest.mark.long
def test_the_connection_goes_silent(session: Session) -> None:
    ssh = [pid for pid in session.children() if "ssh" in Path(f"/proc/{pid}/comm").read_text()]
    for pid in ssh:
        os.kill(pid, signal.SIGSTOP)
    took = session.wait(lambda: not session.there(), SILENT_S)
    print(f"gone after {took:.1f} s of silence")


# --- end to end: Claude Code, the gateway, a real model ---


class Client:
    """Claude Code in the lab's client host, with the wrapper or with bare settings."""

    HOME = "/home/ops"

    def __init__(self, claude: Path, url: str, preset: str, box: Box) -> None:
        self.url, self.preset, self.box = url, preset, box
        program = claude.resolve()
        with program.open("rb") as file:
            self.push(file, "mkdir -p ~/lc/bin && cat > ~/lc/bin/claude && chmod +x ~/lc/bin/claude")
        sources = [support.ROOT / f"apps/{app}/src" for app in ("local_claude", "llama_common")]
        packed = subprocess.run(
            ["tar", "-c", *(word for path in sources for word in ("-C", str(path), path.parent.name))],
            stdout=subprocess.PIPE,
            check=True,
        )
        self.push(packed.stdout, "tar -x -C ~/lc")

    def push(self, content: Any, command: str) -> None:
        """Feed a command there."""
        argv = [sys.executable, "-m", "lab", "ssh", support.CLIENT, command]
        given = {"input": content} if isinstance(content, bytes) else {"stdin": content}
        subprocess.run(argv, cwd=support.ROOT, env=support.environment(), check=True, timeout=300, **given)

    def turn(self, name: str, prompt: str, folder: str, *options: str, wrapped: bool) -> dict[str, Any]:
        """One turn: its result, and what the gateway wrote about its largest request."""
        before = len(self.audited())
        limits = {"API_TIMEOUT_MS": str(TURN_TIMEOUT_S * 1000), "HOME": f"{self.HOME}/lc/{name}"}
        words = ["-p", prompt, "--output-format", "json", *options]
        if wrapped:
            command = ["python3", "-m", "local_claude.cli", "--host", self.url, "--model", self.preset]
            command += ["--skip-checks", *words]
        else:
            command = ["claude", *words]
            models = (
                "ANTHROPIC_MODEL",
                *(f"ANTHROPIC_DEFAULT_{kind}_MODEL" for kind in ("OPUS", "SONNET", "HAIKU")),
            )
            limits |= dict.fromkeys(models, self.preset) | {
                "ANTHROPIC_BASE_URL": self.url,
                "ANTHROPIC_AUTH_TOKEN": "none",
                "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
                "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(OUTPUT_TOKENS),
            }
        exports = shlex.join(f"{key}={value}" for key, value in limits.items())
        place = f"{self.HOME}/lc/{folder}"
        line = (
            f"mkdir -p {place} {self.HOME}/lc/{name} && cd {place} && env {exports} "
            f"PYTHONPATH={self.HOME}/lc "
            f"PATH={self.HOME}/lc/bin:$PATH {shlex.join(command)} < /dev/null"
        )
        done = self.box.on_host(support.CLIENT, line, timeout=TURN_TIMEOUT_S)
        assert done.rc == 0, done.tail()
        result = json.loads(done.stdout.strip().splitlines()[-1])
        asked = self.audited()[before:]
        assert asked and all(entry["status"] == 200 for entry in asked), asked
        largest = max(asked, key=lambda entry: entry["prompt_tokens"])
        cached = largest["cached_tokens"] or 0
        return {
            "prompt": largest["prompt_tokens"],
            "cached": cached,
            "reused": round(cached / largest["prompt_tokens"], 4),
            "ttft_s": round(result["ttft_ms"] / 1000, 1),
            "requests": len(asked),
        }

    def audited(self) -> list[dict[str, Any]]:
        """The gateway's lines about messages, oldest first."""
        path = f"{self.box.wanted.home}/.local/state/llmbox/audit.jsonl"
        lines = self.box.run(f"sudo cat {path}").check().stdout.splitlines()
        return [entry for entry in map(json.loads, lines) if entry["path"] == "/v1/messages"]


STEPS = (
    ("first turn", "Say hello.", "a", ()),
    ("second turn", "And again.", "a", ("--continue",)),
    ("new session", "Say hello.", "a", ()),
    ("another directory", "Say hello.", "b", ()),
)


@pytest.mark.long
def test_what_the_wrapper_saves(claude: Path, box: Box) -> None:
    presets = box.wanted.config.llama_presets
    preset = next(name for name, data in presets.items() if data.agent)
    found: dict[str, list[dict[str, Any]]] = {}
    with tool_template(box, preset, "Qwen3-Coder"):
        client = Client(claude, box.wanted.url(box.hostvars["ansible_host"]), preset, box)
        for step, prompt, folder, options in STEPS:  # interleaved: the machine is not always as busy
            for wrapped in (False, True):
                name = "wrapped" if wrapped else "bare"
                found.setdefault(step, []).append(
                    client.turn(name, prompt, f"{name}-{folder}", *options, wrapped=wrapped)
                )
    support.FIGURES.mkdir(parents=True, exist_ok=True)
    (support.FIGURES / "local-claude.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    ours = {step: both[1] for step, both in found.items()}
    assert ours["second turn"]["reused"] >= 0.99
    assert ours["new session"]["reused"] >= 0.90
    assert ours["another directory"]["reused"] >= 0.80

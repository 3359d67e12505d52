"""local-claude with real things around it: Claude Code, llama-server, ssh, a network without a way out."""

from __future__ import annotations

import base64
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

import httpx
import pytest

from lab import config
from scripts import bench_local_claude
from scripts._tool_template import AGENT, template_flags
from tests import support
from tests.lab.test_gateway_claude_code import claude as claude  # the fixture
from tests.lab.test_lmswitch import Box
from tests.lab.test_lmswitch import box as box  # the fixture
from tests.lab.tool_template import CHOOSES, ONLY_TOOLS, tool_template

LOCAL_CLAUDE = support.BIN / "local-claude"
GONE_S = 5.0
START_S = 60.0
CHECKS_S = 120.0
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


# --- the checks before the start, on a real model ---


@pytest.mark.parametrize(
    ("template", "flags", "code", "said"),
    [
        (CHOOSES, ONLY_TOOLS, 0, ("ok   tool calls: ", "ok   prompt cache: a second turn found ")),
        (CHOOSES, (*ONLY_TOOLS, "--no-jinja"), 76, ("tool calls: ", "; fix: set `jinja: true`")),
        pytest.param(
            *(CHOOSES, (*ONLY_TOOLS, "--no-cache-prompt"), 77, ("prompt cache: ", "; fix: ")),
            marks=pytest.mark.long,
        ),
    ],
    ids=["sound", "no jinja", "no cache"],
)
def test_the_checks_tell_a_sound_server_from_a_broken_one(
    template: str, flags: tuple[str, ...], code: int, said: tuple[str, ...], box: Box, tmp_path: Path
) -> None:
    preset = next(name for name, data in box.wanted.config.llama_presets.items() if data.agent)
    where = {"LOCAL_CLAUDE_DIR": str(tmp_path / "claude"), "HOME": str(tmp_path)}
    words = ("--host", box.wanted.url(box.hostvars["ansible_host"]), "--model", preset, "--print-env")
    with tool_template(box, preset, template, *flags):
        done = support.run(LOCAL_CLAUDE, *words, env=where, timeout=CHECKS_S)
        assert done.rc == code and all(part in done.stderr for part in said), done.tail()
        if code == 0:  # once for each server, model and version
            again = support.run(LOCAL_CLAUDE, *words, env=where).check()
            assert "checking" in done.stderr and "checking" not in again.stderr
            assert "ok   tool calls: " in again.stderr


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
    box.run("rm -rf /tmp/lc-models ~/lc")


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


# --- a server on the machine itself ---

# In claude's place: asks the server that it was given, says what it saw, and ends with 7.
ASKS = """\
#!/usr/bin/python3
import json, os, signal, sys, urllib.request
if "--help" in sys.argv:
    sys.exit()
url = os.environ["ANTHROPIC_BASE_URL"]
body = {"model": os.environ["ANTHROPIC_MODEL"], "max_tokens": 8}
body["messages"] = [{"role": "user", "content": "Hi"}]
request = urllib.request.Request(url + "/v1/messages", json.dumps(body).encode())
request.add_header("Authorization", "Bearer " + os.environ["ANTHROPIC_AUTH_TOKEN"])
request.add_header("Content-Type", "application/json")
answer = json.load(urllib.request.urlopen(request, timeout=60))
servers = os.popen("pgrep -f '^[^ ]*llama-server .*lc-models'").read().split()
print(json.dumps({"url": url, "tokens": answer["usage"]["output_tokens"], "servers": servers}), flush=True)
if "die" in sys.argv:
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(7)
"""


@pytest.mark.parametrize(
    ("word", "code"), [("end", 7), pytest.param("die", 128 + signal.SIGKILL, marks=pytest.mark.long)]
)
def test_a_server_here_is_started_on_a_free_port_and_only_it_is_stopped(
    word: str, code: int, far: dict[str, str], box: Box
) -> None:
    box.lmswitch(box.first).check()  # somebody else's server, and the gateway on its port
    theirs = box.run("pgrep -f '[l]lama-server.*--alias'").check().stdout.split()
    sources = " ".join(f"-C {support.ROOT}/apps/{app}/src {app}" for app in ("local_claude", "llama_common"))
    packed = subprocess.run(["tar", "-cz", *sources.split()], stdout=subprocess.PIPE, check=True).stdout
    give = "mkdir -p ~/lc/bin && base64 -d | tar -xz -C ~/lc"
    box.run(give, stdin=base64.b64encode(packed).decode()).check()
    box.run("cat > ~/lc/bin/claude && chmod +x ~/lc/bin/claude", stdin=ASKS).check()
    python = f"{support.expected_host().variables['llmbox_path']}/bin/python"
    words = ["--backend", "llama", "--context", "2048", "--skip-checks", "-p", word]
    done = box.run(
        "env PATH=~/lc/bin:/usr/bin:/bin PYTHONPATH=~/lc LOCAL_CLAUDE_MODELS=/tmp/lc-models "
        f"LOCAL_CLAUDE_LLAMA_SERVER={far['LOCAL_CLAUDE_REMOTE_LLAMA_SERVER']} "
        f"{python} -m local_claude.cli {shlex.join(words)}; exit $?"
    )
    assert done.rc == code, done.tail()
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["tokens"], seen
    assert seen["url"].startswith("http://127.0.0.1:") and not seen["url"].endswith(":1234")
    (pid,) = seen["servers"]
    box.run(f"for i in $(seq 50); do test -e /proc/{pid} || exit 0; sleep 0.1; done; exit 1").check()
    assert box.run("pgrep -f '[l]lama-server.*--alias'").check().stdout.split() == theirs
    assert box.complete()


# --- end to end: Claude Code, the gateway, a real model ---


def held(found: bench_local_claude.Turns) -> None:
    """What the cache had of each prompt; the times are published (docs/benchmarks/local-claude.md)."""
    print(json.dumps(found, indent=1))
    for step, (_, _, _, bar) in bench_local_claude.STEPS.items():
        (turn,) = found[bench_local_claude.OURS][step]
        assert turn["reused"] >= bar, (step, turn)


@pytest.mark.long
def test_what_the_wrapper_saves(claude: Path, lab: str) -> None:
    with bench_local_claude.bench(str(support.LAB_INVENTORY), claude) as both, both.by_rote() as flags:
        held(both.turns(1, *flags, ways=(bench_local_claude.OURS,)))


@pytest.mark.long
def test_what_the_wrapper_saves_with_a_real_model(claude: Path, lab: str) -> None:
    flags = template_flags(AGENT)
    with bench_local_claude.bench(str(support.LAB_INVENTORY), claude) as both:
        held(both.turns(1, *flags, ways=(bench_local_claude.OURS,)))

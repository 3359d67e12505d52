"""local-claude with real things around it: Claude Code, llama-server, ssh, a network without a way out."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pty
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from lab import config
from scripts import _rote_model, bench_local_claude
from scripts._tool_template import AGENT, template_flags
from tests import support
from tests.lab.test_gateway_claude_code import claude as claude  # the fixture
from tests.lab.test_lmswitch import Box
from tests.lab.test_lmswitch import box as box  # the fixture
from tests.lab.test_router_litellm import python as python  # the fixture: an environment with LiteLLM
from tests.lab.tool_template import CHOOSES, ONLY_TOOLS, tool_template

LOCAL_CLAUDE = support.BIN / "local-claude"
GONE_S = 5.0
START_S = 60.0
CHECKS_S = 120.0
SILENT_S = 40.0
MODEL = "smollm2-135m-instruct-q4_1"
SERVERS = "pgrep -fa '[l]lama-server .*/tmp/local-claude-' || true"


# --- isolation: what is the user's stays as it is, and nothing goes anywhere else ---

NO_WAY_OUT = """
ip link set lo up
sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1 2>/dev/null
ip link add out type veth peer name sink && ip link set sink up
ip addr add 192.0.2.1/24 dev out && ip link set out up arp off
ip route add default dev out
"""
Mode = tuple[str, str, list[str]]
MODES: Sequence[Mode] = (
    ("remote", "gateway", ["-p"]),
    ("at a terminal", "gateway", ["--model", "coder"]),
    ("chat only", "gateway", ["--chat-only", "-p"]),
    ("without checks", "llama-server", ["--skip-checks", "-p"]),
    ("lmstudio", "LM Studio", ["--backend", "lmstudio", "--model", "qwen/qwen3-coder-30b", "-p"]),
    ("ollama", "Ollama", ["--backend", "ollama", "--model", "qwen:7b", "-p"]),
    ("vllm", "vLLM", ["--backend", "vllm", "-p"]),
    ("mcp list", "", ["mcp", "list"]),  # needs no server, and must not ask Anthropic's either
)
# Apple's program exists on macOS alone: this one is asked the same, and wants the key that it was given.
APFEL = """\
#!{python}
import json, os, signal, sys
sys.path.insert(0, {root!r})
from tests.unit import scripted_llm
from tests.unit.test_local_claude_servers import KINDS

def chat(body):
    if server.headers[-1].get("authorization") != "Bearer " + os.environ["APFEL_TOKEN"]:
        return 401, {{"error": {{"message": "no"}}}}
    head = {{"id": "c", "created": 1, "model": body["model"]}}
    if not body.get("stream"):
        message = {{"role": "assistant", "content": "Hello."}}
        choice = {{"index": 0, "finish_reason": "stop", "message": message}}
        usage = {{"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}
        return 200, head | {{"object": "chat.completion", "choices": [choice], "usage": usage}}
    deltas = [({{"role": "assistant", "content": "Hello."}}, None), ({{}}, "stop")]
    pieces = [
        head | {{
            "object": "chat.completion.chunk",
            "choices": [{{"index": 0, "delta": delta, "finish_reason": reason}}],
        }}
        for delta, reason in deltas
    ]
    lines = "".join(f"data: {{text}}\\n\\n" for text in [*map(json.dumps, pieces), "[DONE]"])
    return 200, lines.encode(), {{"Content-Type": "text/event-stream"}}

port = int(sys.argv[sys.argv.index("--port") + 1])
server = scripted_llm.ScriptedLlm({{**KINDS["apfel"][0], "/v1/chat/completions": chat}}, port)
signal.pause()
"""


def alone(claude: Path, folder: Path, modes: Sequence[Mode], **more: str) -> dict[str, Any]:
    """What tests/lab/isolated_modes.py found in a network namespace of its own."""
    (folder / "home").mkdir()
    script = support.ROOT / "tests/lab/isolated_modes.py"
    done = support.run(
        *("unshare", "--net", "sh", "-ec", f'{NO_WAY_OUT}exec "$@"', "sh"),
        *(sys.executable, script, LOCAL_CLAUDE, json.dumps(modes)),
        env={"PATH": f"{folder}:{claude.parent}:{os.environ['PATH']}", "HOME": str(folder / "home"), **more},
        timeout=600,
    )
    found: dict[str, Any] = json.loads(done.check().stdout.splitlines()[-1])
    return found


def kept_apart(found: dict[str, Any], said: str) -> None:
    """Every mode ended well, the user's own is what it was, and nothing went to any other host."""
    for name, (code, answer, told) in found["modes"].items():
        expected = answer if name == "mcp list" else said
        assert (code, answer, found["running"][name]) == (0, expected, []), (name, answer, told)
    assert (found["sent"], found["udp"]) == (0, 0), "packets for another host, or questions to a name server"
    assert not found["left"] and found["sessions"]
    assert not found["told"], "the instructions in ~/.claude are for the user's own claude"


def test_the_user_s_own_stays_and_nothing_leaves(claude: Path, tmp_path: Path) -> None:
    kept_apart(alone(claude, tmp_path, MODES), "Hello.")


@pytest.mark.long
def test_apfel_and_what_translates_for_it_stay_alone(claude: Path, python: Path, tmp_path: Path) -> None:
    """Started by local-claude: a stand-in for apfel, and the real LiteLLM in front of it."""
    (tmp_path / "apfel").write_text(APFEL.format(python=sys.executable, root=str(support.ROOT)))
    (tmp_path / "apfel").chmod(0o755)
    modes: Sequence[Mode] = [("apfel", "", ["--backend", "apfel", "-p"])]
    litellm = str(python.parent / "litellm")
    kept_apart(alone(claude, tmp_path, modes, LOCAL_CLAUDE_LITELLM=litellm), "Hello.")


# What the LLM box runs as root: the network, an sshd in it, and the modes as the person who works there.
WITH_AN_SSHD = """
{no_way_out}
cd ~{user}/lc
ssh-keygen -q -t ed25519 -N "" -f key && chown {user} key
/usr/sbin/sshd -D -f /dev/null -h $PWD/key -o ListenAddress=127.0.0.1 -o AuthorizedKeysFile=$PWD/key.pub \\
 -o StrictModes=no -o UsePAM=yes & sshd=$!
trap 'kill $sshd' EXIT
export HOME=$PWD/home PATH=$PWD/bin:/usr/bin:/bin
export LOCAL_CLAUDE_MODELS=$PWD/models LOCAL_CLAUDE_REMOTE_MODELS=$PWD/models
export LOCAL_CLAUDE_LLAMA_SERVER={server} LOCAL_CLAUDE_REMOTE_LLAMA_SERVER={server}
install -d -o {user} home
setpriv --reuid {user} --regid {user} --init-groups python3 modes.py local-claude {modes}
"""
SSH = """\
#!/bin/sh
exec /usr/bin/ssh -i ~{user}/lc/key -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null "$@"
"""


def llama_server(box: Box) -> str:
    """The program that the first preset runs."""
    presets = json.loads(box.run(f"cat {box.wanted.presets_json}").check().stdout)["presets"]
    return str(presets[box.first]["command"][0])


def give_local_claude(box: Box) -> None:
    """`local-claude` of these sources in ~/lc/bin of the LLM box."""
    sources = " ".join(f"-C {support.ROOT}/apps/{app}/src {app}" for app in ("local_claude", "llama_common"))
    packed = subprocess.run(["tar", "-cz", *sources.split()], stdout=subprocess.PIPE, check=True).stdout
    give = "mkdir -p ~/lc/bin && base64 -d | tar -xz -C ~/lc"
    box.run(give, stdin=base64.b64encode(packed).decode()).check()
    python = f"{support.expected_host().variables['llmbox_path']}/bin/python"
    start = f'#!/bin/sh\nPYTHONPATH=~{config.SUDO_USER}/lc exec {python} -m local_claude.cli "$@"\n'
    box.run("cat > ~/lc/bin/local-claude && chmod +x ~/lc/bin/local-claude", stdin=start).check()


@pytest.mark.long
def test_a_llama_server_of_its_own_stays_alone(claude: Path, box: Box, tmp_path: Path) -> None:
    """On the LLM box, cut off from everything: real llama-servers, one started here, one over a real ssh."""
    user = config.SUDO_USER
    model = tmp_path / "rote.gguf"
    vocabulary = next((config.from_environment().cache / "sources/models").glob(_rote_model.VOCABULARY))
    _rote_model.write(model, vocabulary, "Bash", {"command": "true", "description": "Nothing"})
    modes: Sequence[Mode] = [
        ("llama", "", ["--backend", "llama", "--skip-checks", "-p"]),
        ("remote-llama", "", ["--backend", "remote-llama", "--host", "127.0.0.1", "--skip-checks", "-p"]),
    ]
    script = WITH_AN_SSHD.format(
        no_way_out=NO_WAY_OUT,
        user=user,
        server=llama_server(box),
        modes=shlex.quote(json.dumps(modes)),
    )
    box.lmswitch("off").check()
    give_local_claude(box)
    there = bench_local_claude.Client(support.expected_host())
    try:
        for source, place in (
            (claude.resolve(), "bin/claude"),
            (model, "models/rote.gguf"),
            (support.ROOT / "tests/lab/isolated_modes.py", "modes.py"),
        ):
            with source.open("rb") as file:
                there.run(f"cd ~/lc && mkdir -p models && cat > {place} && chmod +x {place}", 300, file)
        box.run("cat > ~/lc/bin/ssh && chmod +x ~/lc/bin/ssh", stdin=SSH.format(user=user)).check()
        done = box.run(f"sudo unshare --net sh -ec {shlex.quote(script)}", timeout=600).check()
        kept_apart(json.loads(done.stdout.splitlines()[-1]), _rote_model.ANSWER)
        until = time.monotonic() + GONE_S
        while box.run("pgrep -f '[l]lama-server .*rote' ; ls -d /tmp/local-claude-*").stdout:
            assert time.monotonic() < until
    finally:
        box.run("sudo rm -rf ~/lc")


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
    yield {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "LOCAL_CLAUDE_REMOTE_MODELS": "/tmp/lc-models",
        "LOCAL_CLAUDE_REMOTE_LLAMA_SERVER": llama_server(box),
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
    session.wait(lambda: not any(alive(pid) for pid in left), GONE_S)


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
    give_local_claude(box)
    box.run("cat > ~/lc/bin/claude && chmod +x ~/lc/bin/claude", stdin=ASKS).check()
    words = ["--backend", "llama", "--context", "2048", "--skip-checks", "-p", word]
    done = box.run(
        "env PATH=~/lc/bin:/usr/bin:/bin LOCAL_CLAUDE_MODELS=/tmp/lc-models "
        f"LOCAL_CLAUDE_LLAMA_SERVER={far['LOCAL_CLAUDE_REMOTE_LLAMA_SERVER']} "
        f"local-claude {shlex.join(words)}; exit $?"
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

"""The keeper: what a session starts lives exactly as long as the session, whatever ends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from local_claude import keeper, keeping, llama, options, started, survey
from local_claude.errors import LocalClaudeError
from local_claude.keeping import Kept, Order
from local_claude.wire import Server

GONE_S = 5.0  # the bar: nothing of ours is left after this
SLEEP = ("/bin/sleep", "600")
# Ignores the polite signal, as a llama-server that is still answering does, and starts a child of its own.
STUBBORN = ("/bin/sh", "-c", "trap '' TERM; /bin/sleep 600 & echo ready; while :; do wait; done")
# What local-claude does: starts a server, then becomes another program.
SESSION = """
import os, sys
from local_claude.keeping import Kept, Order
kept = Kept(Order("server", tuple(sys.argv[2:]), log=None))
line = os.read(kept._keeper.stdout.fileno(), 4096).decode()
print(kept._keeper.pid, line, flush=True)
os.execv("/bin/sleep", ["claude", sys.argv[1]])
"""
CHECKING = SESSION.replace("os.execv(", "import time; time.sleep(600) or os.execv(")  # still on its way there


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(*pids: int) -> float:
    """Seconds until none of them runs; fails after GONE_S."""
    began = time.monotonic()
    while any(alive(pid) for pid in pids):
        assert time.monotonic() - began < GONE_S, [pid for pid in pids if alive(pid)]
        time.sleep(0.02)
    return time.monotonic() - began


class Session:
    """A process that became "claude", its keeper, and the server."""

    def __init__(self, *server: str, lasts: str = "600", program: str = SESSION) -> None:
        self.claude = subprocess.Popen(
            [sys.executable, "-c", program, lasts, *server], stdout=subprocess.PIPE, text=True
        )
        assert self.claude.stdout is not None
        pid, _, told = self.claude.stdout.readline().partition(" ")
        self.keeper, self.server = int(pid), int(json.loads(told)["started"])


@pytest.fixture
def session() -> Iterator[Callable[..., Session]]:
    """`session(*argv) -> Session`; what is left of it afterwards is killed."""
    sessions: list[Session] = []

    def begin(*server: str, **more: str) -> Session:
        sessions.append(Session(*server, **more))
        return sessions[-1]

    yield begin
    for one in sessions:
        one.claude.kill()
        one.claude.wait()
        for pid in (one.keeper, one.server):
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("program", [SESSION, CHECKING], ids=["claude", "local-claude"])
def test_claude_or_what_would_become_it_is_killed(session: Callable[..., Session], program: str) -> None:
    one = session(*SLEEP, program=program)
    assert alive(one.keeper) and alive(one.server)
    one.claude.kill()
    one.claude.wait()
    gone(one.keeper, one.server)


def test_claude_ends_by_itself_and_its_exit_code_is_its_own(session: Callable[..., Session]) -> None:
    one = session(*SLEEP, lasts="0")
    assert one.claude.wait(10) == 0
    gone(one.keeper, one.server)


def test_the_keeper_is_killed(session: Callable[..., Session]) -> None:
    one = session(*SLEEP)
    os.kill(one.keeper, signal.SIGKILL)
    gone(one.server)
    assert alive(one.claude.pid)


def test_a_server_that_does_not_want_to_end(session: Callable[..., Session]) -> None:
    one = session(*STUBBORN)
    children = Path(f"/proc/{one.server}/task/{one.server}/children")
    while not children.read_text().split():
        time.sleep(0.02)
    child = int(children.read_text().split()[0])
    one.claude.kill()
    one.claude.wait()
    gone(one.keeper, one.server, child)


def test_a_second_signal_does_not_break_off_the_stopping(session: Callable[..., Session]) -> None:
    """The kernel would end the server with its keeper, but not what the server started."""
    one = session(*STUBBORN)
    children = Path(f"/proc/{one.server}/task/{one.server}/children")
    while not children.read_text().split():
        time.sleep(0.02)
    child = int(children.read_text().split()[0])
    for _ in range(2):
        os.kill(one.keeper, signal.SIGTERM)
        time.sleep(0.3)
    gone(one.keeper, one.server, child)


@pytest.mark.parametrize("knows", [True, False], ids=["by its keeper", "before the keeper knows of them"])
def test_files_of_the_server_go_with_it(knows: bool, tmp_path: Path) -> None:
    """LiteLLM's configuration holds a key."""
    file, other = tmp_path / "config.yaml", tmp_path / "other"
    for path in (file, other):
        path.touch()
    kept = Kept(Order("server", SLEEP, log=None, remove=(file,)))
    if knows:
        assert kept._keeper.stdout is not None
        assert b"started" in os.read(kept._keeper.stdout.fileno(), 4096)
        kept._keeper.send_signal(signal.SIGTERM)
        kept._keeper.wait(GONE_S)
    else:
        kept.stop()
    assert [path.exists() for path in (file, other)] == [False, True]


def test_modules_of_the_person_are_none_of_the_keeper_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit(9)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    kept = Kept(Order("server", SLEEP, log=None))
    assert kept._keeper.stdout is not None
    assert b"started" in os.read(kept._keeper.stdout.fileno(), 4096)
    kept.stop()


def test_nobody_else_s_server_is_touched(session: Callable[..., Session]) -> None:
    with subprocess.Popen(SLEEP) as other:
        one = session(*SLEEP)
        one.claude.kill()
        one.claude.wait()
        gone(one.keeper, one.server)
        assert other.poll() is None
        other.kill()


def test_the_terminal_s_ctrl_c_does_not_reach_the_server(session: Callable[..., Session]) -> None:
    one = session(*SLEEP)
    groups = {os.getpgid(pid) for pid in (one.keeper, one.server)}
    assert os.getpgid(one.claude.pid) not in groups
    assert {os.getsid(pid) for pid in (one.keeper, one.server)} == {one.keeper, one.server}


# --- the far end of SSH: its session ends with its standard input ---


def far(tmp_path: Path, **more: Any) -> subprocess.Popen[bytes]:
    """A keeper that is fed as over SSH; its server writes its number into a file."""
    process = subprocess.Popen(
        ["/bin/sh", "-c", started.far_command()], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    server = ["/bin/sh", "-c", f"echo $$ > {tmp_path}/pid; exec /bin/sleep 600"]
    orders = {"program": Path(keeper.__file__).read_text() + started._KEEP, "argv": server, "log": "-"}
    assert process.stdin is not None
    process.stdin.write(f"{json.dumps({**orders, **more})}\n".encode())
    process.stdin.flush()
    return process


def pid_in(tmp_path: Path) -> int:
    """The number that the server wrote."""
    began = time.monotonic()
    while not (text := (tmp_path / "pid").read_text() if (tmp_path / "pid").exists() else ""):
        assert time.monotonic() - began < 10
        time.sleep(0.02)
    return int(text)


def test_the_connection_drops(tmp_path: Path) -> None:
    with far(tmp_path, silence_s=60, folder=str(tmp_path / "run")) as process:
        server = pid_in(tmp_path)
        assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700
        (tmp_path / "run/s.sock").touch()
        assert process.stdin is not None
        process.stdin.close()
        gone(server)
        assert process.wait(GONE_S) == 0
    assert not (tmp_path / "run").exists()


def test_the_connection_goes_silent(tmp_path: Path) -> None:
    with far(tmp_path, silence_s=0.5) as process:
        server = pid_in(tmp_path)
        gone(server)
        process.wait(GONE_S)


def test_orders_go_over_first_and_then_a_beat_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the beats the other end takes the silence for a lost connection, in the middle of a session."""
    one = keeper.Keeper({"argv": [], "first_line": "orders"})
    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin is not None and other.stdout is not None
        monkeypatch.setattr(keeper, "BEAT_S", 1000.0)
        one.beaten = -2000.0
        one._beat(other)
        one._beat(other)  # too early
        assert os.read(other.stdout.fileno(), 100) == b"orders\n"
        monkeypatch.setattr(keeper, "BEAT_S", 0.0)
        for _ in range(2):
            one._beat(other)
            assert os.read(other.stdout.fileno(), 100) == b"\n"
        other.stdin.close()
    assert keeper.BEAT_S * 2 < started.SILENCE_S


def test_both_ends_together_last_longer_than_the_silence(tmp_path: Path) -> None:
    """A keeper here feeds one there, as over SSH: while this one lives that one hears of it."""
    server = ["/bin/sh", "-c", f"echo $$ > {tmp_path}/pid; exec /bin/sleep 600"]
    orders = {"program": Path(keeper.__file__).read_text() + started._KEEP, "argv": server, "log": "-"}
    silence = keeper.BEAT_S + 1
    line = json.dumps({**orders, "silence_s": silence})
    kept = Kept(Order("far", ("/bin/sh", "-c", started.far_command()), first_line=line))
    try:
        server_pid = pid_in(tmp_path)
        time.sleep(2 * silence)
        assert alive(server_pid)
    finally:
        kept.stop()
    gone(server_pid)


def test_a_folder_that_is_there_already_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with far(tmp_path, silence_s=60, folder=str(tmp_path / "run")) as process:
        assert process.wait(10) == 1
        assert process.stdout is not None and b"File exists" in process.stdout.read()
    assert (tmp_path / "run").exists() and not (tmp_path / "pid").exists()


# --- while it starts ---


def test_a_server_that_does_not_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log"
    kept = Kept(Order("llama-server", ("/bin/sh", "-c", "echo no such model; exit 3"), log=log))
    with pytest.raises(LocalClaudeError, match="llama-server ended with 3") as caught:
        kept.wait_ready(lambda: False, 10, print, "look")
    kept.stop()
    assert caught.value.code == 78 and "no such model" in capsys.readouterr().err
    assert log.read_text() == "no such model\n", "what says why is kept"
    assert log.stat().st_mode & 0o777 == 0o600, "prompts may be in it"


def test_a_program_that_is_not_there() -> None:
    kept = Kept(Order("apfel", ("/nowhere/apfel",)))
    with pytest.raises(LocalClaudeError, match="No such file"):
        kept.wait_ready(lambda: False, 10, print, "look")
    kept.stop()


def test_a_server_that_never_answers(tmp_path: Path) -> None:
    log = tmp_path / "log"
    kept = Kept(Order("llama-server", SLEEP, log=log))
    with pytest.raises(LocalClaudeError, match=r"does not answer after 0\.2 s"):
        kept.wait_ready(lambda: False, 0.2, print, "look")
    kept.stop()
    assert not log.exists()


def test_a_keeper_that_does_not_end_is_killed_with_its_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "STOP_TIMEOUT_S", 0.2)
    kept = Kept(Order("server", SLEEP, log=None))
    assert kept._keeper.stdout is not None
    server = json.loads(os.read(kept._keeper.stdout.fileno(), 4096))["started"]
    os.kill(kept._keeper.pid, signal.SIGSTOP)
    kept.stop()
    gone(kept._keeper.pid, server)


# --- who dies with whom ---


def test_a_parent_that_is_gone_already(tmp_path: Path) -> None:
    """Between fork and the wish to die with it: the kernel would never tell."""
    code = f"from local_claude import keeper; keeper.die_with({os.getpid()}); print('on')"
    child = [sys.executable, "-c", code]
    assert subprocess.run(child, capture_output=True, check=False).stdout == b"on\n"
    other = [sys.executable, "-c", code.replace(str(os.getpid()), "1")]
    done = subprocess.run(other, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"")


def test_macos_has_no_such_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    """prctl is Linux's own: elsewhere the keeper's watch over its parent must do."""

    def missing(*_: object) -> None:
        pytest.fail("the C library was asked")

    monkeypatch.setattr("ctypes.CDLL", missing)
    monkeypatch.setattr(sys, "platform", "darwin")
    keeper.die_with(-1)


# --- what a session starts ---


@pytest.fixture
def orders(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Order, Server]]:
    """What would be kept, and where claude would look for it; nothing is started."""
    found: list[tuple[Order, Server]] = []

    def remember(order: Order, server: Server, *_: object, **__: object) -> tuple[None, Server]:
        found.append((order, server))
        return None, server

    plan = types.SimpleNamespace(notes=(), what="m", command=lambda place: ["llama-server", "--host", place])
    monkeypatch.setattr(started, "started", remember)
    monkeypatch.setattr(llama, "plan", lambda *_: plan)
    monkeypatch.setattr(survey, "survey", lambda *_: {})
    monkeypatch.setattr(started, "far_survey", lambda _: {})
    return found


def begun(orders: list[tuple[Order, Server]], where: str, folder: Path) -> tuple[Order, Server]:
    """One of the three that a session can start."""
    if where == "apple":
        started.apple(folder, print)
    else:
        words = ["--backend", "llama"] if where == "here" else ["--backend", "remote-llama", "--host", "box"]
        getattr(started, where)(options.parse(words), folder, print)
    return orders[-1]


@pytest.mark.parametrize("where", ["here", "there", "apple"])
def test_each_has_a_key_of_its_own_that_no_command_line_shows(
    where: str, orders: list[tuple[Order, Server]], tmp_path: Path
) -> None:
    """Other people of this machine reach its ports too, and read its command lines."""
    (one, first), (_, second) = begun(orders, where, tmp_path), begun(orders, where, tmp_path)
    assert len(first.key) >= 32 and first.key != second.key
    assert first.key not in " ".join(one.argv) + repr(one)
    given = json.loads(one.first_line)["env"] if one.first_line else one.environment
    assert set(given.values()) == {first.key}
    assert (first.scheme, first.host) == ("http", "127.0.0.1")


def test_a_port_that_cannot_be_passed_on_ends_the_connection(
    orders: list[tuple[Order, Server]], tmp_path: Path
) -> None:
    """Else ssh stays, and claude talks with its key to whoever has that port here."""
    (one, server), (_, other) = begun(orders, "there", tmp_path), begun(orders, "there", tmp_path)
    said = json.loads(one.first_line or "")
    forward = f"127.0.0.1:{server.port}:{said['folder']}/s.sock"
    assert ("-o", "ExitOnForwardFailure=yes", "-L", forward, "--", "box") == one.argv[-7:-1]
    assert said["argv"][-1] == f"{said['folder']}/s.sock" and said["silence_s"] == 20.0
    assert (
        server.port != other.port and said["folder"] != json.loads(orders[-1][0].first_line or "")["folder"]
    )

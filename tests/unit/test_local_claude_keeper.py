"""The keeper: what a session starts lives exactly as long as the session, whatever ends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from local_claude import keeper, started
from local_claude.errors import LocalClaudeError
from local_claude.keeping import Kept, Order

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

    def __init__(self, *server: str, lasts: str = "600") -> None:
        self.claude = subprocess.Popen(
            [sys.executable, "-c", SESSION, lasts, *server], stdout=subprocess.PIPE, text=True
        )
        assert self.claude.stdout is not None
        pid, _, told = self.claude.stdout.readline().partition(" ")
        self.keeper, self.server = int(pid), int(json.loads(told)["started"])


@pytest.fixture
def session() -> Iterator[Callable[..., Session]]:
    """`session(*argv) -> Session`; what is left of it afterwards is killed."""
    sessions: list[Session] = []

    def begin(*server: str, lasts: str = "600") -> Session:
        sessions.append(Session(*server, lasts=lasts))
        return sessions[-1]

    yield begin
    for one in sessions:
        one.claude.kill()
        one.claude.wait()
        for pid in (one.keeper, one.server):
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


def test_claude_is_killed(session: Callable[..., Session]) -> None:
    one = session(*SLEEP)
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

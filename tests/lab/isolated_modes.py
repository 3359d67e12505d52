"""Runs in a network without a way out: local-claude in each mode, and what became of the user's own files.

    isolated_modes.py local-claude MODES

MODES is JSON: a list of [name, kind of server that is played here or "", words of local-claude]. One whose
words have no `-p` is typed at a terminal: the folder is trusted, the question asked, Ctrl-C pressed twice.
HOME is a new folder. Prints a JSON object: `modes` (exit code, what it said, what it told), `running` (what
was still there after a mode), `told` (modes whose server got the user's own instructions), `left` (files of
the user's own that were changed, made or removed), `sessions` (how many Claude Code kept elsewhere, where
SpecStory would look for them below ~/.claude), `sent` (packets for any other host), `udp` (datagrams, as
questions to a name server are). Where no server is played it needs the standard library alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

MODE_TIMEOUT_S = 400
SCREEN_TIMEOUT_S = 120  # until the next thing is seen on the terminal
QUIET_S = 1.0
GONE_S = 5.0
QUESTION = "Say hello."
ROWS, COLUMNS = 50, 160
DOWN, ENTER, CTRL_C = b"\x1b[B", b"\r", b"\x03"
# What a terminal does instead of showing it: between words a screen has moves of the cursor, and spaces.
UNSEEN = re.compile(
    rb"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]P_^X][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[ -/]*[0-~]|[\x00-\x20\x7f]"
)
MARK = "only-for-my-own-claude"
OWN = {
    ".claude/CLAUDE.md": MARK,
    ".claude/rules/mine.md": MARK,
    ".claude/settings.json": '{"env": {"ANTHROPIC_BASE_URL": "http://192.0.2.99"}}',
    ".claude/.credentials.json": '{"claudeAiOauth": {"accessToken": "mine"}}',
    ".claude.json": '{"numStartups": 7, "hasCompletedOnboarding": true}',
}
PROJECT = '{"env": {"HTTP_PROXY": "http://192.0.2.98:3128", "NO_PROXY": "other", "no_proxy": "other"}}'


def says_hello(body: Any) -> Any:
    """Claude Code's requests are answered with one word; the check of tool calls with a call."""
    from tests.unit import scripted_llm

    if body and [tool["name"] for tool in body.get("tools", ())] == ["report"]:
        called: Any = scripted_llm.called()
        return called(body)
    message: dict[str, Any] = {
        "id": "m",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "stop_reason": "end_turn",
        "content": [{"type": "text", "text": "Hello."}],
        "usage": {"input_tokens": 1, "output_tokens": 1},
    }
    if not (body or {}).get("stream"):
        return 200, message
    events: list[dict[str, Any]] = [
        {"type": "message_start", "message": {**message, "content": [], "stop_reason": None}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hello."}},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 1}},
        {"type": "message_stop"},
    ]
    lines = "".join(f"event: {one['type']}\ndata: {json.dumps(one)}\n\n" for one in events)
    return 200, lines.encode(), {"Content-Type": "text/event-stream"}


def played(kind: str) -> Any:
    """A server of this kind, whose `port` local-claude is given."""
    from tests.unit import scripted_llm
    from tests.unit.test_local_claude_servers import KINDS

    return scripted_llm.ScriptedLlm(
        {**KINDS[kind][0], "/v1/messages": says_hello, "/v1/messages?beta=true": says_hello}
    )


def digests(home: Path) -> dict[str, str]:
    """What is the user's own, byte for byte."""
    files = [home / ".claude.json", *(path for path in (home / ".claude").rglob("*") if path.is_file())]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def counters(name: str) -> list[str]:
    """What the kernel counted in this network."""
    return Path(f"/proc/net/{name}").read_text().splitlines()


class Terminal:
    """A person at a terminal: waits until something is there to be read, then presses a key."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            os.execvpe(command[0], command, {**os.environ, "TERM": "xterm-256color"})  # noqa: S606 - no shell
        self.resize(COLUMNS)
        self.raw = b""
        self.heard = time.monotonic()

    def resize(self, columns: int) -> None:
        """Make the window so wide. The program on it is told."""
        self.columns = columns
        fcntl.ioctl(self.descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, columns, 0, 0))

    def screen(self) -> str:
        """What stands on the screen now: a resized one is drawn whole, of a key only what it changed."""
        self.settle()
        since = len(self.raw)
        self.resize(self.columns - 1)
        self.settle()
        return self.seen(since)

    def seen(self, since: int = 0) -> str:
        """What was written on the screen since then, without spaces."""
        return UNSEEN.sub(b"", self.raw[since:]).decode("utf-8", "replace")

    def wait(self, done: Callable[[], bool], what: str) -> None:
        """Return when `done`. Raises TimeoutError with the end of what was seen."""
        until = time.monotonic() + SCREEN_TIMEOUT_S
        while not done():
            if time.monotonic() > until:
                raise TimeoutError(f"no {what} within {SCREEN_TIMEOUT_S} s: {self.seen()[-1500:]}")
            if select.select([self.descriptor], [], [], 0.1)[0]:
                try:
                    self.raw += os.read(self.descriptor, 65536)
                    self.heard = time.monotonic()
                except OSError:  # the last program on it has ended
                    until = min(until, time.monotonic() + GONE_S)
                    time.sleep(0.1)

    def see(self, text: str, since: int = 0) -> None:
        """Wait until this is on the screen."""
        wanted = text.replace(" ", "")
        self.wait(lambda: wanted in self.seen(since), text)

    def settle(self) -> None:
        """Wait until nothing more is written."""
        self.heard = time.monotonic()
        self.wait(lambda: time.monotonic() - self.heard > QUIET_S, "quiet")

    def press(self, key: bytes) -> int:
        """Press a key; what is seen from there on is what came of it."""
        since = len(self.raw)
        os.write(self.descriptor, key)
        return since

    def ended(self) -> bool:
        """Whether it has, `code` is how."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            self.code = os.waitstatus_to_exitcode(status)
        return bool(pid)


def typed(command: list[str], folder: Path, answer: str) -> list[Any]:
    """Exit code, answer and screen of a session at a terminal. Raises TimeoutError."""
    terminal = Terminal(command, folder)
    try:
        terminal.see("trust this folder")
        for _ in range(3):  # what is pressed in the first half second is taken back
            if "\u276fYes" not in terminal.screen():
                terminal.press(DOWN)
        terminal.see("shift+tab", terminal.press(ENTER))
        terminal.see(QUESTION, terminal.press(QUESTION.encode()))
        terminal.see(answer, terminal.press(ENTER))
        terminal.settle()  # a Ctrl-C that interrupts an answer is none of the two
        terminal.see("again to exit", terminal.press(CTRL_C))
        terminal.press(CTRL_C)
        terminal.wait(terminal.ended, "end")
    except BaseException:
        with suppress(OSError):
            os.killpg(terminal.pid, signal.SIGKILL)
        raise
    finally:
        os.close(terminal.descriptor)
    return [terminal.code, answer, terminal.seen()[-2000:]]


def printed(command: list[str], folder: Path) -> list[Any]:
    """Exit code, answer and what else was said of a session without a terminal."""
    done = subprocess.run(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=MODE_TIMEOUT_S,
        check=False,
    )
    return [done.returncode, done.stdout.strip(), done.stderr[-2000:]]


def processes() -> dict[int, str]:
    """What runs in this network, as far as this user may know."""
    found = {}
    for place in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            if (place / "ns/net").readlink() == Path("/proc/self/ns/net").readlink():
                found[int(place.name)] = (
                    (place / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                )
    return found


def still_running(before: dict[int, str]) -> list[str]:
    """What does not end by itself within a few seconds. What has no command line is dead."""
    until = time.monotonic() + GONE_S
    while True:
        left = [command for pid, command in processes().items() if pid not in before and command]
        if not left or time.monotonic() > until:
            return left
        time.sleep(0.1)


def main() -> None:
    """Go through the modes."""
    program, modes = sys.argv[1], json.loads(sys.argv[2])
    home = Path(os.environ["HOME"])
    for name, text in OWN.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
    (home / "project/.claude").mkdir(parents=True)
    (home / "project/.claude/settings.json").write_text(PROJECT)
    before = digests(home)
    found, running, told = {}, {}, []
    for name, kind, words in modes:
        there = processes()
        with played(kind) if kind else nullcontext() as server:
            command = [program, *(["--port", str(server.port)] if server else []), *words]
            if "-p" in words:
                found[name] = printed([*command, QUESTION], home / "project")
            elif not kind:
                found[name] = printed(command, home / "project")
            else:
                found[name] = typed(command, home / "project", "Hello.")
            if server and MARK in json.dumps([body for *_, body in server.asked]):
                told.append(name)
        running[name] = still_running(there)
    after = digests(home)
    project = re.sub("[^a-zA-Z0-9-]", "-", str((home / "project").resolve()))
    sent = next(line.split()[10] for line in counters("dev") if line.split()[0] == "out:")
    names, values = (line.split() for line in counters("snmp") if line.startswith("Udp:"))
    print(
        json.dumps(
            {
                "modes": found,
                "running": running,
                "told": told,
                "left": sorted(
                    path for path in before.keys() | after.keys() if before.get(path) != after.get(path)
                ),
                "sessions": len(list((home / ".claude-local/projects" / project).glob("*.jsonl"))),
                "sent": int(sent),
                "udp": int(values[names.index("OutDatagrams")]),
            }
        )
    )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main()

"""Run a preset on a box with another command line for a while: another release's program, or other flags.

    with trial(host, "coder") as held:
        held.run([...])      # serves with this command line; raises TrialFailed
        ...                  # measure through the gateway
        held.run(None)       # with its own

However this process ends, the box then serves what it served before: the trial is held by an ssh connection,
and llmbox.trial on the box, in a unit of its own, ends it with that connection.
"""

from __future__ import annotations

import json
import select
import shlex
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from llmbox.systemd import WAIT_PREFIX

from scripts._ask_host import Unreachable, explain
from scripts._inventory import Host
from scripts._measure import NotMeasured

ANSWER_TIMEOUT_S = 1800.0  # the box bounds what it does itself
END_TIMEOUT_S = 900.0
SIGN_OF_LIFE_S = 30.0
KEEP_ALIVE = ["-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4"]


class TrialFailed(Exception):
    """The preset did not become ready; the message is one line, `reason` the server's last ones."""

    def __init__(self, message: str, reason: Sequence[str] = (), *, out_of_memory: bool = False) -> None:
        super().__init__(message)
        self.reason = tuple(reason)
        self.out_of_memory = out_of_memory


@dataclass(frozen=True)
class Serving:
    """What a preset runs: the program, links resolved ("" for none), and its crashes since the start."""

    executable: str
    restarts: int
    out_of_memory: bool = False  # why it crashed


class Trial:
    """A trial that is held. Not to be shared between threads."""

    def __init__(self, host: Host, process: subprocess.Popen[str]) -> None:
        self._host = host
        self._process = process
        self._writing = threading.Lock()
        self._over = threading.Event()
        self._life = threading.Thread(target=self._signs_of_life, daemon=True)
        self._life.start()

    def run(self, command: Sequence[str] | None) -> None:
        """Have the preset serve with `command`, with its own for None. Raises TrialFailed, Unreachable.

        After a TrialFailed it serves with its own again. Raises NotMeasured when the box did not even try:
        that says nothing about the command.
        """
        said = self._ask({"command": None if command is None else list(command)})
        if not said["ok"]:
            if not said.get("tried", True):  # an older box does not say
                raise NotMeasured(str(said["message"]))
            raise TrialFailed(
                str(said["message"]), said.get("reason", ()), out_of_memory=bool(said.get("out_of_memory"))
            )

    def serving(self) -> Serving:
        """What serves now. Raises TrialFailed, Unreachable."""
        said = self._ask({})
        if not said["ok"]:
            raise TrialFailed(str(said["message"]))
        return Serving(
            str(said["executable"]), int(said["restarts"]), out_of_memory=bool(said.get("out_of_memory"))
        )

    def close(self) -> None:
        """End the trial and wait until the box serves what it served before. Raises Unreachable."""
        self._over.set()
        self._life.join()
        process = self._process
        assert process.stdin is not None
        with suppress(OSError):
            process.stdin.close()
        try:
            process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise Unreachable(
                f"the trial did not end in {END_TIMEOUT_S:.0f} s; look on the box: lmswitch status"
            ) from None

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        process = self._process
        assert process.stdout is not None and process.stderr is not None
        self._write(json.dumps(question))
        ready, _, _ = select.select([process.stdout], [], [], ANSWER_TIMEOUT_S)
        line = process.stdout.readline() if ready else ""
        try:
            said: dict[str, Any] = json.loads(line)
        except ValueError:
            if not ready or line:
                raise Unreachable(f"the trial gave no answer: {line.strip() or 'silence'}") from None
            said_last = process.stderr.read()
            fix = "; fix: run site.yml" if "llmbox.trial" in said_last else ""
            raise Unreachable(f"{explain(self._host, process.wait(10), said_last)}{fix}") from None
        return said

    def _write(self, text: str) -> None:
        assert self._process.stdin is not None
        with self._writing, suppress(OSError):  # who reads no more is told of by the missing answer
            self._process.stdin.write(f"{text}\n")
            self._process.stdin.flush()

    def _signs_of_life(self) -> None:
        while not self._over.wait(SIGN_OF_LIFE_S):
            self._write("")


@contextmanager
def trial(host: Host, preset: str) -> Iterator[Trial]:
    """Hold a trial of `preset` during the body. Raises Unreachable, and TrialFailed when it is refused."""
    user, python = str(host.variables["llm_user_name"]), f"{host.variables['llmbox_path']}/bin/python"
    command = shlex.join(["sudo", "-n", "-u", user, python, "-I", "-m", "llmbox.trial", preset])
    argv = host.ssh(command)
    try:
        process = subprocess.Popen(
            [argv[0], *KEEP_ALIVE, *argv[1:]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    except FileNotFoundError:
        raise Unreachable("this machine has no ssh client; install openssh-client") from None
    held = Trial(host, process)
    try:
        held.serving()  # it is there, and nobody else's
        yield held
    finally:
        try:
            held.close()
        finally:
            if process.poll() is None:
                process.terminate()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream:
                    with suppress(OSError):
                        stream.close()
            process.wait(10)


def last_words(error: TrialFailed) -> str:
    """Why it failed, in one line: the server's own last line where there is one."""
    own = [line.strip() for line in error.reason if line.strip() and not line.startswith(WAIT_PREFIX)]
    return own[-1] if own else str(error)

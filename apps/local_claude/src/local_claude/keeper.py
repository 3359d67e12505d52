"""Keeps one server for exactly as long as a session lasts. Standard library only: it also runs over SSH.

It is told what to do by one line of JSON on standard input, and tells what happens in lines of JSON. The
session is over when its parent is gone (`parent`), or when standard input ends or stays silent (`silence_s`):
then what it started is stopped, and nothing else. On Linux its own death, even by SIGKILL, ends the server.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

POLL_S = 0.2
BEAT_S = 2.0
HURRY_S = 1.0
FAR_END_S = 2.6  # what the keeper at the other end of SSH takes at most
TAIL_LINES = 12
MAX_ORDERS = 1 << 20
PDEATHSIG = 1
HERE = "-"  # as a log: what the server says goes where this says it
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class OverError(Exception):
    """The session is over."""


class Keeper:
    """A server, and the session that it belongs to."""

    def __init__(self, orders: dict[str, Any]) -> None:
        self.argv: list[str] = orders["argv"]
        self.environment: dict[str, str] = orders.get("env", {})
        self.log: str = orders.get("log", "")
        self.parent: int = orders.get("parent", 0)
        self.silence_s: float = orders.get("silence_s", 0)
        self.wanted_folder: str = orders.get("folder", "")
        self.folder = ""  # removed at the end, once it was made here
        self.first_line: str | None = orders.get("first_line")
        self.remove: list[str] = orders.get("remove", [])
        self.heard = time.monotonic()
        self.beaten = 0.0
        self.process: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Start the server, wait until it or the session ends, leave nothing behind."""
        try:
            if self.wanted_folder:
                Path(self.wanted_folder).mkdir(0o700)
                self.folder = self.wanted_folder
            self.process = self._start()
            self._tell(started=self.process.pid)
            while self.process.poll() is None:
                self._listen()
                self._beat(self.process)
            self._tell(ended=self.process.returncode, tail=self._tail())
            self.log = ""  # it says why
            return 1
        except OverError:
            return 0
        except OSError as error:
            self._tell(failed=f"{error.filename or self.argv[0]}: {error.strerror}")
            return 1
        finally:
            self._stop()

    def _start(self) -> subprocess.Popen[bytes]:
        """The server, in a session of its own: the terminal's Ctrl-C is not for it."""
        me = os.getpid()
        output: Any = None if self.log == HERE else subprocess.DEVNULL
        if self.log not in ("", HERE):
            output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            return subprocess.Popen(
                self.argv,
                stdin=subprocess.DEVNULL if self.first_line is None else subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment},
                start_new_session=True,
                preexec_fn=lambda: die_with(me),
            )
        finally:
            if isinstance(output, int) and output >= 0:
                os.close(output)

    def _listen(self) -> None:
        """Wait a moment. Raises OverError when the session has ended meanwhile."""
        if self.parent and os.getppid() != self.parent:
            raise OverError
        if not self.silence_s:
            time.sleep(POLL_S)
            return
        if select.select([0], [], [], POLL_S)[0]:
            if not os.read(0, 65536):
                raise OverError
            self.heard = time.monotonic()
        elif time.monotonic() - self.heard > self.silence_s:
            raise OverError

    def _beat(self, process: subprocess.Popen[bytes]) -> None:
        """Pass on the orders, then let the keeper at the other end know that this one lives."""
        if process.stdin is None or time.monotonic() - self.beaten < BEAT_S:
            return
        line, self.first_line = self.first_line or "", ""
        self.beaten = time.monotonic()
        with contextlib.suppress(OSError):  # a broken pipe is seen as the end of the process
            process.stdin.write(f"{line}\n".encode())
            process.stdin.flush()

    def _stop(self) -> None:
        """Stop the server and everything it started: politely, then at once."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if self.process is not None:
            if self.process.stdin is not None:
                with contextlib.suppress(OSError):
                    self.process.stdin.close()
                self._wait(self.process, FAR_END_S)
            # llama-server hangs in its shutdown while clients go on sending: a second signal ends it at once.
            for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
                if self.process.poll() is None or number == signal.SIGKILL:
                    with contextlib.suppress(OSError):
                        os.killpg(self.process.pid, number)
                    self._wait(self.process, HURRY_S)
        for path in [self.log, *self.remove, *self._inside()]:
            with contextlib.suppress(OSError):
                Path(path).unlink()
        if self.folder:
            with contextlib.suppress(OSError):
                Path(self.folder).rmdir()

    def _inside(self) -> list[str]:
        with contextlib.suppress(OSError):
            return [str(path) for path in Path(self.folder).iterdir()] if self.folder else []
        return []

    @staticmethod
    def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)

    def _tell(self, **what: object) -> None:
        """Tell whoever started this, as long as they listen."""
        line = json.dumps(what) if self.log != HERE else str(what.get("failed", ""))
        with contextlib.suppress(OSError):
            os.write(1, f"{line}\n".encode())

    def _tail(self) -> list[str]:
        """The last lines of the log."""
        with contextlib.suppress(OSError), Path(self.log).open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 16384))
            return file.read().decode("utf-8", "replace").splitlines()[-TAIL_LINES:]
        return []


def die_with(parent: int) -> None:
    """Linux: SIGKILL for this process when the one that started it is gone, however that came about."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)


def orders_of_stdin() -> dict[str, Any]:
    """One line, byte by byte, because what follows it are heartbeats. Raises ValueError."""
    line = b""
    while not line.endswith(b"\n") and len(line) < MAX_ORDERS:
        piece = os.read(0, 1)
        if not piece:
            break
        line += piece
    found: dict[str, Any] = json.loads(line)
    return found


def over(_number: int, _frame: object) -> None:
    """A signal ends the session."""
    raise OverError


def main(orders: dict[str, Any] | None = None) -> int:
    """Entry point, here and on the other side of SSH."""
    for number in SIGNALS:
        signal.signal(number, over)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    try:
        keeper = Keeper(orders or orders_of_stdin())
    except (ValueError, KeyError, OverError):
        return 2
    return keeper.run()


if __name__ == "__main__":
    sys.exit(main())

"""Running programs, telling progress, and the one exception that becomes the user's one line."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

_START = time.monotonic()
_PRINT_LOCK = threading.Lock()
# A program that is killed with its parent: a lab command killed with -9 must not leave its helpers at work.
DIES_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL", "--")


class LabError(Exception):
    """Something the user has to know or to do, in one line; `code` becomes the exit status."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def say(message: str) -> None:
    """Print one progress line with the seconds since the command began."""
    with _PRINT_LOCK:
        print(f"[{time.monotonic() - _START:4.0f} s] {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def ticking(what: str, seconds: float = 10) -> Iterator[None]:
    """Say every so many seconds that something is still at work."""
    done = threading.Event()

    def tick() -> None:
        while not done.wait(seconds):
            say(f"{what} is at work")

    threading.Thread(target=tick, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def run(
    argv: Sequence[str | Path],
    *,
    timeout: float = 60,
    text_in: str | None = None,
    env: Mapping[str, str] | None = None,
    check: bool = True,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end and return what it wrote; it dies with this process.

    Raises LabError, with the program's last line, when it fails (and `check`), is missing, or takes more than
    `timeout` seconds.
    """
    words = [str(word) for word in argv]
    full_env = None if env is None else {**os.environ, **env}
    try:
        done = subprocess.run(
            [*DIES_WITH_PARENT, *words],
            input=text_in,
            stdin=subprocess.DEVNULL if text_in is None else None,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            env=full_env,
            cwd=cwd,
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        raise LabError(f"`{' '.join(words[:6])}` did not finish within {timeout:.0f} s") from exc
    except FileNotFoundError as exc:
        raise LabError(f"program not found: {exc.filename}") from exc
    if check and done.returncode != 0:
        raise LabError(
            f"`{' '.join(words[:6])}` failed ({done.returncode}): {last_line(done.stderr or done.stdout)}"
        )
    return done


def remove_tree(folder: Path) -> None:
    """Delete a folder, even while the last helper of a killed command still writes into it."""
    for _ in range(50):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)
    raise LabError(f"cannot delete {folder}: something still writes there or is mounted there")


def last_line(text: str) -> str:
    """Return the last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "(no output)"


def in_parallel(jobs: Mapping[str, Callable[[], None]]) -> None:
    """Run the jobs at the same time, wait for all, raise the first error with the job's name in front."""
    errors: list[tuple[str, BaseException]] = []

    def guarded(name: str, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as exc:
            errors.append((name, exc))

    threads = [threading.Thread(target=guarded, args=item, daemon=True) for item in jobs.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, error in errors:
        if isinstance(error, LabError):
            raise LabError(f"{name}: {error}", error.code) from error
        raise error

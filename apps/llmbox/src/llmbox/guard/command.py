"""A program that may hang in the kernel: run under a timeout, and abandoned, never waited for."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping, Sequence

# With vfork a whole process waits until its child has executed the program, which may hang, too.
subprocess._USE_VFORK = False  # type: ignore[misc]


class Unreadable(Exception):
    """What was asked gave no usable answer; the message is one line without an end."""


class Command:
    """One program, at most one of it at a time: one that hangs is not joined by a second."""

    def __init__(
        self, timeout_s: float, popen: Callable[..., subprocess.Popen[str]] = subprocess.Popen
    ) -> None:
        self._timeout_s = timeout_s
        self._popen = popen
        self._abandoned: subprocess.Popen[str] | None = None

    def run(self, argv: Sequence[str], env: Mapping[str, str] | None = None) -> tuple[int, str, str]:
        """Exit status, standard output and standard error. Raises Unreadable when it does not end."""
        if self._abandoned is not None and self._abandoned.poll() is None:
            raise Unreadable(f"{argv[0]} (process {self._abandoned.pid}) hangs and cannot be killed")
        self._abandoned = None
        try:
            child = self._popen(
                list(argv),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
                env=env,
            )
        except OSError as error:
            raise Unreadable(f"{argv[0]} cannot be run: {error.strerror}") from None
        try:
            out, err = child.communicate(timeout=self._timeout_s)
        except subprocess.TimeoutExpired:
            child.kill()
            self._abandoned = child
            raise Unreadable(f"{argv[0]} gave no answer in {self._timeout_s:g} s") from None
        return child.returncode, out, err


def first_line(*texts: str) -> str:
    """The first line that says something, shortened."""
    lines = (line.strip() for text in texts for line in text.splitlines())
    return next((line[:120] for line in lines if line), "")

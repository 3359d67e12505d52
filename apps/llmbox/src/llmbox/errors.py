"""Errors that a person sees as one line, and the exit codes they end with."""

from __future__ import annotations

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_LOCKED = 3


class LlmboxError(Exception):
    """Something the person at the shell must know, in one line that says how to mend it."""

    exit_code = EXIT_FAILED


class UsageError(LlmboxError):
    """The command cannot be meant as typed: unknown preset, wrong user, missing configuration."""

    exit_code = EXIT_USAGE


class Locked(LlmboxError):
    """Another switch is under way."""

    exit_code = EXIT_LOCKED

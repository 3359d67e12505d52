"""What scripts/lock_models.py is made of: the inventory's side, git, the hub, the lock file.

This module holds what they share: the two ways to fail, and running a program.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent.parent
COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
LINE_LIMIT = 300  # characters of another program's words in one of our lines

Lock = dict[str, dict[str, dict[str, Any]]]
"""{"builds": {name: {repo, ref, commit}},
"models": {name: {repo, revision, commit, files: [{file, size, sha256}]}},
"headers": {name: {sha256, architecture, numbers, tensors}}}"""


class CannotRunError(Exception):
    """The command could not find out (exit code 2); the text is lines that each name a fix."""


class RefusedError(Exception):
    """What the inventory names cannot be locked (exit code 1); the text is lines that each name a fix."""


def line_for(key: str, value: object, problem: str, fix: str) -> str:
    """One line that names key, value, problem and fix."""
    return f"{key} = {json.dumps(value)}: {problem}; fix: {fix}"


def refuse(key: str, value: object, problem: str, fix: str) -> NoReturn:
    """Raise RefusedError with that line."""
    raise RefusedError(line_for(key, value, problem, fix))


def last_line(output: str) -> str:
    """The last line that says something, cut and made safe for one line of a message."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return "".join(c if c.isprintable() else "?" for c in (lines[-1] if lines else "no reason given"))[
        :LINE_LIMIT
    ]


def without_token() -> dict[str, str]:
    """This process's environment for other programs: HF_TOKEN belongs to the hub alone."""
    return {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}


def run(command: list[str], timeout_s: float, environment: Mapping[str, str]) -> tuple[int, str, str]:
    """Run a program in a process group of its own; after `timeout_s` seconds the whole group is ended.

    Returns exit status, stdout, stderr. Raises CannotRunError on the time limit, FileNotFoundError.
    """
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=timeout_s)
        except BaseException as error:
            # git's helpers inherit the pipes: with git alone ended, reading them would never end.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                name = Path(command[0]).name
                raise CannotRunError(
                    f"{name} gave no answer within {timeout_s:g} s; fix: check the network and run this again"
                ) from None
            raise
        return process.returncode, output, errors

"""The controller's environment for a script that was called with another Python. Standard library only."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from pathlib import Path

VENV = Path(__file__).resolve().parent.parent / ".venv"
NEEDED = ("PIL", "ansible", "gevent", "httpx", "jinja2", "llama_common", "pydantic", "pyinfra", "yaml")
COULD_NOT_RUN = 2


def enter() -> None:
    """Return when this Python has what the scripts import; else begin again with the one of `.venv`.

    Ends the program with one line and exit code 2 where there is no such environment.
    """
    if all(importlib.util.find_spec(module) for module in NEEDED):
        return
    if Path(sys.prefix) != VENV:
        python = VENV / "bin/python"
        with contextlib.suppress(OSError):  # no such environment, or another user's
            os.execv(python, [str(python), *sys.argv])  # noqa: S606 - no shell: the same command again
    print("refused: the controller's environment is missing or incomplete; fix: make setup", file=sys.stderr)
    sys.exit(COULD_NOT_RUN)

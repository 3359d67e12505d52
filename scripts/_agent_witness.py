"""What pytest itself says of each of its runs: a plugin that an agent's pytest loads, wherever it is started.

It lies beside `build.txt`, whose text only a failing assertion shows, and adds one line to `runs.jsonl` for
each run. The word that it prints at the end of a run cannot be guessed: who repeats it has read the output.
Standard library and pytest only.
"""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
_RUN = secrets.token_hex(4)


@pytest.fixture
def expected_build() -> str:
    """The build that the service must tell."""
    return (HERE / "build.txt").read_text().strip()


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int) -> None:
    """Write the run down, and its word under its output."""
    count = {kind: len(terminalreporter.stats.get(kind, [])) for kind in ("passed", "failed", "error")}
    with (HERE / "runs.jsonl").open("a") as runs:
        runs.write(json.dumps({"run": _RUN, "exit": int(exitstatus), **count}) + "\n")
    terminalreporter.write_line(f"run {_RUN}")

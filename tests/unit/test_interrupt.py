"""Ctrl-C while a program is still importing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("module", "argv"),
    [
        ("argparse", ["-m", "lab", "status"]),
        ("argparse", ["tests/run.py", "unit"]),
        ("httpx", ["scripts/make_lab.py"]),
        ("argparse", ["scripts/fleet.py", "--inventory", "inventory/lab"]),
        ("httpx", ["scripts/verify_health.py", "--inventory", "inventory/lab"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, str) else value[0].strip("-"),
)
def test_an_interrupted_import_ends_quietly(module: str, argv: list[str], root: Path, tmp_path: Path) -> None:
    """`module`, which the program imports, is one that takes half a minute."""
    (tmp_path / f"{module}.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(30)\n")
    with subprocess.Popen(
        [sys.executable, *argv], cwd=root, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where tests run with nohup
    ) as program:  # fmt: skip
        assert program.stdout is not None
        assert program.stdout.readline() == "importing\n"
        program.send_signal(signal.SIGINT)
        _, told = program.communicate(timeout=20)
    assert (program.returncode, told) == (130, "")

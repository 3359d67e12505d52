"""Scripts that a person calls as they stand, with a Python that is not the controller's environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts._venv import VENV

SCRIPTS = ["fleet", "verify_health", "render_docs", "make_lab", "lock_models", "bench"]
OTHER_PYTHON = Path(sys.base_prefix) / f"bin/python3.{sys.version_info.minor}"


def call(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The script with the Python that made the environment, which has none of its packages."""
    command = [str(OTHER_PYTHON), "-I", str(script), *arguments]
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environ)


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "make_lab"])
def test_a_script_finds_the_environment_by_itself(name: str, root: Path) -> None:
    if not (VENV / "bin/python").exists():
        pytest.skip("there is no .venv beside these tests")
    done = call(root / f"scripts/{name}.py", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ")


@pytest.mark.parametrize("name", SCRIPTS)
def test_without_the_environment_one_line_says_what_to_do(name: str, root: Path, tmp_path: Path) -> None:
    for folder in ("scripts", "lab"):
        shutil.copytree(root / folder, tmp_path / folder)
    done = call(tmp_path / f"scripts/{name}.py", "--inventory", "inventory/lab")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "refused: the controller's environment is missing or incomplete; fix: make setup\n"
    )

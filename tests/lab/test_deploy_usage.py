"""The deploy tests look at no host that nobody named: usage errors are one line with the command to type."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests import support


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--ansible-inventory is missing"),
        (["--ansible-inventory=inventory/nowhere"], "inventory/nowhere: no such file or directory"),
        (["--ansible-inventory=FILE"], "no host"),
        (["--ansible-inventory=inventory/lab", "--hosts=ansible://nobody"], "no host matches --limit nobody"),
    ],
    ids=["none", "not there", "empty", "no such host"],
)
def test_usage(words: list[str], said: str, tmp_path: Path) -> None:
    empty = tmp_path / "hosts.yml"
    empty.write_text("all: {}\n")
    words = [word.replace("FILE", str(empty)) for word in words]
    done = support.run(sys.executable, "-m", "pytest", "-q", "tests/deploy", *words)
    assert done.rc == pytest.ExitCode.USAGE_ERROR, done.tail()
    (line,) = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    assert line.startswith("ERROR: tests/deploy: ") and said in line
    assert "type: .venv/bin/pytest tests/deploy --ansible-inventory=inventory/lab" in line

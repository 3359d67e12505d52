"""What runs confined writes below its folder only, connects to its ports only, and is really stopped."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from scripts import _confine
from tests.support import ROOT

pytestmark = pytest.mark.skipif(_confine.abi() < 4, reason="this kernel has no Landlock of version 4")
TRY = """
import pathlib, socket, sys
def attempt(act):
    try:
        act()
        return "done"
    except PermissionError:
        return "refused"
    except OSError as error:
        return type(error).__name__
inside, outside = map(pathlib.Path, sys.argv[1:])
print(attempt(lambda: (inside / "a").write_text("x")), attempt(lambda: (inside / "a").rename(inside / "b")),
      attempt(lambda: (outside / "kept").write_text("x")), attempt(lambda: (outside / "kept").unlink()),
      attempt(lambda: (outside / "new").mkdir()), attempt(lambda: pathlib.Path("/dev/null").write_text("x")),
      attempt(lambda: socket.create_connection(("127.0.0.1", 9), 1)),
      attempt(lambda: socket.create_connection(("127.0.0.1", 22222), 1)))
"""


def test_a_confined_program_cannot_leave(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (outside / "kept").write_text("mine")
    confine = [sys.executable, "-I", str(ROOT / "scripts/_confine.py"), "--write", str(inside), "--port", "9"]
    command = [*confine, "--", sys.executable, "-I", "-S", "-c", TRY, str(inside), str(outside)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    refused = "refused refused refused"
    assert done.stdout.split() == f"done done {refused} done ConnectionRefusedError refused".split()
    assert (outside / "kept").read_text() == "mine" and (inside / "b").exists()


def test_without_landlock_nothing_is_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_confine, "abi", lambda: 0)
    with pytest.raises(SystemExit) as ended:
        _confine.main(["--write", str(tmp_path), "--", "touch", str(tmp_path / "x")])
    assert ended.value.code == _confine.NO_LANDLOCK and not (tmp_path / "x").exists()

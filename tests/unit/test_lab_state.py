"""The lab's memory of what it made, its lock, and the control groups of its processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lab import __main__ as command
from lab import shell, supervisor
from lab.config import from_environment
from lab.shell import LabError
from lab.state import Claims, only_command


def test_a_claim_is_on_disk_before_the_thing_is_made(tmp_path: Path) -> None:
    claims = Claims(tmp_path / "claims.json")
    claims.suite = "bookworm"
    claims.claim("interface", "llmbox-t1", exists=False)
    again = Claims(tmp_path / "claims.json")
    assert again.suite == "bookworm"
    assert again.of("interface") == ["llmbox-t1"]
    again.claim("interface", "llmbox-t1", exists=True)  # ours: made by the command that was interrupted
    again.release("interface", "llmbox-t1")
    assert Claims(tmp_path / "claims.json").of("interface") == []


def test_what_another_made_is_never_claimed(tmp_path: Path) -> None:
    claims = Claims(tmp_path / "claims.json")
    with pytest.raises(
        LabError, match=r"interface br0 exists and is not this lab's; fix: [^\n]+$"
    ) as refused:
        claims.claim("interface", "br0", exists=True)
    assert refused.value.code == 2
    assert claims.of("interface") == []


def test_two_commands_on_one_lab_do_not_mix(tmp_path: Path) -> None:
    lab = from_environment({"HOME": str(tmp_path)})
    with (
        only_command(lab, "up"),
        pytest.raises(
            LabError, match=rf"another command works on lab 'lab' \(up, pid {os.getpid()}\)"
        ) as refused,
        only_command(lab, "down"),
    ):
        pytest.fail("the second command got the lock")
    assert refused.value.code == 3
    with only_command(lab, "down"):
        pass


HYBRID = """\
tmpfs /sys/fs/cgroup tmpfs rw 0 0
cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0
cgroup /sys/fs/cgroup/systemd cgroup rw,name=systemd 0 0
cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0
"""


def test_control_group_hierarchies() -> None:
    v1 = [Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup/systemd")]
    assert supervisor.hierarchies(HYBRID) == (Path("/sys/fs/cgroup/unified"), v1)
    assert supervisor.hierarchies("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n") == (Path("/sys/fs/cgroup"), [])
    with pytest.raises(LabError, match="mount -t cgroup2"):
        supervisor.hierarchies("proc /proc proc rw 0 0\n")


def test_a_failing_program_is_one_line() -> None:
    with pytest.raises(LabError, match=r"^`sh -c echo first; echo last >&2; exit 3` failed \(3\): last$"):
        shell.run(["sh", "-c", "echo first; echo last >&2; exit 3"])
    with pytest.raises(LabError, match=r"did not finish within 0 s"):
        shell.run(["sleep", "9"], timeout=0.1)


def test_parallel_jobs_all_end_and_the_failing_one_is_named() -> None:
    done: list[str] = []

    def fail() -> None:
        raise LabError("broke", 7)

    with pytest.raises(LabError, match=r"^second: broke$") as failed:
        shell.in_parallel({"first": lambda: done.append("first"), "second": fail})
    assert failed.value.code == 7
    assert done == ["first"]


def test_without_root_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert command.main(["up"]) == 2
    assert capsys.readouterr().err == f"lab: `lab up` needs root; fix: sudo {sys.executable} -m lab up\n"


def test_a_bad_name_is_one_line(root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lab", "inventory"],
        cwd=root,
        env={**os.environ, "LAB_NAME": "TOO-LONG"},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("lab: LAB_NAME = 'TOO-LONG'")
    assert done.stderr.count("\n") == 1

"""`python3 -m lab`: what it refuses before anything is made, and readers that go away."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lab import __main__ as command
from lab import packages


@pytest.fixture
def as_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for name in ("LAB_NAME", "LAB_SUITE", "LAB_INSTALL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(packages, "missing", lambda _needed: [])


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    assert command.main(["check"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    return line


@pytest.mark.usefixtures("as_root")
def test_a_machine_that_can_run_the_lab_is_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["check"]) == 0
    shown = capsys.readouterr()
    assert shown.out + shown.err == ""
    assert list(tmp_path.iterdir()) == [], "nothing is made"


@pytest.mark.usefixtures("as_root")
def test_who_is_not_root_reads_it_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert refusal(capsys).endswith("needs root; fix: sudo make lab")


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize(("name", "value"), [("LAB_NAME", "BAD_NAME"), ("LAB_SUITE", "etch")])
def test_names_that_cannot_be_are_refused(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, value)
    assert repr(value) in refusal(capsys)


@pytest.mark.usefixtures("as_root")
def test_packages_that_may_not_be_installed_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(packages, "missing", lambda _needed: ["nftables"])
    monkeypatch.setattr(shutil, "which", lambda *_args, **_more: "/usr/bin/apt-get")
    assert command.main(["check"]) == 0, "`lab up` installs them"
    monkeypatch.setenv("LAB_INSTALL", "0")
    assert "type: apt-get install --no-install-recommends nftables" in refusal(capsys)


def test_a_reader_that_has_enough_is_no_traceback(root: Path, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "lab", "inventory"],
            cwd=root, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
            env={**os.environ, "HOME": str(tmp_path)},
        )  # fmt: skip
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_make_lab_checks_before_it_makes_anything(root: Path) -> None:
    planned = subprocess.run(
        ["make", "--dry-run", "lab", "PYTHON=python3"],
        cwd=root, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    steps = [line for line in planned.stdout.splitlines() if "lab" in line or "setup" in line]
    assert steps[0] == "python3 -m lab check"

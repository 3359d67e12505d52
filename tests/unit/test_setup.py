"""`make setup`: what stops it is one line."""

from __future__ import annotations

import errno
import fcntl
import shutil
import subprocess
import threading
from collections import namedtuple
from pathlib import Path

import pytest

from scripts import setup

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another `.venv`, which does not exist."""
    monkeypatch.setattr(setup, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(setup, "LOCK", tmp_path / ".venv.lock")
    monkeypatch.setattr(setup, "STAMP", tmp_path / ".venv/setup.sha256")
    monkeypatch.setattr(setup, "ensure_venv_module", lambda: None)
    return tmp_path


def stop_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def raising(*_args: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr(subprocess, "run", raising)


def test_ctrl_c(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    stop_with(monkeypatch, KeyboardInterrupt())
    assert setup.run() == 130
    assert capsys.readouterr().err == "setup: interrupted; run `make setup` again, it begins anew\n"


def test_the_environment_of_somebody_else(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_with(monkeypatch, PermissionError(errno.EACCES, "Permission denied", "/x/.venv/bin"))
    assert setup.run() == 1
    said = capsys.readouterr().err
    assert said.startswith("setup: /x/.venv/bin: Permission denied") and said.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        subprocess.CalledProcessError(1, ["pip"]),
        OSError(errno.ENOSPC, "No space left on device", "/x/.venv"),
    ],
)
def test_a_full_disk_is_named(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(10**9, 10**9 - 10**6, 10**6))
    stop_with(monkeypatch, error)
    assert setup.run() == 1
    said = capsys.readouterr().err
    assert "0 MiB free" in said and said.count("\n") == 1


def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The programs that setup runs from here on; none does anything."""
    ran: list[list[str]] = []

    def record(command: list[str], **_options: object) -> None:
        setup.VENV.mkdir(exist_ok=True)
        ran.append(command)

    monkeypatch.setattr(subprocess, "run", record)
    return ran


def test_what_changed_decides_what_is_made_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = commands(monkeypatch)
    app = place / "app/pyproject.toml"
    app.parent.mkdir()
    app.write_text("one")
    monkeypatch.setattr(setup, "apps", lambda: [app.parent])
    monkeypatch.setattr(setup, "REQUIREMENTS", place / "requirements.txt")
    setup.REQUIREMENTS.write_text("one")
    whole = [["-m", "venv"], ["--requirement", str(setup.REQUIREMENTS)], ["--editable", str(app.parent)]]

    def made() -> list[list[str]]:
        ran.clear()
        assert setup.run() == 0
        return [pair for command in ran for pair in whole if " ".join(pair) in " ".join(command)]

    assert made() == whole
    assert made() == []
    app.write_text("two")
    assert made() == whole[2:]
    assert made() == []
    setup.REQUIREMENTS.write_text("two")
    assert made() == whole
    stop_with(monkeypatch, subprocess.CalledProcessError(1, ["pip"]))
    app.write_text("three")
    assert setup.run() == 1
    ran = commands(monkeypatch)
    assert made() == whole, "what was interrupted is not trusted"


def test_the_second_of_two_waits_and_finds_it_made(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_with(monkeypatch, AssertionError("made twice"))
    with (place / ".venv.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = threading.Thread(target=setup.run)
        second.start()
        second.join(timeout=0.1)
        assert second.is_alive()
        setup.VENV.mkdir()
        setup.STAMP.write_text(" ".join(setup.fingerprints()))
    second.join(timeout=10)
    assert not second.is_alive()
    assert "waiting for another setup" in capsys.readouterr().out

"""What a dry run of the presets' units says of the preset that runs."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from roles.llama_presets.library import llama_preset_units as module

UNIT = "llama-coder.service"
RUNS = ["sleep", "60"]


def text_of(command: list[str]) -> str:
    return f"{module.MARKER}\n[Service]\nExecStart={' '.join(command)}\n"


class Box:
    """A host whose user systemd runs one unit, with the command RUNS."""

    def __init__(self, folder: Path, pid: int) -> None:
        self.folder, self.pid = folder, pid
        self.units = folder / ".config/systemd/user"
        self.units.mkdir(parents=True)
        self.state, self.read, self.reload, self.drop_ins = "active", RUNS, "no", ""
        self.mode = 0o644
        self.said: list[tuple[str, ...]] = []

    def systemctl(self, *argv: str) -> SimpleNamespace:
        self.said.append(argv)
        shown = (
            f"ActiveState={self.state}\nMainPID={self.pid}\nLoadState=loaded\n"
            f"ExecStart={{ path=/x ; argv[]={' '.join(self.read)} ; ignore_errors=no ; pid=1 }}\n"
            f"NeedDaemonReload={self.reload}\nDropInPaths={self.drop_ins}\n"
        )
        return SimpleNamespace(stdout=shown, stderr="", returncode=0)

    def dry_run(self, command: list[str], on_disk: list[str] | None, scope: str = "user") -> dict[str, Any]:
        """The data says `command`, the disk holds `on_disk`; nothing may be written or reloaded."""
        presets = {"version": 1, "presets": {"coder": {"unit": UNIT, "command": command}}}
        units = self.units if scope == "user" else module.SYSTEM_DIR
        if on_disk is not None:
            units.mkdir(exist_ok=True)
            (units / UNIT).write_text(text_of(on_disk))
            (units / UNIT).chmod(self.mode)
        before = {each: each.read_bytes() for each in self.folder.rglob("*") if each.is_file()}
        wanted = {
            "user": "llm",
            "units": {UNIT: {"scope": scope, "text": text_of(command)}},
            "presets": presets,
            "path": str(self.folder / "presets.json"),
            "checker": ["false"],
        }
        result = module.apply(SimpleNamespace(params=wanted, check_mode=True))
        assert {each: each.read_bytes() for each in self.folder.rglob("*") if each.is_file()} == before
        assert {words[0] for words in self.said} <= {"show"}
        return result


@pytest.fixture
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Box]:
    entry = SimpleNamespace(pw_uid=os.geteuid(), pw_gid=os.getegid(), pw_dir=str(tmp_path))
    monkeypatch.setattr(pwd, "getpwnam", lambda _name: entry)
    monkeypatch.setattr(module.Account, "acting", lambda _self: contextlib.nullcontext())
    monkeypatch.setattr(module.Scope, "manager_runs", True)
    monkeypatch.setattr(module, "SYSTEM_DIR", tmp_path / "system")
    monkeypatch.setattr(module, "presets_file_differs", lambda _path, text: (False, text, ""))
    with subprocess.Popen(RUNS) as process:
        while not Path(f"/proc/{process.pid}/cmdline").read_bytes():
            time.sleep(0.01)  # the kernel is still exchanging the program
        made = Box(tmp_path, process.pid)
        monkeypatch.setattr(module.Scope, "systemctl", made.systemctl)
        yield made
        process.kill()


def restarts(result: dict[str, Any]) -> list[dict[str, str]]:
    return [entry for entry in result["diff"] if entry["after_header"].startswith("lmswitch")]


def test_nothing_to_do_is_no_change(box: Box) -> None:
    result = box.dry_run(RUNS, on_disk=RUNS)
    assert (result["changed"], result["restart"], result["diff"]) == (False, [], [])


def test_a_new_command_of_the_active_preset_predicts_its_restart(box: Box) -> None:
    result = box.dry_run(["sleep", "61"], on_disk=RUNS)
    assert (result["changed"], result["restart"]) == (True, ["coder"])
    assert restarts(result) == [
        {
            "before_header": "lmswitch --restart coder",
            "after_header": "lmswitch --restart coder",
            "before": "sleep 60\n",
            "after": "sleep 61\n",
        }
    ]


def test_a_system_preset_is_restarted_by_the_system_and_always_meant_to_run(box: Box) -> None:
    result = box.dry_run(["sleep", "61"], on_disk=RUNS, scope="system")
    assert (result["changed"], result["restart"], result["restart_system"]) == (True, [], [UNIT])
    assert "systemctl restart llama-coder.service" in [each["after_header"] for each in result["diff"]]
    assert result["deployed"]["units"] == [{"unit": UNIT, "enabled": True, "active": True}]


def test_a_stopped_preset_is_not_restarted(box: Box) -> None:
    box.state = "inactive"
    result = box.dry_run(["sleep", "61"], on_disk=RUNS)
    assert (result["changed"], result["restart"], restarts(result)) == (True, [], [])


def test_a_preset_older_than_its_unit_is_a_change_though_every_file_is_right(box: Box) -> None:
    box.read = ["sleep", "61"]
    result = box.dry_run(["sleep", "61"], on_disk=["sleep", "61"])
    assert (result["changed"], result["restart"]) == (True, ["coder"])


def test_a_preset_of_the_release_before_is_restarted(box: Box) -> None:
    """`current` leads to another release since it started; the command is the same."""
    for name in ("old", "new"):
        (box.folder / name).mkdir()
        shutil.copy(Path("/bin/sleep").resolve(), box.folder / name / "sleep")
    current = box.folder / "current"
    current.symlink_to("old")
    command = [str(current / "sleep"), "60"]
    with subprocess.Popen(command) as process:
        box.pid, box.read = process.pid, command
        while "current" not in Path(f"/proc/{process.pid}/cmdline").read_text():
            time.sleep(0.01)
        assert box.dry_run(command, on_disk=command)["restart"] == []
        current.unlink()
        current.symlink_to("new")
        result = box.dry_run(command, on_disk=command)
        process.kill()
    assert (result["changed"], result["restart"]) == (True, ["coder"])
    (shown,) = restarts(result)
    assert (shown["before"], shown["after"]) == (f"{box.folder}/old/sleep\n", f"{box.folder}/new/sleep\n")


def test_what_systemd_has_yet_to_read_is_a_change(box: Box) -> None:
    box.reload = "yes"
    assert box.dry_run(RUNS, on_disk=RUNS)["changed"] is True
    result = box.dry_run(["sleep", "61"], on_disk=["sleep", "61"])
    assert (result["changed"], result["restart"]) == (True, ["coder"])


def test_another_text_with_the_same_command_restarts_nothing(box: Box) -> None:
    (box.units / UNIT).write_text(text_of(RUNS) + "# before\n")
    (box.units / UNIT).chmod(0o644)
    result = box.dry_run(RUNS, on_disk=None)
    assert (result["changed"], result["restart"]) == (True, [])


@pytest.mark.parametrize(("line", "restarted"), [("ExecStart=sleep 60", []), ("Nice=3", ["coder"])])
def test_the_command_of_a_drop_in_stays(box: Box, line: str, restarted: list[str]) -> None:
    drop_in = box.folder / "50-own.conf"
    drop_in.write_text(f"[Service]\n{line}\n")
    box.drop_ins = str(drop_in)
    assert box.dry_run(["sleep", "61"], on_disk=RUNS)["restart"] == restarted


@pytest.mark.parametrize(
    ("read", "restarted"),
    [
        (["sleep", "$$HOME"], ["coder"]),  # our own escape of a dollar
        (["sleep", "$HOME"], []),  # what it becomes nobody but systemd knows
    ],
)
def test_a_dollar_in_the_command(box: Box, read: list[str], restarted: list[str]) -> None:
    box.read = read
    assert box.dry_run(["sleep", "$HOME"], on_disk=["sleep", "$HOME"])["restart"] == restarted


def test_a_dollar_that_runs_as_written_is_no_change(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen(["sh", "-c", "sleep 60; :", "$HOME"]) as process:
        box.pid = process.pid
        box.read = ["sh", "-c", "sleep 60; :", "$$HOME"]
        until = time.monotonic() + 5
        while "$HOME" not in Path(f"/proc/{process.pid}/cmdline").read_text():
            assert time.monotonic() < until
            time.sleep(0.01)
        command = ["sh", "-c", "sleep 60; :", "$HOME"]
        assert box.dry_run(command, on_disk=command)["restart"] == []
        process.kill()


def test_a_preset_that_is_gone_is_stopped_before_its_unit_is_removed(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    (box.units / UNIT).write_text(text_of(RUNS))
    order: list[tuple[str, bool]] = []

    def systemctl(_self: object, *argv: str) -> SimpleNamespace:
        order.append((" ".join(argv), (box.units / UNIT).exists()))
        return SimpleNamespace(stdout="", stderr="", returncode=0)

    monkeypatch.setattr(module.Scope, "systemctl", systemctl)
    scope = module.Scope(None, box.units, {})
    scope.read()
    scope.write()
    assert not (box.units / UNIT).exists()
    assert (f"stop {UNIT}", True) in order


@pytest.mark.parametrize("mode", [0o666, 0o600, 0o755])
def test_a_unit_with_another_mode_is_a_change_and_restarts_nothing(box: Box, mode: int) -> None:
    box.mode = mode
    result = box.dry_run(RUNS, on_disk=RUNS)
    assert (result["changed"], result["restart"]) == (True, [])
    where = f"{box.units / UNIT}"
    assert [(entry["before_header"], entry["after_header"]) for entry in result["diff"]] == [
        (f"{where} (mode {mode:04o}, owner {os.geteuid()})", where)
    ]


def test_writing_mends_the_mode(box: Box) -> None:
    (box.units / UNIT).write_text(text_of(RUNS))
    (box.units / UNIT).chmod(0o666)
    scope = module.Scope(None, box.units, {UNIT: text_of(RUNS)})
    scope.read()
    assert scope.differing == [UNIT]
    scope.write()
    assert (box.units / UNIT).stat().st_mode & 0o7777 == 0o644
    again = module.Scope(None, box.units, {UNIT: text_of(RUNS)})
    again.read()
    assert bool(again.exposed) == bool(os.geteuid())


def test_owner_and_kind_of_a_file_count(tmp_path: Path) -> None:
    path, link = tmp_path / "presets.json", tmp_path / "link"
    path.write_text("{}")
    path.chmod(0o644)
    link.symlink_to(path)
    me = os.geteuid()
    assert module.wrong_access(path, me) == ""
    assert module.wrong_access(path, me + 1) == f"mode 0644, owner {me}"
    assert module.wrong_access(link, me) == "not a regular file"


def test_presets_json_of_the_right_text_with_an_open_mode_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "wrong_access", lambda _path, uid: f"owner is not {uid}")
    path = tmp_path / "presets.json"
    path.write_text("{}")
    assert module.presets_file_differs(path, "{}") == (True, "{}", "owner is not 0")
    assert module.presets_file_differs(tmp_path / "none", "{}") == (True, "", "")

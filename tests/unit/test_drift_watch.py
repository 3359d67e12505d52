"""The module drift_watch: what it makes of units, timers and the record."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

from roles.drift.library import drift_watch as module

UNITS = {"a@.service": "[Service]\nExecStart=/x\n", "a-full.timer": "[Timer]\nOnCalendar=daily\n"}


class Box:
    """A host's systemd and llmbox-drift; what they were told is kept."""

    def __init__(self, folder: Path) -> None:
        self.program = folder / "llmbox-drift"
        self.program.touch()
        self.timer = ("active", "enabled")
        self.failed, self.changed, self.complaint = "", False, ""
        self.only_warns, self.loud = False, 1
        self.fails: tuple[str, ...] = ("nothing",)
        self.told: list[tuple[str, ...]] = []

    def run(self, *argv: str, stdin: str = "", timeout_s: float = 0) -> subprocess.CompletedProcess[str]:
        self.told.append((Path(argv[0]).name, *argv[1:]))
        said = ""
        if argv[1] == "show":
            said = f"Id=a-full.timer\nActiveState={self.timer[0]}\nUnitFileState={self.timer[1]}\n"
        elif argv[1] == "list-units":
            said = self.failed
        elif argv[1] == "record":
            assert json.loads(stdin) == {"files": ["/x"]}
            said = json.dumps({"changed": self.changed, "diff": {"before": "", "after": "x"}})
        complaint = self.complaint if argv[0] == "systemd-analyze" else ""
        if argv[: len(self.fails)] == self.fails:
            return subprocess.CompletedProcess(argv, 3, "first\n\n", "  Unit is masked.\n\n" * self.loud)
        code = 1 if complaint and not self.only_warns else 0
        return subprocess.CompletedProcess(argv, code, said, complaint)

    def apply(self, *, check: bool = False) -> dict[str, Any]:
        self.told.clear()
        wanted = {"program": str(self.program), "units": UNITS, "deployed": {"files": ["/x"]}}
        return module.apply(wanted, check)

    def did(self, *words: str) -> bool:
        return any(told[: len(words)] == words for told in self.told)


@pytest.fixture
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Box:
    made = Box(tmp_path)
    (tmp_path / "system").mkdir()
    monkeypatch.setattr(module, "SYSTEM_DIR", tmp_path / "system")
    monkeypatch.setattr(module, "run", made.run)
    for name, text in UNITS.items():
        module.write(tmp_path / "system" / name, text)
    return made


def test_a_converged_host_is_not_changed(box: Box) -> None:
    for check in (False, True):
        result = box.apply(check=check)
        assert (result["changed"], result["diff"]) == (False, [])
        assert not box.did("systemctl", "daemon-reload") and not box.did("systemctl", "enable")
        assert box.did("llmbox-drift", "record", "--dry-run") is check


@pytest.mark.parametrize("how", ["text", "mode", "gone"])
def test_a_unit_that_differs_is_written_after_it_was_verified(box: Box, how: str) -> None:
    path = module.SYSTEM_DIR / "a-full.timer"
    if how == "text":
        path.write_text("[Timer]\n")
    elif how == "mode":
        path.chmod(0o666)
    else:
        path.unlink()
    before = path.lstat().st_mtime_ns if path.exists() else None
    assert box.apply(check=True)["changed"]
    assert (path.lstat().st_mtime_ns if path.exists() else None) == before
    assert box.apply()["changed"]
    assert box.did("systemd-analyze") and box.did("systemctl", "daemon-reload")
    assert (path.read_text(), path.stat().st_mode & 0o777) == (UNITS["a-full.timer"], 0o644)
    assert not box.apply()["changed"]


def test_a_unit_that_systemd_refuses_is_not_written(box: Box) -> None:
    path = module.SYSTEM_DIR / "a-full.timer"
    path.unlink()
    box.complaint = "a-full.timer:2: Failed to parse calendar"
    with pytest.raises(module.Refused, match=r"systemd-analyze refuses a unit: a-full.timer:2: Failed"):
        box.apply()
    assert not path.exists()


@pytest.mark.parametrize("state", [("inactive", "enabled"), ("active", "disabled")])
def test_a_timer_that_rests_is_started(box: Box, state: tuple[str, str]) -> None:
    box.timer = state
    assert box.apply(check=True)["changed"]
    assert not box.did("systemctl", "enable")
    assert box.apply()["changed"]
    assert box.did("systemctl", "enable", "--now", "a-full.timer")


def test_what_systemd_says_of_other_units_is_no_refusal(box: Box) -> None:
    (module.SYSTEM_DIR / "a-full.timer").unlink()
    box.only_warns, box.complaint = True, "/etc/systemd/system/other.service:3: Unknown key"
    assert box.apply()["changed"]


def test_what_systemd_says_of_ours_is_one_however_it_ends(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    (module.SYSTEM_DIR / "a-full.timer").unlink()
    monkeypatch.setattr(tempfile, "mkdtemp", lambda **_: str(box.program.parent / "verify"))
    (box.program.parent / "verify").mkdir()
    box.only_warns, box.complaint = True, f"{box.program.parent}/verify/a-full.timer:2: Unknown key"
    with pytest.raises(module.Refused, match=r"refuses a unit: a-full.timer:2: Unknown key"):
        box.apply()


def test_a_command_that_fails_is_a_refusal_with_its_last_words(box: Box) -> None:
    box.timer, box.fails = ("inactive", "enabled"), ("systemctl", "enable")
    with pytest.raises(module.Refused, match=r"^systemctl enable --now failed: Unit is masked\.$"):
        box.apply()
    box.fails, box.loud = (str(box.program), "record"), 0
    with pytest.raises(module.Refused, match=r"llmbox-drift record failed: first$"):
        box.apply()
    assert box.apply(check=True)["changed"], "damaged: a run would put it right"


def test_a_run_does_all_of_it_where_a_dry_run_must_not_ask(box: Box) -> None:
    box.program.unlink()
    box.apply()
    assert box.did("llmbox-drift", "record")


def test_a_diff_has_the_unit_before_and_after_and_the_record(box: Box) -> None:
    (module.SYSTEM_DIR / "a-full.timer").write_text("[Timer]\n")
    (module.SYSTEM_DIR / "a@.service").unlink()
    box.changed = True
    shown = [(one["before"], one["after"]) for one in box.apply(check=True)["diff"]]
    assert shown == [("", UNITS["a@.service"]), ("[Timer]\n", UNITS["a-full.timer"]), ("", "x")]


def test_a_new_record_is_a_change(box: Box) -> None:
    box.changed = True
    assert box.apply()["changed"]


def test_a_comparison_that_failed_is_begun_anew_and_is_no_change(box: Box) -> None:
    box.failed = "llmbox-drift@full.service loaded failed failed x\n"
    assert not box.apply()["changed"]
    assert box.did("systemctl", "start", "--no-block", "llmbox-drift@full.service")
    box.apply(check=True)
    assert not box.did("systemctl", "start")


def test_a_dry_run_on_a_new_host_needs_no_program(box: Box) -> None:
    box.program.unlink()
    assert box.apply(check=True)["changed"]
    assert not box.did("llmbox-drift")

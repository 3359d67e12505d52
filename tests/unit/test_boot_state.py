"""The module boot_state: what counts as another system's, and what difference is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from plugins.modules import boot_state
from tests.support import ROOT

GLOBAL = "8be4df61-93ca-11d2-aa0d-00e098032b8c"


def test_boot_variables_are_looked_at_and_no_others(tmp_path: Path) -> None:
    for name in ("Boot0001", "BootOrder", "BootNext", "Timeout", "BootCurrent", "ConIn", "Boot000g"):
        (tmp_path / f"{name}-{GLOBAL}").write_bytes(name.encode())
    (tmp_path / "Boot0001-00000000-0000-0000-0000-000000000000").write_bytes(b"a vendor's")
    assert boot_state.variables(tmp_path) == {
        name: name.encode().hex() for name in ("Boot0001", "BootNext", "BootOrder", "Timeout")
    }
    assert boot_state.variables(tmp_path / "missing") == {}


@pytest.mark.parametrize(
    ("order", "current", "first"),
    [
        ([0, 1], [0], ""),
        ([2, 0, 1], [0], ""),
        ([1, 0], [0], "Boot0001"),
        ([2, 1, 0], [0], "Boot0001"),
        ([2, 1], [0], "Boot0001"),
        ([2, 0], [3], ""),
        ([1, 0], [], "Boot0001"),
        ([0, 1], [], ""),
        ([], [0], ""),
        ([3, 0], [0], ""),
        ([3, 1, 0], [0], "Boot0001"),
        ([3, 1, 0], [], "Boot0001"),
        ([3, 0, 1], [], ""),
    ],
)
def test_windows_that_starts_before_the_system_that_runs_is_told(
    tmp_path: Path, order: list[int], current: list[int], first: str
) -> None:
    """0 is Linux, 1 Windows, 2 the network, 3 a Windows that is switched off: passed over."""
    for name, numbers in {"BootOrder": order, "BootCurrent": current}.items():
        content = b"\7\0\0\0" + b"".join(number.to_bytes(2, "little") for number in numbers)
        (tmp_path / f"{name}-{GLOBAL}").write_bytes(content)
    windows = "\\EFI\\Microsoft\\Boot\\bootmgfw.efi"
    for number, path in enumerate(("\\EFI\\debian\\shimx64.efi", windows, "", windows)):
        attributes = b"\7\0\0\0" + (b"\0" if number == 3 else b"\1") + b"\0\0\0"
        (tmp_path / f"Boot{number:04X}-{GLOBAL}").write_bytes(attributes + path.encode("utf-16-le"))
    assert boot_state.windows_first(tmp_path) == first
    assert boot_state.windows_first(tmp_path / "missing") == ""


def test_a_partition_is_found_at_a_path_with_a_space(tmp_path: Path) -> None:
    """The kernel writes it as an octal number."""
    (tmp_path / "my esp/EFI").mkdir(parents=True)
    (tmp_path / "root/EFI").mkdir(parents=True)
    mounts = f"/dev/vda1 {tmp_path}/my\\040esp vfat rw 0 0\n/dev/vda2 {tmp_path}/root ext4 rw 0 0\n"
    assert boot_state.partitions(mounts) == [tmp_path / "my esp"]


def test_files_of_the_system_that_runs_are_left_out(tmp_path: Path) -> None:
    for name in (
        "EFI/debian/grub.cfg",
        "EFI/DEBIAN/shimx64.efi",
        "EFI/Microsoft/Boot/BCD",
        "EFI/BOOT/BOOTX64.EFI",
        "System/debian/x",
    ):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(name)
    (partition,) = boot_state.partitions(
        f"/dev/vda1 {tmp_path} vfat rw 0 0\n/dev/vda2 / ext4 rw 0 0\n/dev/sdb1 {tmp_path}/EFI vfat rw 0 0\n"
    )
    found = boot_state.files(
        [partition], boot_state.own_folders('NAME="Debian"\nVERSION_ID="12"\nID=debian\n')
    )
    assert {name.removeprefix(f"{tmp_path}/") for name in found} == {
        "EFI/Microsoft/Boot/BCD",
        "EFI/BOOT/BOOTX64.EFI",
        "System/debian/x",
    }
    bcd = partition / "EFI/Microsoft/Boot/BCD"
    bcd.write_text(bcd.read_text()[::-1])  # as long as before
    changed = boot_state.files([partition], ["debian"])
    assert [name for name in found if changed[name] != found[name]] == [str(bcd)]


@pytest.mark.parametrize(
    ("after", "told"),
    [
        ({"variables": {"Boot0001": "aa", "BootOrder": "01"}, "files": {"/e/BCD": "1"}}, []),
        ({"variables": {"BootOrder": "01"}, "files": {"/e/BCD": "1"}}, ["Boot0001 is gone"]),
        (
            {"variables": {"Boot0001": "aa", "BootOrder": "02", "BootNext": "1"}, "files": {}},
            ["BootNext is new", "BootOrder has changed", "/e/BCD is gone"],
        ),
        (
            {"variables": {"Boot0001": "aa", "BootOrder": "01"}, "files": {"/e/BCD": "2"}},
            ["/e/BCD has changed"],
        ),
    ],
)
def test_every_difference_is_named(after: dict[str, dict[str, str]], told: list[str]) -> None:
    before = {"variables": {"Boot0001": "aa", "BootOrder": "01"}, "files": {"/e/BCD": "1"}}
    assert boot_state.differences(before, after) == told


class Ended(Exception):
    """The module has ended."""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with one boot entry, in a folder."""
    for name in ("VARIABLES", "MOUNTS", "OS_RELEASE", "REMEMBERED"):
        monkeypatch.setattr(boot_state, name, tmp_path / name.lower())
    boot_state.VARIABLES.mkdir()
    boot_state.MOUNTS.touch()
    boot_state.OS_RELEASE.write_text("ID=debian\n")
    entry(tmp_path).write_text("a")
    return tmp_path


def entry(machine: Path) -> Path:
    return machine / f"variables/Boot0001-{GLOBAL}"


def play(
    monkeypatch: pytest.MonkeyPatch, before: dict[str, Any] | None = None, *, check: bool = False
) -> dict[str, Any]:
    """The module's answer; it has `msg` when the module fails."""
    answer: dict[str, Any] = {}

    class Module:
        check_mode = check

        def __init__(self, **_: Any) -> None:
            self.params = {"before": before, "own": None}

        def exit_json(self, **found: Any) -> None:
            assert not found["changed"]
            answer.update(found)
            raise Ended

        def fail_json(self, **found: Any) -> None:
            self.exit_json(changed=False, **found)

    monkeypatch.setattr(boot_state, "AnsibleModule", Module)
    with pytest.raises(Ended):
        boot_state.main()
    return answer


def test_a_run_that_failed_for_a_change_does_not_make_it_the_next_ones_beginning(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = play(monkeypatch)
    assert first["efi"] and "msg" not in first
    assert "msg" not in play(monkeypatch, first["state"])
    entry(machine).write_text("b")
    for check in (True, False):
        said = play(monkeypatch, first["state"], check=check)["msg"]
        assert "Boot0001 has changed" in said and f"rm {boot_state.REMEMBERED}" in said
        assert boot_state.REMEMBERED.exists() is not check, "a dry run writes nothing"
    for check in (True, False, False):
        assert "Boot0001 has changed" in play(monkeypatch, check=check)["msg"], "the next run's first look"
    entry(machine).write_text("a")
    assert "msg" not in play(monkeypatch, check=True) and boot_state.REMEMBERED.exists()
    assert "msg" not in play(monkeypatch) and not boot_state.REMEMBERED.exists(), "it is put back"
    entry(machine).write_text("c")
    assert "msg" not in play(monkeypatch), "between two runs it may change"


def test_a_change_that_is_to_stay_is_the_next_beginning(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = play(monkeypatch)["state"]
    entry(machine).unlink()
    assert "Boot0001 is gone" in play(monkeypatch, before)["msg"]
    boot_state.REMEMBERED.unlink()
    found = play(monkeypatch)
    assert "msg" not in found and not found["efi"]


def test_the_module_tells_which_windows_starts_first(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a dry run, and when it fails."""
    assert play(monkeypatch)["windows_first"] == ""
    entry(machine).write_bytes(b"\7\0\0\0\1\0\0\0" + "\\EFI\\Microsoft\\".encode("utf-16-le"))
    (machine / f"variables/BootOrder-{GLOBAL}").write_bytes(b"\7\0\0\0\1\0")
    for check in (True, False):
        assert play(monkeypatch, check=check)["windows_first"] == "Boot0001"
    assert play(monkeypatch, {"variables": {}, "files": {}})["windows_first"] == "Boot0001"


def test_what_is_remembered_goes_with_a_boot() -> None:
    assert boot_state.REMEMBERED.parent == Path("/run")


def test_role_dual_boot_looks_before_its_first_task_and_compares_after_its_last() -> None:
    tasks = yaml.safe_load((ROOT / "roles/dual_boot/tasks/main.yml").read_text())
    block = next(task["block"] for task in tasks if task.get("when") == "dual_boot_enabled")
    first, last = block[0], block[-1]
    assert first["boot_state"] is None and "when" not in first
    assert last["boot_state"] == {"before": "{{ " + first["register"] + ".state }}"} and "when" not in last
    assert sum("boot_state" in task for task in block) == 2

"""The module boot_state: what counts as another system's, and what difference is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from plugins.modules import boot_state

GLOBAL = "8be4df61-93ca-11d2-aa0d-00e098032b8c"


def test_boot_variables_are_looked_at_and_no_others(tmp_path: Path) -> None:
    for name in ("Boot0001", "BootOrder", "BootNext", "Timeout", "BootCurrent", "ConIn", "Boot000g"):
        (tmp_path / f"{name}-{GLOBAL}").write_bytes(name.encode())
    (tmp_path / "Boot0001-00000000-0000-0000-0000-000000000000").write_bytes(b"a vendor's")
    assert boot_state.variables(tmp_path) == {
        name: name.encode().hex() for name in ("Boot0001", "BootNext", "BootOrder", "Timeout")
    }
    assert boot_state.variables(tmp_path / "missing") == {}


def test_a_partition_is_found_at_a_path_with_a_space(tmp_path: Path) -> None:
    """The kernel writes it as an octal number."""
    (tmp_path / "my esp/EFI").mkdir(parents=True)
    mounts = f"/dev/vda1 {tmp_path}/my\\040esp vfat rw 0 0\n"
    assert boot_state.partitions(mounts) == [tmp_path / "my esp"]


def test_files_of_the_system_that_runs_are_left_out(tmp_path: Path) -> None:
    for name in ("EFI/debian/grub.cfg", "EFI/Microsoft/Boot/BCD", "EFI/BOOT/BOOTX64.EFI", "System/debian/x"):
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

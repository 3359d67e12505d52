"""`bootwin` on firmware variables as OVMF writes them; what the firmware answers to it is in tests/vm."""

from __future__ import annotations

import os
import struct
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from llmbox import bootwin
from llmbox.bootwin import Entry, Machine
from llmbox.complaint import complaint
from llmbox.errors import LlmboxError

from tests.support import ROOT

GLOBAL = "8be4df61-93ca-11d2-aa0d-00e098032b8c"
PARTITION = "643ce2fd-56a4-9c44-a4f5-918015a7fec6"
LABEL = "Windows Boot Manager"
LOADER = "\\EFI\\Microsoft\\Boot\\bootmgfw.efi"
FREE = 1


def node(kind: int, subkind: int, body: bytes) -> bytes:
    return struct.pack("<BBH", kind, subkind, 4 + len(body)) + body


def entry(label: str, loader: str = LOADER, partition: str = PARTITION) -> bytes:
    """A Boot#### variable: attributes, flags, length of the device path, label, device path."""
    drive = struct.pack("<IQQ", 1, 0x800, 0x20000) + uuid.UUID(partition).bytes_le + b"\x02\x02"
    path = node(4, 1, drive) + node(4, 4, f"{loader}\0".encode("utf-16-le")) + node(0x7F, 0xFF, b"")
    return struct.pack("<IIH", 7, 1, len(path)) + f"{label}\0".encode("utf-16-le") + path


class World:
    """A machine in a folder: firmware variables, partition, mounts; efibootmgr and systemctl are scripts."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.esp = folder / "esp"
        (self.esp / "EFI/Microsoft/Boot").mkdir(parents=True)
        (self.esp / "EFI/Microsoft/Boot/bootmgfw.efi").write_text("program")
        for name in ("efivars", "by-partuuid", "bin"):
            (folder / name).mkdir()
        (folder / "vda1").touch()
        (folder / "by-partuuid" / PARTITION).symlink_to(folder / "vda1")
        (folder / "mounts").write_text(f"proc /proc proc rw 0 0\n{folder}/vda1 {self.esp} vfat rw 0 0\n")
        self.machine = Machine(folder / "efivars", folder / "by-partuuid", folder / "mounts")
        self.log = folder / "log"
        self._bin = folder / "bin"
        self.put("Boot0000", entry("debian", "\\EFI\\debian\\grubx64.efi"))
        self.put("Boot0001", entry(LABEL))
        self.put("BootOrder", struct.pack("<IHH", 7, 0, 1))
        self.put("BootCurrent", struct.pack("<IH", 6, 0))
        self.program("efibootmgr", self.sets_next(1))
        self.program("systemctl", "")
        monkeypatch.setenv("PATH", f"{self._bin}:{os.environ['PATH']}")
        monkeypatch.setattr(os, "geteuid", lambda: 0)

    def put(self, name: str, content: bytes) -> None:
        (self.machine.variables / f"{name}-{GLOBAL}").write_bytes(content)

    def remove(self, name: str) -> None:
        (self.machine.variables / f"{name}-{GLOBAL}").unlink()

    def sets_next(self, number: int) -> str:
        place = self.machine.variables / f"BootNext-{GLOBAL}"
        return (
            f"""case "$*" in *--delete-bootnext*) rm -f {place};; """
            rf"""*) printf '\007\000\000\000\{number:03o}\000' > {place};; esac"""
        )

    def program(self, name: str, text: str) -> None:
        place = self._bin / name
        place.write_text(f'#!/bin/sh\necho "{name} $*" >> {self.log}\n{text}\n')
        place.chmod(0o755)

    def variables(self) -> dict[str, bytes]:
        return bootwin.read_variables(self.machine.variables)

    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def run(self, *words: str) -> int:
        return bootwin.main(["--label", LABEL, "--esp-free-mib", str(FREE), *words], self.machine)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


def test_an_entry_is_read_as_the_firmware_stores_it() -> None:
    assert bootwin.parse_entry(1, entry(LABEL)) == Entry(
        1, LABEL, PARTITION, "/EFI/Microsoft/Boot/bootmgfw.efi"
    )
    # UiApp of OVMF: a program in the firmware itself.
    inner = node(4, 7, b"\xaa" * 16) + node(4, 6, b"\xbb" * 16) + node(0x7F, 0xFF, b"")
    content = struct.pack("<IIH", 7, 0x109, len(inner)) + "UiApp\0".encode("utf-16-le") + inner
    assert bootwin.parse_entry(0, content) == Entry(0, "UiApp")
    # A label with a byte pair of zeros across two characters: U+0100 is stored as 00 01.
    assert bootwin.parse_entry(2, entry("\u6100\u0061x")).label == "\u6100\u0061x"


@pytest.mark.parametrize("content", [b"", b"\x07\0\0\0", struct.pack("<IIH", 7, 1, 0) + b"A\0B\0"])
def test_what_is_no_entry_is_told(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"Boot00AB is no boot entry"):
        bootwin.parse_entry(0xAB, content)


def test_it_sets_boot_next_and_restarts(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    before = world.variables()
    assert world.run() == 0
    assert world.calls() == ["efibootmgr --quiet --bootnext 0001", "systemctl reboot"]
    assert world.variables() == before | {"BootNext": b"\7\0\0\0\1\0"}
    assert capsys.readouterr().out.startswith(f'restarting into Boot0001 "{LABEL}"')


def test_a_boot_next_without_a_number_is_none(world: World) -> None:
    """As a firmware leaves it that empties the variable instead of removing it."""
    world.put("BootNext", b"\7\0\0\0")
    assert world.run() == 0


def test_a_dry_run_calls_nothing(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    before = world.variables()
    assert world.run("--dry-run") == 0
    assert (world.calls(), world.variables()) == ([], before)
    assert capsys.readouterr().out == f'would start Boot0001 "{LABEL}" once: BootNext = 0001, then restart\n'


def test_an_entry_s_number_is_hexadecimal(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.remove("Boot0001")
    world.put("Boot001A", entry(LABEL))
    world.program("efibootmgr", world.sets_next(0x1A))
    assert world.run() == 0
    assert world.calls()[0] == "efibootmgr --quiet --bootnext 001A"
    assert capsys.readouterr().out.startswith(f'restarting into Boot001A "{LABEL}"')


def test_entries_beside_windows_own_change_nothing(world: World) -> None:
    """One of a vendor's making that is none, and one whose label only begins like Windows'."""
    world.put("Boot0002", b"\1\2")
    world.put("Boot0003", entry(f"{LABEL} (old)"))
    assert world.run() == 0
    assert world.calls()[0] == "efibootmgr --quiet --bootnext 0001"


@pytest.mark.parametrize("order", [(2, 0, 1), (0, 1), (0,)])
def test_another_entry_that_comes_first_is_none_of_windows(world: World, order: tuple[int, ...]) -> None:
    """The network, say: the firmware has tried it and gone on to Linux."""
    world.put("BootOrder", struct.pack(f"<I{len(order)}H", 7, *order))
    assert world.run("--dry-run") == 0


def test_a_windows_that_is_switched_off_is_not_started_first(world: World) -> None:
    """The firmware passes over it in its order."""
    windows_is_first(world)
    off = bytearray(entry(LABEL))
    off[4] = 0
    world.put("Boot0001", bytes(off))
    assert world.run("--dry-run") == 0


def only_one_like_it(world: World) -> None:
    world.put("Boot0001", entry(f"{LABEL} (old)"))


def no_entry(world: World) -> None:
    world.remove("Boot0001")


def two_entries(world: World) -> None:
    world.put("Boot0004", entry(LABEL))


def the_first_of_two_is_gone(world: World) -> None:
    world.put("Boot0001", entry(LABEL, partition="11111111-56a4-9c44-a4f5-918015a7fec6"))
    two_entries(world)


def the_second_of_two_is_gone(world: World) -> None:
    world.put("Boot0004", entry(LABEL, "\\EFI\\Old\\bootmgfw.efi"))


def no_efi(world: World) -> None:
    for path in world.machine.variables.iterdir():
        path.unlink()


def no_folder(world: World) -> None:
    no_efi(world)
    world.machine.variables.rmdir()


def partition_gone(world: World) -> None:
    (world.machine.partitions / PARTITION).unlink()


def loader_gone(world: World) -> None:
    (world.esp / "EFI/Microsoft/Boot/bootmgfw.efi").unlink()


def something_else_is_next(world: World) -> None:
    world.put("BootNext", b"\7\0\0\0\0\0")


def windows_is_first(world: World) -> None:
    world.put("BootOrder", struct.pack("<IHH", 7, 1, 0))


def linux_is_in_no_order(world: World) -> None:
    """As when it was started from the firmware's menu, by its file."""
    world.put("BootOrder", struct.pack("<IHH", 7, 3, 1))


def linux_is_first_and_was_started_otherwise(world: World) -> None:
    """As by an entry of the firmware's menu that is in no order: which one is Linux' own cannot be told."""
    world.put("BootCurrent", struct.pack("<IH", 6, 9))


def windows_is_first_and_what_runs_is_not_told(world: World) -> None:
    windows_is_first(world)
    world.remove("BootCurrent")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (no_entry, f'the firmware has no boot entry "{LABEL}"; it has "debian"; fix: start Windows once'),
        (only_one_like_it, f'no boot entry "{LABEL}"; it has "debian", "{LABEL} (old)"; fix: '),
        (two_entries, f'has 2 boot entries "{LABEL}" (Boot0001 and Boot0004)'),
        (
            two_entries,
            "cannot be told; fix: efibootmgr -v says where each is, and sudo efibootmgr -b NUMBER -B",
        ),
        (the_first_of_two_is_gone, "Boot0001 is of a Windows that is gone; fix: sudo efibootmgr -b 0001 -B"),
        (the_second_of_two_is_gone, "Boot0004 is of a Windows that is gone; fix: sudo efibootmgr -b 0004 -B"),
        (no_efi, "holds no boot entries: this machine was not started through EFI"),
        (no_folder, "cannot be read (No such file or directory): this machine was not started through EFI"),
        (partition_gone, f"starts from the partition {PARTITION}, which this machine does not have"),
        (loader_gone, "starts /EFI/Microsoft/Boot/bootmgfw.efi, which"),
        (something_else_is_next, "something else is to start next (BootNext = 0000"),
        (windows_is_first, f'the firmware starts Boot0001 "{LABEL}" before the system that runs'),
        (linux_is_in_no_order, f'starts Boot0001 "{LABEL}" before the system that runs'),
        (linux_is_first_and_was_started_otherwise, "(efibootmgr shows them); where it is already, restart"),
        (windows_is_first_and_what_runs_is_not_told, "the start after it would be Windows again; fix: "),
    ],
)
@pytest.mark.parametrize("words", [[], ["--dry-run"]])
def test_a_wrong_world_is_refused_and_left_alone(
    world: World,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[World], None],
    reason: str,
    words: list[str],
) -> None:
    spoil(world)
    before = sorted(path.name for path in world.machine.variables.glob("*"))
    assert world.run(*words) == 1
    said = capsys.readouterr().err
    assert said.startswith("bootwin: ")
    assert said.count("\n") == 1
    assert reason in said
    assert "; fix: " in said
    assert sorted(path.name for path in world.machine.variables.glob("*")) == before
    assert world.calls() == []


def test_a_full_esp_is_refused(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = list(os.statvfs(world.esp))
    fields[1], fields[4] = 512, 100  # f_frsize, f_bavail
    monkeypatch.setattr(os, "statvfs", lambda _place: os.statvfs_result(fields))
    assert world.run() == 1
    assert "has 0.0 MiB free, less than dual_boot_esp_free_mib = 1" in capsys.readouterr().err
    assert world.calls() == []


def test_an_esp_that_is_not_mounted_is_not_judged(world: World) -> None:
    world.machine.mounts.write_text("proc /proc proc rw 0 0\n")
    assert world.run("--dry-run") == 0


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (
            "echo 'Could not set BootNext: Read-only file system' >&2; exit 8",
            "(Could not set BootNext: Read-only",
        ),
        ("exit 0", "refuses BootNext = 0001 (it stays as it was)"),
    ],
)
def test_boot_next_that_is_refused_stops_the_restart(
    world: World, capsys: pytest.CaptureFixture[str], script: str, reason: str
) -> None:
    world.program("efibootmgr", script)
    before = world.variables()
    assert world.run() == 1
    assert reason in capsys.readouterr().err
    assert world.calls() == ["efibootmgr --quiet --bootnext 0001"]
    assert world.variables() == before


def test_another_boot_next_than_the_one_asked_for_is_taken_back(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.program("efibootmgr", world.sets_next(5))
    before = world.variables()
    assert world.run() == 1
    assert "refuses BootNext = 0001" in capsys.readouterr().err
    assert world.variables() == before
    assert world.calls() == [
        "efibootmgr --quiet --bootnext 0001",
        "efibootmgr --quiet --delete-bootnext",
    ]


MORE = {
    "changed": ("BootOrder", r"printf '\007\000\000\000\001\000' > {}"),
    "added": ("Boot0007", "echo new > {}"),
    "removed": ("Boot0000", "rm -f {}"),
}


@pytest.mark.parametrize(("name", "spoil"), MORE.values(), ids=MORE)
@pytest.mark.parametrize("was_next", [False, True])
def test_firmware_that_changes_more_is_not_restarted(
    world: World, capsys: pytest.CaptureFixture[str], name: str, spoil: str, was_next: bool
) -> None:
    if was_next:
        world.put("BootNext", b"\7\0\0\0\1\0")
    place = world.machine.variables / f"{name}-{GLOBAL}"
    world.program("efibootmgr", f"{spoil.format(place)}; {world.sets_next(1)}")
    assert world.run() == 1
    assert f"changed {name} when BootNext was set; not restarted" in capsys.readouterr().err
    assert ("efibootmgr --quiet --delete-bootnext" in world.calls()) is not was_next
    assert ("BootNext" in world.variables()) is was_next
    assert "systemctl reboot" not in world.calls()


@pytest.mark.parametrize("was_next", [False, True])
def test_a_restart_that_fails_leaves_boot_next_as_it_was(
    world: World, capsys: pytest.CaptureFixture[str], was_next: bool
) -> None:
    if was_next:
        world.put("BootNext", b"\7\0\0\0\1\0")
    world.program("systemctl", "echo 'Call to Reboot failed: Access denied' >&2; exit 1")
    before = world.variables()
    assert world.run() == 1
    said = capsys.readouterr().err
    assert f"Access denied); Windows {'starts' if was_next else 'will not start'} next" in said
    assert world.variables() == before


def test_an_ordinary_user_goes_through_the_one_sudo_rule(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    called: list[tuple[str, list[str]]] = []
    arguments = ["--label", LABEL, "--esp-free-mib", "1"]
    assert bootwin.main(arguments, world.machine, lambda *words: called.append(words)) == 0
    assert called == [("sudo", ["sudo", "--non-interactive", "/usr/local/sbin/llmbox-bootwin"])]
    assert world.calls() == []


def test_an_esp_only_root_sees_into_is_left_to_root(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_self: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_file", refused)
    assert world.run("--dry-run") == 0


def test_an_entry_without_a_partition_is_taken_as_it_is(world: World) -> None:
    bootwin.check_partition(Entry(1, LABEL), world.machine, FREE)


def test_a_missing_program_is_named() -> None:
    assert complaint(["no-such-program-here"], 5) == "no-such-program-here is not installed"


def test_variables_that_are_unreadable_are_told(tmp_path: Path) -> None:
    with pytest.raises(LlmboxError, match=r"cannot be read"):
        bootwin.read_variables(tmp_path / "missing")


@pytest.mark.parametrize("kind", ["llm", "ocr"])
def test_every_box_whose_data_may_ask_for_windows_gets_it(kind: str) -> None:
    """`dual_boot_enabled` may stand at any host of llama_hosts: on none it is left unread."""
    plays = yaml.safe_load((ROOT / f"playbooks/{kind}_server.yml").read_text())
    roles = [role for play in plays for role in play.get("roles", [])]
    assert "dual_boot" in roles
    before = roles[: roles.index("dual_boot")]
    assert "llm_user" in before and "llmbox" in before, "who runs it, and what runs"

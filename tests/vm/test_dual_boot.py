"""Role dual_boot and `bootwin` on real firmware; Windows is the lab's stand-in."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator

import pytest

from tests import support
from tests.vm.machine import Machine

PLAY = support.ROOT / "tests/vm/dual_boot.yml"
SPOILING_PLAY = support.ROOT / "tests/vm/boot_order_changed.yml"
BOOTWIN = "sudo -u llm bootwin"
LABEL = "Windows Boot Manager"


def imported_by_bootwin() -> bytes:
    """A tar archive of what bootwin imports, as it lies in the environment that role llmbox installs."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("__init__", "complaint", "errors", "bootwin"):
            tar.add(support.ROOT / f"apps/llmbox/src/llmbox/{name}.py", f"llmbox/{name}.py")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def with_role(machine: Machine) -> Iterator[Machine]:
    """The machine after the role's first run; kept, so that each test begins there."""
    machine.out("sudo useradd --create-home llm && sudo python3 -m venv --without-pip /opt/llmbox")
    archive = imported_by_bootwin().hex()
    unpack = "tar --extract --directory=$(echo /opt/llmbox/lib/python3*/site-packages)"
    program = "import sys; sys.stdout.buffer.write(bytes.fromhex(sys.stdin.read()))"
    machine.run(f"python3 -c '{program}' | sudo sh -c '{unpack}'", stdin=archive).check()
    before = machine.efi_variables()
    first = machine.playbook(PLAY).check()
    assert first.changed == 3
    assert machine.efi_variables() == before
    machine.snapshot("with-role")
    yield machine


@pytest.fixture
def box(with_role: Machine) -> Machine:
    with_role.restore("with-role")
    return with_role


def windows_files(machine: Machine) -> str:
    return machine.out("sudo find /boot/efi -type f -not -path '*/debian/*' -exec sha256sum {} +")


def test_a_second_run_changes_nothing(box: Machine) -> None:
    assert box.playbook(PLAY).check().changed == 0


def test_the_llm_user_may_run_exactly_this(box: Machine) -> None:
    assert '(root) NOPASSWD: /usr/local/sbin/llmbox-bootwin ""' in box.out("sudo -l -U llm")
    refused = box.run("sudo -u llm sudo --non-interactive /usr/local/sbin/llmbox-bootwin --dry-run")
    assert refused.rc != 0
    assert "password is required" in refused.stderr


def test_windows_starts_once_and_then_linux_again(box: Machine) -> None:
    before, files, boot_id, runs = box.efi_variables(), windows_files(box), box.boot_id, box.windows_runs()
    assert box.out(f"{BOOTWIN} --dry-run").startswith("would start Boot")
    assert (box.efi_variables(), box.windows_runs()) == (before, runs)
    box.run(BOOTWIN)  # the connection may end before the answer
    box.wait_for_boot(boot_id)
    assert box.windows_runs() == runs + 1
    assert box.efi_variables() == before
    assert windows_files(box) == files


WRONG_WORLDS = {
    "no entry": (
        f"n=$(efibootmgr | sed -n 's/^Boot\\(....\\).*{LABEL}.*/\\1/p'); sudo efibootmgr -q -b $n -B",
        f'the firmware has no boot entry "{LABEL}"; it has ',
    ),
    "two entries": (
        f"sudo efibootmgr -q -C -d /dev/vda -p 1 -L '{LABEL}' -l '\\EFI\\Microsoft\\Boot\\bootmgfw.efi'",
        f'has 2 boot entries "{LABEL}" (Boot0001 and Boot000',
    ),
    "no EFI variables": (
        "sudo umount /sys/firmware/efi/efivars",
        "this machine was not started through EFI, or its EFI variables are switched off",
    ),
    "BootNext refused": (
        "sudo mount -o remount,ro /sys/firmware/efi/efivars",
        "the firmware refuses BootNext = 0001 (",
    ),
    "Windows first": (
        "sudo efibootmgr --quiet --bootorder 0001,0002",
        'the firmware starts Boot0001 "Windows Boot Manager" before the system that runs',
    ),
    "ESP full": (
        "sudo sh -c 'cat /dev/zero > /boot/efi/filler 2>/dev/null'; true",
        "MiB free, less than dual_boot_esp_free_mib = 1",
    ),
}


@pytest.mark.parametrize("world", WRONG_WORLDS)
def test_a_wrong_world_is_refused_and_nothing_changes(box: Machine, world: str) -> None:
    spoil, reason = WRONG_WORLDS[world]
    box.out(spoil)
    before, files, boot_id, runs = box.efi_variables(), windows_files(box), box.boot_id, box.windows_runs()
    refused = box.run(BOOTWIN)
    assert refused.rc == 1, refused.tail()
    assert refused.stderr.startswith("bootwin: ")
    assert reason in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert (box.efi_variables(), windows_files(box)) == (before, files)
    assert (box.boot_id, box.windows_runs()) == (boot_id, runs)


def test_the_role_refuses_what_bootwin_refuses(box: Machine) -> None:
    spoil, reason = WRONG_WORLDS["no entry"]
    box.out(spoil)
    played = box.playbook(PLAY)
    assert played.rc == 2
    assert reason in " ".join(played.stdout.split())


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        ("efibootmgr --quiet --bootorder 0001,0002", "BootOrder has changed"),
        ("touch /boot/efi/EFI/Microsoft/Boot/new", "/boot/efi/EFI/Microsoft/Boot/new is new"),
    ],
)
def test_a_play_that_changes_what_is_not_ours_fails_before_the_restart(
    box: Machine, spoil: str, told: str
) -> None:
    boot_id = box.boot_id
    played = box.playbook(SPOILING_PLAY, "-e", f"spoil='{spoil}'")
    assert played.rc == 2
    assert told in " ".join(played.stdout.split())
    again = box.playbook(SPOILING_PLAY, "-e", "spoil=true")
    assert again.rc == 2 and told in " ".join(again.stdout.split()), (
        "the next run knows what was there before"
    )
    assert again.changed == 0
    assert box.boot_id == boot_id

"""The UEFI machine itself: firmware, boot loader, second system, power, snapshots."""

from __future__ import annotations

from lab import vm
from tests import support
from tests.vm.machine import Machine

BOOT_BAR_S = 90  # on two cores; measured, not judged: another machine is slower


def test_it_has_started_through_grub_and_the_firmware(machine: Machine) -> None:
    assert machine.out("cat /proc/cmdline").startswith("BOOT_IMAGE=/boot/vmlinuz-")
    shown = machine.out("efibootmgr")
    current = shown.partition("BootCurrent: ")[2].split()[0]
    assert f"Boot{current}* debian" in shown
    assert f"* {vm.WINDOWS_LABEL}" in shown
    assert machine.out("findmnt -no FSTYPE /boot/efi") == "vfat"
    assert machine.out("dpkg-query -Wf '${Status}' grub-efi-amd64").startswith("install ok")


def test_a_drop_in_of_grub_reaches_the_kernel_and_the_machine_comes_back(restored: Machine) -> None:
    restored.out(
        "echo 'GRUB_CMDLINE_LINUX=\"$GRUB_CMDLINE_LINUX lab.proof=1\"' "
        "| sudo tee /etc/default/grub.d/50-proof.cfg"
    )
    restored.out("sudo update-grub")
    seconds = restored.reboot()
    assert "lab.proof=1" in restored.out("cat /proc/cmdline").split()
    print(support.keep_figures("vm-reboot", "reboot of the UEFI machine", [seconds], BOOT_BAR_S))


def test_boot_next_runs_the_second_system_once(restored: Machine) -> None:
    (line,) = [line for line in restored.out("efibootmgr").splitlines() if vm.WINDOWS_LABEL in line]
    before, runs = restored.efi_variables(), restored.windows_runs()
    restored.out(f"sudo efibootmgr --quiet --bootnext {line[4:8]}")
    assert restored.efi_variables().keys() - before.keys() == {"BootNext"}
    restored.reboot()
    assert restored.windows_runs() == runs + 1
    assert restored.efi_variables() == before


def test_a_snapshot_brings_disk_and_firmware_back(restored: Machine) -> None:
    before = restored.efi_variables()
    restored.out(
        "sudo efibootmgr --quiet --create-only --label extra --loader '\\x.efi' --disk /dev/vda --part 1"
    )
    restored.out("touch extra")
    assert restored.efi_variables() != before
    restored.restore("fresh")
    assert restored.efi_variables() == before
    assert restored.run("test -e extra").rc == 1


def test_power_button_and_power_on(restored: Machine) -> None:
    before = restored.boot_id
    restored.power_off()
    assert restored.run("true").rc != 0
    seconds = restored.power_on()
    assert restored.boot_id != before
    print(support.keep_figures("vm-boot", "power-on of the UEFI machine to ssh", [seconds], BOOT_BAR_S))

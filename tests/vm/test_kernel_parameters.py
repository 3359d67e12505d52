"""Kernel parameters on a machine that boots: what is asked for takes effect, what is broken never boots."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support import ROOT, PlaybookRun
from tests.vm.machine import NAME, Machine

pytestmark = pytest.mark.long

DROP_IN = "/etc/default/grub.d/99-llmbox.cfg"
KEPT = "/var/tmp/kept"
PENDING = "asked for, in effect after a reboot"
SETTINGS, BOOTS = "/etc/default/grub", "/boot/grub/grub.cfg"


def role(machine: Machine, *parameters: str, reboot: bool = False) -> PlaybookRun:
    """Run role gpu_host with these kernel parameters."""
    data: dict[str, Any] = {"gpu_host_kernel_parameters": parameters}
    allowed = ["--extra-vars", "allow_reboot=true"] if reboot else []
    playbook = ROOT / "tests/lab/gpu_host.yml"
    return machine.playbook(
        playbook, "--limit", NAME, "--extra-vars", json.dumps(data), *allowed, timeout=1500
    )


def given(machine: Machine) -> set[str]:
    """The words of the running kernel's command line."""
    return set(machine.out("cat /proc/cmdline").split())


def test_a_parameter_comes_is_replaced_and_goes(restored: Machine) -> None:
    machine = restored
    machine.run(
        f"echo 'GRUB_CMDLINE_LINUX_DEFAULT=\"quiet mine=1\"  # by hand' | sudo tee -a {SETTINGS}"
    ).check()
    by_hand, first_boot = machine.out(f"sha256sum {SETTINGS}"), machine.boot_id

    asked = role(machine, "pcie_aspm=off").check()
    assert f"{PENDING}: +" in asked.stdout
    assert "pcie_aspm=off" in machine.out(f"sudo grep -m1 linux.*vmlinuz {BOOTS}")
    assert "pcie_aspm=off" not in given(machine)
    assert machine.boot_id == first_boot, "it was not allowed to reboot"

    role(machine, "pcie_aspm=off", reboot=True).check()
    assert {"pcie_aspm=off", "mine=1", "console=ttyS0"} <= given(machine)
    second_boot = machine.boot_id
    assert second_boot != first_boot

    for allowed in (True, False):  # what is pending is said only where it may not reboot
        again = role(machine, "pcie_aspm=off", reboot=allowed).check()
        assert again.changed == 0, again.tail()
        assert PENDING not in again.stdout
        assert machine.boot_id == second_boot, "it had nothing to reboot for"

    role(machine, "pcie_aspm=performance", "consoleblank=60", reboot=True).check()
    words = given(machine)
    assert {"pcie_aspm=performance", "consoleblank=60", "mine=1"} <= words
    assert "pcie_aspm=off" not in words, "piled up"

    removed, boot = role(machine).check(), machine.boot_id
    for run in (removed, role(machine).check()):
        assert f"{PENDING}: -" in run.stdout and machine.boot_id == boot
    assert run.changed == 0, run.tail()
    assert "consoleblank=60" in given(machine)

    role(machine, reboot=True).check()
    assert machine.boot_id != boot
    words = given(machine)
    assert not any(word.startswith(("pcie_aspm", "consoleblank")) for word in words)
    assert "mine=1" in words
    assert machine.run(f"test -e {DROP_IN}").rc == 1
    assert machine.out(f"sha256sum {SETTINGS}") == by_hand
    assert role(machine).check().changed == 0


def test_what_is_broken_is_caught_before_the_reboot_and_it_still_boots(restored: Machine) -> None:
    machine = restored
    role(machine, "pcie_aspm=off").check()
    good, boot = machine.out(f"sudo sha256sum {BOOTS}"), machine.boot_id

    for place, text, says in (
        ("/etc/grub.d/40_custom", "if [ x = y ]; then\n", "grub-mkconfig"),  # in what is generated
        (
            "/etc/default/grub.d/50-hand.cfg",
            'GRUB_TIMEOUT="5\n',
            "50-hand.cfg",
        ),  # in what it is generated from
    ):
        machine.out(f"sudo sh -c 'rm -f {KEPT}; test ! -e {place} || cp -a {place} {KEPT}'")
        machine.run(f"sudo tee -a {place} > /dev/null", stdin=text).check()
        refused = role(machine, "pcie_aspm=off", "consoleblank=60", reboot=True)
        assert refused.rc != 0
        assert says in refused.stdout
        assert "boots as before" in refused.stdout
        assert machine.boot_id == boot
        assert machine.out(f"sudo sha256sum {BOOTS}") == good
        machine.out(f"sudo sh -c 'rm -f {place}; test ! -e {KEPT} || mv {KEPT} {place}'")
    machine.reboot()
    assert "pcie_aspm=off" in given(machine)

    # In our own file, and in what boots: found, and made whole, before a reboot.
    machine.run(f"echo 'GRUB_CMDLINE_LINUX=\"$(' | sudo tee {DROP_IN}").check()
    machine.run(f"echo 'if [' | sudo tee -a {BOOTS}").check()
    assert machine.run(f"sudo grub-script-check {BOOTS}").rc != 0
    mended = role(machine, "pcie_aspm=off").check()
    assert mended.changed
    machine.run(f"sudo grub-script-check {BOOTS} && sh -n {DROP_IN}").check()
    machine.reboot()
    assert "pcie_aspm=off" in given(machine)

"""Driving the UEFI machine of the lab that LAB_NAME names."""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from lab import hosts, supervisor, vm
from lab.config import Lab, from_environment
from tests import support

MAKE_S = 2400  # with the image, on a loaded machine
NAME = "lab-vm"


@dataclass
class Machine:
    """The machine: commands, power, firmware, snapshots, and its serial line."""

    lab: Lab = field(default_factory=from_environment)

    def make(self) -> None:
        """Make it anew and start it."""
        argv = (sys.executable, "-m", "lab", "up", "--only", NAME, "--fresh", NAME)
        support.run(*argv, timeout=MAKE_S).check()

    def run(self, command: str, *, timeout: float = 120, stdin: str = "") -> support.Run:
        """Run a shell command as the ordinary sudo user; write `sudo …` where root is needed."""
        return support.on_host(NAME, command, timeout=timeout, stdin=stdin)

    def out(self, command: str) -> str:
        """What a command that has to succeed prints."""
        return self.run(command).check().stdout.strip()

    @property
    def boot_id(self) -> str:
        """Which start of the kernel this is."""
        return self.out("cat /proc/sys/kernel/random/boot_id")

    def wait_for_boot(self, unlike: str = "") -> float:
        """Wait until it answers with a boot id other than `unlike`; the seconds that took."""
        begun = time.monotonic()
        hosts.wait_for_ssh(self.lab, self.lab.vm, unlike=unlike)
        return time.monotonic() - begun

    def reboot(self) -> float:
        """Reboot it in order and wait until it answers again; the seconds that took."""
        before = self.boot_id
        self.run("sudo systemctl reboot")
        return self.wait_for_boot(before)

    def power_off(self) -> None:
        """Press the power button and wait."""
        hosts.poweroff(self.lab, self.lab.vm, supervisor.choose())

    def power_on(self) -> float:
        """Switch it on and wait until it answers; the seconds that took."""
        begun = time.monotonic()
        hosts.boot(self.lab, self.lab.vm, supervisor.choose())
        return time.monotonic() - begun

    def snapshot(self, name: str) -> None:
        """Keep the running machine under a name: disk, firmware variables, memory."""
        vm.snapshot(self.lab, name)

    def restore(self, name: str) -> None:
        """Put it back to what `snapshot` kept; it runs on from there."""
        hosts.close_connections(self.lab)
        vm.restore(self.lab, name)
        self.wait_for_boot()

    @property
    def console(self) -> str:
        """What it has written on its serial line since it was last switched on."""
        return self._console_file.read_text(errors="replace")

    @property
    def _console_file(self) -> Path:
        return self.lab.host_dir(self.lab.vm) / "console.log"

    def keep_console(self) -> None:
        """Keep the serial line's text for whoever looks for what went wrong."""
        kept = support.ROOT / "build" / "test-results" / "lab-vm-console.log"
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self._console_file, kept)

    def windows_runs(self) -> int:
        """How often the stand-in for Windows has run since the machine was last switched on."""
        return self.console.count(vm.WINDOWS_SAYS)

    def efi_variables(self) -> dict[str, str]:
        """Boot entries and their order as the firmware holds them: {Boot0001: hexadecimal bytes}."""
        shown = self.out(
            "cd /sys/firmware/efi/efivars && for v in Boot[0-9A-F]???-* BootOrder-* BootNext-*; do "
            'if [ -e $v ]; then echo "${v%%-*} $(od -An -v -tx1 $v | tr -d " \\n")"; fi; done'
        )
        return dict(line.split() for line in shown.splitlines())

    def playbook(self, *args: str | Path, timeout: float = 900) -> support.PlaybookRun:
        """ansible-playbook on this machine, with the lab's inventory."""
        return support.ansible_playbook(*args, timeout=timeout)

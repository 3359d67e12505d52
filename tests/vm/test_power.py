"""Power on a machine that really suspends and has a second system, with a preset that serves.

S3 by its firmware: it wakes up where it was. Its network card wakes nobody: this test does, when it has seen
the magic packet. The stand-in for Windows restarts by itself and answers on no port: this test answers in its
place when it has run. llama-server is compiled on a container of the same lab.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lab import vm
from tests import support
from tests.lab.test_power import Watcher, play
from tests.support import LLM, ROOT, PlaybookRun
from tests.vm.machine import NAME, Machine

pytestmark = pytest.mark.long

BUILD, PRESET = "tq3", "smol"
RELEASES = f"/opt/llama.cpp/{BUILD}"
DOOR = 4450  # a port of this machine on which "Windows" answers
LMSWITCH = "sudo -u llm lmswitch"


def inventory(name: str) -> dict[str, Any]:
    """A variable of the lab's LLM box."""
    found: dict[str, Any] = support.expected_host().variables[name]
    return found


def compiled() -> None:
    """A container of the lab with the release of the preset's build; the compiler's cache makes it short."""
    support.run(sys.executable, "-m", "lab", "up", "--only", LLM, timeout=1200).check()
    builds = {"llama_cpp_builds": {BUILD: inventory("llama_cpp_builds")[BUILD]}}
    play = (ROOT / "tests/lab/llama_cpp.yml", "--limit", LLM, "--extra-vars", json.dumps(builds))
    support.ansible_playbook(*play, timeout=2400).check()


def brought(machine: Machine) -> None:
    """The release, as it lies in the container."""
    ssh = [sys.executable, "-m", "lab", "ssh"]
    pack = [*ssh, LLM, f"sudo tar -C / -c {RELEASES[1:]}/releases {RELEASES[1:]}/current"]
    unpack = [*ssh, NAME, "sudo tar -C / -x --no-same-owner"]
    with subprocess.Popen(pack, cwd=ROOT, stdout=subprocess.PIPE) as packing:
        subprocess.run(unpack, cwd=ROOT, stdin=packing.stdout, check=True, timeout=600)
    assert packing.returncode == 0
    runtime = "sudo apt-get update && sudo apt-get install -y --no-install-recommends libgomp1"
    machine.run(runtime, timeout=900).check()  # comes with the compiler where role llama_cpp ran
    machine.out(f"{RELEASES}/current/bin/llama-server --version 2>&1")


@pytest.fixture(scope="module")
def serving(machine: Machine) -> Iterator[Machine]:
    """The machine with the roles of an LLM box, kept before its preset serves."""
    compiled()
    brought(machine)
    support.run(sys.executable, "-m", "lab", "poweroff", LLM, timeout=180).check()
    data = {
        "llama_presets": {PRESET: {**inventory("llama_presets")[PRESET], "start_timeout": 600}},
        "dual_boot_enabled": True,
    }
    roles = (ROOT / "tests/vm/serving.yml", "--extra-vars", json.dumps(data))
    machine.playbook(*roles, timeout=2400).check()
    machine.snapshot("serving")
    yield machine


@pytest.fixture
def box(serving: Machine) -> Machine:
    serving.restore("serving")
    serving.run(f"{LMSWITCH} {PRESET}", timeout=900).check()
    return serving


def power(folder: Path, action: str, **variables: object) -> PlaybookRun:
    """playbooks/power.yml on the machine as an LLM box, which is emulated, and slow."""
    limits = {"power_wake_timeout": 600, "power_down_timeout": 600, "power_windows_timeout": 600}
    return play(folder, action, NAME, timeout=1500, _power_serves=True, **{**limits, **variables})


def status(machine: Machine) -> tuple[str, str]:
    """The preset that serves, and its state."""
    said = json.loads(machine.run(f"{LMSWITCH} status --json").check().stdout)
    return said["active"], said["state"]


def press_power(machine: Machine) -> None:
    """Wake it. qemu holds back what its card was sent meanwhile until the machine is stopped and goes on."""
    vm.control(machine.lab, "system_wakeup")
    for _ in range(20):  # its driver has to be there
        time.sleep(1)
        vm.control(machine.lab, "stop")
        vm.control(machine.lab, "cont")


def test_it_sleeps_with_a_preset_and_wakes_with_it(box: Machine, tmp_path: Path) -> None:
    states = box.out("cat /sys/power/state; cat /sys/power/mem_sleep")
    if "mem" not in states or "deep" not in states:
        pytest.skip(f"this machine cannot suspend to memory: {states}")
    before = box.boot_id
    assert status(box) == (PRESET, "ready")
    power(tmp_path, "sleep").check()
    assert vm.control(box.lab, "query-status")["status"] == "suspended"
    assert f"{NAME}: silent: asleep, off or gone" in power(tmp_path, "status").check().stdout

    broadcast = box.lab.subnet.replace(".0/24", ".255")
    with Watcher(lambda: press_power(box)) as wire:
        woken = power(tmp_path, "wake", power_wake_addresses=[broadcast]).check()
    assert woken.changed == 2 and wire.frames, "woken, and the preset started again"
    assert box.boot_id == before, "it woke up, it did not boot"
    assert "suspend exit" in box.out("sudo dmesg")
    assert status(box) == (PRESET, "ready")
    # That it generates is what `lmswitch resume` ends with; it has nothing left to do.
    assert "no preset served" in box.out(f"{LMSWITCH} resume")


@contextmanager
def windows_answers(machine: Machine) -> Iterator[None]:
    """A port of this machine opens when the stand-in for Windows has run once more."""
    runs, over = machine.windows_runs(), threading.Event()

    def answer() -> None:
        while machine.windows_runs() == runs:
            if over.wait(0.2):
                return
        with socket.create_server((machine.lab.gateway, DOOR)):
            over.wait()

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(5)


def test_it_goes_to_windows_and_comes_back_with_its_preset(box: Machine, tmp_path: Path) -> None:
    before, boot_id, runs = box.efi_variables(), box.boot_id, box.windows_runs()
    where = {"power_windows_address": box.lab.gateway, "power_windows_ports": [DOOR]}
    with windows_answers(box):
        there = power(tmp_path, "windows", **where).check()
    assert box.windows_runs() == runs + 1
    assert "changed: [lab-vm]" in there.stdout
    power(tmp_path, "linux", **where).check()
    assert box.boot_id != boot_id
    assert box.efi_variables() == before
    assert status(box) == (PRESET, "ready")


def test_a_machine_that_runs_windows_is_named_and_not_waited_for(box: Machine, tmp_path: Path) -> None:
    box.power_off()
    where = {"power_windows_address": box.lab.gateway, "power_windows_ports": [DOOR]}
    with socket.create_server((box.lab.gateway, DOOR)):
        began = time.monotonic()
        woken = power(tmp_path, "wake", **where)
    assert woken.rc != 0 and f"{NAME} runs Windows; fix: " in woken.stdout
    assert time.monotonic() - began < 120, "no endless retry"
    box.power_on()

"""Services and settings of a card's driver on a machine that boots: stand-ins of its packages, no card."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.stand_in_nvidia import SERVED, Repository, serve
from tests.support import ROOT, PlaybookRun, Run
from tests.vm.machine import NAME, Machine

pytestmark = pytest.mark.long

DEVICES, LIMITS = "llmbox-gpu-devices.service", "llmbox-gpu-limits.service"
SUSPEND = ("nvidia-suspend.service", "nvidia-resume.service", "nvidia-hibernate.service")


def test_services_and_settings_are_there_after_a_boot(restored: Machine, tmp_path_factory: Any) -> None:
    machine = restored

    def as_root(command: str, stdin: str = "") -> Run:
        return machine.run(f"sudo sh -c '{command}'", stdin=stdin)

    def role(**data: Any) -> PlaybookRun:
        playbook = ROOT / "tests/lab/gpu_host.yml"
        return machine.playbook(playbook, "--limit", NAME, "--extra-vars", json.dumps(data), timeout=1500)

    repository = Repository(tmp_path_factory.mktemp("stand-in"))
    repository.lay_out(as_root)
    serve(as_root)
    data = {
        "gpu_host_repository": SERVED,
        "gpu_host_repository_key": f"{SERVED}key.asc",
        "gpu_host_repository_fingerprint": repository.fingerprint,
        "gpu_host_driver_version": "580.1-1ubuntu1",
        "_gpu_host_headers": False,  # the stand-ins build no module
    }
    skipped = role(**data).check()
    assert skipped.changed == 0, "there is no card"
    assert "no NVIDIA card on the PCI bus" in skipped.stdout

    first = role(**data, gpu_host_card="present").check()
    assert "driver 580.1 is installed, none is loaded" in first.stdout
    second = role(**data, gpu_host_card="present").check()
    assert second.changed == 0, second.tail()
    for unit in (DEVICES, "nvidia-persistenced.service", *SUSPEND):
        assert machine.out(f"systemctl is-enabled {unit}") == "enabled"
    assert "NVreg_PreserveVideoMemoryAllocations=1" in machine.out("cat /etc/modprobe.d/llmbox-nvidia.conf")
    assert machine.run(f"test -e /etc/systemd/system/{LIMITS}").rc == 1

    machine.reboot()
    assert machine.out(f"systemctl is-active {DEVICES}") == "active"
    machine.out("test -c /dev/nvidia-uvm")
    made, services = (
        int(machine.out(f"systemctl show -P ActiveEnterTimestampMonotonic {unit}"))
        for unit in (DEVICES, "basic.target")
    )
    assert 0 < made < services, "before any service, so before a preset"

    gone = role(gpu_host_card="present").check()
    assert gone.changed
    for path in ("/etc/modprobe.d/llmbox-nvidia.conf", f"/etc/systemd/system/{DEVICES}"):
        assert machine.run(f"test -e {path}").rc == 1
    assert role(gpu_host_card="present").check().changed == 0

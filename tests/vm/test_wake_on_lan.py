"""Wake-on-LAN and the hardware clock on a machine that boots; ethtool judges, on an emulated card."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support import ROOT, PlaybookRun
from tests.vm.machine import NAME, Machine

pytestmark = pytest.mark.long

LINK = "/etc/systemd/network/50-llmbox-wake-on-lan.link"
NETPLAN = "/etc/netplan/90-llmbox-wake-on-lan.yaml"


def role(machine: Machine, **data: Any) -> PlaybookRun:
    """Run role gpu_host with these variables."""
    playbook = ROOT / "tests/lab/gpu_host.yml"
    return machine.playbook(playbook, "--limit", NAME, "--extra-vars", json.dumps(data), timeout=1500)


def card(machine: Machine) -> str:
    """The network card."""
    return machine.out("ip -o -4 route get 1.1.1.1 | sed 's/.* dev //; s/ .*//'")


def wakes(machine: Machine, interface: str) -> bool:
    """Whether a magic packet would wake it, as ethtool says."""
    return "g" in machine.out(f"sudo ethtool {interface} | sed -n 's/^\\s*Wake-on: //p'")


def test_on_debian_a_file_for_the_link_keeps_it_over_a_boot(restored: Machine) -> None:
    machine = restored
    interface = card(machine)
    machine.run("sudo apt-get update", timeout=600).check()  # what role base does before this one
    set_up = role(machine, gpu_host_wake_on_lan=interface, gpu_host_hardware_clock="local").check()
    assert set_up.changed >= 2
    assert wakes(machine, interface)
    assert machine.out("tail -n 1 /etc/adjtime") == "LOCAL"
    assert role(machine, gpu_host_wake_on_lan=interface, gpu_host_hardware_clock="local").check().changed == 0

    machine.reboot()
    assert card(machine) == interface, "it has another name"
    assert wakes(machine, interface)

    machine.run(f"sudo ethtool -s {interface} wol d").check()  # by hand: seen and mended
    assert role(machine, gpu_host_wake_on_lan=interface).check().changed == 1
    assert wakes(machine, interface)
    role(machine, gpu_host_hardware_clock="utc").check()
    assert machine.run(f"test -e {LINK}").rc == 1, "it was taken out of the data"
    assert machine.run("grep LOCAL /etc/adjtime").rc != 0, "without the file it is UTC, too"


def test_netplan_keeps_it_and_the_connection_over_a_boot(restored: Machine) -> None:
    machine = restored
    interface = card(machine)
    address = machine.out(f"ip -o -4 addr show {interface} | sed 's/.* inet //; s/ .*//'")
    gateway = machine.out("ip -o -4 route show default | sed 's/.* via //; s/ .*//'")
    definition = {
        "network": {
            "version": 2,
            "ethernets": {interface: {"addresses": [address], "routes": [{"to": "default", "via": gateway}]}},
        }
    }
    machine.run(
        "sudo apt-get update && sudo apt-get install -y --no-install-recommends netplan.io", timeout=900
    ).check()
    machine.run("sudo tee /etc/netplan/50-installer.yaml", stdin=json.dumps(definition)).check()
    machine.run(
        "sudo chmod 600 /etc/netplan/50-installer.yaml && sudo rm /etc/systemd/network/10-lab.network"
    ).check()
    machine.reboot()
    assert card(machine) == interface

    role(machine, gpu_host_wake_on_lan=interface).check()
    assert "wakeonlan: true" in machine.out(f"sudo cat {NETPLAN}")
    assert wakes(machine, interface)
    assert role(machine, gpu_host_wake_on_lan=interface).check().changed == 0

    machine.reboot()
    assert card(machine) == interface, "it has another name"
    assert address in machine.out(f"ip -o -4 addr show {interface}")
    assert wakes(machine, interface)

    # A definition for every card: the role would take the others' network away, and does not.
    definition["network"]["ethernets"] = {"all": {"match": {"name": "en*"}, "dhcp4": True}}
    machine.run("sudo tee /etc/netplan/50-installer.yaml", stdin=json.dumps(definition)).check()
    machine.run(f"sudo rm {NETPLAN}").check()
    refused = role(machine, gpu_host_wake_on_lan=interface)
    assert refused.rc != 0
    assert "more cards than" in refused.stdout
    assert machine.run(f"sudo test -e {NETPLAN}").rc == 1

"""The UEFI machine of the lab: what it is made of and when the inventory has it."""

from __future__ import annotations

import json
import socket
import tarfile
import threading
from pathlib import Path

import pytest

from lab import root as lab_root
from lab import vm
from lab.config import Lab, from_environment
from lab.inventory import inventory
from lab.shell import LabError


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return from_environment({"LAB_NAME": "t1", "XDG_CACHE_HOME": str(tmp_path)})


def test_the_inventory_has_the_machine_only_when_it_is_made(lab: Lab) -> None:
    assert inventory(lab)["lab_machines"] == {"hosts": []}
    assert "lab-vm" not in inventory(lab)["_meta"]["hostvars"]
    (lab.host_dir(lab.vm) / "vm").mkdir(parents=True)
    assert inventory(lab)["lab_machines"] == {"hosts": ["lab-vm"]}
    assert inventory(lab)["_meta"]["hostvars"]["lab-vm"]["ansible_host"] == "10.213.179.14"


def test_no_group_of_site_yml_has_the_machine(lab: Lab) -> None:
    (lab.host_dir(lab.vm) / "vm").mkdir(parents=True)
    groups = {name: group for name, group in inventory(lab).items() if name not in ("_meta", "lab_machines")}
    assert "lab-vm" not in json.dumps(groups)


def test_each_lab_s_machine_has_a_hardware_address_of_its_own(lab: Lab) -> None:
    assert vm.mac(lab) == "52:54:0a:d5:b3:0e"


@pytest.mark.parametrize("flags", ["fpu sse2 hypervisor", ""])
def test_without_the_processor_s_extension_kvm_does_not_count(tmp_path: Path, flags: str) -> None:
    """A paravirtual KVM has /dev/kvm, makes guests, and cannot run firmware."""
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags : {flags}\n")
    assert not vm.kvm_works(tmp_path / "cpuinfo", Path("/dev/kvm"))


def test_kvm_that_makes_no_guest_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor : 0\nflags : fpu vmx sse2\n")
    assert not vm.kvm_works(tmp_path / "cpuinfo", tmp_path / "missing")
    (tmp_path / "kvm").write_text("no device")
    assert not vm.kvm_works(tmp_path / "cpuinfo", tmp_path / "kvm")


def test_the_identity_has_the_owners_and_modes_that_sshd_wants(tmp_path: Path) -> None:
    files = {"etc/ssh/ssh_host_ed25519_key": "k", "home/ops/.ssh/authorized_keys": "a", "etc/hosts": "h"}
    vm.write_identity(tmp_path / "identity.tar", files)
    with tarfile.open(tmp_path / "identity.tar") as tar:
        found = {member.name: (member.mode, member.uid) for member in tar}
    assert found == {
        "home/ops/.ssh": (0o700, 1000),
        "etc/ssh/ssh_host_ed25519_key": (0o600, 0),
        "home/ops/.ssh/authorized_keys": (0o600, 1000),
        "etc/hosts": (0o644, 0),
    }


def test_a_removed_machine_does_not_count_as_made(lab: Lab) -> None:
    (lab.host_dir(lab.vm) / "vm").mkdir(parents=True)
    assert lab_root.made(lab, lab.vm)
    lab_root.unmake(lab, lab.vm)
    assert not lab_root.made(lab, lab.vm)


def answer(lab: Lab, *lines: str) -> threading.Thread:
    """A qemu that answers one connection with these lines."""
    place = lab.host_dir(lab.vm)
    place.mkdir(parents=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(place / "qmp"))
    listener.listen()

    def serve() -> None:
        with listener, listener.accept()[0] as connection:
            connection.sendall("".join(f"{line}\n" for line in lines).encode())
            while connection.recv(4096):
                pass

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


def test_qemu_s_events_are_no_answers(lab: Lab) -> None:
    thread = answer(
        lab, '{"QMP": {}}', '{"return": {}}', '{"event": "STOP"}', '{"return": {"running": true}}'
    )
    assert vm.control(lab, "query-status") == {"running": True}
    thread.join(5)


def test_what_qemu_refuses_is_told_in_one_line(lab: Lab) -> None:
    thread = answer(lab, '{"QMP": {}}', '{"return": {}}', '{"error": {"desc": "no such thing"}}')
    with pytest.raises(LabError, match=r"^lab-vm refuses `nonsense`: no such thing$"):
        vm.control(lab, "nonsense")
    thread.join(5)


def test_a_machine_that_is_off_is_told_in_one_line(lab: Lab) -> None:
    with pytest.raises(LabError, match=r"^lab-vm does not answer `query-status`"):
        vm.control(lab, "query-status")

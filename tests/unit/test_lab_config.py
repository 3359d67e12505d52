"""Names and addresses that follow from LAB_NAME, and the inventory made of them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from lab.config import Lab, from_environment, third_octet
from lab.inventory import inventory
from lab.shell import LabError


def make(name: str = "lab", cache: str = "/c") -> Lab:
    return from_environment({"LAB_NAME": name, "HOME": "/home/u", "XDG_CACHE_HOME": cache})


def test_the_default_lab_has_fixed_addresses() -> None:
    lab = from_environment({"HOME": "/home/u"})
    assert (lab.name, lab.suite, lab.cache) == ("lab", "bookworm", Path("/home/u/.cache/llmbox"))
    assert [(host.name, host.address) for host in lab.hosts] == [
        ("lab-llm", "10.213.77.11"),
        ("lab-ocr", "10.213.77.12"),
        ("lab-client", "10.213.77.13"),
    ]
    assert (lab.gateway, lab.subnet) == ("10.213.77.1", "10.213.77.0/24")
    assert (lab.source_git, lab.source_http) == ("git://10.213.77.1", "http://10.213.77.1:8088")


def test_other_labs_get_other_addresses_but_the_same_host_names() -> None:
    lab = make("t1")
    assert third_octet("t1") == 179  # 100 + crc32 of the name % 100; a change would move every running lab
    assert lab.gateway == "10.213.179.1"
    assert [host.name for host in lab.hosts] == ["lab-llm", "lab-ocr", "lab-client"]
    assert all(100 <= third_octet(name) < 200 for name in ("a", "zzzzzz", "0", "l1"))


def test_interface_names_fit_the_kernels_15_characters() -> None:
    lab = make("abcdef")
    assert len(lab.bridge) <= 15
    assert all(len(f"vb-{lab.machine(host)}") <= 15 for host in lab.every_host)


@pytest.mark.parametrize("name", ["Lab", "seven77", "a-b", "../x", "a b", "é"])
def test_a_bad_name_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(LabError, match=r"^LAB_NAME = .*1 to 6 characters[^\n]*$") as refused:
        make(name)
    assert refused.value.code == 2


def test_a_suite_comes_from_the_environment_or_the_command_line() -> None:
    assert from_environment({"HOME": "/h", "LAB_SUITE": "trixie"}).suite == "trixie"
    assert from_environment({"HOME": "/h", "LAB_SUITE": "trixie"}, suite="bookworm").suite == "bookworm"
    with pytest.raises(LabError, match="sid"):
        from_environment({"HOME": "/h", "LAB_SUITE": "sid"})


def test_a_relative_cache_directory_is_ignored_as_the_xdg_specification_says() -> None:
    assert make(cache="relative").cache == Path("/home/u/.cache/llmbox")


def test_hosts_are_found_by_both_names() -> None:
    lab = make()
    assert lab.host("llm") == lab.host("lab-llm") == lab.hosts[0]
    with pytest.raises(LabError, match=r"no lab host 'gpu'; there are lab-llm, lab-ocr, lab-client, lab-vm"):
        lab.host("gpu")


def test_the_inventory_has_the_groups_of_production() -> None:
    lab = make("t1")
    found = inventory(lab)
    assert found["llama_hosts"] == {"children": ["llm_servers", "ocr_servers"]}
    assert {group: found[group]["hosts"] for group in ("llm_servers", "ocr_servers", "clients")} == {
        "llm_servers": ["lab-llm"],
        "ocr_servers": ["lab-ocr"],
        "clients": ["lab-client"],
    }
    assert found["lab"] == {"children": ["llama_hosts", "clients", "routers", "lab_machines"]}
    assert found["all"]["vars"] == {
        "lab_source_git": "git://10.213.179.1",
        "lab_network": "10.213.179.0/24",
        "lab_source_http": "http://10.213.179.1:8088",
        "lab_ssh_public_key": "",
    }
    llm = found["_meta"]["hostvars"]["lab-llm"]
    assert (llm["ansible_host"], llm["ansible_user"]) == ("10.213.179.11", "ops")
    assert llm["ansible_ssh_private_key_file"] == "/c/llmbox/lab/t1/ssh/id_ed25519"
    for wanted in (
        "UserKnownHostsFile=/c/llmbox/lab/t1/ssh/known_hosts",
        "StrictHostKeyChecking=yes",
        "ControlPath=",
    ):
        assert wanted in llm["ansible_ssh_common_args"]


def test_the_inventory_has_the_key_of_a_lab_that_is_there(tmp_path: Path) -> None:
    lab = make("t1", cache=str(tmp_path))
    lab.ssh_key.parent.mkdir(parents=True)
    lab.ssh_key.with_suffix(".pub").write_text("ssh-ed25519 AAAAC3 lab\n")
    assert inventory(lab)["all"]["vars"]["lab_ssh_public_key"] == "ssh-ed25519 AAAAC3 lab"


def test_the_inventory_script_runs_without_root_from_anywhere(root: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [root / "inventory/lab/hosts.py", "--list"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "LAB_NAME": "t1"},
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    assert json.loads(done.stdout) == inventory(from_environment({"HOME": str(tmp_path), "LAB_NAME": "t1"}))
    assert list(tmp_path.iterdir()) == []

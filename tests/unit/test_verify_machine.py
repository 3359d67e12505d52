"""verify_health on the machine below the services: what was asked for against what is in effect."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts import _probe
from scripts.verify_health import kernel_check, machine_asked, machine_checks, removed_checks
from tests.support import ROOT

ASKED = {
    "parameters": ["pcie_aspm=off"], "driver": "580.159.03-1ubuntu1", "wake": "eno1", "card": "auto",
    "suspend": True, "power": 250,
}  # fmt: skip
GIVEN = ("ro", "pcie_aspm=off")


def seen(**changes: Any) -> dict[str, Any]:
    """What the probe says of a machine that is as it was asked to be."""
    return {
        "container": False, "driver": "580.159.03", "uvm": True,
        "links": [{"device": "0000:01:00.0", "link": {"can": 2, "on": 0}, "gone": False}], "wake_on": "g",
        "card_set_up": True, "suspend": "1", "power_limits": ["250.00"], **changes,
    }  # fmt: skip


def short(command_line: tuple[str, ...] = GIVEN, **changes: Any) -> dict[str, str]:
    checks = machine_checks(ASKED, seen(**changes), command_line)
    return {check.name: check.detail for check in checks if not check.ok}


def test_a_machine_that_is_as_asked_is_well() -> None:
    assert short() == {}
    assert len(machine_checks(ASKED, seen(), GIVEN)) == 8
    assert machine_checks(ASKED, seen(container=True), ()) == []
    assert machine_asked({"gpu_host_kernel_parameters": [], "gpu_host_driver_version": ""}) is None


@pytest.mark.parametrize(
    ("changes", "name", "says"),
    [
        (
            {"command_line": ("ro",)},
            "kernel_pcie_aspm",
            "asked for, not in effect; fix: run site.yml with -e allow",
        ),
        ({"command_line": (*GIVEN, "pcie_aspm=force")}, "kernel_pcie_aspm", "asked for, not in effect"),
        ({"driver": "570.1"}, "nvidia_driver", "asked for, not in effect"),
        ({"uvm": False}, "nvidia_uvm", "llmbox-gpu-devices.service"),
        ({"suspend": "0"}, "nvidia_suspend", "asked for, not in effect; fix: run site.yml with -e allow"),
        ({"suspend": None}, "nvidia_suspend", "asked for, not in effect"),
        ({"power_limits": ["285.00"]}, "nvidia_power_limit", "restart llmbox-gpu-limits.service"),
        ({"power_limits": ["250.00", "200.00"]}, "nvidia_power_limit", "asked for, not in effect"),
        ({"power_limits": ["[N/A]"]}, "nvidia_power_limit", "asked for, not in effect"),
        ({"power_limits": []}, "nvidia_power_limit", "asked for, not in effect"),
        ({"power_limits": None}, "nvidia_power_limit", "nvidia-smi does not say"),
        ({"wake_on": "d"}, "wake_on_lan", "ethtool eno1"),
        ({"wake_on": None}, "wake_on_lan", "ethtool eno1"),
        (
            {"links": [{"device": "0000:01:00.0", "link": {"can": 2, "on": 2}, "gone": False}]},
            "aspm_0000:01:00.0",
            "firmware",
        ),
        (
            {"links": [{"device": "0000:01:00.0", "link": None, "gone": False}]},
            "aspm_0000:01:00.0",
            "cannot be read",
        ),
        (
            {
                "links": [{"device": "0000:01:00.0", "link": None, "gone": True}],
                "driver": "",
                "power_limits": None,
            },
            "nvidia_card",
            "gone from the PCI bus",
        ),
    ],
)
def test_what_is_not_in_effect_is_said(changes: dict[str, Any], name: str, says: str) -> None:
    found = short(**changes)
    assert list(found) == [name]
    assert says in found[name]


@pytest.mark.parametrize(
    ("card", "set_up", "told"),
    [
        ("auto", True, True),
        ("present", False, True),
        ("auto", False, False),  # the role has skipped it, and said so
        ("absent", True, False),
    ],
)
def test_a_card_that_is_gone_is_said(card: str, set_up: bool, told: bool) -> None:
    """Off the bus it takes the checks of its driver and of its link along."""
    gone = seen(links=[], driver="", uvm=False, card_set_up=set_up)
    wrong = [check for check in machine_checks({**ASKED, "card": card}, gone, GIVEN) if not check.ok]
    assert [check.name for check in wrong] == (["nvidia_card"] if told else [])
    assert all("gone from the PCI bus; fix: " in check.detail for check in wrong)


def test_a_card_that_is_said_to_be_there_is_looked_for_without_anything_else() -> None:
    assert machine_asked({"gpu_host_card": "present"}) and machine_asked({"gpu_host_card": "auto"}) is None
    memory = {"llama_presets_gpu_memory_mib": 16376}  # of a card
    assert (machine_asked(memory) or {})["card"] == "present"
    assert machine_asked({**memory, "gpu_host_card": "absent"}) is None


def test_a_parameter_that_only_a_reboot_takes_away_is_said() -> None:
    """It was taken out of the data, so that the inventory asks for nothing that could be compared."""
    (found,) = removed_checks(["pcie_aspm=off", "quiet"], [], GIVEN)
    assert (found.name, found.ok, found.value, found.limit) == (
        "kernel_pcie_aspm",
        False,
        "pcie_aspm=off",
        "",
    )
    assert "taken out of the inventory, still in effect; fix: " in found.detail
    assert removed_checks(["pcie_aspm=off"], ["pcie_aspm=off"], GIVEN) == [], "it is asked for again"
    assert removed_checks(["pcie_aspm=off"], ["pcie_aspm=force"], GIVEN) == [], "which has a check of its own"
    assert removed_checks([], [], GIVEN) == []


def test_suspend_is_looked_at_where_it_is_asked_for() -> None:
    for changes in ({"suspend": False}, {"driver": ""}):
        asked, found = {**ASKED, **changes}, seen(suspend="0")
        assert "nvidia_suspend" not in {check.name for check in machine_checks(asked, found, GIVEN)}
    driver = {"gpu_host_driver_version": "580.1-1"}
    for told in (True, False):
        assert (machine_asked({**driver, "gpu_host_suspend": told}) or {})["suspend"] is told


def test_the_loaded_driver_s_options_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_probe, "DRIVER_PARAMETERS", tmp_path / "params")
    monkeypatch.setattr(_probe, "command", lambda *_: None)
    assert _probe.machine("")["suspend"] is None
    (tmp_path / "params").write_text('EnableMSI: 1\nPreserveVideoMemoryAllocations: 0\nRegistryDwords: ""\n')
    assert _probe.machine("")["suspend"] == "0"


def test_the_power_limit_is_asked_for_where_it_is_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    answers = {"nvidia-smi": {"rc": 0, "out": "250.00\n285.00\n"}}

    def command(argv: list[str], _timeout: float = 0) -> dict[str, Any] | None:
        asked.append(argv)
        return answers.get(argv[0])

    monkeypatch.setattr(_probe, "command", command)
    request = {"wake": "", "power": True}
    assert _probe.probe({"machine": request})["machine"]["power_limits"] == ["250.00", "285.00"]
    assert "--query-gpu=power.limit" in asked[-1]
    answers["nvidia-smi"] = {"rc": None, "out": ""}
    assert _probe.machine("", power=True)["power_limits"] is None, "it hangs"
    asked.clear()
    assert _probe.machine("")["power_limits"] is None and all(argv[0] != "nvidia-smi" for argv in asked)
    assert (machine_asked({"gpu_host_power_limit": 250}) or {})["power"] == 250
    off = {check.name for check in machine_checks({**ASKED, "power": 0}, seen(power_limits=None), GIVEN)}
    assert "nvidia_power_limit" not in off


def test_what_is_asked_of_the_machine_is_among_the_variables_that_are_read() -> None:
    """A name that is not shown never comes: the check would go by nothing, and be silent or wrong."""
    shown = yaml.safe_load((ROOT / "scripts/_shown.yml").read_text())["_shown_names"]
    (names,) = re.findall(r"gpu_host_\(([a-z_|]+)\)\$", shown)
    read = re.findall(r'get\("gpu_host_(\w+)"\)', inspect.getsource(machine_asked))
    assert read and set(read) <= set(names.split("|"))


def test_what_the_role_has_taken_away_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_probe, "REMOVED_PARAMETERS", tmp_path / "removed")
    assert _probe.probe({})["removed_parameters"] == []
    (tmp_path / "removed").write_text("pcie_aspm=off\n")
    assert _probe.probe({})["removed_parameters"] == ["pcie_aspm=off"]


def test_the_link_s_control_register_is_found_among_the_capabilities() -> None:
    """As lspci -vv finds it: LnkCap at 0x0c and LnkCtl at 0x10 of the PCI Express capability."""
    config = bytearray(256)
    config[0x06] = 0x10  # it has capabilities
    config[0x34] = 0x60
    config[0x60:0x62] = bytes([0x01, 0x78])  # power management, then the one at 0x78
    config[0x78:0x7A] = bytes([0x10, 0x00])
    config[0x78 + 0x0C : 0x78 + 0x0E] = (0x0C00 | 0x0103).to_bytes(2, "little")  # L0s and L1, x16
    config[0x78 + 0x10] = 0x42
    assert _probe.link_control(bytes(config)) == {"can": 3, "on": 2}
    config[0x78 + 0x10] = 0x40
    assert _probe.link_control(bytes(config)) == {"can": 3, "on": 0}
    assert _probe.link_control(bytes(config[:64])) is None, "what others than root may read"
    config[0x79] = 0x60  # a loop
    config[0x78] = 0x05
    assert _probe.link_control(bytes(config)) is None
    assert _probe.link_control(b"") is None


@pytest.mark.parametrize("gone", [False, True])
def test_a_card_that_the_kernel_still_lists_and_that_does_not_answer_is_gone(
    gone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel keeps its entry, vendor and class; its configuration reads as all ones."""
    monkeypatch.setattr(_probe, "PCI", tmp_path)
    card, other = tmp_path / "0000:01:00.0", tmp_path / "0000:00:02.0"
    for device, vendor in ((card, "0x10de"), (other, "0x8086")):
        device.mkdir()
        (device / "vendor").write_text(f"{vendor}\n")
        (device / "class").write_text("0x030000\n")
        (device / "config").write_bytes(b"\xff" * 256 if gone else b"\xde\x10".ljust(256, b"\0"))
    assert _probe.links() == [{"device": "0000:01:00.0", "link": None, "gone": gone}]


def test_each_console_counts() -> None:
    consoles = ("console=tty0", "console=ttyS0")
    assert kernel_check("console=tty0", consoles).ok and not kernel_check("console=tty1", consoles).ok

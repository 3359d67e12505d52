#!/usr/bin/python3
"""Ansible module: what of the role applies to this host, and what it has to be told."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ansible.module_utils.basic import AnsibleModule  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from roles.gpu_host.module_utils.gpu_host_tools import Refused, run
else:
    from ansible.module_utils.gpu_host_tools import Refused, run

DOCUMENTATION = r"""
---
module: gpu_host_look
short_description: Look which parts of the role gpu_host apply to this host
description:
  - Changes nothing. In a container nothing applies that belongs to the machine that runs it (its kernel, boot
    files, clock, modules, network cards); without an NVIDIA card, and O(card=auto), nothing that is for one.
options:
  declared: {description: Parts for which the inventory asks., type: list, elements: str, required: true}
  card: {description: C(auto) looks for an NVIDIA card on the PCI bus., type: str, default: auto}
  local_clock: {description: Whether the hardware clock is to run in local time., type: bool}
  left_behind: {description: Files that the parts own by their names., type: dict, default: {}}
author: [llmbox]
"""

EXAMPLES = r"""
- name: Look what applies
  gpu_host_look:
    declared: [packages, kernel_parameters]
"""

RETURN = r"""
apply: {description: The parts that apply., returned: always, type: list}
notes: {description: What was skipped and what a person has to do., returned: always, type: list}
cards: {description: NVIDIA cards by their PCI address., returned: always, type: list}
container: {description: "The kind of container, empty on a machine.", returned: always, type: str}
clock_differs: {description: The hardware clock runs in another time than asked., type: bool}
key_waits: {description: The key that signs the driver has to be enrolled by a person., type: bool}
"""

PCI = Path("/sys/bus/pci/devices")
EFI_VARIABLES = Path("/sys/firmware/efi/efivars")
SECURE_BOOT = "SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
ADJTIME = Path("/etc/adjtime")
GRUB = Path("/etc/default/grub")
# The key that DKMS signs modules with: Ubuntu's, Debian's.
SIGNING_KEYS = (Path("/var/lib/shim-signed/mok/MOK.der"), Path("/var/lib/dkms/mok.pub"))
NVIDIA, DISPLAY = "0x10de", "0x03"

# What each part is, as a person reads it, and whether it is only for an NVIDIA card or only for a machine.
PARTS = {
    "packages": ("the NVIDIA driver and the CUDA toolkit", True, False),
    "holds": ("packages on hold", False, False),
    "device": ("the driver's settings, services and limits", True, True),
    "kernel_parameters": ("kernel parameters", False, True),
    "wake_on_lan": ("Wake-on-LAN", False, True),
    "hardware_clock": ("the hardware clock", False, True),
}


def container() -> str:
    """What systemd says this runs in; empty on a machine, a virtual one too."""
    done = run("systemd-detect-virt", "--container")
    kind = done.stdout.strip()
    if done.returncode == 0 and kind:
        return kind
    # Not sure means no: nothing of the machine is touched.
    return "" if kind == "none" else "something that systemd-detect-virt cannot tell"


def cards(devices: Path = PCI) -> list[str]:
    """NVIDIA's display controllers on the PCI bus."""
    found = []
    for device in sorted(devices.glob("*")):
        try:
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
        except OSError:
            continue
        if vendor == NVIDIA and kind.startswith(DISPLAY):
            found.append(device.name)
    return found


def secure_boot(variables: Path = EFI_VARIABLES) -> bool:
    """Whether the firmware refuses unsigned code; four bytes of attributes, then one of value."""
    try:
        return (variables / SECURE_BOOT).read_bytes()[4:5] == b"\x01"
    except OSError:
        return False


def secure_boot_notes(keys: Iterable[Path] = SIGNING_KEYS) -> Iterator[str]:
    """What a person has to do at the console before the driver may load."""
    there = [key for key in keys if key.exists()]
    if not there:
        yield (
            "Secure Boot is on, and DKMS has no key yet to sign the NVIDIA modules with: run this again when "
            "the driver is installed; it names the key that a person has to enrol (docs/gpu-host.md)"
        )
        return
    try:
        enrolled = "already enrolled" in run("mokutil", "--test-key", str(there[0])).stdout
    except Refused as error:
        yield f"Secure Boot is on, and whether the NVIDIA modules' key is enrolled is not known: {error}"
        return
    if not enrolled:
        yield (
            "Secure Boot is on and the key of the NVIDIA modules is not enrolled, so they will not load: "
            f"sudo mokutil --import {there[0]}, reboot, and choose 'Enroll MOK' at the machine's own screen "
            "within 10 s; no program can do that for you"
        )


def clock_is_local(file: Path = ADJTIME) -> bool:
    """Whether the hardware clock runs in local time: the third line of adjtime(5)."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return False
    return len(lines) > 2 and lines[2].strip() == "LOCAL"


def look(wanted: dict[str, Any]) -> dict[str, Any]:
    """What applies here. Raises Refused."""
    left = [
        part for part, files in wanted["left_behind"].items() if any(Path(file).exists() for file in files)
    ]
    declared = [part for part in PARTS if part in wanted["declared"] or part in left]
    nothing: dict[str, Any] = {
        "apply": [],
        "notes": [],
        "cards": [],
        "container": "",
        "clock_differs": False,
        "key_waits": False,
    }
    if not declared:
        return nothing
    where, found = container(), cards()
    has_card = bool(found) if wanted["card"] == "auto" else wanted["card"] == "present"
    apply, notes = [], []
    for part in declared:
        what, for_card, for_machine = PARTS[part]
        if for_machine and where:
            notes.append(
                f"skipped: {what}: this is a container ({where}), they belong to the machine that runs it"
            )
        elif for_card and not has_card and part not in left:
            notes.append(f"skipped: {what}: no NVIDIA card on the PCI bus (gpu_host_card: {wanted['card']})")
        elif part == "kernel_parameters" and not GRUB.exists():
            notes.append(f"skipped: {what}: this host does not boot with GRUB ({GRUB} is missing)")
        else:
            apply.append(part)
    enrolment = list(secure_boot_notes()) if "packages" in apply and not where and secure_boot() else []
    notes += enrolment
    differs = (
        "hardware_clock" in apply
        and wanted["local_clock"] is not None
        and clock_is_local() != wanted["local_clock"]
    )
    return {
        "apply": apply,
        "notes": notes,
        "cards": found,
        "container": where,
        "clock_differs": differs,
        "key_waits": bool(enrolment),
    }


def main() -> None:
    """Module entry point."""
    module = AnsibleModule(
        argument_spec={
            "declared": {"type": "list", "elements": "str", "required": True},
            "card": {"type": "str", "default": "auto", "choices": ["auto", "present", "absent"]},
            "local_clock": {"type": "bool"},
            "left_behind": {"type": "dict", "default": {}},
        },
        supports_check_mode=True,
    )
    try:
        result = look(module.params)
    except (Refused, OSError, subprocess.SubprocessError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=False, **result)


if __name__ == "__main__":
    main()

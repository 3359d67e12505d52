#!/usr/bin/python3
"""Ansible module: the settings, units and services that an NVIDIA card needs on its host, in one task."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ansible.module_utils.basic import AnsibleModule  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from roles.gpu_host.module_utils.gpu_host_tools import Refused, converge, must, run, work
else:
    from ansible.module_utils.gpu_host_tools import Refused, converge, must, run, work

DOCUMENTATION = r"""
---
module: gpu_host_device
short_description: Write settings and units, and enable services
description:
  - Writes what differs, units after systemd-analyze has verified them, and enables services that are not.
  - Units of ours are started anew when they changed, or have failed. One that fails does not fail the task,
    because a driver that was just installed may want a reboot first; where none is wanted it is V(broken).
options:
  files: {description: "Text by path; none removes.", type: dict, required: true}
  enabled: {description: Units that start at boot., type: list, elements: str, required: true}
  started: {description: Units among them that are started now., type: list, elements: str, default: []}
  version: {description: "The driver's version; empty does not compare.", type: str, default: ""}
author: [llmbox]
"""

EXAMPLES = r"""
- name: Enable persistence
  gpu_host_device:
    files: {}
    enabled: [nvidia-persistenced.service]
"""

RETURN = r"""
modprobe: {description: Options of kernel modules have changed., returned: always, type: bool}
pending: {description: "Why a reboot is wanted; empty when it is not.", returned: always, type: str}
broken: {description: "A unit of ours that no reboot would mend; empty: none.", returned: always, type: str}
"""

UNITS = Path("/etc/systemd/system")
LOADED = Path("/sys/module/nvidia/version")
PARAMETERS = Path("/proc/driver/nvidia/params")
DEVICES = Path("/dev")
MODPROBE = Path("/etc/modprobe.d")
INITRAMFS = Path(f"/boot/initrd.img-{os.uname().release}")
START_TIMEOUT_S = 180
SUSPEND = "PreserveVideoMemoryAllocations"


def verify(units: Mapping[str, str]) -> None:
    """Let systemd judge the units. Raises Refused with its first complaint about one of them."""
    folder = Path(tempfile.mkdtemp(prefix="llmbox-verify-", dir="/run"))
    try:
        for name, text in units.items():
            (folder / name).write_text(text)
        paths = [str(folder / name) for name in sorted(units)]
        done = run("systemd-analyze", "--man=no", "verify", *paths)
        said = [line for line in done.stderr.splitlines() if str(folder) in line]
        if said:
            raise Refused(f"systemd-analyze refuses a unit: {said[0].replace(f'{folder}/', '')}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def states(units: Sequence[str]) -> dict[str, tuple[str, str, str]]:
    """LoadState, UnitFileState and ActiveState of each unit."""
    found = {}
    said = run("systemctl", "show", "--property=Id,LoadState,UnitFileState,ActiveState", *units).stdout
    for block in said.split("\n\n"):
        values = dict(line.partition("=")[::2] for line in block.splitlines())
        if "Id" in values:
            found[values["Id"]] = (values["LoadState"], values["UnitFileState"], values["ActiveState"])
    return found


def initramfs_stale(files: Mapping[Path, str | None]) -> bool:
    """Whether the initramfs that boots is older than our options of modules: an update of it has failed."""
    if not INITRAMFS.exists():
        return False
    made = INITRAMFS.stat().st_mtime
    return any(path.parent == MODPROBE and path.exists() and path.stat().st_mtime > made for path in files)


def suspend_pending(files: Mapping[Path, str | None]) -> str:
    """Why a reboot is wanted for suspend: the driver reads its options when it is loaded, not later."""
    asked = [
        value
        for path, text in files.items()
        if path.parent == MODPROBE
        for value in re.findall(rf"^options nvidia .*\bNVreg_{SUSPEND}=(\d+)", text or "", re.M)
    ]
    try:
        loaded = re.findall(rf"^{SUSPEND}: *(\d+)$", PARAMETERS.read_text(), re.M)
    except FileNotFoundError:  # no driver is loaded
        return ""
    if not asked or not loaded or loaded[-1] == asked[-1]:
        return ""
    return f"{SUSPEND}={asked[-1]} is asked for, the loaded driver has {loaded[-1]}"


def apply(wanted: Mapping[str, Any], check: bool) -> dict[str, Any]:
    """Compare, and unless this is a dry run, converge. Raises Refused, OSError."""
    files = {Path(path): text or None for path, text in wanted["files"].items()}
    own = {path.name: text for path, text in files.items() if path.parent == UNITS}
    before = states(wanted["enabled"])
    differing = {diff["after_header"] for diff in converge(files, check=True)}
    gone = [name for name, text in own.items() if text is None and str(UNITS / name) in differing]
    if not check:
        verify({name: text for name, text in own.items() if text})
        if gone:
            run("systemctl", "disable", "--now", *gone)
    diffs = converge(files, check=check)
    units_changed = any(Path(path).parent == UNITS for path in differing)
    if units_changed and not check:
        must("systemctl", "daemon-reload")
        before = states(wanted["enabled"])
    missing = [unit for unit in wanted["enabled"] if before.get(unit, ("",))[0] in ("", "not-found")]
    if missing and not check:
        raise Refused(f"the driver's packages bring no {', '.join(missing)}; fix: gpu_host_driver_packages")
    disabled = [unit for unit in wanted["enabled"] if unit in missing or before[unit][1] != "enabled"]
    notes = ""
    broken = [unit for unit in wanted["started"] if before.get(unit, ("",) * 3)[2] == "failed"]
    if not check:
        if disabled:
            must("systemctl", "enable", *disabled)
        due = [unit for unit in wanted["started"] if str(UNITS / unit) in differing or unit in broken]
        broken = [
            unit
            for unit in due
            if run("systemctl", "restart", unit, timeout_s=START_TIMEOUT_S).returncode != 0
        ]
    if broken:
        notes = f"{broken[-1]} could not do its work; look with: journalctl -u {broken[-1]}"
    modprobe = any(Path(path).parent == MODPROBE for path in differing) or initramfs_stale(files)
    loaded = LOADED.read_text().strip() if LOADED.exists() else ""
    asked = wanted["version"].partition("-")[0]
    pending = ""
    if asked and loaded != asked:
        pending = f"driver {asked} is installed, {loaded or 'none'} is loaded"
    elif asked and not (DEVICES / "nvidia-uvm").exists():
        pending = notes or "the driver is loaded, /dev/nvidia-uvm is missing"
    elif asked:
        pending = suspend_pending(files)
    return {
        "changed": bool(diffs or disabled or modprobe),
        "diff": [*diffs, *({"before": "", "after": f"{unit}: enabled\n"} for unit in disabled)],
        "modprobe": modprobe,
        "pending": pending,
        "broken": "" if pending else notes,
    }


def main() -> None:
    """Module entry point."""
    module = AnsibleModule(
        argument_spec={
            "files": {"type": "dict", "required": True},
            "enabled": {"type": "list", "elements": "str", "required": True},
            "started": {"type": "list", "elements": "str", "default": []},
            "version": {"type": "str", "default": ""},
        },
        supports_check_mode=True,
    )
    work(module, apply)


if __name__ == "__main__":
    main()

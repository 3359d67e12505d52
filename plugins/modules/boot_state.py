#!/usr/bin/python3
"""Ansible module: what other systems need to start is still there, byte for byte."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule  # type: ignore[import-untyped]

DOCUMENTATION = r"""
---
module: boot_state
short_description: Look at the firmware's boot entries and the ESP, and refuse to go on when they have changed
description:
  - Without O(before) it looks. Run it before the first task that touches boot settings, and keep what it
    returns.
  - With O(before) it looks again and fails, naming what differs, unless all of it is as it was. Run it after
    the last such task, before a restart.
  - A difference is remembered until it is put back, or the machine boots. Until then a look fails, too: no
    later run takes the changed state for its beginning.
  - Looks at every boot entry, their order, the one that starts next and the timeout; and at every file
    of every mounted EFI system partition, but for the folder of this very system (O(own)), which its boot
    loader's package writes.
  - Says, too, which entry of Windows the firmware starts before the system that runs (RV(windows_first)).
  - Changes nothing else. On a machine without EFI variables there is nothing to compare, and V(efi) is false.
options:
  before: {description: RV(state) of the look before., type: dict}
  own:
    description: Folders below C(EFI/) of the system that runs; from its C(/etc/os-release) unless given.
    type: list
    elements: str
author: [llmbox]
"""

EXAMPLES = r"""
- name: Look at what other systems need to start
  boot_state:
  register: __boot_before

- name: Make sure that it is as it was
  boot_state:
    before: "{{ __boot_before.state }}"
"""

RETURN = r"""
efi: {description: Whether the machine has EFI variables., type: bool, returned: always}
state: {description: What was found; for O(before)., type: dict, returned: always}
windows_first:
  description: The entry of Windows that stands in BootOrder before the one that runs; empty where none does.
  type: str
  returned: always
"""

VARIABLES = Path("/sys/firmware/efi/efivars")
MOUNTS = Path("/proc/self/mounts")
OS_RELEASE = Path("/etc/os-release")
# In memory: after a boot it is known what still starts, and Windows writes its own files whenever it runs.
REMEMBERED = Path("/run/llmbox-boot-state.json")
_GLOBAL = "8be4df61-93ca-11d2-aa0d-00e098032b8c"
_WINDOWS = "\\efi\\microsoft\\".encode("utf-16-le")
_ACTIVE = 1  # of an entry's attributes: what lacks it the firmware passes over
_BOOT_VARIABLE = re.compile(rf"(Boot[0-9A-F]{{4}}|BootOrder|BootNext|Timeout)-{_GLOBAL}")


def variables(folder: Path) -> dict[str, str]:
    """The firmware's boot variables, as hexadecimal text."""
    if not folder.is_dir():
        return {}
    return {
        path.name.partition("-")[0]: path.read_bytes().hex()
        for path in sorted(folder.iterdir())
        if _BOOT_VARIABLE.fullmatch(path.name)
    }


def windows_first(folder: Path) -> str:
    """The entry of Windows that the firmware starts before the one that runs; empty where none does."""

    def raw(name: str) -> bytes:
        path = folder / f"{name}-{_GLOBAL}"
        return path.read_bytes()[4:] if path.is_file() else b""

    order, current = (
        [
            f"Boot{int.from_bytes(raw(name)[at : at + 2], 'little'):04X}"
            for at in range(0, len(raw(name)) - 1, 2)
        ]
        for name in ("BootOrder", "BootCurrent")
    )
    order = [name for name in order if int.from_bytes(raw(name)[:4], "little") & _ACTIVE]
    before = order[:1] if not current else order[: order.index(current[0])] if current[0] in order else order
    # By its program: the label is a person's, and another system's entry may be one that leads nowhere.
    return next((name for name in before if _WINDOWS in raw(name).lower()), "")


def partitions(mounts: str) -> list[Path]:
    """Where EFI system partitions are mounted."""
    rows = [line.split(" ") for line in mounts.splitlines()]
    places = [Path(row[1].replace("\\040", " ")) for row in rows if row[2] == "vfat"]
    return [place for place in places if (place / "EFI").is_dir()]


def files(places: Iterable[Path], own: Iterable[str]) -> dict[str, str]:
    """The digest of every file of the partitions that is not this system's own."""
    mine = {name.lower() for name in own}
    found: dict[str, str] = {}
    for place in places:
        for folder, folders, names in os.walk(place):
            if Path(folder) == place / "EFI":
                folders[:] = [name for name in folders if name.lower() not in mine]
            for name in names:
                path = Path(folder, name)
                found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def own_folders(os_release: str) -> list[str]:
    """What the system that runs calls its folder on the ESP."""
    return re.findall(r'^ID="?([^"\n]+)"?$', os_release, re.M)


def differences(before: Mapping[str, Mapping[str, str]], after: Mapping[str, Mapping[str, str]]) -> list[str]:
    """What is not as it was, one text for each variable and file."""
    found: list[str] = []
    for part in ("variables", "files"):
        old, new = before.get(part, {}), after[part]
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                how = "is new" if name not in old else "is gone" if name not in new else "has changed"
                found.append(f"{name} {how}")
    return found


def settle(
    before: Mapping[str, Mapping[str, str]] | None, after: Mapping[str, Mapping[str, str]], *, check: bool
) -> list[str]:
    """What is not as it was, or as an earlier run that found a difference remembers it. Raises OSError."""
    if before is None and REMEMBERED.exists():
        before = json.loads(REMEMBERED.read_bytes())
    changed = [] if before is None else differences(before, after)
    if check:
        return changed
    if changed:
        fresh = REMEMBERED.with_name(f"{REMEMBERED.name}.new")
        fresh.write_text(json.dumps(before))
        fresh.replace(REMEMBERED)
    else:
        REMEMBERED.unlink(missing_ok=True)
    return changed


def main() -> None:
    """Module entry point."""
    module = AnsibleModule(
        argument_spec={"before": {"type": "dict"}, "own": {"type": "list", "elements": "str"}},
        supports_check_mode=True,
    )
    own = module.params["own"]
    try:
        state = {
            "variables": variables(VARIABLES),
            "files": files(
                partitions(MOUNTS.read_text()), own_folders(OS_RELEASE.read_text()) if own is None else own
            ),
        }
        first = windows_first(VARIABLES)
        changed = settle(module.params["before"], state, check=module.check_mode)
    except OSError as error:
        module.fail_json(msg=f"{error.filename}: {error.strerror}; fix: run it as root")
    found = {"efi": bool(state["variables"]), "state": state, "windows_first": first}
    if changed:
        module.fail_json(
            msg=f"what other systems need to start is not as it was: {', '.join(changed)}; the machine is "
            "not restarted; fix: put it back (efibootmgr -v shows the entries) and find out what changed it; "
            f"where it is to stay so: rm {REMEMBERED}",
            **found,
        )
    module.exit_json(changed=False, **found)


if __name__ == "__main__":
    main()

#!/usr/bin/python3
"""Ansible module: refuse units of other programs that only the system's service manager knows."""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterable, Sequence
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule  # type: ignore[import-untyped]

DOCUMENTATION = r"""
---
module: llama_foreign_units
short_description: Check that foreign units are user units
description:
  - A user unit cannot conflict with a system unit. Fails when a unit lies in a folder of system units and in
    none of user units. One that lies nowhere is allowed, its program may come later; so is a masked one.
  - Looks at files, so that it answers before the user's service manager runs. Changes nothing.
options:
  user: {description: The user whose manager runs the presets., type: str, required: true}
  units: {description: Names of the units., type: list, elements: str, required: true}
author: [llmbox]
"""

EXAMPLES = r"""
- name: Check the units of other programs
  llama_foreign_units:
    user: llm
    units: [lmstudio.service]
"""

RETURN = "# nothing"

# systemd.unit(5), "Unit File Load Path".
PREFIXES = ("etc/systemd", "run/systemd", "usr/local/lib/systemd", "usr/lib/systemd")
SYSTEM = (
    *(f"{prefix}/system" for prefix in PREFIXES),
    *(f"run/systemd/{name}" for name in ("generator", "generator.early", "generator.late", "transient")),
)
USER = (*(f"{prefix}/user" for prefix in PREFIXES), "usr/local/share/systemd/user", "usr/share/systemd/user")
HOME = (".config/systemd/user", ".local/share/systemd/user")
RUNTIME = ("user", "generator", "generator.early", "generator.late", "transient")


def lies_in(folders: Iterable[Path], unit: str) -> bool:
    """Whether the unit, or the template of it, lies in one of the folders. The first may mask it."""
    stem, at, _instance = unit.removesuffix(".service").partition("@")
    names = [unit, f"{stem}@.service"] if at else [unit]
    paths = (folder / name for name in names for folder in folders)
    first = next((path for path in paths if os.path.lexists(path)), None)
    return first is not None and first.resolve() != Path(os.devnull)


def refusals(user: str, units: Sequence[str], root: Path = Path("/")) -> list[str]:
    """One line for each unit that is the system's."""
    folders = [root / folder for folder in USER]
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        pass  # a dry run on a new host
    else:
        folders += [Path(entry.pw_dir) / folder for folder in HOME]
        folders += [root / f"run/user/{entry.pw_uid}/systemd" / folder for folder in RUNTIME]
    system = [root / folder for folder in SYSTEM]
    return [
        f"refused: llama_presets_foreign_units.{index} = {unit}: it is a system unit here, and a user unit"
        f" cannot conflict with one; fix: run it as a user unit of {user}, or remove it from the list"
        f" and stop it: systemctl disable --now {unit}"
        for index, unit in enumerate(units)
        if lies_in(system, unit) and not lies_in(folders, unit)
    ]


def main() -> None:
    """Module entry point."""
    module = AnsibleModule(
        argument_spec={
            "user": {"type": "str", "required": True},
            "units": {"type": "list", "elements": "str", "required": True},
        },
        supports_check_mode=True,
    )
    found = refusals(module.params["user"], module.params["units"])
    if found:
        more = f" (+{len(found) - 1} more)" if len(found) > 1 else ""
        module.fail_json(msg=found[0] + more)
    module.exit_json(changed=False)


if __name__ == "__main__":
    main()

#!/usr/bin/python3
"""Ansible module: the user's service manager runs, and with the groups that the user has now."""

from __future__ import annotations

import os
import pwd
import subprocess
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule  # type: ignore[import-untyped]

DOCUMENTATION = r"""
---
module: llm_user_manager
short_description: Have a user's service manager run, and tell whether it lacks groups of the user
description:
  - Starts user@UID.service when it does not run.
  - A manager keeps the groups that it started with, and so does everything that it starts. Whether that is
    another set than the user's is looked up in the process itself. It is changed then, for a handler to
    restart the manager in an orderly way.
options:
  name: {description: The user., type: str, required: true}
  unit: {description: The unit of its manager., type: str, required: true}
author: [llmbox]
"""

EXAMPLES = r"""
- name: Have the user's service manager run with the user's groups
  llm_user_manager:
    name: llm
    unit: user@1500.service
  register: manager
"""

RETURN = r"""
started: {description: It did not run before., returned: always, type: bool}
lacking: {description: Groups of the user that the manager does not have., returned: always, type: list}
"""

TIMEOUT_S = 60


def groups_of(status: str) -> set[int]:
    """The groups in the text of /proc/PID/status: its own and the supplementary ones."""
    lines = {name: value.split() for name, _, value in (line.partition(":") for line in status.splitlines())}
    return {int(group) for group in (*lines.get("Groups", []), *lines.get("Gid", [])[:1])}


def systemctl(*words: str) -> str:
    """What systemctl printed. Raises CalledProcessError, TimeoutExpired."""
    done = subprocess.run(
        ["systemctl", *words], capture_output=True, text=True, timeout=TIMEOUT_S, check=True
    )
    return done.stdout.strip()


def main() -> None:
    """Module entry point."""
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "unit": {"type": "str", "required": True},
        },
        supports_check_mode=True,
    )
    name, unit = module.params["name"], module.params["unit"]
    try:
        user = pwd.getpwnam(name)
    except KeyError:  # in a dry run on a new host
        module.exit_json(changed=module.check_mode, started=module.check_mode, lacking=[])
    try:
        pid = int(systemctl("show", "--value", "--property=MainPID", unit) or 0)
        started = pid == 0
        if started and not module.check_mode:
            systemctl("start", unit)
        has = groups_of(Path(f"/proc/{pid}/status").read_text()) if pid else None
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[0]
        module.fail_json(msg=f"{unit}: {said}; look with: systemctl status {unit}")
    wanted = set(os.getgrouplist(name, user.pw_gid))
    lacking = sorted(wanted - has) if has is not None else []
    module.exit_json(changed=started or bool(lacking), started=started, lacking=lacking)


if __name__ == "__main__":
    main()

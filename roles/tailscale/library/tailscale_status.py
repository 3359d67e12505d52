#!/usr/bin/python3
"""Ansible module: whether a host is in its tailnet, once tailscaled has made up its mind."""

from __future__ import annotations

import json
import subprocess
import time

from ansible.module_utils.basic import AnsibleModule  # type: ignore[import-untyped]

DOCUMENTATION = r"""
---
module: tailscale_status
short_description: Whether a host is in its tailnet, and what lacks
description:
  - Changes nothing. Waits while tailscaled is starting, and refuses a state that only a person can mend.
  - A dry run looks once and refuses nothing.
options:
  timeout: {description: Seconds that it may be starting., type: int, required: true}
author: [llmbox]
"""

EXAMPLES = r"""
- name: Look whether it is in its tailnet
  tailscale_status:
    timeout: 60
"""

RETURN = r"""
state: {description: "Running, Stopped or NeedsLogin; in a dry run anything.", returned: always, type: str}
"""

SETTLED = ("Running", "Stopped", "NeedsLogin")
STARTING = ("", "NoState", "Starting")  # empty: no answer, as of a service that was started just now
PAUSE_S = 1.0
COMMAND_TIMEOUT_S = 20


def look() -> tuple[str, str]:
    """BackendState, empty without an answer, and what was said then."""
    argv = ["tailscale", "status", "--json"]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
        return str(json.loads(done.stdout)["BackendState"]), ""
    except (ValueError, LookupError, TypeError):
        return "", " ".join(done.stderr.split()) or "no answer"
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", str(error)


def fault(state: str, said: str, timeout_s: float) -> str:
    """Why a state will not do, in one line; empty when the role knows what to do."""
    if state in SETTLED:
        return ""
    if state == "NeedsMachineAuth":
        return (
            "this host waits for approval in its tailnet; "
            "fix: approve it in the admin console under Machines, then run this again"
        )
    if not state:
        return f"tailscale status: {said}; fix: systemctl status tailscaled on the host says more"
    if state in STARTING:
        return (
            f"tailscaled is still {state} after {timeout_s:g} s; "
            "fix: journalctl --unit tailscaled on the host says what it waits for"
        )
    return f"tailscaled is in the state {state}; fix: tailscale status on the host says more"


def main() -> None:
    """Module entry point."""
    module = AnsibleModule(
        argument_spec={"timeout": {"type": "int", "required": True}}, supports_check_mode=True
    )
    timeout_s = module.params["timeout"]
    deadline = time.monotonic() + timeout_s
    state, said = look()
    while state in STARTING and not module.check_mode and time.monotonic() < deadline:
        time.sleep(PAUSE_S)
        state, said = look()
    why = "" if module.check_mode else fault(state, said, timeout_s)
    if why:
        module.fail_json(msg=why, state=state)
    module.exit_json(changed=False, state=state)


if __name__ == "__main__":
    main()

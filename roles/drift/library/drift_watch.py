#!/usr/bin/python3
"""Ansible module: the timers that look for drift, and the record that they compare with, in one run."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule  # type: ignore[import-untyped]

DOCUMENTATION = r"""
---
module: drift_watch
short_description: Record what was deployed, and keep the timers that compare the box with it
description:
  - Writes units that differ in text, owner or mode, after systemd-analyze has verified them, and has every
    timer among them run, now and at boot.
  - Then has O(program) record what lies on the disk of O(deployed). A comparison that failed is begun anew,
    without waiting for it.
options:
  program: {description: "C(llmbox-drift) on this host.", type: path, required: true}
  units: {description: Text by unit name., type: dict, required: true}
  deployed: {description: What the roles say of themselves; docs/drift.md., type: dict, required: true}
author: [llmbox]
"""

EXAMPLES = r"""
- name: Record what was deployed
  drift_watch:
    program: /opt/llmbox/bin/llmbox-drift
    units: {llmbox-drift@.service: "...", llmbox-drift-full.timer: "..."}
    deployed: {files: [/etc/llmbox/presets.json]}
"""

RETURN = "# nothing"

SYSTEM_DIR = Path("/etc/systemd/system")
FILE_MODE = 0o644
TIMEOUT_S = 60
# It hashes settings and lists, no models.
RECORD_TIMEOUT_S = 120
COMPARISONS = "llmbox-drift@*.service"


class Refused(Exception):
    """Something is not as it must be; the text is one line for the person."""


def run(*argv: str, stdin: str = "", timeout_s: float = TIMEOUT_S) -> subprocess.CompletedProcess[str]:
    """Run a program. Raises OSError, subprocess.TimeoutExpired."""
    return subprocess.run(
        argv, input=stdin, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False
    )


def must(*argv: str, stdin: str = "", timeout_s: float = TIMEOUT_S) -> str:
    """The output of a program. Raises Refused with its last line when it fails."""
    done = run(*argv, stdin=stdin, timeout_s=timeout_s)
    if done.returncode != 0:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise Refused(
            f"{' '.join(argv[:3])} failed: {said[-1].strip() if said else f'exit {done.returncode}'}"
        )
    return done.stdout


def present(path: Path) -> str | None:
    """The text of a unit; None unless it is a regular file of root's with the right mode."""
    try:
        info = path.lstat()
        access = (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (
            os.geteuid(),
            os.getegid(),
            FILE_MODE,
        )
        return path.read_text(errors="replace") if access and stat.S_ISREG(info.st_mode) else None
    except OSError:
        return None


def verify(units: Mapping[str, str]) -> None:
    """Let systemd judge all units together. Raises Refused with its first complaint."""
    folder = Path(tempfile.mkdtemp(prefix="llmbox-verify-", dir="/run"))
    try:
        for name, text in units.items():
            (folder / name).write_text(text)
        paths = [str(folder / name) for name in sorted(units)]
        done = run("systemd-analyze", "--man=no", "verify", *paths)
        said = [line for line in done.stderr.splitlines() if str(folder) in line or done.returncode != 0]
        if said:
            raise Refused(f"systemd-analyze refuses a unit: {said[0].replace(f'{folder}/', '')}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write(path: Path, text: str) -> None:
    """Write a unit in one step."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.write_text(text)
    fresh.chmod(FILE_MODE)
    fresh.replace(path)


def resting(timers: list[str]) -> list[str]:
    """The timers that do not run, or would not after a boot."""
    shown = run("systemctl", "show", "--property=Id,ActiveState,UnitFileState", *timers).stdout
    found = {}
    for block in shown.split("\n\n"):
        values = dict(line.partition("=")[::2] for line in block.splitlines())
        found[values.get("Id")] = (values.get("ActiveState"), values.get("UnitFileState"))
    return [timer for timer in timers if found.get(timer) != ("active", "enabled")]


def apply(wanted: Mapping[str, Any], check: bool) -> dict[str, Any]:
    """Compare, and unless this is a dry run, converge. Raises Refused, OSError, subprocess.TimeoutExpired."""
    units: Mapping[str, str] = wanted["units"]
    texts = {name: present(SYSTEM_DIR / name) for name in units}
    differing = [name for name, text in units.items() if texts[name] != text]
    timers = resting([name for name in units if name.endswith(".timer")])
    diffs = [
        {
            "before_header": str(SYSTEM_DIR / name),
            "after_header": str(SYSTEM_DIR / name),
            "before": texts[name] or "",
            "after": units[name],
        }
        for name in differing
    ]
    if check and not Path(wanted["program"]).exists():  # a new host
        return {"changed": True, "diff": diffs}
    if not check:
        if differing:
            verify(units)
            for name in differing:
                write(SYSTEM_DIR / name, units[name])
            must("systemctl", "daemon-reload")
        if timers:
            must("systemctl", "enable", "--now", *timers)
    words = [wanted["program"], "record", *(["--dry-run"] if check else [])]
    try:
        said = must(*words, stdin=json.dumps(wanted["deployed"]), timeout_s=RECORD_TIMEOUT_S)
    except Refused:
        if check:  # damaged, and a run that is none would have put it right before this
            return {"changed": True, "diff": diffs}
        raise
    recorded = json.loads(said)
    if recorded["changed"]:
        diffs.append(recorded["diff"])
    if not check:
        failed = run("systemctl", "list-units", "--failed", "--plain", "--no-legend", COMPARISONS).stdout
        for line in failed.splitlines():
            must("systemctl", "start", "--no-block", line.split()[0])
    return {"changed": bool(differing or timers or recorded["changed"]), "diff": diffs}


def main() -> None:
    """Module entry point."""
    module = AnsibleModule(
        argument_spec={
            "program": {"type": "path", "required": True},
            "units": {"type": "dict", "required": True},
            "deployed": {"type": "dict", "required": True},
        },
        supports_check_mode=True,
    )
    try:
        result = apply(module.params, module.check_mode)
    except (Refused, OSError, ValueError, subprocess.TimeoutExpired) as error:
        module.fail_json(msg=str(error))
    module.exit_json(**result)


if __name__ == "__main__":
    main()

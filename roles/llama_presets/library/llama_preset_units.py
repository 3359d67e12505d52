#!/usr/bin/python3
"""Ansible module: the units of all presets, presets.json, and systemd's knowledge of them, in one run."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule  # type: ignore[import-untyped]

DOCUMENTATION = r"""
---
module: llama_preset_units
short_description: Install the systemd units of the presets and presets.json
description:
  - Writes units that differ in text, owner or mode, after systemd-analyze has verified all of them together,
    and presets.json after its checker has accepted it. Removes units that carry the marker and are wanted no
    longer, stopping them first. Reloads systemd when it has not read what lies on the disk. Never touches
    drop-ins.
  - Units of scope user are written with the user's own rights, those of scope system as root.
options:
  user: {description: Owner of the units of scope user., type: str, required: true}
  units: {description: Scope and text by unit name., type: dict, required: true}
  presets: {description: Content of presets.json., type: dict, required: true}
  path: {description: Where presets.json lies., type: path, required: true}
  checker: {description: Checks the presets.json named after it., type: list, elements: str, required: true}
author: [llmbox]
"""

EXAMPLES = r"""
- name: Install the units
  llama_preset_units:
    user: llm
    units: {llama-coder.service: {scope: user, text: "..."}}
    presets: {version: 1, user: llm, presets: {}}
    path: /etc/llmbox/presets.json
    checker: [/opt/llmbox/bin/python, -I, -m, llmbox.presets]
"""

RETURN = r"""
restart:
  description:
    - Names of the user presets that run with another command than their unit has, or would have after a
      dry run.
  type: list
  returned: always
restart_system:
  description: The units of system presets of which the same holds.
  type: list
  returned: always
deployed:
  description: What the role drift compares the box with later, the paths of the files and the units.
  type: dict
  returned: always
"""

MARKER = "# Managed by llmbox: roles/llama_presets."
SYSTEM_DIR = Path("/etc/systemd/system")
TIMEOUT_S = 60
MANAGER_TIMEOUT_S = 20
FILE_MODE = 0o644
SHOWN = ("ActiveState", "MainPID", "ExecStart", "NeedDaemonReload", "DropInPaths")


class Refused(Exception):
    """Something is not as it must be; the text is one line for the person."""


@dataclass
class Account:
    """The user who runs the presets."""

    name: str
    uid: int
    gid: int
    home: Path

    @property
    def units(self) -> Path:
        """Where the user's own units lie."""
        return self.home / ".config/systemd/user"

    @property
    def runtime(self) -> Path:
        """The user's runtime directory."""
        return Path(f"/run/user/{self.uid}")

    @contextlib.contextmanager
    def acting(self) -> Iterator[None]:
        """The body has the rights of the user: a link that the user planted leads nowhere new."""
        os.setegid(self.gid)
        os.seteuid(self.uid)
        try:
            yield
        finally:
            os.seteuid(0)
            os.setegid(0)


@dataclass
class Scope:
    """The units of one service manager."""

    account: Account | None
    folder: Path
    wanted: dict[str, str]
    stale: list[str] = field(default_factory=list)
    present: dict[str, str] = field(default_factory=dict)
    exposed: dict[str, str] = field(default_factory=dict)

    def run(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """Run a command as the owner of this service manager."""
        identity: dict[str, Any] = {}
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
        if self.account:
            identity = {
                "user": self.account.uid,
                "group": self.account.gid,
                "extra_groups": os.getgrouplist(self.account.name, self.account.gid),
            }
            environment |= {
                "HOME": str(self.account.home),
                "XDG_RUNTIME_DIR": str(self.account.runtime),
                "DBUS_SESSION_BUS_ADDRESS": f"unix:path={self.account.runtime}/bus",
            }
        return subprocess.run(
            argv,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
            check=False,
            cwd="/",
            **identity,
        )

    def acting(self) -> contextlib.AbstractContextManager[None]:
        """File operations of the body have the rights of the units' owner."""
        return self.account.acting() if self.account else contextlib.nullcontext()

    def systemctl(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """Run systemctl on this service manager."""
        return self.run("systemctl", "--user" if self.account else "--system", *argv)

    def read(self) -> None:
        """Learn which of our units lie on the disk."""
        with self.acting():
            for path in sorted(self.folder.glob("llama-*.service")) if self.folder.is_dir() else []:
                with contextlib.suppress(OSError):
                    text = path.read_text(errors="replace")
                    if text.startswith(MARKER) or path.name in self.wanted:
                        self.present[path.name] = text
                        wrong = wrong_access(path, self.account.uid if self.account else 0)
                        if wrong:
                            self.exposed[path.name] = wrong
        self.stale = [name for name in self.present if name not in self.wanted]

    @property
    def differing(self) -> list[str]:
        """Units to write."""
        return [
            name
            for name, text in self.wanted.items()
            if self.present.get(name) != text or name in self.exposed
        ]

    @property
    def manager_runs(self) -> bool:
        """True when the service manager can be asked."""
        return self.account is None or (self.account.runtime / "systemd/private").exists()

    def wait_for_manager(self) -> None:
        """Lingering starts the manager in the background. Raises Refused when it does not come."""
        deadline = time.monotonic() + MANAGER_TIMEOUT_S
        while not self.manager_runs:
            if time.monotonic() > deadline:
                assert self.account is not None
                raise Refused(
                    f"the service manager of {self.account.name} did not start in {MANAGER_TIMEOUT_S} s; "
                    f"look with: systemctl status user@{self.account.uid}"
                )
            time.sleep(0.2)

    def verify(self) -> None:
        """Let systemd judge all units together. Raises Refused with its first complaint."""
        folder = Path(tempfile.mkdtemp(prefix="llmbox-verify-", dir="/run"))
        try:
            folder.chmod(0o755)
            for name, text in self.wanted.items():
                (folder / name).write_text(text)
                (folder / name).chmod(0o644)
            mode = ("--user",) if self.account else ()
            done = self.run(
                "systemd-analyze",
                *mode,
                "--man=no",
                "verify",
                *(str(folder / name) for name in sorted(self.wanted)),
            )
            said = [line for line in done.stderr.splitlines() if str(folder) in line or done.returncode != 0]
            if said:
                raise Refused(f"systemd-analyze refuses a unit: {said[0].replace(str(folder) + '/', '')}")
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def write(self) -> None:
        """Write what differs, each file in one step, and remove what is stale after stopping it."""
        for name in self.stale:
            self.systemctl("stop", name)
        with self.acting():
            self.folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            for name in self.differing:
                replace(self.folder / name, self.wanted[name])
            for name in self.stale:
                (self.folder / name).unlink()

    def unread(self) -> bool:
        """True when systemd has not read what lies on the disk now."""
        if not self.wanted or not self.manager_runs:
            return False
        shown = self.systemctl(
            "show", "--property=NeedDaemonReload,LoadState", *sorted(self.wanted)
        ).stdout.split()
        return "NeedDaemonReload=yes" in shown or "LoadState=not-found" in shown

    def running_otherwise(self, written: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, str]]:
        """Active units whose process was started with another command than the unit has, or whose program is
        no longer the one of that name (a new llama.cpp release): what runs, and what is to run.

        `written` holds the commands of the wanted units. They count in a dry run, where systemd has yet to
        read a unit, unless a drop-in has a command of its own.
        """
        if not self.wanted or not self.manager_runs:
            return {}
        names = sorted(self.wanted)
        shown = self.systemctl("show", f"--property={','.join(SHOWN)}", *names).stdout
        found = {}
        for name, block in zip(names, shown.strip().split("\n\n"), strict=False):
            values = dict(line.partition("=")[::2] for line in block.splitlines())
            command = values.get("ExecStart", "").partition("argv[]=")[2].partition(" ; ignore_errors=")[0]
            to_read = name in self.differing or values.get("NeedDaemonReload") == "yes"
            own = any(map(sets_command, values.get("DropInPaths", "").split()))
            if to_read and name in written and not own:
                command = " ".join(written[name])
            elif "$" in command.replace("$$", ""):  # a variable, which only systemd knows
                continue
            else:
                command = command.replace("$$", "$")
            if values.get("ActiveState") != "active" or not command:
                continue
            with contextlib.suppress(OSError):
                argv = Path(f"/proc/{values['MainPID']}/cmdline").read_text(errors="replace")
                running = " ".join(argv.rstrip("\0").split("\0"))
                if running != command:
                    found[name] = (running, command)
                    continue
                program = str(Path(f"/proc/{values['MainPID']}/exe").readlink()).removesuffix(" (deleted)")
                path = command.partition(" ")[0]
                wanted = os.path.realpath(path)
                # A script's program is its interpreter, of another name.
                if path.startswith("/") and program != wanted and Path(program).name == Path(wanted).name:
                    found[name] = (program, wanted)
        return found


def sets_command(drop_in: str) -> bool:
    """True when this drop-in says what a unit runs."""
    try:
        lines = Path(drop_in).read_text(errors="replace").splitlines()
    except OSError:
        return False
    return any(line.partition("=")[0].strip() == "ExecStart" for line in lines)


def wrong_access(path: Path, uid: int) -> str:
    """What is wrong with a file's kind, owner or mode, or "". Raises OSError."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        return "not a regular file"
    mode = stat.S_IMODE(status.st_mode)
    if (status.st_uid, mode) != (uid, FILE_MODE):
        return f"mode {mode:04o}, owner {status.st_uid}"
    return ""


def replace(path: Path, text: str) -> None:
    """Write a file of mode 0644 in one step."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w") as handle:
            handle.write(text)
            os.fchmod(handle.fileno(), FILE_MODE)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def check_presets(checker: list[str], text: str) -> None:
    """Let lmswitch's own checker judge the file. Raises Refused with its line."""
    with tempfile.NamedTemporaryFile("w", prefix="llmbox-presets-", suffix=".json", dir="/run") as handle:
        handle.write(text)
        handle.flush()
        done = subprocess.run(
            [*checker, handle.name],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise Refused(f"presets.json was not accepted: {lines[-1] if lines else done.returncode}")


def presets_file_differs(path: Path, text: str) -> tuple[bool, str, str]:
    """Whether presets.json must be written, what it holds now, and what is wrong with its owner or mode."""
    try:
        wrong, present = wrong_access(path, 0), path.read_text(errors="replace")
    except OSError:
        return True, "", ""
    return present != text or bool(wrong), present, wrong


def difference(
    scopes: list[Scope], path: Path, presets: tuple[str, str], wrong: str = ""
) -> list[dict[str, str]]:
    """What --diff shows; `wrong` is what is wrong with the access to presets.json."""
    changes = [
        (
            scope.folder / name,
            scope.exposed.get(name, ""),
            scope.present.get(name, ""),
            scope.wanted.get(name, ""),
        )
        for scope in scopes
        for name in [*scope.differing, *scope.stale]
    ]
    if wrong or presets[0] != presets[1]:
        changes.append((path, wrong, *presets))
    return [
        {
            "before_header": f"{where} ({access})" if access else str(where),
            "after_header": str(where),
            "before": before,
            "after": after,
        }
        for where, access, before, after in changes
    ]


def make_scopes(user: str, units: dict[str, dict[str, str]]) -> list[Scope]:
    """The user's service manager and the system's; in a dry run on a new host the user does not exist yet."""
    wanted = {
        scope: {name: unit["text"] for name, unit in units.items() if unit["scope"] == scope}
        for scope in ("user", "system")
    }
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        account = Account(user, 0, 0, Path(f"/home/{user}"))
    else:
        account = Account(user, entry.pw_uid, entry.pw_gid, Path(entry.pw_dir))
    return [Scope(account, account.units, wanted["user"]), Scope(None, SYSTEM_DIR, wanted["system"])]


def deployed(scopes: list[Scope], path: Path) -> dict[str, Any]:
    """The files that this module keeps as they are, and the units among them with their user."""
    files = [str(path), *(str(scope.folder / name) for scope in scopes for name in scope.wanted)]
    units = [
        {"unit": name, "user": scope.account.name}
        if scope.account
        else {"unit": name, "enabled": True, "active": True}
        for scope in scopes
        for name in scope.wanted
    ]
    return {"files": files, "units": units}


def apply(module: AnsibleModule) -> dict[str, Any]:
    """Compare, and unless this is a dry run, converge. Returns the module's result."""
    wanted = module.params
    scopes = make_scopes(wanted["user"], wanted["units"])
    path = Path(wanted["path"])
    text = json.dumps(wanted["presets"], indent=1, ensure_ascii=False) + "\n"
    for scope in scopes:
        scope.read()
    write_presets, present, wrong = presets_file_differs(path, text)
    result: dict[str, Any] = {
        "deployed": deployed(scopes, path),
        "diff": difference(scopes, path, (present, text), wrong),
        "changed": write_presets or any(scope.differing or scope.stale for scope in scopes),
    }
    if not module.check_mode:
        if not scopes[0].account or scopes[0].account.uid == 0:
            raise Refused(f"the user {wanted['user']} does not exist; fix: run the role llm_user before")
        if write_presets:
            check_presets(wanted["checker"], text)
        for scope in scopes:
            if scope.differing:
                scope.verify()
        for scope in scopes:
            if scope.wanted or scope.stale:
                scope.wait_for_manager()
            if scope.differing or scope.stale:
                scope.write()
        if write_presets:
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            replace(path, text)
        for scope in scopes:
            if scope.unread() or scope.stale:
                result["changed"] = True
                done = scope.systemctl("daemon-reload")
                if done.returncode != 0:
                    raise Refused(f"systemctl daemon-reload failed: {done.stderr.strip()}")
            scope.present = {**scope.wanted}
            scope.exposed = {}
    presets_wanted = wanted["presets"]["presets"]
    names = {preset["unit"]: name for name, preset in presets_wanted.items()}
    commands = {preset["unit"]: preset["command"] for preset in presets_wanted.values()}
    users, systems = (scope.running_otherwise(commands) for scope in scopes)
    otherwise = users | systems
    result["restart"] = [names[unit] for unit in users]
    result["restart_system"] = list(systems)
    for unit, (running, command) in otherwise.items():
        where = f"systemctl restart {unit}" if unit in systems else f"lmswitch --restart {names[unit]}"
        result["diff"].append(
            {
                "before_header": where,
                "after_header": where,
                "before": f"{running}\n",
                "after": f"{command}\n",
            }
        )
    if module.check_mode and (otherwise or any(scope.unread() for scope in scopes)):
        result["changed"] = True  # a dry run skips the task that restarts, and nobody reloads
    return result


def main() -> None:
    """Module entry point."""
    module = AnsibleModule(
        argument_spec={
            "user": {"type": "str", "required": True},
            "units": {"type": "dict", "required": True},
            "presets": {"type": "dict", "required": True},
            "path": {"type": "path", "required": True},
            "checker": {"type": "list", "elements": "str", "required": True},
        },
        supports_check_mode=True,
    )
    try:
        result = apply(module)
    except (Refused, OSError, subprocess.TimeoutExpired) as error:
        module.fail_json(msg=str(error))
    module.exit_json(**result)


if __name__ == "__main__":
    main()

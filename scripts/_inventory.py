"""The inventory as Ansible sees it, for the scripts that a person runs from the controller.

`ansible-inventory --list` prints variables untemplated and knows nothing of the roles' defaults. The
playbook `_expected.yml` beside this module therefore prints, for every host and without connecting to any,
the variables with both applied: what a script checks against is exactly what the roles work with.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EXPECTED_PLAYBOOK = Path(__file__).resolve().parent / "_expected.yml"
INVENTORY_TIMEOUT_S = 60
CONNECT_TIMEOUT_S = 8
_RESULT = re.compile(r"^(?:ok|fatal): \[(?P<host>[^\]]+)\](?P<failed>: FAILED!)? => (?=\{)", re.MULTILINE)


class InventoryUnreadable(Exception):
    """The inventory could not be read; the message is one line for the person who called."""


@dataclass(frozen=True)
class Host:
    """One host: its name, its groups and its templated variables (role defaults included).

    `refusal` says why there are none: one line about a value that cannot be worked out.
    """

    name: str
    groups: frozenset[str] = frozenset()
    variables: Mapping[str, Any] = field(default_factory=dict)
    refusal: str = ""

    @property
    def address(self) -> str:
        """Where ssh and HTTP reach it."""
        return str(self.variables.get("ansible_host") or self.name)

    def ssh(self, command: str) -> list[str]:
        """The argv that runs `command` on the host."""
        return [*self.ssh_options(), self.address, "--", command]

    def ssh_options(self) -> list[str]:
        """`ssh` with the inventory's own key, port, user and ssh arguments.

        It never asks anything, and opens a connection of its own: a stale multiplexing socket cannot answer
        for the host.
        """
        argv = [
            "ssh",
            "-o",
            "BatchMode=yes",
            "-o",
            f"ConnectTimeout={CONNECT_TIMEOUT_S}",
            "-o",
            "ControlMaster=no",
            "-o",
            "ControlPath=none",
            "-o",
            "LogLevel=ERROR",
            *self.ssh_arguments(),
        ]
        if port := self.variables.get("ansible_port"):
            argv += ["-p", str(port)]
        if key := self.variables.get("ansible_ssh_private_key_file"):
            argv += ["-o", "IdentitiesOnly=yes", "-i", str(Path(str(key)).expanduser())]
        if user := self.variables.get("ansible_user"):
            argv += ["-l", str(user)]
        return argv

    def ssh_arguments(self) -> list[str]:
        """`ansible_ssh_common_args` and `ansible_ssh_extra_args` as words."""
        names = ("ansible_ssh_common_args", "ansible_ssh_extra_args")
        return [word for name in names for word in shlex.split(str(self.variables.get(name) or ""))]

    def ssh_option(self, name: str) -> str | None:
        """The value of `-o NAME=value` in the host's ssh arguments, or None."""
        words = iter(self.ssh_arguments())
        for word in words:
            if not word.startswith("-o"):
                continue
            key, _, value = (word[2:] or next(words, "")).partition("=")
            if key.strip().lower() == name.lower():
                return value.strip().strip('"')
        return None


def environment() -> dict[str, str]:
    """The environment of Ansible's programs: this venv first on PATH, the repository's settings."""
    return {
        **{name: value for name, value in os.environ.items() if name != "ANSIBLE_FORCE_COLOR"},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
        "ANSIBLE_NOCOLOR": "1",
    }


def load(inventory: Path, *, limit: str | None = None, partly: bool = False) -> list[Host]:
    """Hosts of `inventory` (those that match the Ansible pattern `limit`), in the inventory's order.

    With `partly` a host whose variables cannot be worked out is among them, with its refusal.

    Raises InventoryUnreadable: no such directory, Ansible missing, an error in the data, or no host left.
    """
    if not inventory.exists():
        raise InventoryUnreadable(
            f"--inventory {inventory}: no such file or directory; "
            "give one of inventory/production, inventory/lab"
        )
    command = [
        "ansible-playbook",
        "-i",
        str(inventory),
        str(EXPECTED_PLAYBOOK),
        "--tags",
        "expected",
        "--skip-tags",
        "always",
    ]
    if limit:
        command += ["--limit", limit]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=INVENTORY_TIMEOUT_S,
            check=False,
            env={
                **environment(),
                "ANSIBLE_STDOUT_CALLBACK": "default",
                "ANSIBLE_CALLBACK_RESULT_FORMAT": "json",
                "ANSIBLE_DISPLAY_OK_HOSTS": "1",
            },
        )
    except FileNotFoundError:
        raise InventoryUnreadable(
            "ansible-playbook is not installed beside this Python; run `make setup` and use .venv/bin/python"
        ) from None
    except subprocess.TimeoutExpired:
        raise InventoryUnreadable(
            f"reading {inventory} took more than {INVENTORY_TIMEOUT_S} s; run "
            f"`.venv/bin/ansible-inventory -i {inventory} --list` to see where it hangs"
        ) from None
    hosts = parse_hosts(done.stdout)
    if "no hosts to target" in done.stderr:
        hosts = []
    elif done.returncode != 0 and not (partly and any(host.refusal for host in hosts)):
        raise InventoryUnreadable(f"{inventory}: {_reason(done.stdout + done.stderr)}")
    if not hosts:
        raise InventoryUnreadable(
            f"{inventory}: no host"
            + (f" matches --limit {limit}" if limit else "")
            + f"; `.venv/bin/ansible-inventory -i {inventory} --graph` shows what there is"
        )
    return hosts


def parse_hosts(output: str) -> list[Host]:
    """Hosts in what `_expected.yml` printed."""
    decoder = json.JSONDecoder()
    hosts = []
    for match in _RESULT.finditer(output):
        printed, _ = decoder.raw_decode(output, match.end())
        if match["failed"]:
            hosts.append(Host(match["host"], refusal=" ".join(str(printed["msg"]).split())))
            continue
        value = json.loads(printed["msg"])
        hosts.append(Host(match["host"], frozenset(value["groups"]), value["variables"]))
    return hosts


def _reason(output: str) -> str:
    """Ansible's own error as one line, without its decoration."""
    lines = [line.strip() for line in output.splitlines()]
    for mark in ("[ERROR]:", "ERROR!", "fatal:", "[WARNING]:"):
        for line in lines:
            if line.startswith(mark):
                return line.removeprefix(mark).strip()
    return next((line for line in reversed(lines) if line), "ansible-playbook failed without a word")

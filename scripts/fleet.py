#!/usr/bin/env python3
"""One screen for all boxes: active preset, state, build commit, GPU, disk.

    scripts/fleet.py --inventory DIR [--limit PATTERN] [--json]

Looks only. Hosts are asked side by side through pyinfra, with the inventory's own user, port, key and pinned
host keys. Exit codes: 0 every box was reached and none is in trouble, 1 a box is in trouble (its preset
failed, lmswitch or the GPU does not answer), 2 a box could not be reached, its data is refused,
or the inventory cannot be read.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lab import interrupt
from scripts import _venv

if __name__ == "__main__":
    interrupt.exit_quietly()
    _venv.enter()
    # Before anything imports sockets: pyinfra asks its hosts side by side through gevent.
    from gevent import monkey  # type: ignore[import-untyped]

    monkey.patch_all()

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from typing import Any

from llama_common.problems import InventoryError

from scripts import _command
from scripts._ask_host import PROBE_TIMEOUT_S, probe_source
from scripts._inventory import CONNECT_TIMEOUT_S, Host, load
from scripts._llm_box import GROUP, LlmBox, gateway_units_unlike
from scripts._screen import size, table

NOTHING = "-"
STATES_IN_TROUBLE = ("failed",)
HEADERS = ("host", "preset", "state", "build", "gpu", "disk free")


@dataclass(frozen=True)
class Row:
    """One box on the screen. `disk_free` in bytes; `trouble` says what is wrong, "" when nothing is.

    A box that is not `reached` was asked in vain, or not at all because its data is `refused`.
    """

    host: str
    reached: bool
    preset: str | None = None
    state: str | None = None
    build: str | None = None
    commit: str | None = None
    gpu: str | None = None
    disk_free: int | None = None
    trouble: str = ""
    refused: bool = False

    def cells(self) -> list[str]:
        """The row as text."""
        if not self.reached:
            state = "refused" if self.refused else "unreachable"
            return [self.host, NOTHING, state, NOTHING, NOTHING, NOTHING]
        build = f"{self.build}@{self.commit[:9]}" if self.build and self.commit else self.build or NOTHING
        disk = NOTHING if self.disk_free is None else size(self.disk_free)
        return [self.host, self.preset or NOTHING, self.state or NOTHING, build, gpu_text(self.gpu), disk]


def gpu_text(line: str | None) -> str:
    """nvidia-smi's `name, used, total, °C` for a person; `-` without a GPU."""
    if not line:
        return NOTHING
    fields = [field.strip() for field in line.split(",")]
    if len(fields) != 4:
        return line
    name, used, total, celsius = fields
    return f"{name.removeprefix('NVIDIA GeForce ')} {used}/{total} MiB {celsius} °C"


def row(host: Host, seen: Mapping[str, Any]) -> Row:
    """What the probe saw on one host."""
    gpu = seen.get("gpu")
    trouble = f"nvidia-smi {gpu}" if gpu and gpu.split(":")[0] in ("hung", "failed") else ""
    llm = seen.get("llm")
    if llm is None:
        return Row(host.name, True, gpu=gpu, disk_free=(seen["disk"] or {}).get("free"), trouble=trouble)
    status = llm["status"]
    disk_free = (llm["disk"] or {}).get("free")
    if status is None:
        silent = "lmswitch status --json gave no answer; fix: run site.yml"
        return Row(host.name, True, gpu=gpu, disk_free=disk_free, trouble=trouble or silent)
    down = gateway_units_unlike(llm["gateway_units"], "ActiveState", "active")
    if down:
        trouble = trouble or f"{' and '.join(down)} not active; fix: systemctl --user start {' '.join(down)}"
    if status["state"] in STATES_IN_TROUBLE:
        trouble = trouble or f"the preset {status['active']} failed; look with: lmswitch logs"
    return Row(
        host.name,
        True,
        preset=status["active"],
        state=status["state"],
        build=status["build"] or None,
        commit=status["commit"] or None,
        gpu=gpu,
        disk_free=disk_free,
        trouble=trouble,
    )


def pyinfra_data(host: Host) -> dict[str, Any]:
    """A host's connection in pyinfra's terms; an unknown host key is refused unless the inventory says so."""
    variables = host.variables
    arguments = host.ssh_arguments()
    data = {
        "ssh_hostname": host.address,
        "ssh_user": variables.get("ansible_user"),
        "ssh_port": variables.get("ansible_port"),
        "ssh_key": variables.get("ansible_ssh_private_key_file"),
        "ssh_known_hosts_file": host.ssh_option("UserKnownHostsFile"),
        "ssh_strict_host_key_checking": host.ssh_option("StrictHostKeyChecking") or "yes",
        "ssh_config_file": arguments[arguments.index("-F") + 1] if "-F" in arguments else None,
    }
    return {name: value for name, value in data.items() if value is not None}


def request(host: Host) -> dict[str, Any]:
    """What to ask a host for. Raises InventoryError for data that is refused."""
    return {"gpu": True, **({"llm": LlmBox.of(host.variables).request()} if GROUP in host.groups else {})}


def ask_all(hosts: Sequence[Host]) -> list[Row]:
    """Ask all hosts side by side, in the order given; one whose data is refused is a row that says so."""
    requests: dict[str, dict[str, Any]] = {}
    refused: dict[str, Row] = {}
    for host in hosts:
        if host.refusal:
            why = f"refused: {host.refusal}; fix: playbooks/validate.yml names the file and the key"
            refused[host.name] = Row(host.name, False, trouble=why, refused=True)
            continue
        key = host.variables.get("ansible_ssh_private_key_file")
        if key and not Path(str(key)).expanduser().is_file():  # pyinfra would print a traceback for each
            why = f"its ssh key {key} is missing; fix: ansible_ssh_private_key_file, or for a lab: make lab"
            refused[host.name] = Row(host.name, False, trouble=why)
            continue
        try:
            requests[host.name] = request(host)
        except InventoryError as error:
            refused[host.name] = Row(host.name, False, trouble=str(error), refused=True)
    sound = [host for host in hosts if host.name in requests]
    rows = refused | {row.host: row for row in (ask(sound, requests) if sound else [])}
    return [rows[host.name] for host in hosts]


def ask(hosts: Sequence[Host], requests: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Ask hosts side by side for what `requests` says, in the order given."""
    from gevent import joinall
    from pyinfra.api.connect import connect_all, disconnect_all
    from pyinfra.api.exceptions import PyinfraError
    from pyinfra.api.state import BaseStateCallback

    pyinfra: Any = import_module("pyinfra.api")  # its classes are only half typed
    logging.getLogger("pyinfra").setLevel(logging.CRITICAL)
    logging.getLogger("paramiko").setLevel(logging.CRITICAL)
    inventory = pyinfra.Inventory(([(host.name, pyinfra_data(host)) for host in hosts], {}))
    state = pyinfra.State(inventory, pyinfra.Config(CONNECT_TIMEOUT=CONNECT_TIMEOUT_S))
    errors: dict[str, str] = {}

    class Listener(BaseStateCallback):
        """Keeps why a host could not be connected to."""

        @staticmethod
        def host_connect_error(_state: Any, failed: Any, error: Exception) -> None:
            errors[failed.name] = " ".join(str(error).split())

    def asked(host: Host) -> Row:
        remote = inventory.get_host(host.name)
        if not remote.connected:
            return Row(host.name, False, trouble=errors.get(host.name, "no connection"))
        try:
            done, output = remote.run_shell_command(
                "/usr/bin/python3 -",
                _stdin=probe_source(requests[host.name]),
                _sudo=GROUP in host.groups,
                _timeout=PROBE_TIMEOUT_S,
            )
            if not done:
                said = output.stderr.strip().splitlines() or ["the probe failed"]
                return Row(host.name, False, trouble=said[-1])
            return row(host, json.loads(output.stdout.strip().splitlines()[-1]))
        except (PyinfraError, OSError, ValueError, IndexError) as error:
            return Row(host.name, False, trouble=f"{type(error).__name__}: {error}")

    state.add_callback_handler(Listener())
    with suppress(PyinfraError):  # raised when no host is left; the rows say why
        connect_all(state)
    jobs = [state.pool.spawn(asked, host) for host in hosts]
    joinall(jobs)
    disconnect_all(state)
    return [job.get() for job in jobs]


def exit_code(rows: Sequence[Row]) -> int:
    """0 all well, 1 a box in trouble, 2 a box not reached."""
    if not all(one.reached for one in rows):
        return 2
    return 1 if any(one.trouble for one in rows) else 0


def screen(rows: Sequence[Row]) -> str:
    """The table, and one line for each box in trouble."""
    lines = [f"{one.host}: {one.trouble}" for one in rows if one.trouble]
    return "\n".join([table(HEADERS, [one.cells() for one in rows]), *([""] if lines else []), *lines])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = _command.parser(
        __doc__,
        "0 all well, 1 a box is in trouble, 2 a box could not be reached or its data is refused",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Show the screen."""
    args = parse(argv)
    return _command.attempt("fleet", args.inventory, lambda: show(args))


def show(args: argparse.Namespace) -> int:
    """Ask the boxes and print what they said. Raises InventoryUnreadable."""
    rows = ask_all(load(args.inventory, limit=args.limit, partly=True))
    rows = [replace(row, trouble=_command.typed(row.trouble, args.inventory)) for row in rows]
    if args.json:
        print(json.dumps({"ok": exit_code(rows) == 0, "hosts": [asdict(one) for one in rows]}, indent=2))
    else:
        print(screen(rows))
    return exit_code(rows)


if __name__ == "__main__":
    _command.end(main)

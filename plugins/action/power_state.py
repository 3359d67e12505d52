"""Wait, from this machine, until another one is awake, asleep or runs Windows; wake it meanwhile.

Nothing runs on the machine that is watched. Magic packets come from where the task is delegated to.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail  # type: ignore[import-untyped]
from ansible.plugins.action import ActionBase  # type: ignore[import-untyped]

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "apps/llama_common/src"))

from llama_common.power import Seen, State, message, watch

ANSWER_S = 2.0
BANNER_BYTES = 255


def banner(address: str, port: int) -> str:
    """What an SSH server calls itself; empty without one."""
    with contextlib.suppress(OSError), socket.create_connection((address, port), ANSWER_S) as connection:
        connection.settimeout(ANSWER_S)
        return connection.recv(BANNER_BYTES).decode(errors="replace").strip()
    return ""


def answers(address: str, port: int) -> bool:
    """Whether somebody listens there."""
    with contextlib.suppress(OSError), socket.create_connection((address, port), ANSWER_S):
        return True
    return False


def pings(address: str) -> bool:
    """Whether the machine answers ping; no where this machine has none."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            ["ping", "-c", "1", address],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=ANSWER_S,
            check=False,
        )
        return done.returncode == 0
    return False


def seen(address: str, port: int, windows_address: str, windows_ports: list[int]) -> Seen:
    """One look; what settles it comes first."""
    if said := banner(address, port):
        return Seen(said)
    found = next((number for number in windows_ports if answers(windows_address, number)), None)
    return Seen("", found, found is None and (pings(address) or pings(windows_address)))


class ActionModule(ActionBase):  # type: ignore[misc]
    """`power_state: {name, address, port, until, timeout, windows: {...}, packet: {...}}`."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _VALID_ARGS = frozenset(
        {"name", "address", "port", "until", "timeout", "through_windows", "windows", "packet"}
    )

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """The state, and one line about it; failed when it is not the wanted one."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        asked = self._task.args
        name, until, windows = str(asked["name"]), asked["until"], asked["windows"]
        packet = asked.get("packet") or {}
        mac = str(packet.get("mac") or "")

        def look() -> State:
            ports = [int(number) for number in windows["ports"]]
            return seen(str(asked["address"]), int(asked["port"]), str(windows["address"]), ports).state

        def wake() -> None:
            arguments = {key: packet[key] for key in ("mac", "addresses", "port")}
            sent = self._execute_module(
                module_name="magic_packet", module_args=arguments, task_vars=task_vars
            )
            if sent.get("failed"):
                raise AnsibleActionFail(str(sent.get("msg")))
            self._display.display(f"  [{name}] magic packet to {', '.join(map(str, packet['addresses']))}")

        watched = watch(
            look,
            until,
            float(asked.get("timeout", 0)),
            wake=wake if mac and not self._task.check_mode else None,
            wake_interval_s=float(packet.get("interval", 10)),
            through_windows=bool(asked.get("through_windows")),
            clock=time.monotonic,
            pause=time.sleep,
        )
        result.update(
            changed=watched.packets > 0,
            state=watched.state,
            msg=message(name, until, watched, mac),
            failed=until not in ("any", watched.state),
        )
        return result

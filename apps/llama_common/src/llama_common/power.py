"""What a machine that may be asleep, or run Windows, is doing, and what its owner does about it. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

State = Literal["linux", "windows", "up", "silent"]
Until = Literal["linux", "windows", "silent", "any"]

PAUSE_S: Final = 2.0
# What one look may be wrong about: a packet gets lost, and Linux's Samba may answer before its sshd does.
SILENT_S: Final = 10.0
WINDOWS_S: Final = 30.0


@dataclass(frozen=True)
class Seen:
    """What was seen of a machine from outside. `banner` is what its SSH server calls itself."""

    banner: str = ""
    windows_port: int | None = None
    pings: bool = False

    @property
    def state(self) -> State:
        """What that makes of it: Windows too may have an SSH server, which says so."""
        if self.windows_port is not None or "windows" in self.banner.lower():
            return "windows"
        if self.banner.startswith("SSH-"):
            return "linux"
        return "up" if self.pings else "silent"


@dataclass(frozen=True)
class Watched:
    """How a watch ended: the last state, seconds, magic packets sent."""

    state: State
    seconds: float
    packets: int = 0


def watch(
    look: Callable[[], State],
    until: Until,
    timeout_s: float,
    *,
    wake: Callable[[], None] | None = None,
    wake_interval_s: float = 10.0,
    through_windows: bool = False,
    clock: Callable[[], float],
    pause: Callable[[float], None],
) -> Watched:
    """Look until the machine is in the wanted state, at most `timeout_s`; what is silent is woken meanwhile.

    Without any time it is one look. Else it is silent when it has been for SILENT_S, also past `timeout_s`.
    What has been Windows for WINDOWS_S ends the wait for Linux, as it does not reboot by itself, unless it is
    `through_windows`.
    """
    began, last_wake, packets = clock(), float("-inf"), 0
    former: State | None = None
    since = began
    while True:
        state = look()
        now = clock()
        if state != former:
            former, since = state, now
        waited, stayed = now - began, now - since
        if until == "silent" and state == "silent" and timeout_s > 0:
            ended = stayed >= SILENT_S
        elif until == "linux" and state == "windows" and not through_windows:
            ended = stayed >= WINDOWS_S or waited >= timeout_s
        else:
            ended = until in ("any", state) or waited >= timeout_s
        if ended:
            return Watched(state, waited, packets)
        if wake and state == "silent" and now - last_wake >= wake_interval_s:
            wake()
            last_wake, packets = clock(), packets + 1
        pause(PAUSE_S)


def message(name: str, until: Until, watched: Watched, mac: str = "") -> str:
    """One line: what the machine is doing, and when that was not wanted, what to do."""
    state, after = watched.state, f"{watched.seconds:.0f} s"
    if state == until:
        how = f", magic packets sent: {watched.packets}" if watched.packets else ""
        return f"{name}: {_STATES[state]}{how} ({after})"
    if until == "any":
        return f"{name}: {_STATES[state]}"
    if state == "windows":
        return (
            f"{name} runs Windows; fix: restart it there, its next boot is Linux again, "
            "or -e power_action=linux with power_windows_user set"
        )
    if state == "up":
        return (
            f"{name} answers ping, but neither SSH nor Windows does ({after}): it boots, sshd is down, or "
            "its firewall does not let this machine in; fix: look at its screen"
        )
    if state == "linux":
        wanted = "go to sleep or off" if until == "silent" else "start Windows"
        return f"{name} still answers SSH after {after}: it did not {wanted}; fix: journalctl -b"
    if until == "windows":
        return (
            f"{name} is silent after {after}: Windows answers on none of power_windows_ports, or its boot "
            "waits for a key; fix: look at its screen"
        )
    if not mac:
        return f"{name} is asleep, off or gone; fix: set power_mac, then -e power_action=wake wakes it"
    if not watched.packets:
        return f"{name} is asleep, off or gone; fix: -e power_action=wake"
    return (
        f"{name} is gone: no answer to {watched.packets} magic packets for {mac} in {after}; fix: look at "
        "its power switch, its cable and Wake-on-LAN in its firmware, and whether power_mac is its own"
    )


_STATES: Final[dict[State, str]] = {
    "linux": "awake, SSH answers",
    "windows": "runs Windows",
    "up": "answers ping, but neither SSH nor Windows does",
    "silent": "silent: asleep, off or gone",
}

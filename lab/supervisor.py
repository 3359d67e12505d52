"""Processes that outlive the command that starts them, each in a control group of its own.

The control group is the identity: what runs in it was started by this lab, and it can be ended as a whole.
Where the machine's init is systemd the groups are transient units; elsewhere they are plain directories.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from lab.shell import LabError, run

REBOOT_STATUS = 133  # what systemd-nspawn exits with when the host inside asked for a reboot
# Joins its group, then runs the program in the group's `box`, again while the program asks for a reboot.
_LOOP = f"""
echo $$ > "$0/watch/cgroup.procs" || exit 1
while :; do
  sh -c 'echo $$ > "$0/box/cgroup.procs" && exec "$@"' "$0" "$@"
  [ $? -eq {REBOOT_STATUS} ] || exit
done
"""


class Supervisor(Protocol):
    """Starts and ends processes under a name."""

    def start(self, unit: str, argv: Sequence[str | Path], env: Mapping[str, str], log: Path) -> None: ...
    def alive(self, unit: str) -> bool: ...
    def exists(self, unit: str) -> bool: ...
    def group(self, unit: str) -> Path:
        """The control group (v2) of all processes under the name."""

    def poweroff(self, unit: str) -> None:
        """Ask the main process to end in order (SIGTERM)."""

    def stop(self, unit: str) -> None:
        """End everything at once and leave no trace."""


def choose() -> Supervisor:
    """Return the supervisor that fits this machine's init."""
    if Path("/run/systemd/system").is_dir():
        return SystemdSupervisor()
    return CgroupSupervisor(*hierarchies(Path("/proc/self/mounts").read_text()))


def mounts(text: str) -> Iterator[tuple[Path, str, list[str]]]:
    """Place, type and options of each mount in the text of /proc/self/mounts."""
    for line in text.splitlines():
        _, place, kind, options, *_ = line.split(" ")
        yield Path(place), kind, options.split(",")


def hierarchies(text: str) -> tuple[Path, list[Path]]:
    """Return where cgroup v2 is mounted and the v1 hierarchies beside it, from the text of /proc/self/mounts.

    Raises LabError when there is no cgroup v2.
    """
    found: dict[str, list[Path]] = {"cgroup2": [], "cgroup": []}
    for place, kind, _ in mounts(text):
        found.get(kind, []).append(place)
    if not found["cgroup2"]:
        raise LabError("no cgroup v2 hierarchy is mounted; fix: mount -t cgroup2 none /sys/fs/cgroup", 2)
    return found["cgroup2"][0], found["cgroup"]


class CgroupSupervisor:
    """Control groups as directories, for machines whose init is not systemd."""

    def __init__(self, hierarchy: Path, older: Sequence[Path] = ()) -> None:
        self._hierarchy = hierarchy
        self._older = older  # on a hybrid machine systemd-nspawn makes empty groups there too

    def group(self, unit: str) -> Path:
        return self._hierarchy / unit

    def start(self, unit: str, argv: Sequence[str | Path], env: Mapping[str, str], log: Path) -> None:
        group = self.group(unit)
        for part in ("watch", "box"):
            (group / part).mkdir(parents=True, exist_ok=True)
        with log.open("ab") as stream:
            subprocess.Popen(
                ["/bin/sh", "-c", _LOOP, str(group), *map(str, argv)],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env={**os.environ, **env},
                cwd="/",
                start_new_session=True,
            )

    def alive(self, unit: str) -> bool:
        try:
            return "populated 1" in (self.group(unit) / "cgroup.events").read_text()
        except (FileNotFoundError, OSError):
            return False

    def exists(self, unit: str) -> bool:
        return self.group(unit).exists()

    def poweroff(self, unit: str) -> None:
        for inner in ("box/supervisor", "box"):
            procs = self.group(unit) / inner / "cgroup.procs"
            with contextlib.suppress(FileNotFoundError):
                for pid in procs.read_text().split():
                    os.kill(int(pid), signal.SIGTERM)

    def stop(self, unit: str) -> None:
        group = self.group(unit)
        deadline = time.monotonic() + 30
        if group.exists():
            (group / "cgroup.kill").write_text("1")
        while self.alive(unit):
            if time.monotonic() > deadline:
                raise LabError(f"processes in {group} do not end within 30 s: `cat {group}/cgroup.events`")
            time.sleep(0.02)
        for hierarchy in (self._hierarchy, *self._older):
            for folder, _, _ in os.walk(hierarchy / unit, topdown=False):
                remove_group(Path(folder), deadline)


class SystemdSupervisor:
    """Transient services of the machine's own systemd."""

    def start(self, unit: str, argv: Sequence[str | Path], env: Mapping[str, str], log: Path) -> None:
        properties = (
            "Delegate=yes",
            "KillMode=mixed",
            "TasksMax=infinity",
            f"RestartForceExitStatus={REBOOT_STATUS}",
            f"SuccessExitStatus={REBOOT_STATUS}",
            "StartLimitIntervalSec=0",
            f"StandardOutput=append:{log}",
            f"StandardError=append:{log}",
        )
        run(
            [
                *("systemd-run", "--quiet", "--collect", f"--unit={unit}.service"),
                *(f"--property={value}" for value in properties),
                *(f"--setenv={name}={value}" for name, value in env.items()),
                *("--", *argv),
            ]
        )

    def alive(self, unit: str) -> bool:
        return run(["systemctl", "is-active", "--quiet", f"{unit}.service"], check=False).returncode == 0

    def exists(self, unit: str) -> bool:
        done = run(["systemctl", "show", "--property=LoadState", "--value", f"{unit}.service"], check=False)
        return done.stdout.strip() not in ("not-found", "")

    def group(self, unit: str) -> Path:
        done = run(["systemctl", "show", "--property=ControlGroup", "--value", f"{unit}.service"])
        hierarchy, _ = hierarchies(Path("/proc/self/mounts").read_text())
        return hierarchy / done.stdout.strip().lstrip("/")

    def poweroff(self, unit: str) -> None:
        run(["systemctl", "kill", "--kill-whom=main", "--signal=TERM", f"{unit}.service"], check=False)

    def stop(self, unit: str) -> None:
        run(["systemctl", "kill", "--signal=KILL", f"{unit}.service"], check=False)
        run(["systemctl", "stop", f"{unit}.service"], check=False)
        run(["systemctl", "reset-failed", f"{unit}.service"], check=False)


def remove_group(group: Path, deadline: float) -> None:
    """Remove an emptied control group; the kernel needs a moment after the last process is gone."""
    while True:
        try:
            group.rmdir()
        except FileNotFoundError:
            return
        except OSError as exc:
            if time.monotonic() > deadline:
                raise LabError(f"cannot remove control group {group}: {exc.strerror}") from exc
            time.sleep(0.02)
        else:
            return

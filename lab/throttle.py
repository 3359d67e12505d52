"""A lab host on a slower disk: what its processes read is held to a rate, by the machine's control groups."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from lab.config import Host, Lab
from lab.hosts import unit_of
from lab.supervisor import choose, mounts, remove_group

_READ_LIMIT = "blkio.throttle.read_bps_device"
_MOVING_S = 10.0
_SYS_BLOCK = Path("/sys/dev/block")


class CannotThrottle(Exception):
    """This machine cannot do it; the message is the reason, one line."""


@contextlib.contextmanager
def slow_reads(lab: Lab, host: Host, bytes_per_s: int) -> Iterator[None]:
    """Hold what the host reads from the disk under its files to a rate while the body runs.

    Nothing of it is left afterwards; what a killed program leaves goes with the host (`lab down`).
    Raises CannotThrottle.
    """
    disk = disk_under(lab.host_dir(host))
    unit = unit_of(lab, host.short)
    keeper = choose()
    if not keeper.alive(unit):
        raise CannotThrottle(f"{host.name} does not run on this machine")
    group = keeper.group(unit)
    older = blkio_hierarchy(Path("/proc/self/mounts").read_text())
    if (group / "io.max").exists():
        limit = _io_max(group, disk, bytes_per_s)
    elif older is not None and (older / _READ_LIMIT).exists():
        limit = _blkio(older, unit, group, disk, bytes_per_s)
    else:
        raise CannotThrottle(_reason(group, older))
    with limit:
        yield


def disk_under(path: Path, known: Path = _SYS_BLOCK) -> str:
    """`major:minor` of the whole disk under a file system: limits are the disk's. Raises CannotThrottle."""
    number = path.stat().st_dev
    name = f"{os.major(number)}:{os.minor(number)}"
    device = known / name
    if not device.exists():
        raise CannotThrottle(f"the file system of {path} is not on one block device")
    if (device / "partition").exists():
        return (device.resolve().parent / "dev").read_text().strip()
    return name


def blkio_hierarchy(text: str) -> Path | None:
    """Where /proc/self/mounts says that the blkio controller of cgroup v1 is."""
    found = (place for place, kind, options in mounts(text) if kind == "cgroup" and "blkio" in options)
    return next(found, None)


def _reason(group: Path, older: Path | None) -> str:
    if older is not None:
        return f"the kernel has no {_READ_LIMIT} in {older} (CONFIG_BLK_DEV_THROTTLING)"
    return f"no control group limits reads: {group} has no io.max, and blkio of cgroup v1 is not mounted"


@contextlib.contextmanager
def _io_max(group: Path, disk: str, bytes_per_s: int) -> Iterator[None]:
    """cgroup v2: the host's group has the limit."""
    limit = group / "io.max"
    try:
        limit.write_text(f"{disk} rbps={bytes_per_s}")
    except OSError as error:
        raise CannotThrottle(f"{limit} does not take a limit for {disk}: {error.strerror}") from None
    try:
        yield
    finally:
        limit.write_text(f"{disk} rbps=max")


@contextlib.contextmanager
def _blkio(hierarchy: Path, unit: str, group: Path, disk: str, bytes_per_s: int) -> Iterator[None]:
    """cgroup v1: the host's processes go into a group with the limit, and back to where they were.

    The group is called like the host's unit, so that `lab down` finds it.
    """
    home = hierarchy / _group_in(hierarchy, _members(group)[0])
    home = home.parent if home.name == unit else home
    slow = home / unit
    slow.mkdir(exist_ok=True)
    try:
        try:
            (slow / _READ_LIMIT).write_text(f"{disk} {bytes_per_s}")
        except OSError as error:
            raise CannotThrottle(f"blkio does not take a limit for {disk}: {error.strerror}") from None
        _move(lambda: [pid for pid in _members(group) if pid not in _members(slow)], slow)
        yield
    finally:
        _move(lambda: _members(slow), home)
        remove_group(slow, time.monotonic() + _MOVING_S)


def _group_in(hierarchy: Path, pid: int) -> str:
    """The group of a process in a hierarchy of cgroup v1, relative to its mount."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "blkio" in controllers.split(","):
            return path.lstrip("/")
    raise CannotThrottle(f"process {pid} is in no group of {hierarchy}")


def _members(group: Path) -> list[int]:
    """All processes of a group and the groups in it."""
    pids: list[int] = []
    for folder, _, _ in os.walk(group):
        with contextlib.suppress(OSError):
            pids += map(int, (Path(folder) / "cgroup.procs").read_text().split())
    return pids


def _move(left: Callable[[], list[int]], to: Path) -> None:
    """Move processes until none is left: one that is born meanwhile is where its parent was."""
    deadline = time.monotonic() + _MOVING_S
    while pids := left():
        if time.monotonic() > deadline:
            raise CannotThrottle(f"processes {pids} cannot be moved into {to}")
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                (to / "cgroup.procs").write_text(str(pid))

"""A lab host on a slower disk: finding the disk and the control group, and leaving nothing behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lab import throttle
from lab.config import Lab
from lab.throttle import CannotThrottle, slow_reads

HYBRID = """/dev/vda / ext4 rw 0 0
cgroup /sys/fs/cgroup/cpu cgroup rw,relatime,cpu 0 0
cgroup /sys/fs/cgroup/blkio cgroup rw,relatime,blkio 0 0
cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0
"""


class Keeper:
    """A supervisor of one unit."""

    def __init__(self, group: Path, alive: bool = True) -> None:
        self._group, self._alive = group, alive

    def alive(self, _unit: str) -> bool:
        """Whether it runs."""
        return self._alive

    def group(self, _unit: str) -> Path:
        """Its control group."""
        return self._group


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """A lab whose LLM box is a control group in a folder, on the disk 254:0."""
    monkeypatch.setattr(throttle, "choose", lambda: Keeper(tmp_path / "group"))
    monkeypatch.setattr(throttle, "disk_under", lambda _path: "254:0")
    monkeypatch.setattr(throttle, "blkio_hierarchy", lambda _text: None)
    (tmp_path / "group").mkdir()
    return Lab("lab", "bookworm", tmp_path)


def test_the_blkio_hierarchy_is_found_by_its_option() -> None:
    assert throttle.blkio_hierarchy(HYBRID) == Path("/sys/fs/cgroup/blkio")
    assert throttle.blkio_hierarchy("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n") is None


def test_the_disk_of_a_partition_is_the_whole_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "devices/vda"
    (disk / "vda1").mkdir(parents=True)
    (disk / "dev").write_text("254:0\n")
    known = tmp_path / "block"
    known.mkdir()
    monkeypatch.setattr(os, "major", lambda _number: 254)
    monkeypatch.setattr(os, "minor", lambda _number: 1)
    with pytest.raises(CannotThrottle, match="not on one block device"):
        throttle.disk_under(tmp_path, known)
    (known / "254:1").symlink_to(disk / "vda1")
    assert throttle.disk_under(tmp_path, known) == "254:1", "a file system without partitions"
    (disk / "vda1/partition").write_text("1\n")
    assert throttle.disk_under(tmp_path, known) == "254:0"


def test_the_group_has_the_limit_only_meanwhile(lab: Lab, tmp_path: Path) -> None:
    limit = tmp_path / "group/io.max"
    limit.touch()
    with pytest.raises(KeyboardInterrupt), slow_reads(lab, lab.hosts[0], 50_000_000):
        assert limit.read_text() == "254:0 rbps=50000000"
        raise KeyboardInterrupt
    assert limit.read_text() == "254:0 rbps=max"


def test_without_a_controller_the_reason_is_told(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_limit = r"group has no io\.max, and blkio"
    with pytest.raises(CannotThrottle, match=no_limit), slow_reads(lab, lab.hosts[0], 1):
        pass
    monkeypatch.setattr(throttle, "blkio_hierarchy", lambda _text: tmp_path)
    with pytest.raises(CannotThrottle, match="CONFIG_BLK_DEV_THROTTLING"), slow_reads(lab, lab.hosts[0], 1):
        pass


def test_a_host_that_does_not_run_is_told(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throttle, "choose", lambda: Keeper(tmp_path, alive=False))
    with pytest.raises(CannotThrottle, match="lab-llm does not run"), slow_reads(lab, lab.hosts[0], 1):
        pass


def test_processes_go_into_a_slow_group_and_back(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "blkio"
    root.mkdir()
    (root / throttle._READ_LIMIT).touch()
    done: list[tuple[str, Path]] = []
    monkeypatch.setattr(throttle, "blkio_hierarchy", lambda _text: root)
    monkeypatch.setattr(throttle, "_group_in", lambda _hierarchy, _pid: "")
    monkeypatch.setattr(throttle, "_members", lambda _group: [7])
    monkeypatch.setattr(throttle, "_move", lambda _left, to: done.append(("into", to)))
    monkeypatch.setattr(throttle, "remove_group", lambda group, _deadline: done.append(("gone", group)))
    slow = root / "llmbox-lab-llm"  # the name by which `lab down` finds it
    with pytest.raises(KeyboardInterrupt), slow_reads(lab, lab.hosts[0], 50_000_000):
        assert done == [("into", slow)]
        assert (slow / throttle._READ_LIMIT).read_text() == "254:0 50000000"
        raise KeyboardInterrupt
    assert done == [("into", slow), ("into", root), ("gone", slow)]


def test_processes_are_moved_until_none_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = iter([[7], [8], []])  # 8 was born while 7 was moved
    throttle._move(lambda: next(left), tmp_path)
    assert (tmp_path / "cgroup.procs").read_text() == "8"
    monkeypatch.setattr(throttle, "_MOVING_S", 0.0)
    with pytest.raises(CannotThrottle, match=r"\[7\] cannot be moved"):
        throttle._move(lambda: [7], tmp_path)

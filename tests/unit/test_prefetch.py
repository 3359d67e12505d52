"""Prefetching a file, with the kernel's own word on what is in memory."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from llmbox import prefetch as module
from llmbox.prefetch import available_bytes, prefetch, resident_bytes

MIB = 1024 * 1024
SIZE = 24 * MIB + 123
PLENTY = 1024 * 1024 * MIB


@pytest.fixture
def cold(tmp_path: Path) -> Path:
    """A file of which nothing is in memory."""
    path = tmp_path / "model.gguf"
    path.write_bytes(os.urandom(SIZE))
    evict(path)
    if resident_bytes(path) > SIZE / 20:
        pytest.skip(f"{tmp_path} keeps its files in memory")
    return path


def evict(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_reads_all_of_a_cold_file_and_nothing_of_a_warm_one(cold: Path) -> None:
    first = prefetch(cold, available=lambda: PLENTY)
    assert first.read >= SIZE * 0.9 and first.read + first.resident == SIZE
    assert resident_bytes(cold) == SIZE
    assert prefetch(cold, available=lambda: PLENTY).read == 0


def test_reads_only_the_part_that_is_missing(cold: Path) -> None:
    prefetch(cold, available=lambda: PLENTY)
    with cold.open("rb") as file:
        os.posix_fadvise(file.fileno(), 8 * MIB, 4 * MIB, os.POSIX_FADV_DONTNEED)
    done = prefetch(cold, available=lambda: PLENTY)
    assert 0 < done.read <= 5 * MIB and resident_bytes(cold) == SIZE


def test_nobody_waits_for_a_small_rest(cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefetch(cold, available=lambda: PLENTY)
    rest = int(SIZE * module.REST_SHARE) // 4096 * 4096 - 4096
    with cold.open("rb") as file:
        os.posix_fadvise(file.fileno(), 8 * MIB, rest, os.POSIX_FADV_DONTNEED)
    monkeypatch.setattr(os, "preadv", lambda *_: pytest.fail("it was waited for"))
    done = prefetch(cold, available=lambda: 0)
    assert 0 < done.read <= rest and done.left_out == 0
    deadline = time.monotonic() + 10
    while resident_bytes(cold) < SIZE and time.monotonic() < deadline:
        time.sleep(0.01)
    assert resident_bytes(cold) == SIZE, "but it does come"


def test_leaves_the_reserve_alone(cold: Path) -> None:
    done = prefetch(cold, available=lambda: module.RESERVE + 10 * MIB)
    assert done.read <= 10 * MIB and done.left_out >= SIZE - 10 * MIB - module.CHUNK


def test_a_gibibyte_is_left_alone(cold: Path) -> None:
    """Of the 32 GiB of a box: what llama-server itself takes while it loads."""
    done = prefetch(cold, available=lambda: 1024 * MIB + 8 * MIB)
    assert done.read <= 8 * MIB


def test_what_is_protected_keeps_its_memory(cold: Path, tmp_path: Path) -> None:
    present = tmp_path / "present.gguf"
    present.write_bytes(bytes(16 * MIB))
    done = prefetch(cold, protect=[present], available=lambda: module.RESERVE + 20 * MIB)
    assert done.read <= 4 * MIB


def test_ends_when_it_is_told_to(cold: Path) -> None:
    asked = iter([False, False, True])
    done = prefetch(cold, stop=lambda: next(asked, True), available=lambda: PLENTY)
    assert done.read <= 2 * module.CHUNK and done.left_out


def test_an_empty_file_and_a_missing_one(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert prefetch(tmp_path / "empty").read == 0
    with pytest.raises(FileNotFoundError):
        prefetch(tmp_path / "missing")


def test_available_memory_is_the_kernel_s_figure() -> None:
    assert 0 < available_bytes() < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 1.01

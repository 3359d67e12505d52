"""Read a model's file into the page cache before its server starts, as far as the memory goes."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

WINDOW = 256 * 1024 * 1024  # bytes looked at in one call of mincore: a vector of 64 KiB
CHUNK = 4 * 1024 * 1024
RESERVE = 1024**3  # bytes of free memory that a prefetch leaves alone
# Nobody waits for a rest of up to so many bytes, and so much of the file: it comes while the switch goes on.
REST, REST_SHARE = 16 * 1024 * 1024, 1 / 32

_LOWEST_BIT = bytes(byte & 1 for byte in range(256))
_PROT_READ, _MAP_SHARED, _MAP_FAILED = 1, 1, ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]


@dataclass(frozen=True)
class Prefetched:
    """What a prefetch did: bytes read, bytes that were there, bytes that the memory had no room for."""

    read: int
    resident: int
    left_out: int


def resident_bytes(path: Path) -> int:
    """Bytes of a file that are in the page cache. Raises OSError.

    The kernel tells only the file's owner (or who may write it) the truth: mincore(2), since Linux 5.2.
    """
    return sum(length for _, length, there in _ranges(path) if there)


def available_bytes() -> int:
    """Memory that can be had without swapping: MemAvailable of proc(5)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def prefetch(
    path: Path,
    *,
    protect: Iterable[Path] = (),
    stop: Callable[[], bool] = lambda: False,
    available: Callable[[], int] = available_bytes,
) -> Prefetched:
    """Read what is not in memory yet, from the file's beginning, until the memory that may be used is full.

    What `protect` names (the files of the present server) keeps its memory. `stop` ends it early.
    A small rest is only asked for: it comes while the switch goes on. Raises OSError.
    """
    rest = _small_rest(path)
    if rest is not None:
        with path.open("rb") as file:
            for offset, length in rest:
                os.posix_fadvise(file.fileno(), offset, length, os.POSIX_FADV_WILLNEED)
        asked = sum(length for _, length in rest)
        return Prefetched(asked, path.stat().st_size - asked, 0)
    room = available() - sum(resident_bytes(one) for one in protect if one != path) - RESERVE
    read = resident = left_out = 0
    buffer = bytearray(CHUNK)
    with path.open("rb", buffering=0) as file:
        for offset, length, there in _ranges(path):
            if there:
                resident += length
                continue
            position, end = offset, offset + length
            while position < end:
                if stop() or room < CHUNK:
                    left_out += end - position
                    break
                count = os.preadv(file.fileno(), [memoryview(buffer)[: min(CHUNK, end - position)]], position)
                if not count:
                    break
                position, read, room = position + count, read + count, room - count
    return Prefetched(read, resident, left_out)


def _small_rest(path: Path) -> list[tuple[int, int]] | None:
    """What is not in memory, offset and bytes each; None when that is more than a small rest."""
    left = min(REST, REST_SHARE * path.stat().st_size)
    rest = []
    for offset, length, there in _ranges(path):
        if not there:
            left -= length
            if left < 0:
                return None
            rest.append((offset, length))
    return rest


def _ranges(path: Path) -> Iterable[tuple[int, int, bool]]:
    """Runs of pages of a file that are, or are not, in the page cache: offset, bytes, whether they are."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        for start in range(0, size, WINDOW):
            length = min(WINDOW, size - start)
            flags = _in_core(file.fileno(), start, length)
            page = 0
            while page < len(flags):
                there = flags[page]
                other = flags.find(b"\0" if there else b"\1", page)
                end = other if other >= 0 else len(flags)
                first = page * mmap.PAGESIZE
                yield start + first, min(end * mmap.PAGESIZE, length) - first, bool(there)
                page = end


def _in_core(descriptor: int, start: int, length: int) -> bytes:
    """One byte for each page: 1 when it is in the page cache, else 0."""
    address = _libc.mmap(None, length, _PROT_READ, _MAP_SHARED, descriptor, start)
    if address == _MAP_FAILED:
        raise OSError(ctypes.get_errno(), "mmap failed")
    try:
        vector = ctypes.create_string_buffer(-(-length // mmap.PAGESIZE))
        if _libc.mincore(address, length, vector) != 0:
            raise OSError(ctypes.get_errno(), "mincore failed")
        return vector.raw.translate(_LOWEST_BIT)  # the others are reserved
    finally:
        _libc.munmap(address, length)

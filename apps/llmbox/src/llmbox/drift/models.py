"""Model files, which are too large to be read whole every day."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmbox.drift.compare import Difference, compare, kind
from llmbox.drift.host import look, open_regular, unreadable

CHUNK_BYTES = 1 << 20
# A day's sample of one model: 64 MiB, and in time every block.
BLOCK_BYTES = 16 << 20
BLOCKS_A_DAY = 4


def model_differences(
    models: Sequence[Mapping[str, Any]], blocks: dict[str, Any], *, full: bool, day: int
) -> Iterator[Difference]:
    """Model files that are not what was installed. `blocks`, what full reads learned, is kept up to date."""
    for group in models:
        for file in group["files"]:
            path = f"{group['directory']}/{file['file']}"
            expected = {"type": "file", "owner": group["owner"], "writable": "by its owner"}
            found = look(path, 0)
            yield from compare(path, expected, found)
            if found is not None and found["type"] == "file":
                try:
                    yield from model_difference(path, file, blocks, full=full, day=day)
                except OSError as error:  # mostly how a disk tells that it rots
                    yield Difference(path, f"sha256 {file['sha256']}", kind(unreadable(error)))


def model_difference(
    path: str, file: Mapping[str, Any], blocks: dict[str, Any], *, full: bool, day: int
) -> Iterator[Difference]:
    """Size, then content: all of it when `full`, or touched since it was verified, else a sample.

    Raises OSError.
    """
    with open_regular(path) as handle:
        info = os.fstat(handle.fileno())
        if info.st_size != file["size"]:
            yield Difference(path, f"{file['size']} bytes", f"{info.st_size} bytes")
            return
        known = blocks.get(path, {})
        if not full and stamped(path, info) == file["sha256"]:
            if known.get("sha256") == file["sha256"]:
                yield from sample_differences(path, handle.fileno(), known["blocks"], day)
            return
        sha256, found = block_digests(handle.fileno())
    if sha256 == file["sha256"]:
        blocks[path] = {"sha256": sha256, "blocks": found}
    else:
        yield Difference(path, f"sha256 {file['sha256']}", f"sha256 {sha256}")


def stamped(path: str, info: os.stat_result) -> str | None:
    """The checksum that roles/gguf_models verified for the file as it is now; None when it changed since."""
    place = Path(path)
    now = {
        "size": info.st_size,
        "mtime_ns": info.st_mtime_ns,
        "ctime_ns": info.st_ctime_ns,
        "inode": info.st_ino,
    }
    try:
        with open_regular(str(place.with_name(f".{place.name}.sha256"))) as handle:
            stamp = json.loads(handle.read(4096))
        sha256 = stamp.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    return str(sha256) if stamp == now else None


def block_digests(descriptor: int) -> tuple[str, list[str]]:
    """The sha256 of a file, and that of each of its blocks. Raises OSError."""
    whole, found = hashlib.sha256(), []
    block, left = hashlib.sha256(), BLOCK_BYTES
    while chunk := os.read(descriptor, min(CHUNK_BYTES, left)):
        whole.update(chunk)
        block.update(chunk)
        left -= len(chunk)
        if not left:
            found.append(block.hexdigest())
            block, left = hashlib.sha256(), BLOCK_BYTES
    if left < BLOCK_BYTES:
        found.append(block.hexdigest())
    return whole.hexdigest(), found


def sample_differences(path: str, descriptor: int, known: Sequence[str], day: int) -> Iterator[Difference]:
    """The day's blocks, read again. Raises OSError."""
    for number in sample_of(len(known), day):
        start, digest, left = number * BLOCK_BYTES, hashlib.sha256(), BLOCK_BYTES
        while left and (chunk := os.pread(descriptor, min(CHUNK_BYTES, left), start + BLOCK_BYTES - left)):
            digest.update(chunk)
            left -= len(chunk)
        if digest.hexdigest() != known[number]:
            where = f"bytes from {start} on with sha256"
            yield Difference(path, f"{where} {known[number]}", f"{where} {digest.hexdigest()}")


def sample_of(count: int, day: int) -> list[int]:
    """The blocks, of `count`, whose turn it is on a day."""
    first = day * BLOCKS_A_DAY
    return sorted({(first + step) % count for step in range(min(BLOCKS_A_DAY, count))})

"""One switch at a time: an flock in the runtime directory, released by the kernel however its holder ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmbox.errors import Locked

LOCK_NAME = "lmswitch.lock"


@contextmanager
def held(runtime_dir: Path, purpose: str) -> Iterator[None]:
    """Hold the switch lock while the body runs. Raises Locked, naming the holder, when it is taken."""
    descriptor = os.open(runtime_dir / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            raise Locked(
                f"another switch is under way ({holder}); wait, or look with: lmswitch status"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"lmswitch {purpose}, pid {os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)

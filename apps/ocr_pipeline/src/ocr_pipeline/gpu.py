"""One stage on the GPU at a time, whichever process it is in: a lock on a file, with a bounded wait."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ocr_pipeline.errors import BackendError, SettingsError
from ocr_pipeline.stages import Deadline

POLL_S = 0.05


class GpuBusyError(BackendError):
    """The GPU was others' for longer than this photo could wait."""

    reason = "GPU_BUSY"


@contextmanager
def turn(path: str, deadline: Deadline) -> Iterator[None]:
    """Hold the GPU for a while; "" needs no turn. The kernel frees the lock of a process that is killed."""
    if not path:
        yield
        return
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o660)
    except OSError as error:
        raise SettingsError(f"gpu_lock = {path!r}: {error.strerror}") from None
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if deadline.left() <= 0:
                    raise GpuBusyError("the GPU was busy with other photos until the time was up") from None
                time.sleep(min(POLL_S, deadline.left()))
        yield
    finally:
        os.close(descriptor)

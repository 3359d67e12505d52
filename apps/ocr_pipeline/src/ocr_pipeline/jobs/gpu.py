"""One semaphore per GPU: a lock on a file, so that it holds between processes and ends with whoever held it."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

POLL_S = 0.05


class GpuBusyError(Exception):
    """Others had the GPU all the time that one may wait."""


class GpuSemaphore:
    """The right to use one GPU. Raises GpuBusyError from `held` after `wait_s`."""

    def __init__(
        self,
        path: Path,
        wait_s: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._path = path
        self._wait_s = wait_s
        self._clock = clock
        self._sleep = sleep

    @contextmanager
    def held(self) -> Iterator[None]:
        """The GPU is this caller's alone."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o660)
        try:
            self._lock(descriptor)
            yield
        finally:
            os.close(descriptor)

    def _lock(self, descriptor: int) -> None:
        deadline = self._clock() + self._wait_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if self._clock() >= deadline:
                    name = self._path.name
                    raise GpuBusyError(f"others had the GPU ({name}) for {self._wait_s:.0f} s") from None
                self._sleep(POLL_S)


@contextmanager
def no_gpu() -> Iterator[None]:
    """Where no stage uses a GPU."""
    yield

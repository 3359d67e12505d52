"""Huey wakes workers: SQLite embedded, Redis when several boxes work.

A message says only "something waits": what, and whose it is, stands in the job tables, so a lost message
loses
nothing (huey loses a task whose worker is killed), and a message too many does nothing. Messages are JSON,
never pickle: whoever can write to the queue cannot make a worker run anything.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import time
from collections.abc import Callable
from typing import Any, Protocol

from huey import RedisHuey, SqliteHuey  # type: ignore[import-untyped]
from huey.api import Huey  # type: ignore[import-untyped]
from huey.registry import Message  # type: ignore[import-untyped]
from huey.serializer import Serializer  # type: ignore[import-untyped]

log = logging.getLogger(__name__)

QUEUE = "ocr"
MOST_WAKES = 256  # messages for one submit; a worker takes what waits anyway
SQLITE_POLL_S = 0.05


class Dispatch(Protocol):
    """Tells workers that something waits."""

    def wake(self, photos: int) -> None:
        """So many photos are new. Never fails: the sweep finds what nobody was told of."""

    def wait(self, seconds: float) -> bool:
        """Whether a message came within this time."""


class JsonMessages(Serializer):  # type: ignore[misc]
    """Messages of one task without arguments."""

    def _serialize(self, data: Any) -> bytes:
        return json.dumps({"id": data.id, "name": data.name}).encode()

    def _deserialize(self, data: Any) -> Message:
        found = json.loads(bytes(data))
        return Message(
            id=str(found["id"]), name=str(found["name"]), retries=0, retry_delay=0, args=(), kwargs={}
        )


class HueyDispatch:
    """The real one. `url`: `sqlite:///FILE` or `redis://HOST:PORT/DB`. Raises ValueError for another."""

    def __init__(self, url: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._huey = _huey(url)
        self._arrived = False
        self._down = False

        @self._huey.task(name="wake")  # type: ignore[untyped-decorator]
        def wake() -> None:
            self._arrived = True

        self._task = wake

    def wake(self, photos: int) -> None:
        try:
            for _ in range(min(photos, MOST_WAKES)):
                self._task()
            self._down = False
        except Exception as error:  # of Redis or SQLite, each has its own
            self._tell(error)

    def wait(self, seconds: float) -> bool:
        self._arrived = False
        deadline = self._clock() + seconds
        while not self._arrived:
            try:
                task = self._huey.dequeue()
                self._down = False
            except Exception as error:
                self._tell(error)
                task = None
                time.sleep(min(1.0, max(0.0, deadline - self._clock())))
            if task is not None:
                self._huey.execute(task)
            elif self._clock() >= deadline:
                return False
            elif isinstance(self._huey, SqliteHuey):
                time.sleep(SQLITE_POLL_S)
        return True

    def pending(self) -> int:
        """Messages that nobody has taken."""
        return int(self._huey.pending_count())

    def _tell(self, error: Exception) -> None:
        if not self._down:
            log.warning("the queue does not answer, photos wait for the next sweep: %s", error)
        self._down = True


def _huey(url: str) -> Huey:
    kind, _, rest = url.partition("://")
    common = {"name": QUEUE, "results": False, "serializer": JsonMessages(), "utc": True}
    if kind == "sqlite" and rest.startswith("/") and len(rest) > 1:
        try:
            return SqliteHuey(filename=rest[1:], fsync=True, **common)
        except sqlite3.Error as error:
            fix = "its folder must be there, and this user's to write in"
            raise ValueError(f"queue {rest[1:]}: {error}; {fix}") from None
    if kind in ("redis", "rediss", "unix"):
        return RedisHuey(url=url, read_timeout=1, **common)
    raise ValueError(
        f"queue {kind}://…: write it like sqlite:////var/lib/ocr/queue.sqlite3 or redis://HOST:6379/0"
    )

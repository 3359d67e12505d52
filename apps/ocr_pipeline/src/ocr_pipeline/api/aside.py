"""Work that may hang where nobody can end it: on threads of its own, few for each thing that it waits for."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


class FullError(Exception):
    """So much waits for that thing already that no more is begun."""


class Aside:
    """At most `most` threads for one name. A thread whose caller has left counts until it really ends."""

    def __init__(self, most: int, seconds: float) -> None:
        self.most = most
        self.seconds = seconds
        self._busy: Counter[str] = Counter()

    async def run(self, name: str, work: Callable[[], T]) -> T:
        """What `work` gives or raises. Raises FullError at once, TimeoutError after `seconds`."""
        if self._busy[name] >= self.most:
            raise FullError
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._busy[name] += 1

        def ended(give: Callable[[], None]) -> None:
            self._busy[name] -= 1
            if not future.done():
                give()

        def go() -> None:
            give: Callable[[], None]
            try:
                result = work()
            except BaseException as error:
                caught = error
                give = lambda: future.set_exception(caught)  # noqa: E731
            else:
                give = lambda: future.set_result(result)  # noqa: E731
            with suppress(RuntimeError):  # the loop is closed: nobody asks any more
                loop.call_soon_threadsafe(ended, give)

        threading.Thread(target=go, name=f"aside {name}", daemon=True).start()
        async with asyncio.timeout(self.seconds):
            return await future

"""Requests that wait for their photo. One look into the tables serves all of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from ocr_pipeline.jobs.store import Outcome

log = logging.getLogger(__name__)
FASTEST_S = 0.02
SLOWEST_S = 0.25


class Waiting:
    """`news` is JobStore.news."""

    def __init__(self, news: Callable[[Iterable[int]], dict[int, Outcome]]) -> None:
        self._news = news
        self._waiters: dict[int, asyncio.Future[Outcome]] = {}
        self._task: asyncio.Task[None] | None = None

    async def outcome(self, item_id: int, timeout_s: float) -> Outcome | None:
        """What became of a photo; None when nothing did in that time."""
        future = self._waiters.setdefault(item_id, asyncio.get_running_loop().create_future())
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._look(), name="waiting")
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(future)
        except TimeoutError:
            return None
        finally:
            self._waiters.pop(item_id, None)

    async def _look(self) -> None:
        pause = FASTEST_S
        while self._waiters:
            await asyncio.sleep(pause)
            try:
                found = await asyncio.to_thread(self._news, list(self._waiters))
            except Exception:
                log.exception("the job tables do not answer")
                found = {}
                await asyncio.sleep(1)
            pause = FASTEST_S if found else min(SLOWEST_S, pause * 1.3)
            for item_id, outcome in found.items():
                future = self._waiters.pop(item_id, None)
                if future and not future.done():
                    future.set_result(outcome)

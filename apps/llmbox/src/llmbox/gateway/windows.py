"""How much was used in the last minute or day."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

BUCKETS = 60


class Window:
    """What was counted in the last `length` seconds, at most BUCKETS + 1 numbers whatever happens.

    It slides in steps of length / BUCKETS: a step counts until the whole of it is out of the window, so no
    stretch of `length` seconds ever holds more than the limit. `now` is in seconds since the epoch, which is
    what survives a restart.
    """

    def __init__(self, length: int, steps: Iterable[tuple[int, int]] = ()) -> None:
        self._step = length / BUCKETS
        self._counts: deque[tuple[int, int]] = deque(sorted(steps), BUCKETS + 1)
        self._total = sum(count for _, count in self._counts)

    def add(self, count: int, now: float) -> None:
        """Count something; less than nothing takes back what was counted too much."""
        number = self._trim(now)
        if self._counts and self._counts[-1][0] == number:
            count_there = self._counts.pop()[1]
            self._counts.append((number, count_there + count))
        else:
            self._counts.append((number, count))
        self._total += count

    def used(self, now: float) -> int:
        """What counts now."""
        self._trim(now)
        return self._total

    def wait(self, excess: int, now: float) -> int:
        """Whole seconds until `excess` of what counts now has left the window."""
        self._trim(now)
        end = now
        for number, count in self._counts:
            if excess <= 0:
                break
            excess -= count
            end = (number + BUCKETS + 1) * self._step
        return max(1, math.ceil(end - now))

    def steps(self) -> list[tuple[int, int]]:
        """What to give to a new Window to go on after a restart."""
        return list(self._counts)

    def _trim(self, now: float) -> int:
        number = int(now // self._step)
        early = 0
        # After the clock was set back: what seems to come from the future counts as of now.
        while self._counts and self._counts[-1][0] > number:
            early += self._counts.pop()[1]
        if early:
            there = self._counts.pop()[1] if self._counts and self._counts[-1][0] == number else 0
            self._counts.append((number, there + early))
        while self._counts and self._counts[0][0] < number - BUCKETS:
            self._total -= self._counts.popleft()[1]
        return number

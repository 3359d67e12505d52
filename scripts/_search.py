"""Find the fastest settings of a server in few runs: one axis at a time, towards its one peak.

Pure: what a run is and costs is the caller's. A run that does not fit into memory is None, which is told
apart from one that is slow: behind it, in the direction that takes more memory, nothing is run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

Setting = Mapping[str, int]
Measure = Callable[[Setting], float | None]

WORTH = 0.005  # a change of speed below this share is none: two runs of one setting differ by more
RELIEF = (1, 2, 4)  # steps on another axis that may make room for what did not fit
COARSE = 4  # parts that an axis is divided into at first
ROUNDS = 4  # over all axes; nearly every surface is done after two


@dataclass(frozen=True)
class Axis:
    """One setting and the values that it may have, ascending. `memory` tells which way takes more of it."""

    name: str
    values: tuple[int, ...]
    memory: Literal["rises", "falls", "same"] = "same"

    def __post_init__(self) -> None:
        if not self.values or list(self.values) != sorted(set(self.values)):
            raise ValueError(f"{self.name}: the values must be different and ascending")

    def nearest(self, value: int) -> int:
        """The index of the value nearest to this one."""
        return min(range(len(self.values)), key=lambda index: abs(self.values[index] - value))


@dataclass(frozen=True)
class Found:
    """The best setting and its speed; `finished` is False when the caller's time was over first."""

    setting: dict[str, int]
    speed: float
    finished: bool


class OutOfTime(Exception):
    """What `measure` raises to end the search with the best that it has, if it has one."""


class NothingFits(Exception):
    """No setting that was tried fits into memory."""


def search(axes: tuple[Axis, ...], start: Setting, measure: Measure) -> Found:
    """The setting for which `measure` gives the highest speed (any unit; None: out of memory).

    `start` is where it begins, best the setting in use; its values are taken to the nearest of the axes. The
    axes are searched in their order, the one that matters most first. A setting is measured once. Raises
    NothingFits, OutOfTime when there is nothing to give yet, ValueError for an axis without values.
    """
    return _Descent(axes, start, measure).run()


class _Descent:
    def __init__(self, axes: tuple[Axis, ...], start: Setting, measure: Measure) -> None:
        self.axes = axes
        self.at = [axis.nearest(start[axis.name]) for axis in axes]
        self._measure = measure
        self._known: dict[tuple[int, ...], float | None] = {}
        self._too_large: list[tuple[int, ...]] = []

    def run(self) -> Found:
        try:
            self._find_room()
            # The others decide where the peak of the first one is, and it was sought before they were: again.
            for number in (*range(len(self.axes)), *range(len(self.axes) - 1)):
                self._across(number)
            for _ in range(ROUNDS):
                before = self._speed(self.at)
                for number in range(len(self.axes)):
                    self._along(number)
                    self._traded(number)
                if not self._better(self._speed(self.at), before):
                    break
        except OutOfTime:
            if all(speed is None for speed in self._known.values()):
                raise  # there is no best yet, and what was not tried may well fit
            return self._best(finished=False)
        return self._best(finished=True)

    def _best(self, *, finished: bool) -> Found:
        speeds = {place: speed for place, speed in self._known.items() if speed is not None}
        # The place that the descent stands on: another that was measured as hardly faster is chance.
        place = max(speeds, key=speeds.__getitem__)
        here = tuple(self.at)
        if here in speeds and not self._better(speeds[place], speeds[here]):
            place = here
        return Found(self._setting(place), speeds[place], finished)

    def _find_room(self) -> None:
        """From a start that does not fit, take memory back on each axis in turn, in growing steps."""
        if self._speed(self.at) is not None:
            return
        for number, axis in enumerate(self.axes):
            if axis.memory == "same":
                continue
            step = 1
            while True:
                index = self._less_memory(number, step)
                if index == self.at[number]:
                    break
                self.at[number] = index
                if self._speed(self.at) is not None:
                    return
                step *= 2
        raise NothingFits

    def _less_memory(self, number: int, steps: int) -> int:
        axis = self.axes[number]
        towards = -1 if axis.memory == "rises" else 1
        return min(max(self.at[number] + towards * steps, 0), len(axis.values) - 1)

    def _across(self, number: int) -> None:
        """Find the peak of a whole axis, at first at places so far apart that noise cannot hide the slope."""
        last = len(self.axes[number].values) - 1
        places = sorted({round(last * share / COARSE) for share in range(COARSE + 1)} | {self.at[number]})
        # From less memory to more: behind the first that does not fit nothing is run.
        for index in places if self.axes[number].memory != "falls" else reversed(places):
            self._go(number, index)
        here = places.index(self.at[number])
        low, high = places[max(here - 1, 0)], places[min(here + 1, len(places) - 1)]
        self._narrow(number, low, high)

    def _along(self, number: int) -> None:
        """Follow an axis from where it is, in growing steps until it is lower, then between the last two."""
        last = len(self.axes[number].values) - 1
        for direction in self._directions(number):
            step = 1
            while True:
                here = self.at[number]
                further = min(max(here + direction * step, 0), last)
                if further == here or not self._go(number, further):
                    break
                step *= 2
            low, high = sorted((max(min(here - direction * step // 2, last), 0), further))
            self._narrow(number, low, high)

    def _directions(self, number: int) -> tuple[int, int]:
        """The direction that takes more memory first: there the speed is."""
        return (-1, 1) if self.axes[number].memory == "falls" else (1, -1)

    def _narrow(self, number: int, low: int, high: int) -> None:
        """Halve the larger gap beside the best place until no place is left, or none is worth a run."""
        while True:
            here = self.at[number]
            left, right = here - low, high - here
            if left <= 1 and right <= 1:
                return
            if right >= left:
                try_at = here + right // 2
                if not self._go(number, try_at):
                    high = try_at
                else:
                    low = here
            else:
                try_at = here - left // 2
                if not self._go(number, try_at):
                    low = try_at
                else:
                    high = here

    def _traded(self, number: int) -> None:
        """Trade memory: a value less on another axis may make room for some on this one, and the reverse."""
        others = [other for other in self._heavy() if other != number]
        if self.axes[number].memory == "same":
            return
        for other, step in itertools.product(others, (1, -1)):
            before = self.at
            place = before.copy()
            place[other] = self._less_memory(other, step)
            fitting = self._fitting(place, number) if place != before else None
            if fitting is None:
                continue
            self.at = fitting
            self._along(number)
            if not self._better(self._speed(self.at), self._speed(before)):
                self.at = before

    def _fitting(self, place: list[int], number: int) -> list[int] | None:
        """The place itself, or one beside it on this axis with less memory; None when none of them fits."""
        for steps in (0, *RELIEF):
            moved = place.copy()
            moved[number] = self._less_memory(number, steps)
            if self._speed(moved) is not None:
                return moved
        return None

    def _go(self, number: int, index: int) -> bool:
        """Go to another value of an axis if it is faster; whether it was."""
        place = self.at.copy()
        place[number] = index
        if not self._better(self._speed(place), self._speed(self.at)):
            return False
        self.at = place
        return True

    @staticmethod
    def _better(speed: float | None, than: float | None) -> bool:
        return speed is not None and (than is None or speed > than * (1 + WORTH))

    def _speed(self, place: list[int] | tuple[int, ...]) -> float | None:
        """The speed at a place, from a run, from memory, or from what is known not to fit."""
        key = tuple(place)
        if key not in self._known:
            if any(self._needs_more(key, other) for other in self._too_large):
                return None
            self._known[key] = self._measure(self._setting(key))
            if self._known[key] is None:
                self._too_large.append(key)
        return self._known[key]

    def _needs_more(self, place: tuple[int, ...], other: tuple[int, ...]) -> bool:
        """Whether `place` takes at least the memory of `other` on every axis."""
        return all(self._load(number, place) >= self._load(number, other) for number in self._heavy())

    def _heavy(self) -> Iterator[int]:
        return (number for number, axis in enumerate(self.axes) if axis.memory != "same")

    def _load(self, number: int, place: tuple[int, ...]) -> int:
        return place[number] if self.axes[number].memory == "rises" else -place[number]

    def _setting(self, place: tuple[int, ...]) -> dict[str, int]:
        return {axis.name: axis.values[index] for axis, index in zip(self.axes, place, strict=True)}

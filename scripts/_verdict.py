"""Whether a new release of llama.cpp may take the place of the one that serves, from what both did.

Pure. A release is kept when, for every preset, it starts, does whatever the old one does, and is nowhere
slower than LEAST times the old one, with the lower end of the ratio's interval. What the old release cannot
do either is not held against the new one: a preset that it cannot serve speaks for the new release or not at
all. Where the figures leave it open the old release stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

from scripts._statistics import Ratio, ratio_of_medians

LEAST = 0.95  # of the old release's speed
LEAST_PAIRS = 5

Word = Literal["keep", "roll back", "undecided"]
Pairs = tuple[tuple[float, float], ...]
PROBES = {
    "health": "is not healthy",
    "tool_call": "breaks tool calls",
    "prompt_cache": "loses the prompt cache",
}


@dataclass(frozen=True)
class Behaviour:
    """What one release did with a preset beside its speed: "" where it did well, else what was wrong."""

    start: str = ""
    health: str = ""
    tool_call: str = ""
    prompt_cache: str = ""


@dataclass(frozen=True)
class Comparison:
    """One preset under both releases. Pairs are (old, new) in tokens per second, measured one after another.

    `trouble` says why there are too few of them; `known` whether the box has the preset at all.
    """

    preset: str
    old: Behaviour = field(default_factory=Behaviour)
    new: Behaviour = field(default_factory=Behaviour)
    generation: Pairs = ()
    prefill: Pairs = ()
    trouble: str = ""
    known: bool = True

    @property
    def ratios(self) -> dict[str, Ratio]:
        """New over old, by figure; empty while there are fewer than LEAST_PAIRS."""
        figures = {"generation": self.generation, "prefill": self.prefill}
        return {name: ratio_of_medians(pairs) for name, pairs in figures.items() if len(pairs) >= LEAST_PAIRS}


@dataclass(frozen=True)
class Verdict:
    """What is to be done, and why: one reason a line, the decisive ones first.

    Without `compared` there was nothing to compare with: other presets decide, and nothing is rejected.
    Without `measured` runs could not be made: nothing was found against the release, and it is not rejected.
    """

    word: Word
    reasons: tuple[str, ...]
    compared: bool = True
    measured: bool = True


def judge_preset(found: Comparison) -> Verdict:
    """What one preset says about the new release."""
    name, old, new = found.preset, found.old, found.new
    if not found.known:
        line = f"{name}: nothing to compare with: the box does not know it yet"
        return Verdict("undecided", (line,), compared=False)
    if old.start:
        return without_old(found, f"does not start: {old.start}")
    if new.start:
        return Verdict("roll back", (f"{name} does not start: {new.start}",))
    broken = tuple(
        f"{name}: the new release {words}: {getattr(new, probe)}"
        for probe, words in PROBES.items()
        if getattr(new, probe) and not getattr(old, probe)
    )
    ratios = found.ratios
    slower = tuple(
        f"{name}: {told(figure, ratios[figure], found)}" for figure in ratios if is_slower(ratios[figure])
    )
    known = tuple(
        f"{name}: the current release {words}{' too' if getattr(new, probe) else ''}: {said}"
        for probe, words in PROBES.items()
        if (said := getattr(old, probe))
    )
    if broken or slower:
        return Verdict("roll back", broken + slower + known)
    if old.health and not found.generation:
        return without_old(found, f"is not healthy: {old.health}")
    if found.trouble or not ratios:
        why = found.trouble or "too few runs"
        if old.health:
            why = f"{why}: the current release is not healthy: {old.health}"
        return Verdict("undecided", (f"{name} could not be measured: {why}",), measured=False)
    unsure = [figure for figure, ratio in ratios.items() if ratio.low < LEAST]
    lines = tuple(f"{name}: {told(figure, ratio, found)}" for figure, ratio in ratios.items())
    if unsure:
        why = f"{name}: the runs vary too much to tell whether {' and '.join(unsure)} stayed as fast"
        return Verdict("undecided", (why, *lines, *known))
    return Verdict("keep", lines + known)


def without_old(found: Comparison, trouble: str) -> Verdict:
    """What a preset says that the current release cannot serve: for the new one if that can, or nothing."""
    line = f"{found.preset}: nothing to compare with: the current release {trouble}"
    wrong = [
        f"{words}: {said}"
        for probe, words in {"start": "does not start", **PROBES}.items()
        if (said := getattr(found.new, probe))
    ]
    if found.trouble:
        wrong.append(f"could not be measured: {found.trouble}")
    if wrong:
        return Verdict("undecided", (f"{line}; the new one {', '.join(wrong)}",), compared=False)
    return Verdict("keep", (f"{line}; the new one serves",))


def judge(found: Sequence[Comparison]) -> Verdict:
    """What all presets together say: the worst of their verdicts. Without any there is nothing against it."""
    if not found:
        return Verdict("keep", ("no user preset has this build: there is nothing to compare",))
    every = [judge_preset(one) for one in found]
    verdicts = [one for one in every if one.compared]
    silent = tuple(reason for one in every if not one.compared for reason in one.reasons)
    if not verdicts:
        return Verdict("undecided", silent, compared=False)
    order: tuple[Word, ...] = ("roll back", "undecided", "keep")
    word: Word = next((word for word in order if any(one.word == word for one in verdicts)), "keep")
    decisive = [one for one in verdicts if one.word == word]
    reasons = tuple(reason for one in decisive for reason in one.reasons)
    return Verdict(word, reasons + silent, measured=any(one.measured for one in decisive))


def is_slower(ratio: Ratio) -> bool:
    """Whether the whole interval lies below LEAST."""
    return ratio.high < LEAST


def open_yet(found: Comparison) -> bool:
    """Whether more pairs could still decide it."""
    verdict = judge_preset(found)
    return verdict.word == "undecided" and verdict.compared and not found.trouble


def told(figure: str, ratio: Ratio, found: Comparison) -> str:
    """'generation 81.5 -> 57.1 tok/s: 70.1 % of it (69.2 to 71.9 % in 5 pairs; at least 95 % is wanted)'."""
    pairs: Pairs = getattr(found, figure)
    old, new = (median(pair[side] for pair in pairs) for side in (0, 1))
    return (
        f"{figure} {old:.1f} -> {new:.1f} tok/s: {100 * ratio.value:.1f} % of it ({100 * ratio.low:.1f} to"
        f" {100 * ratio.high:.1f} % in {len(pairs)} pairs; at least {100 * LEAST:.0f} % is wanted)"
    )

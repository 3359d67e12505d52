"""What measured speeds say: their level and spread, a verdict against a baseline, a ratio with its interval.

Pure, for every script that measures. Shares are of 1 (0.03 is 3 %). Robust throughout: one run that something
disturbed must neither raise an alarm nor hide one.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from statistics import fmean, median

RECENT = 5  # runs that are judged together
BASELINE = 60  # runs before them that they are compared with, at most
BASELINE_LEAST = 25  # five measurements: of fewer, how far their levels lie apart cannot be told
NOISY = 0.03  # with more noise than this the verdict says what it can still see
LEAST_CHANGE = 0.06  # what is called a change, however quiet the box is
# Beyond this wander (see Baseline) the threshold grows with its square: the more there is, the less the past
# few stretches tell of the next. A box at NOISY has 0.0204; what 25 runs say of it scatters.
STILL = 0.022
# Wanders from the threshold to the slowdown that nine of ten comparisons show: more than the normal quantile
# of 1.28, since the wander is an estimate. tests/unit/test_statistics.py holds both against recorded and
# synthetic runs.
POWER = 2.5
CUT = 4.0  # standard errors of independent runs: what one stretch adds to the wander at most
MAD_TO_SIGMA = 1.4826  # of a normal distribution: 1 / its 0.75 quantile
MOST = 0.7  # of the runs: what they span counts as well
MOST_TO_MAD = 0.3254  # of a normal distribution: its 0.75 quantile / (2 x its 0.85 quantile)
# Variance of the Hodges-Lehmann estimate from n normal values in units of sigma²/n, asymptotically (Hodges &
# Lehmann 1963); the median's is pi/2, the mean's 1.
LEVEL_VARIANCE = math.pi / 3
# The standard error of the level of RECENT independent normal runs in units of the MAD of one.
LEVEL_ERROR = MAD_TO_SIGMA * math.sqrt(LEVEL_VARIANCE / RECENT)
BOOTSTRAPS = 2000


@dataclass(frozen=True)
class Baseline:
    """What a box did before: level, spread (see there) as a share of it, and how many runs that are.

    `wander` is how far the level of RECENT runs in a row lies from the level of all, as the root mean square
    of the logarithm. A box on which slow runs follow each other wanders farther than its spread explains.
    """

    level: float
    spread: float
    runs: int
    wander: float = 0.0

    @classmethod
    def of(cls, values: Sequence[float]) -> Baseline:
        """The baseline that the newest BASELINE of positive `values` give. Raises ValueError without any."""
        newest = values[-BASELINE:]
        if not newest or min(newest) <= 0:
            raise ValueError("a baseline needs positive values")
        return cls(level(newest), spread(newest), len(newest), wander(newest))

    @property
    def noise(self) -> float:
        """As `noise` of its runs."""
        return max(self.spread, self.wander / LEVEL_ERROR)

    @property
    def noisy(self) -> bool:
        """Whether there is too much noise for a sharp verdict."""
        return self.noise > NOISY

    @property
    def threshold(self) -> float:
        """The slowdown of the level of RECENT runs, as a share, from which on it is told."""
        beyond = max(1.0, self.wander / STILL)
        return 1 - math.exp(math.log(1 - LEAST_CHANGE) * beyond * beyond)

    @property
    def detectable(self) -> float:
        """The slowdown, as a share, that nine of ten such comparisons show."""
        error = self.wander * math.sqrt(1 + RECENT / self.runs)
        return 1 - (1 - self.threshold) * math.exp(-POWER * error)


@dataclass(frozen=True)
class Verdict:
    """What the newest runs are beside the baseline. `change` is a share: -0.1 is 10 % slower."""

    level: float
    runs: int
    baseline: Baseline | None = None

    @property
    def change(self) -> float:
        """The level beside the baseline's; 0 without a baseline."""
        return self.level / self.baseline.level - 1 if self.baseline else 0.0

    @property
    def slower(self) -> bool:
        """Whether the level is lower than chance explains."""
        return self.baseline is not None and self.change < -self.baseline.threshold

    @property
    def word(self) -> str:
        """steady, slower, faster, or no baseline."""
        if self.baseline is None:
            return "no baseline"
        if self.slower:
            return "slower"
        return "faster" if self.change > self.baseline.threshold else "steady"


@dataclass(frozen=True)
class Ratio:
    """The ratio of two medians with the interval that a share `confidence` of resampled pairs fall into."""

    value: float
    low: float
    high: float
    confidence: float


def spread(values: Sequence[float]) -> float:
    """The median absolute deviation (MAD) from the median, as a share of it. Raises ValueError: no values.

    Or what the middle MOST of them span, as the MAD of a normal distribution that spans as much, if that is
    more: of a box with two speeds the median is one of them, and the MAD does not see the other.
    """
    middle, ascending = median(values), sorted(values)
    tail = round((1 - MOST) / 2 * (len(ascending) - 1))
    span = ascending[-1 - tail] - ascending[tail]
    return max(_deviation(values), MOST_TO_MAD * span / middle)


def wander(values: Sequence[float]) -> float:
    """How far the levels of RECENT runs in a row lie from the level of all (see Baseline); 0 of fewer runs.

    Each counts with CUT standard errors at most: what disturbed a quiet box once does not blind it.
    """
    middle, most = level(values), CUT * LEVEL_ERROR * spread(values)
    stretches = [values[at : at + RECENT] for at in range(len(values) - RECENT + 1)]
    away = [min(abs(math.log(level(stretch) / middle)), most) for stretch in stretches]
    return math.sqrt(fmean(one * one for one in away)) if away else 0.0


def noise(values: Sequence[float]) -> float:
    """What makes a slowdown hard to see, as a MAD: the spread of runs, or what their wander amounts to.

    That is the MAD of independent normal runs whose levels would lie as far apart. Raises ValueError: none.
    """
    return max(spread(values), wander(values) / LEVEL_ERROR)


def _deviation(values: Sequence[float]) -> float:
    middle = median(values)
    return median([abs(value - middle) for value in values]) / middle


def level(values: Sequence[float]) -> float:
    """The Hodges-Lehmann estimate: the median of the means of all pairs, each value with itself too.

    As robust as needed (up to 29 % of the values may be anything) and nearly as sharp as the mean. Raises
    ValueError without values; takes time that grows with the square of their number.
    """
    return median([(one + other) / 2 for one, other in combinations_with_replacement(values, 2)])


def judge(values: Sequence[float]) -> Verdict:
    """The newest RECENT of `values`, in the order in which they were measured, beside those before them."""
    recent, before = values[-RECENT:], values[:-RECENT]
    baseline = Baseline.of(before) if len(before) >= BASELINE_LEAST else None
    return Verdict(level(recent), len(recent), baseline)


def ratio_of_medians(
    pairs: Sequence[tuple[float, float]], *, confidence: float = 0.95, seed: int = 0
) -> Ratio:
    """The median of the second values over that of the first, with a percentile bootstrap interval.

    `pairs` were measured one right after the other, so whole pairs are drawn: what both suffered cancels
    out. Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapter 13. Raises ValueError: no pairs.
    """
    if not pairs:
        raise ValueError("a ratio needs at least one pair")
    rng = random.Random(seed)  # noqa: S311  (the same pairs give the same interval)
    drawn = sorted(_ratio(rng.choices(pairs, k=len(pairs))) for _ in range(BOOTSTRAPS))
    tail = round((1 - confidence) / 2 * BOOTSTRAPS)
    return Ratio(_ratio(pairs), drawn[tail], drawn[-1 - tail], confidence)


def _ratio(pairs: Sequence[tuple[float, float]]) -> float:
    return median([second for _, second in pairs]) / median([first for first, _ in pairs])

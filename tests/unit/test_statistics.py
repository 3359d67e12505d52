"""The statistics of measured speeds, and their verdicts on series drawn from runs of a real box."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

import pytest

from scripts._history import History
from scripts._statistics import (
    BASELINE,
    BASELINE_LEAST,
    LEAST_CHANGE,
    NOISY,
    RECENT,
    Baseline,
    judge,
    level,
    noise,
    ratio_of_medians,
    spread,
    wander,
)

RECORDED = Path(__file__).resolve().parent / "recorded_runs.jsonl"
SERIES, LENGTH, BLOCK = 1000, 30, 5
SLOWDOWN = 0.10
FALSE_ALARM_BAR, FOUND_BAR = 0.01, 0.90
# Runs that follow each other, at one and a half to three times the noise of the bar, after the fewest runs
# that make a baseline: those are but five stretches, and do not tell how far such a box wanders.
NOISY_FALSE_ALARM = 0.07


def normal(count: int, sigma: float, seed: int = 1) -> list[float]:
    rng = random.Random(seed)  # noqa: S311  (a seed, not a secret)
    return [100 * (1 + rng.gauss(0, sigma)) for _ in range(count)]


def test_the_spread_is_a_share_and_one_wild_run_does_not_change_it() -> None:
    assert spread([98.0, 99.0, 100.0, 101.0, 102.0]) == 0.01
    assert spread([98.0, 99.0, 100.0, 101.0, 3.0]) == pytest.approx(1 / 99)


def test_the_level_lies_between_median_and_mean_and_withstands_one_wild_run() -> None:
    values = [10.0, 11.0, 12.0, 13.0, 20.0]
    assert median(values) <= level(values) <= fmean(values)
    assert level([100.0, 101.0, 102.0, 99.0, 1.0]) == pytest.approx(100, abs=1)
    assert level([7.0]) == 7.0


def test_too_short_a_history_gives_no_verdict() -> None:
    few = normal(BASELINE_LEAST + RECENT - 1, 0.01)
    assert judge(few).word == "no baseline" and not judge(few).slower
    assert judge([1.0]).runs == 1
    assert judge([*few, 100.0]).word == "steady"


@pytest.mark.parametrize(("factor", "word"), [(0.9, "slower"), (1.0, "steady"), (1.1, "faster")])
def test_a_change_is_told_with_its_size(factor: float, word: str) -> None:
    values = normal(40, 0.01)
    verdict = judge([*values, *(factor * value for value in normal(RECENT, 0.01, seed=2))])
    assert verdict.word == word
    assert verdict.change == pytest.approx(factor - 1, abs=0.02)


def test_however_quiet_the_box_a_small_change_is_none() -> None:
    verdict = judge([100.0] * 40 + [100.0 * (1 - LEAST_CHANGE + 0.001)] * RECENT)
    assert verdict.word == "steady" and verdict.baseline and not verdict.baseline.noisy
    assert judge([100.0] * 40 + [100.0 * (1 - LEAST_CHANGE - 0.001)] * RECENT).slower


def test_a_noisy_box_says_so_and_what_it_can_see() -> None:
    values = normal(60, 0.12)
    verdict = judge(values)
    assert verdict.baseline and verdict.baseline.noisy and verdict.baseline.noise > NOISY
    assert 0.12 < verdict.baseline.threshold < verdict.baseline.detectable < 0.8


def test_the_wander_is_how_far_the_levels_of_runs_in_a_row_lie_from_that_of_all() -> None:
    values = [100.0, 101.0, 102.0, 103.0, 104.0, 105.0]
    away = [math.log(level(row) / level(values)) for row in (values[:RECENT], values[1:])]
    assert wander(values) == pytest.approx(math.sqrt(fmean(one * one for one in away)))
    assert wander([50.0, 100.0, 150.0]) == 0.0, "too few for a row"
    assert Baseline.of(values).wander == wander(values)


def test_what_disturbs_a_quiet_box_for_a_while_does_not_blind_it() -> None:
    """A noisy one it does: there what disturbs it comes again."""
    disturbed = [*normal(30, 0.007), *[50.0] * RECENT, *normal(20, 0.007, seed=2)]
    assert wander(disturbed) < 0.01
    assert Baseline.of(disturbed).threshold == pytest.approx(LEAST_CHANGE)
    assert wander([100.0] * 30 + [50.0] * RECENT + [100.0] * RECENT) == 0.0
    assert wander([90.0, 110.0] * 15 + [50.0] * RECENT + [90.0, 110.0]) > 0.15


def test_noise_is_the_spread_or_what_the_wander_amounts_to() -> None:
    """Of independent runs both are the same; of runs that follow each other the wander is more."""
    alone = normal(400, 0.03 * 1.4826)
    assert noise(alone) == pytest.approx(0.03, rel=0.1)
    assert noise(sorted(alone)) > 2 * spread(alone)
    assert Baseline.of(alone).noise == noise(alone[-BASELINE:])


@pytest.mark.parametrize(
    ("known", "threshold", "seen"),
    [
        (Baseline(100, 0.02, 60), 0.06, 0.06),
        (Baseline(100, 0.02, 60, wander=0.015), 0.06, 0.0960),
        (Baseline(100, 0.03, 60, wander=0.02), 0.06, 0.1076),
        (Baseline(100, 0.03, 25, wander=0.03), 0.1087, 0.1790),
        (Baseline(100, 0.06, 60, wander=0.05), 0.2736, 0.3622),
        (Baseline(100, 0.02, 60, wander=0.05), 0.2736, 0.3622),
    ],
)
def test_thresholds_by_hand(known: Baseline, threshold: float, seen: float) -> None:
    """0.94 ** (wander / 0.022) ** 2 is left, and exp(-2.5 * wander * sqrt(1 + 5 / runs)) of that."""
    assert known.threshold == pytest.approx(threshold, abs=1e-4)
    assert known.detectable == pytest.approx(seen, abs=1e-4)
    assert known.noisy == (known.wander > 0.02035 or known.spread > 0.03)


def test_a_slow_box_has_a_baseline_too() -> None:
    assert Baseline.of([0.5] * BASELINE_LEAST).level == 0.5
    assert judge([1.0]).change == 0.0


def test_an_interval_is_as_wide_as_it_is_sure() -> None:
    pairs = [(100.0, speed) for speed in normal(15, 0.05)]
    sure, unsure = ratio_of_medians(pairs), ratio_of_medians(pairs, confidence=0.5)
    assert sure.low < unsure.low <= unsure.value <= unsure.high < sure.high
    assert (sure.confidence, unsure.confidence) == (0.95, 0.5)


def test_the_baseline_rolls() -> None:
    values = [50.0] * 100 + [100.0] * BASELINE
    assert Baseline.of(values).level == 100.0
    assert judge([*values, *[100.0] * RECENT]).word == "steady"


@pytest.mark.parametrize("values", [[], [1.0, 0.0], [-1.0]])
def test_a_baseline_needs_positive_values(values: list[float]) -> None:
    with pytest.raises(ValueError, match="positive"):
        Baseline.of(values)


def test_a_ratio_has_an_interval_that_holds_what_both_suffered() -> None:
    """Both of a pair run at the same moment of a box that halves its speed and comes back."""
    rng = random.Random(3)  # noqa: S311  (a seed, not a secret)
    load = [rng.choice([1.0, 0.5]) for _ in range(9)]
    pairs = [(80 * one * rng.gauss(1, 0.01), 76 * one * rng.gauss(1, 0.01)) for one in load]
    found = ratio_of_medians(pairs)
    assert found.low <= found.value <= found.high
    assert found.value == pytest.approx(0.95, abs=0.02)
    assert ratio_of_medians(pairs) == found, "the same pairs give the same interval"
    with pytest.raises(ValueError, match="pair"):
        ratio_of_medians([])


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    held = 0
    for seed in range(100):
        rng = random.Random(seed)  # noqa: S311  (a seed, not a secret)
        pairs = [(rng.gauss(100, 3), rng.gauss(95, 3)) for _ in range(7)]
        found = ratio_of_medians(pairs)
        held += found.low <= 0.95 <= found.high
    assert held >= 85


# --- the bar, on runs of a real box ---


def drawn(recorded: Sequence[float], count: int, rng: random.Random) -> list[float]:
    """A series of `count` runs, drawn in blocks: what follows each other on the box does so here."""
    found: list[float] = []
    while len(found) < count:
        start = rng.randrange(len(recorded) - BLOCK + 1)
        found += recorded[start : start + BLOCK]
    return found[:count]


def following(rho: float, count: int, rng: random.Random) -> list[float]:
    """Runs that follow each other: a first-order autoregression."""
    found = [rng.gauss(0, 1)]
    while len(found) < count:
        found.append(rho * found[-1] + math.sqrt(1 - rho * rho) * rng.gauss(0, 1))
    return found


def student(rng: random.Random, freedom: int = 3) -> float:
    """A value with heavy tails: Student's t."""
    return rng.gauss(0, 1) / math.sqrt(rng.gammavariate(freedom / 2, 2) / freedom)


SYNTHETIC: dict[str, Callable[[int, random.Random], list[float]]] = {
    "independent": lambda count, rng: [rng.gauss(0, 1) for _ in range(count)],
    "following 0.3": lambda count, rng: following(0.3, count, rng),
    "following 0.6": lambda count, rng: following(0.6, count, rng),
    "two speeds": lambda count, rng: [rng.choice([0, 5]) + rng.gauss(0, 0.5) for _ in range(count)],
    "seldom slow": lambda count, rng: [rng.gauss(0, 1) - 5 * (rng.random() < 0.2) for _ in range(count)],
    "heavy tails": lambda count, rng: [student(rng) for _ in range(count)],
}


def alarm_at(series: Sequence[float], begin: int) -> int | None:
    """After which run from `begin` on the box is first called slower."""
    return next((end for end in range(begin, len(series) + 1) if judge(series[:end]).slower), None)


def recordings() -> dict[str, list[float]]:
    """Speeds of at least 60 runs each, in the order in which they were recorded."""
    runs = History(RECORDED).runs()
    found: dict[str, list[float]] = {}
    for run in runs:
        key = f"{run.preset} {run.shape}"
        found.setdefault(f"{key} generation", []).append(run.generation_tok_s)
        found.setdefault(f"{key} prefill", []).append(run.prefill_tok_s)
    return found


def rescaled(recorded: Sequence[float], wanted: float) -> list[float]:
    """The same runs on a box with `wanted` noise: the distance of each from the median, in the logarithm."""
    middle, factor = median(recorded), wanted / noise(recorded)
    return [middle * math.exp(factor * math.log(value / middle)) for value in recorded]


@dataclass(frozen=True)
class Rates:
    """Of many series, the shares with a false alarm, and with a slowdown found in at most RECENT runs.

    `named`: one as large as the verdict said that it would see. `noisy`: it said that it cannot see sharply.
    False alarms are looked for after each run, of series longer than LENGTH after the last.
    """

    false: float
    found: float
    named: float
    noisy: float

    @classmethod
    def of(cls, series: Sequence[Sequence[float]]) -> Rates:
        """The rates of series that have no slowdown; it is put in before the last RECENT runs."""
        counts = [0, 0, 0, 0]
        for runs in series:
            known = Baseline.of(runs[:-RECENT])
            counts[0] += alarm_at(runs, 1 if len(runs) <= LENGTH else len(runs)) is not None
            counts[1] += found_in_time(runs, SLOWDOWN)
            counts[2] += found_in_time(runs, known.detectable)
            counts[3] += known.noisy
        return cls(*(count / len(series) for count in counts))

    def __str__(self) -> str:
        return (
            f"false alarms {self.false:.1%}, 10 % slower found in {self.found:.1%}, as much as named in "
            f"{self.named:.1%}, called noisy {self.noisy:.1%}"
        )


def found_in_time(runs: Sequence[float], slowdown: float) -> bool:
    """Whether the last RECENT runs, had they been slower, raise an alarm."""
    onset = len(runs) - RECENT
    slowed = [*runs[:onset], *(value * (1 - slowdown) for value in runs[onset:])]
    return alarm_at(slowed, onset + 1) is not None


def rates(recorded: Sequence[float], series: int, seed: str, length: int = LENGTH) -> Rates:
    """The rates of series drawn from recorded runs."""
    rng = random.Random(seed)  # noqa: S311  (a seed, not a secret)
    return Rates.of([drawn(recorded, length, rng) for _ in range(series)])


def test_the_recording_is_long_enough() -> None:
    assert len(recordings()) >= 2
    assert min(len(recorded) for recorded in recordings().values()) >= 60


@pytest.mark.parametrize("seed", ["i", "j"])
@pytest.mark.parametrize("name", sorted(recordings()))
def test_on_recorded_runs_false_alarms_are_rare_and_a_noisy_box_says_so(name: str, seed: str) -> None:
    recorded = recordings()[name]
    found = rates(recorded, SERIES, seed)
    said = f"{name}: noise {noise(recorded):.1%}, spread {spread(recorded):.1%}: {found}"
    print(said)
    assert found.false <= FALSE_ALARM_BAR and found.named >= FOUND_BAR, said
    assert spread(recorded) > NOISY or found.found >= FOUND_BAR, said
    assert noise(recorded) < 1.2 * NOISY or found.noisy > 0.9, said


@pytest.mark.parametrize(
    ("wanted", "seed", "series"),
    [
        (0.005, "a", 100),
        (0.01, "b", 100),
        (0.015, "c", 200),
        (0.02, "d", 200),
        (0.025, "e", 400),
        (0.03, "f", 1000),
        (0.03, "g", 400),
    ],
)
@pytest.mark.parametrize("name", sorted(recordings()))
def test_up_to_the_noise_of_the_bar_both_hold(name: str, wanted: float, seed: str, series: int) -> None:
    quieter = rescaled(recordings()[name], wanted)
    assert noise(quieter) == pytest.approx(wanted, rel=0.05)
    found = rates(quieter, series, seed)
    said = f"{name} at noise {wanted:.1%} (MAD {spread(quieter):.1%}): {found}"
    print(said)
    assert found.false <= FALSE_ALARM_BAR and found.found >= FOUND_BAR and found.named >= FOUND_BAR, said


@pytest.mark.parametrize("wanted", [0.045, 0.06, 0.1])
@pytest.mark.parametrize("name", sorted(recordings()))
def test_above_it_what_is_named_is_found(name: str, wanted: float) -> None:
    found = rates(rescaled(recordings()[name], wanted), 300, "h")
    said = f"{name} at noise {wanted:.1%}: {found}"
    print(said)
    assert found.named >= FOUND_BAR and found.false <= NOISY_FALSE_ALARM, said


@pytest.mark.parametrize("kind", sorted(SYNTHETIC))
@pytest.mark.parametrize("wanted", [0.02, 0.03])
def test_they_hold_for_noise_that_nobody_recorded(kind: str, wanted: float) -> None:
    rng = random.Random(kind)  # noqa: S311  (a seed, not a secret)
    raw = SYNTHETIC[kind](300 * LENGTH, rng)
    factor = wanted / noise([math.exp(0.01 * value) for value in raw[:600]])
    runs = [100 * math.exp(0.01 * factor * value) for value in raw]
    found = Rates.of([runs[at : at + LENGTH] for at in range(0, len(runs), LENGTH)])
    said = f"{kind} at noise {wanted:.1%}: {found}"
    print(said)
    assert found.false <= FALSE_ALARM_BAR and found.found >= FOUND_BAR and found.named >= FOUND_BAR, said


@pytest.mark.parametrize("wanted", [0.03, 0.1])
@pytest.mark.parametrize("name", sorted(recordings()))
def test_after_sixty_runs_false_alarms_are_fewer(name: str, wanted: float) -> None:
    """Of so few series three may have one by chance."""
    found = rates(rescaled(recordings()[name], wanted), 100, "k", BASELINE + RECENT)
    said = f"{name} at noise {wanted:.1%} after {BASELINE} runs: {found}"
    print(said)
    assert found.false <= 3 * FALSE_ALARM_BAR and found.named >= FOUND_BAR, said
    assert wanted > NOISY or found.found >= FOUND_BAR, said


def test_a_full_baseline_knows_the_box_better() -> None:
    """Not blinder for being longer: independent runs at the noise of the bar, after 60 of them."""
    runs = normal(150 * (BASELINE + RECENT), 0.03 * 1.4826)
    size = BASELINE + RECENT
    found = Rates.of([runs[at : at + size] for at in range(0, len(runs), size)])
    assert found.false <= FALSE_ALARM_BAR and found.found >= 0.93 and found.named >= FOUND_BAR, str(found)


def test_a_box_with_two_speeds_is_noisy_though_its_median_is_one_of_them() -> None:
    fast, slow = [320.0, 321.0, 319.0], [275.0, 276.0, 274.0, 277.0]
    assert spread([*fast, *slow] * 5) > NOISY
    assert spread(slow * 5) < 0.01

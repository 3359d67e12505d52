"""The statistics of measured speeds, and their verdicts on series drawn from runs of a real box."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
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
    ratio_of_medians,
    spread,
)

RECORDED = Path(__file__).resolve().parent / "recorded_runs.jsonl"
SERIES, LENGTH, BLOCK = 1000, 30, 5
SLOWDOWN = 0.10
FALSE_ALARM_BAR, FOUND_BAR = 0.01, 0.90


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
    assert verdict.baseline and verdict.baseline.noisy and verdict.baseline.spread > NOISY
    seen = verdict.baseline.detectable(RECENT)
    assert 0.2 < seen < 0.8
    assert verdict.baseline.threshold(RECENT) < seen


def test_the_wander_is_that_of_the_level_of_runs_in_a_row() -> None:
    values = [100.0, 101.0, 102.0, 103.0, 104.0, 105.0]
    rows = [level(values[:RECENT]), level(values[1:])]
    assert Baseline.of(values).wander == pytest.approx(1.4826 * spread(rows)) and spread(rows) > 0
    assert Baseline.of([50.0, 100.0, 150.0]).wander == 0.0, "too few for a row"


def test_what_disturbs_a_quiet_box_for_a_while_does_not_blind_it() -> None:
    """A noisy one it does: there what disturbs it comes again."""
    disturbed = [100.0] * 30 + [50.0] * RECENT + [100.0] * RECENT
    assert Baseline.of(disturbed).wander == 0.0
    assert Baseline.of(disturbed).threshold(RECENT) == LEAST_CHANGE
    noisy = [90.0, 110.0] * 15 + [50.0] * RECENT + [90.0, 110.0]
    assert Baseline.of(noisy).wander > 0.2


@pytest.mark.parametrize(
    ("known", "threshold", "seen"),
    [
        (Baseline(100, 0.02, 60), 0.06, 0.0768),
        (Baseline(100, 0.03, 60), 0.06, 0.0851),
        (Baseline(100, 0.04, 60), 0.0933, 0.1255),
        (Baseline(100, 0.06, 60), 0.1978, 0.2401),
        (Baseline(100, 0.06, 60, wander=0.1), 0.4055, 0.4769),
    ],
)
def test_thresholds_by_hand(known: Baseline, threshold: float, seen: float) -> None:
    """1 - exp(-z * error), the error 1.4826 * spread * sqrt(pi / 3 * (1 / 5 + 1 / 60)) or the wander."""
    assert known.threshold(RECENT) == pytest.approx(threshold, abs=1e-4)
    assert known.detectable(RECENT) == pytest.approx(seen, abs=1e-4)
    assert known.noisy == (known.spread > 0.03)


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


def rescaled(recorded: Sequence[float], noise: float) -> list[float]:
    """The same runs on a quieter box: the distance of each from the median, in the logarithm, scaled."""
    middle, factor = median(recorded), noise / spread(recorded)
    return [middle * math.exp(factor * math.log(value / middle)) for value in recorded]


def rates(recorded: Sequence[float], series: int, seed: str) -> tuple[float, float, int]:
    """False alarms, and slowdowns found in at most RECENT runs, as shares; the latter of how many series.

    A slowdown is asked for where the baseline itself is not NOISY; elsewhere the verdict says that it is.
    """
    rng = random.Random(seed)  # noqa: S311  (a seed, not a secret)
    onset = LENGTH - RECENT
    false = found = quiet = 0
    for _ in range(series):
        drawn_runs = drawn(recorded, LENGTH, rng)
        false += alarm_at(drawn_runs, 1) is not None
        if Baseline.of(drawn_runs[:onset]).noisy:
            continue
        quiet += 1
        slowed = [*drawn_runs[:onset], *(value * (1 - SLOWDOWN) for value in drawn_runs[onset:])]
        found += alarm_at(slowed, onset + 1) is not None
    return false / series, found / max(quiet, 1), quiet


def test_the_recording_is_long_enough() -> None:
    assert len(recordings()) >= 2
    assert min(len(recorded) for recorded in recordings().values()) >= 60


@pytest.mark.parametrize("name", sorted(recordings()))
def test_on_recorded_runs_false_alarms_are_rare_and_a_slowdown_is_found(name: str) -> None:
    recorded = recordings()[name]
    false, found, quiet = rates(recorded, SERIES, name)
    said = (
        f"{name}: {len(recorded)} runs, MAD {spread(recorded):.1%}: false alarms in {false:.1%} of {SERIES} "
        f"series, 10 % slower found in {found:.1%} of the {quiet} that are quiet enough"
    )
    print(said)
    assert false <= FALSE_ALARM_BAR, said
    if spread(recorded) <= NOISY:
        assert found >= FOUND_BAR and quiet > SERIES / 2, said
    else:
        assert quiet < SERIES / 2, f"the verdict does not say that it is noisy: {said}"


def test_a_recording_is_as_noisy_as_the_bar_allows() -> None:
    """Runs that nobody scaled, close to the limit on its good side."""
    assert any(0.9 * NOISY <= spread(recorded) <= NOISY for recorded in recordings().values())


def test_a_box_with_two_speeds_is_noisy_though_its_median_is_one_of_them() -> None:
    fast, slow = [320.0, 321.0, 319.0], [275.0, 276.0, 274.0, 277.0]
    assert spread([*fast, *slow] * 5) > NOISY
    assert spread(slow * 5) < 0.01


@pytest.mark.parametrize("noise", [0.005, 0.01, 0.015, 0.02])
@pytest.mark.parametrize("name", sorted(recordings()))
def test_the_same_on_a_quieter_box(name: str, noise: float) -> None:
    false, found, quiet = rates(rescaled(recordings()[name], noise), SERIES // 5, name)
    said = f"{name} at MAD {noise:.1%}: false alarms {false:.1%}, 10 % found in {found:.1%} of {quiet} series"
    print(said)
    assert false <= FALSE_ALARM_BAR and found >= FOUND_BAR, said

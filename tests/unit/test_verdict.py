"""Keep, roll back or leave it open: the five worlds of an update, with injected timings, and the borders."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from scripts._verdict import LEAST, Behaviour, Comparison, Pairs, Verdict, judge, judge_preset, open_yet


def pairs(ratio: float, *, noise: float = 0.005, count: int = 5, speed: float = 80.0, seed: int = 1) -> Pairs:
    """Timings of both releases, tokens per second: the new one `ratio` times as fast, both a bit unsteady."""
    rng = random.Random(seed)  # noqa: S311  (timings, not a secret)
    return tuple((speed * rng.gauss(1, noise), speed * ratio * rng.gauss(1, noise)) for _ in range(count))


def world(generation: float = 1.0, prefill: float = 1.0, noise: float = 0.005, **new: str) -> Comparison:
    """A preset under both releases, the old one without fault."""
    return Comparison(
        "coder",
        new=Behaviour(**new),
        generation=pairs(generation, noise=noise),
        prefill=pairs(prefill, noise=noise, speed=1800, seed=2),
    )


WORLDS = [
    ("good", world(), "keep", "coder: generation 80.0 -> 80.0 tok/s: 100.0 % of it ("),
    ("30 % slower", world(0.7), "roll back", "coder: generation 80.0 -> 56.0 tok/s: 70.0 % of it ("),
    (
        "not starting",
        Comparison("coder", new=Behaviour(start="error: invalid argument: --x")),
        "roll back",
        "coder does not start: error: invalid argument: --x",
    ),
    (
        "broken tool call",
        world(tool_call="no tool_calls in its answer"),
        "roll back",
        "coder: the new release breaks tool calls: no tool_calls in its answer",
    ),
    (
        "cache lost",
        world(prompt_cache="0 of 1500 tokens came from it"),
        "roll back",
        "coder: the new release loses the prompt cache: 0 of 1500 tokens came from it",
    ),
]


@pytest.mark.parametrize(
    ("found", "word", "reason"), [case[1:] for case in WORLDS], ids=[c[0] for c in WORLDS]
)
def test_the_five_worlds_end_in_the_right_state_with_the_right_reason(
    found: Comparison, word: str, reason: str
) -> None:
    verdict = judge([world(), found, world()])
    assert verdict.word == word
    assert verdict.reasons[0].startswith(reason), verdict.reasons


@pytest.mark.parametrize(("figure", "found"), [("generation", world(0.8)), ("prefill", world(1.0, 0.8))])
def test_either_figure_decides(figure: str, found: Comparison) -> None:
    verdict = judge([found])
    assert verdict.word == "roll back"
    assert [line.split()[1] for line in verdict.reasons] == [figure]


@pytest.mark.parametrize(
    ("ratio", "noise", "word"),
    [
        (LEAST, 0.0, "keep"),  # exactly at the limit is kept
        (LEAST - 1e-6, 0.0, "roll back"),
        (LEAST + 0.02, 0.002, "keep"),
        (LEAST - 0.02, 0.002, "roll back"),
        (LEAST, 0.02, "undecided"),
        (1.0, 0.15, "undecided"),
        (1.5, 0.05, "keep"),
        (0.5, 0.1, "roll back"),
    ],
)
def test_the_ends_of_the_interval_decide_at_the_border(ratio: float, noise: float, word: str) -> None:
    assert judge([world(ratio, ratio, noise)]).word == word


def test_a_ratio_that_looks_well_is_no_verdict_while_its_interval_reaches_below() -> None:
    unsteady = ((80.0, 60.0),) * 2 + ((80.0, 80.0),) * 3
    verdict = judge([replace(world(), generation=unsteady)])
    assert verdict.word == "undecided"
    assert "100.0 % of it (75.0 to 100.0 % in 5 pairs" in verdict.reasons[1]


@pytest.mark.parametrize(("low", "word"), [(0.94, "undecided"), (0.949, "undecided"), (0.95, "keep")])
def test_the_lower_end_must_reach_the_bar_itself(low: float, word: str) -> None:
    found = replace(world(), generation=((100.0, 100 * low),) * 2 + ((100.0, 100.0),) * 3)
    ratio = found.ratios["generation"]
    assert (ratio.low, ratio.high) == pytest.approx((low, 1.0))
    assert judge([found]).word == word


def test_a_reason_has_both_ends_of_the_interval_and_the_bar() -> None:
    halves = ((80.0, 40.0),) * 3 + ((80.0, 44.0),) * 2
    (reason,) = judge([replace(world(), generation=halves)]).reasons
    assert reason.startswith("coder: generation 80.0 -> 40.0 tok/s: 50.0 % of it (50.0 to 55.0 % in 5 pairs;")
    assert reason.endswith("; at least 95 % is wanted)")


@pytest.mark.parametrize(
    ("found", "word", "measured"),
    [
        ([Comparison("x", trouble="busy"), world()], "undecided", False),
        ([Comparison("x", trouble="busy"), world(noise=0.15)], "undecided", True),
        ([Comparison("x", trouble="busy"), world(0.7)], "roll back", True),
        ([world(noise=0.15)], "undecided", True),
        ([replace(world(), trouble="busy")], "undecided", False),
        ([replace(world(0.7), trouble="busy")], "roll back", True),
        ([Comparison("x", new=Behaviour(tool_call="none"), trouble="busy")], "roll back", True),
    ],
)
def test_what_could_not_be_measured_is_no_finding(found: list[Comparison], word: str, measured: bool) -> None:
    """It keeps the old release, and rejects nothing; a finding, be it of another preset, does."""
    verdict = judge(found)
    assert (verdict.word, verdict.measured) == (word, measured)


def test_one_disturbed_run_changes_nothing() -> None:
    outlier = (80.0, 20.0)
    good = replace(world(), generation=(*pairs(1.0, count=8), outlier))
    assert judge([good]).word == "keep"


@pytest.mark.parametrize(("new", "too"), [("no tool_calls", " too"), ("", "")])
@pytest.mark.parametrize(
    ("found", "word"), [(world(), "keep"), (world(0.7), "roll back"), (world(noise=0.15), "undecided")]
)
def test_what_the_current_release_cannot_do_is_told_and_not_held_against_the_new_one(
    found: Comparison, word: str, new: str, too: str
) -> None:
    """Else nobody would see that of such a preset nothing was compared but its speed."""
    old = Behaviour(tool_call="its template has no tools")
    verdict = judge([replace(found, old=old, new=Behaviour(tool_call=new))])
    assert verdict.word == word
    assert (
        verdict.reasons[-1] == f"coder: the current release breaks tool calls{too}: its template has no tools"
    )


OLD_FAILS = Behaviour(start="unknown model architecture")
NOTHING = (
    "x: nothing to compare with: the current release does not start: unknown model architecture; the new"
)
NEW_PRESET = Comparison("x", old=OLD_FAILS)


@pytest.mark.parametrize(
    ("old", "said"),
    [
        (OLD_FAILS, "does not start: unknown model architecture"),
        (Behaviour(health="its server ended 1 times"), "is not healthy: its server ended 1 times"),
    ],
)
def test_a_preset_that_only_the_new_release_can_serve_speaks_for_it(old: Behaviour, said: str) -> None:
    verdict = judge([Comparison("x", old=old)])
    line = f"x: nothing to compare with: the current release {said}; the new one serves"
    assert verdict == Verdict("keep", (line,))
    assert judge([world(0.7), Comparison("x", old=old)]).word == "roll back"


@pytest.mark.parametrize(
    ("ratio", "count", "word"),
    [(0.5, 4, "undecided"), (1.0, 4, "undecided"), (0.5, 5, "roll back"), (1.0, 8, "keep")],
)
def test_a_current_release_that_ended_late_leaves_what_was_measured_before(
    ratio: float, count: int, word: str
) -> None:
    """Pairs are something to compare with: a slow release is not kept because the old one died once."""
    ended = Behaviour(health="its server ended 1 times")
    found = replace(
        world(), old=ended, generation=pairs(ratio, count=count), prefill=pairs(ratio, count=count)
    )
    verdict = judge([found])
    assert (verdict.word, verdict.compared) == (word, True)
    if word != "roll back":
        assert "the current release is not healthy" in verdict.reasons[-1]


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (replace(NEW_PRESET, new=Behaviour(start="so")), f"{NOTHING} one does not start: so"),
        (replace(NEW_PRESET, new=Behaviour(tool_call="no")), f"{NOTHING} one breaks tool calls: no"),
        (replace(NEW_PRESET, trouble="busy"), f"{NOTHING} one could not be measured: busy"),
        (Comparison("x", known=False), "x: nothing to compare with: the box does not know it yet"),
    ],
)
def test_with_nothing_to_compare_with_the_other_presets_decide(found: Comparison, line: str) -> None:
    assert judge([found]) == Verdict("undecided", (line,), compared=False)
    both = judge([found, world()])
    assert (both.word, both.compared, both.reasons[-1]) == ("keep", True, line)
    assert judge([found, world(0.7)]).word == "roll back"


def test_what_started_before_is_no_excuse_for_the_new_release() -> None:
    old = Behaviour(health="its server ended 1 times")
    assert judge([Comparison("x", old=old, new=Behaviour(start="so"))]).word == "roll back"
    assert judge([Comparison("x", old=old, new=Behaviour(tool_call="so"))]).word == "roll back"


def test_too_few_pairs_are_no_verdict() -> None:
    few = replace(world(), generation=pairs(1.0, count=4), prefill=())
    assert judge([few]) == Verdict(
        "undecided", ("coder could not be measured: too few runs",), measured=False
    )
    busy = replace(few, trouble="no run of 10 was undisturbed")
    assert judge([busy]).reasons == ("coder could not be measured: no run of 10 was undisturbed",)


def test_trouble_leaves_it_open_however_well_the_figures_look() -> None:
    """Only one of the figures may have its pairs."""
    verdict = judge([replace(world(), trouble="the box became busy")])
    assert verdict == Verdict(
        "undecided", ("coder could not be measured: the box became busy",), measured=False
    )


def test_a_slower_figure_decides_even_when_the_rest_could_not_be_measured() -> None:
    assert judge([replace(world(0.6), trouble="the box became busy")]).word == "roll back"


def test_the_worst_preset_decides_and_only_its_reasons_are_told() -> None:
    verdict = judge([world(), replace(world(1.0, noise=0.15), preset="b"), replace(world(0.5), preset="c")])
    assert (verdict.word, len(verdict.reasons)) == ("roll back", 1)
    assert verdict.reasons[0].startswith("c: generation")
    assert judge([]) == Verdict("keep", ("no user preset has this build: there is nothing to compare",))


def test_more_pairs_are_asked_for_only_while_they_can_decide() -> None:
    assert open_yet(world(1.0, noise=0.15))
    unsure = world(1.0, noise=0.15)
    for settled in (
        *(world(), world(0.7), world(start="x")),
        *(replace(unsure, trouble="busy"), replace(unsure, old=Behaviour(start="x"))),
    ):
        assert not open_yet(settled)


def test_a_verdict_is_the_same_for_the_same_timings() -> None:
    found = world(LEAST, noise=0.01)
    assert judge_preset(found) == judge_preset(found)

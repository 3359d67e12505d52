"""What the benchmark of updates asks for, reads from the playbook, and makes of its figures."""

from __future__ import annotations

import types
from typing import Any, cast

import pytest

from scripts import bench_update as bench
from scripts._traffic import Sent, Traffic
from scripts.bench import NoMeasurement

BUILDS = {
    "one": {"repo": "git://a", "commit": "a" * 40, "cmake_options": {"GGML_AVX2": True}},
    "two": {"repo": "git://b", "commit": "b" * 40, "cmake_options": {}},
}
SAID = """
  [box] one: comparing bbbbbbbbbbbb with aaaaaaaaaaaa
  [box] small 1: generation 80.0 -> 40.0 tok/s, prefill 500.0 -> 400.5 tok/s
  [box] small 2: generation 82.0 -> 42.0 tok/s, prefill 510.0 -> 410.0 tok/s
  [box] other 1: generation 1.0 -> 1.0 tok/s, prefill 1.0 -> 1.0 tok/s
  [box] one: roll back
  [box]   small: generation 81.0 -> 41.0 tok/s: 50.6 % of it
"""


def of(preset: str = "small", build: str = "one") -> bench.Bench:
    return cast("bench.Bench", types.SimpleNamespace(preset=preset, build=build))


def read(said: str, case: bench.Case, *, kept: bool = False) -> bench.Outcome:
    return bench.Bench.read(of(), case, 2, 100.0, said, kept=kept)


def test_the_new_releases_differ_from_the_old_one_in_what_they_say() -> None:
    again, other, slow = bench.cases(BUILDS, "one", "GGML_AVX2=OFF,GGML_FMA=OFF")
    assert again.data["commit"] == "a" * 40 and again.data["cmake_options"] != BUILDS["one"]["cmake_options"]
    assert (other.data["repo"], other.data["commit"]) == ("git://b", "b" * 40)
    assert slow.data == {**BUILDS["one"], "cmake_options": {"GGML_AVX2": False, "GGML_FMA": False}}
    assert (again.right, other.right, slow.right) == ("keep", "", "roll back")
    with pytest.raises(NoMeasurement, match="only one"):
        bench.cases({"one": BUILDS["one"]}, "one", "X=Y")


def test_the_playbook_s_own_words_are_the_measurement() -> None:
    found = read(SAID, bench.Case("slow", {}, "roll back"))
    assert found.word == "roll back" and found.right
    assert found.generation == ((80.0, 40.0), (82.0, 42.0)) and found.prefill[0] == (500.0, 400.5)
    assert found.reasons == ("small: generation 81.0 -> 41.0 tok/s: 50.6 % of it",)
    with pytest.raises(NoMeasurement, match="no verdict: refused: no room"):
        read("refused: no room\nPLAY RECAP", found.case)


@pytest.mark.parametrize(
    ("right", "kept", "wanted"),
    [("roll back", False, True), ("roll back", True, False), ("keep", False, False), ("", False, True)],
)
def test_an_outcome_is_right_when_verdict_and_box_are(right: str, kept: bool, wanted: bool) -> None:
    assert read(SAID, bench.Case("x", {}, right), kept=kept).right is wanted


@pytest.mark.parametrize(("new", "seconds", "marks"), [(40.0, 12.0, 2), (77.0, 61.0, 0)])
def test_the_page_says_what_is_met(new: float, seconds: float, marks: int) -> None:
    pairs = ((80.0, new),) * 5
    slow = bench.Outcome(
        bench.Case("slow", {}, "roll back"), "roll back", ("why",), pairs, pairs, 99.0, False
    )
    back = [bench.WayBack(seconds, 3.0)] * 3
    text = bench.page([slow], back, where="W", revision="R", day="D", what="B")
    assert text.count("| met |") == marks and text.count("**not met**") == 2 - marks
    assert f"| slow | generation | 80.0 / 80.0 / 80.0 | {new:.1f} / {new:.1f} / {new:.1f} | 5 |" in text
    assert "**wrong**" not in text and "- slow: roll back: why" in text
    assert [bar.length for bar in bench.bars([slow])] == [80.0, new]


def test_a_lost_request_is_no_measurement() -> None:
    answer: dict[str, Any] = {"began": 0.0, "model": "m", "stream": False, "status": 200, "tokens": 1}
    traffic = Traffic([Sent(took=2.0, **answer), Sent(took=3.5, **answer)])
    assert bench.waited(traffic) == 3.5
    traffic.sent.append(Sent(took=1.0, error="gone", **answer))
    with pytest.raises(NoMeasurement, match="1 of 3 requests were lost"):
        bench.waited(traffic)

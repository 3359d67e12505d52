"""What bench_ocr.py says of its figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ocr_pipeline.synthetic import dataset, scene

from lab import packages
from scripts import _second_plates, _third_plates, bench_ocr, verify_ocr
from tests.support import ROOT


def measured(wrong: int, *, difficulty: str = "easy", review: bool = False) -> dict[str, Any]:
    """100 plates with one field, some read wrong."""
    outcomes = []
    for number in range(100):
        photo = verify_ocr.Labelled(f"{number}.jpg", str(number), difficulty, {"fases": 3})
        answer = {"fases": 1 if number < wrong else 3, "_needs_review": review}
        outcomes.append(verify_ocr.judge(photo, answer, 0.5))
    told = {"commit": "abc", "day": "2026-11-28", "machine": "a machine", "first": 0, "not_right": []}
    return {**told, **verify_ocr.report(outcomes), "counts": [[4, 1, 1], [5, 0, 1]]}


def row(page: str, begins: str) -> str:
    return next(line for line in page.splitlines() if line.startswith(f"| {begins}"))


def test_a_bar_that_is_missed_is_said_so() -> None:
    good = bench_ocr.page({"accuracy": measured(0)})
    bad = bench_ocr.page({"accuracy": measured(4)})
    reviewed = bench_ocr.page({"accuracy": measured(0, review=True)})
    assert row(good, "easy and medium").endswith("| 100.0% | met |")
    assert row(bad, "easy and medium").endswith("| 96.0% | **not met** |")
    assert row(bad, "wrong and not marked").endswith("| 4 of 100, 4.00% | **not met** |")
    assert row(reviewed, "correct plates").endswith("| 100 of 100, 100.0% | **not met** |")


def test_hard_photos_have_a_bar_of_their_own() -> None:
    assert row(bench_ocr.page({"accuracy": measured(14, difficulty="hard")}), "hard,").endswith("met |")
    assert row(bench_ocr.page({"accuracy": measured(16, difficulty="hard")}), "hard,").endswith(
        "**not met** |"
    )


def test_the_drop_is_held_against_the_generator_that_nothing_is_tuned_on() -> None:
    page = bench_ocr.page({"accuracy": measured(0), "second": measured(30), "third": measured(7)})
    assert row(page, "another generator").endswith("| 7.0 | **not met** |")
    assert "another generator" not in bench_ocr.page({"accuracy": measured(0), "second": measured(30)})


@pytest.mark.parametrize(
    ("part", "told", "seeds"),
    [("second", "tuned on it since", (4, 5, 7, 3)), ("third", "never tuned\non it", (0, 2, 1, 4))],
)
def test_every_other_generator_has_its_section(part: str, told: str, seeds: tuple[int, ...]) -> None:
    counts = [[seed, right, 1] for seed, right in zip(seeds, (1, 0, 0, 1), strict=True)]
    languages = "Portuguese 50.0% of 2, Spanish 0.0% of 1, English 100.0% of 1"
    page = bench_ocr.page({part: measured(7) | {"counts": counts, "first": 100}})
    assert f"## {bench_ocr.GENERATORS[part].title}\n\nSeeds 100 to 199 of `scripts/_{part}_plates.py`" in page
    assert told in page
    assert f"By the plate's language: {languages} printed fields." in page


def test_a_part_reads_its_own_generator_from_its_own_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(packages, "ensure", lambda *_: None)
    monkeypatch.setattr(dataset, "write", lambda *given: asked.append(given))
    monkeypatch.setattr(verify_ocr, "labels", lambda folder: [])
    monkeypatch.setattr(verify_ocr, "in_process", lambda _: None)
    monkeypatch.setattr(verify_ocr, "run", lambda *_: [])
    places = ["--work", str(tmp_path), "--output", str(tmp_path)]
    assert bench_ocr.main(["accuracy", "second", "third", "--photos", "2", "--third", "3", *places]) == 0
    assert asked == [
        (tmp_path / "photos", 7200, 2, scene.sample),
        (tmp_path / "second-photos", 11000, 45, _second_plates.sample),
        (tmp_path / "third-photos", 13100, 3, _third_plates.sample),
    ]


def test_what_was_not_measured_is_not_on_the_page() -> None:
    page = bench_ocr.page({"accuracy": measured(0)})
    assert "## Speed" not in page
    assert "900 MB" not in page


def test_speed_is_held_against_the_engine_on_the_same_crop() -> None:
    stages = dict.fromkeys(("decode", "detector", "vision", "reasoning", "audit"), 0.1)
    rows = [{"total": {"wall": 2.0, "cpu": 3.2}, "engine": {"wall": 9.0, "cpu": 2.0}, "stages": stages}] * 3
    told = {"commit": "abc", "day": "2026-11-28", "machine": "a machine", "rows": rows, "megapixels": 12.0}
    page = bench_ocr.page({"speed": told})
    assert row(page, "end to end, at most").endswith("| 1.60 | **not met** |")
    assert row(page, "a photo of 12").endswith("| 2.00 s | **not met** |")


def test_a_part_that_there_is_not_is_bad_usage() -> None:
    with pytest.raises(SystemExit) as caught:
        bench_ocr.main(["colour"])
    assert caught.value.code == 2


def test_missing_typefaces_are_named_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LAB_INSTALL", "0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_second_plates, "PACKAGES", {"/nowhere/plate.ttf": "fonts-of-plates"})
    places = ["--work", str(tmp_path / "photos"), "--output", str(tmp_path)]
    assert bench_ocr.main(["second", "--second", "1", *places]) == 2
    assert "fonts-of-plates" in capsys.readouterr().err
    assert not list((tmp_path / "photos").iterdir())


def test_one_part_measured_again_leaves_the_others_on_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "ensure", lambda *_: None)
    monkeypatch.setattr(bench_ocr, "memory", lambda *_: {"rss": [400, 500], "peak": 600.0, "images": 2})
    (tmp_path / "ocr.json").write_text(json.dumps({"accuracy": measured(4)}))
    assert bench_ocr.main(["memory", "--work", str(tmp_path / "photos"), "--output", str(tmp_path)]) == 0
    text = (tmp_path / "ocr.md").read_text()
    assert row(text, "easy and medium").endswith("| 96.0% | **not met** |")
    assert row(text, "a worker's memory after 2 varied images").endswith("| 500 MB | met |")


def test_a_page_is_the_same_from_its_file_of_figures() -> None:
    """The file has its keys in the alphabet's order, the page and the chart have the fields in theirs."""
    fresh = {"accuracy": measured(4)}
    fresh["accuracy"]["by_field"]["potencia_kva"] |= {"printed": 100, "right": 50}  # before `fases`
    filed = json.loads(json.dumps(fresh, sort_keys=True))
    assert bench_ocr.page(filed) == bench_ocr.page(fresh)
    assert bench_ocr.charted(filed) == bench_ocr.charted(fresh)


def test_the_published_page_has_all_parts_and_says_what_its_figures_say() -> None:
    figures = json.loads((ROOT / "docs/benchmarks/ocr.json").read_text(encoding="utf-8"))
    assert set(figures) == set(bench_ocr.PARTS)
    assert (ROOT / "docs/benchmarks/ocr.md").read_text(encoding="utf-8") == bench_ocr.page(figures)

"""The history of runs: what is kept, for how long, and what is compared with what."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from scripts import _history
from scripts._history import History, Run

RUN = Run("2026-11-22T10:00:00+00:00", "coder", "short", "4ca1-00", "580.1", 1550, 1850.0, 400, 81.5,
          {"power_w": 210.0})  # fmt: skip


def test_runs_come_back_in_the_order_in_which_they_were_made(tmp_path: Path) -> None:
    history = History(tmp_path / "new" / "box.jsonl")
    assert history.runs() == []
    made = [replace(RUN, generation_tok_s=float(speed), gpu=None) for speed in (1, 2, 3)] + [RUN]
    for run in made:
        history.append(run)
    assert History(history.file).runs() == made


def test_each_host_of_each_inventory_has_its_own_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (tmp_path / "inventory/lab").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "inventory/lab")
    file = History.of(Path(), "box").file
    assert file == tmp_path / "llmbox/throughput/lab/box.jsonl" == History.of(Path("../lab/"), "box").file
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert History.of(Path(), "box").file == tmp_path / ".local/state/llmbox/throughput/lab/box.jsonl"


def test_what_cannot_be_read_is_passed_over(tmp_path: Path) -> None:
    history = History(tmp_path / "box.jsonl")
    history.append(RUN)
    with history.file.open("a") as file:
        file.write('{"time": "torn\n[]\n{}\n')
        file.write(history.file.read_text().splitlines()[0].replace("81.5", "0") + "\n")
        for figure in ('"fast"', "Infinity", "NaN"):
            file.write(history.file.read_text().splitlines()[0].replace("81.5", figure) + "\n")
        file.write(json.dumps({**asdict(RUN), "gpu": 5}) + "\n")
    with history.file.open("ab") as file:
        file.write(b"\xff\xfe\x80\n")  # a block that a power cut left is not even text
    history.append(RUN)
    assert history.runs() == [RUN, RUN]


def test_a_run_that_follows_a_torn_line_is_not_lost_with_it(tmp_path: Path) -> None:
    history = History(tmp_path / "box.jsonl")
    history.append(RUN)
    with history.file.open("a") as file:
        file.write('{"time": "torn')
    history.append(RUN)
    history.append(RUN)
    assert history.runs() == [RUN] * 3


def test_the_oldest_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_history, "LIMIT", 10)
    monkeypatch.setattr(_history, "SLACK", 3)
    history = History(tmp_path / "box.jsonl")
    for number in range(1, 41):
        history.append(replace(RUN, generation_tok_s=float(number)))
    kept = [run.generation_tok_s for run in history.runs()]
    assert 10 <= len(kept) <= 13 and kept == [float(number) for number in range(41 - len(kept), 41)]


@pytest.mark.parametrize(
    ("field", "value"), [("preset", "x"), ("shape", "deep"), ("release", "x"), ("driver", "581")]
)
def test_only_runs_of_the_same_preset_shape_release_and_driver_are_alike(field: str, value: str) -> None:
    assert RUN.alike(replace(RUN, generation_tok_s=1.0, time="x", gpu=None))
    assert not RUN.alike(replace(RUN, **{field: value}))  # type: ignore[arg-type]


DEPTHS = [(15_992, True), (16_650, True), (15_990, False), (7_936, False)]  # beside 16,318 tokens


@pytest.mark.parametrize(("tokens", "alike"), DEPTHS)
def test_only_prompts_of_about_one_length_are_alike(tokens: int, alike: bool) -> None:
    """A preset whose context changed is measured at another depth, where it has another speed."""
    deep, other = (replace(RUN, shape="deep", prompt_tokens=count) for count in (16_318, tokens))
    assert deep.alike(other) is other.alike(deep) is alike


def test_a_history_that_cannot_be_written_is_one_line_with_the_fix(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"the history .*box\.jsonl: .*XDG_STATE_HOME"):
        History(tmp_path / "file" / "box.jsonl").ensure_writable()
    History(tmp_path / "box.jsonl").ensure_writable()

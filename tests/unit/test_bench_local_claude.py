"""What the benchmark of local-claude makes of its figures, and its probe on the client."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from scripts import _client_probe as probe
from scripts import bench_local_claude as bench

EVENTS = """
import json, sys
print("no JSON"); print(json.dumps({"type": "system"}))
for kind in KINDS:
    print(json.dumps({"type": "stream_event", "event": {"type": kind}}))
print(json.dumps({"type": "result", "is_error": IS_ERROR})); sys.exit(CODE)
"""


def turns(reused: float) -> bench.Turns:
    """Two repetitions, of which the second reuses a bit less."""
    return {
        way: {
            step: [
                {"prompt": 20000, "reused": reused - less, "first_s": 10 + less, "requests": 1}
                for less in (0, 0.02)
            ]
            for step in bench.STEPS
        }
        for way in (bench.BARE, bench.OURS)
    }


def judged(found: bench.Turns) -> list[str]:
    return [line.split("|")[6].strip() for line in bench.turn_lines(found) if ">=" in line]


def test_the_worst_repetition_counts_and_only_ours_is_judged() -> None:
    assert judged(turns(1.0)) == ["**not met**", "met", "met"]
    assert judged(turns(0.9)) == ["**not met**", "**not met**", "met"]
    assert len(bench.turn_lines(turns(1.0))) == 3 * 2 * len(bench.STEPS)
    assert len(bench.bars(turns(1.0))) == 2 * len(bench.STEPS)


def test_the_page_has_what_was_measured(tmp_path: Path) -> None:
    about = {"where": "a machine", "commit": "c0ffee", "day": "2026-01-01"}
    start = {"ours": [0.2], "stub": [0.1], "cpu": [0.1]}
    bench.write(tmp_path, {"rote": {**about, "found": turns(1.0)}, "start": {**about, "found": start}})
    text = (tmp_path / "local-claude.md").read_text()
    assert text.count("c0ffee") == 2 and "Gemma" not in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["local-claude.md", "local-claude.png"]


def test_what_a_new_session_reads_again_is_told_with_the_real_model() -> None:
    about = {"where": "a machine", "commit": "c0ffee", "day": "2026-01-01"}
    said = "read 0, 400 tokens again, and their first events came after 10.0, 10.0 s"
    assert said in bench.page({"real": {**about, "found": turns(1.0)}})
    assert "tokens again" not in bench.page({"rote": {**about, "found": turns(1.0)}})


def test_the_start_is_what_a_pair_differs_by() -> None:
    found = {"ours": [0.11, 0.2, 0.14], "stub": [0.01, 0.01, 0.02], "cpu": [0.09, 0.1, 0.08]}
    line, cpu = bench.start_lines(found)
    assert "| 100 | 120 | 190 | <= 150 | met |" in line and "| 80 | 90 | 100 |" in cpu
    assert "**not met**" in bench.start_lines({"ours": [0.2], "stub": [0.01], "cpu": [0.1]})[0]


def one_turn(tmp_path: Path, is_error: bool = False, code: int = 0, *kinds: str) -> dict[str, Any]:
    text = EVENTS.replace("IS_ERROR", str(is_error)).replace("CODE", str(code))
    text = text.replace("KINDS", repr(kinds or ("message_start", "content_block_start")))
    return probe.turn({"argv": [sys.executable, "-S", "-c", text], "cwd": str(tmp_path), "env": {}})


def test_a_turn_is_timed_to_its_first_event(tmp_path: Path) -> None:
    found = one_turn(tmp_path)
    assert found["ok"] and 0 < found["first_s"] <= found["seconds"]
    assert not one_turn(tmp_path, is_error=True)["ok"] and not one_turn(tmp_path, code=1)["ok"]
    assert one_turn(tmp_path, False, 0, "message_start")["first_s"] is None, "sent before the prompt is read"
    assert one_turn(tmp_path, False, 0, "message_start", "message_delta")["ok"], "an empty answer"

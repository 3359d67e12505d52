"""What a person reads while a download runs, and how it is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from plugins.action.gguf_models import duration, progress_line
from roles.gguf_models.module_utils.gguf_files.worker import Progress

REPORT: dict[str, Any] = {
    "phase": "downloading",
    "file": "a.gguf",
    "index": 1,
    "count": 1,
    "done_bytes": 7_800_000_000,
    "total_bytes": 18_600_000_000,
    "bytes_per_s": 85_000_000,
}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "a.gguf: 41 % (7.8/18.6 GB), 85 MB/s, 2 min left"),
        ({"count": 3, "index": 2}, "a.gguf (2 of 3): 41 % (7.8/18.6 GB), 85 MB/s, 2 min left"),
        ({"phase": "checking"}, "a.gguf: 41 % (7.8/18.6 GB), 85 MB/s checking, 2 min left"),
        ({"phase": "waiting"}, "a.gguf: 41 % (7.8/18.6 GB), connection lost, trying again"),
        ({"bytes_per_s": 0}, "a.gguf: 41 % (7.8/18.6 GB), downloading"),
        (
            {"done_bytes": 1_000_000, "total_bytes": 3_000_000, "bytes_per_s": 500_000},
            "a.gguf: 33 % (1.0/3.0 MB), 0.5 MB/s, 4 s left",
        ),
        ({"total_bytes": 0}, "starting"),
    ],
)
def test_a_line_of_progress(changes: dict[str, Any], line: str) -> None:
    assert progress_line({**REPORT, **changes}) == line


def test_nothing_reported_yet() -> None:
    assert progress_line({}) == "starting"


@pytest.mark.parametrize(("seconds", "text"), [(4.2, "4 s"), (89, "89 s"), (120, "2 min"), (5400, "1.5 h")])
def test_durations_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_rates_are_of_the_last_seconds_and_writes_are_few(tmp_path: Path) -> None:
    now = 0.0
    path = tmp_path / "progress.json"
    progress = Progress(path, total=1_000_000, count=2, clock=lambda: now)
    progress.start_file(1)
    progress.finish_file(400_000)
    progress.start_file(2)
    writes = set()
    for step in range(400):
        now = step * 0.1
        progress("downloading", "b.gguf", step * (100 if step < 200 else 1000))
        writes.add(path.stat().st_mtime_ns)
    report = json.loads(path.read_text())
    assert report["bytes_per_s"] == 10_000
    assert report["done_bytes"] == 400_000 + report["file_bytes"]
    assert (report["index"], report["count"]) == (2, 2)
    assert len(writes) <= 81
    progress("downloading", "b.gguf", 0)  # a server without Range: from the beginning
    now += 1
    progress("downloading", "b.gguf", 1)
    assert json.loads(path.read_text())["bytes_per_s"] >= 0

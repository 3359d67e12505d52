"""What memory the lab's presets take: the header says what the box's own llama-fit-params says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support import ROOT

BAR_MIB, BAR = 2, 0.03


def planned(tmp_path: Path, *words: str) -> dict[str, Any]:
    """The checks of scripts/plan_vram.py, by preset."""
    report = tmp_path / "plan.json"
    command = [sys.executable, "scripts/plan_vram.py", "--inventory", "inventory/lab", "--limit", "lab-llm"]
    done = subprocess.run(
        [*command, "--json", str(report), *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {check["name"]: check for check in json.loads(report.read_text())["hosts"][0]["checks"]}


def figures(detail: str) -> list[int]:
    """CPU cache and compute buffer in MiB; weights differ by what llama-fit-params leaves out of them."""
    host = detail.partition("CPU weights")[2]
    return [int(host.partition(f"{name} ")[2].split(",")[0].split(";")[0]) for name in ("cache", "compute")]


def test_both_predictors_agree(tmp_path: Path) -> None:
    asked, header = planned(tmp_path), planned(tmp_path, "--offline")
    assert asked.keys() == header.keys()
    for name in asked:
        assert asked[name]["detail"].startswith("llama-fit-params: "), asked[name]
        assert header[name]["detail"].startswith("header: ")
        for one, other in zip(figures(asked[name]["detail"]), figures(header[name]["detail"]), strict=True):
            assert abs(one - other) <= max(BAR_MIB, BAR * one)

"""--preset where llama_presets is not what it should be: one line and exit code 2, by whatever script."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from scripts import choose_draft, tune_moe, verify_agent, verify_throughput
from scripts._inventory import Host
from tests.unit.test_verify_health import VARIABLES

SCRIPTS = [choose_draft, tune_moe, verify_throughput, verify_agent]


def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path, *hosts: Host) -> int:
    monkeypatch.setattr(script, "load", lambda *_, **__: list(hosts))
    monkeypatch.setenv("XDG_STATE_HOME", str(folder))
    more = ["--claude", "/bin/true"] if script is verify_agent else []
    code: int = script.main(["--inventory", str(folder), "--preset", "coder", *more])
    return code


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("presets", [[1], [{"name": "coder"}], "coder", {"coder": 5}, {5: {}}])
def test_presets_of_another_shape_are_refused_in_one_line(
    script: ModuleType,
    presets: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    box = Host("box", frozenset({"llm_servers"}), {**VARIABLES, "llama_presets": presets})
    assert run(script, monkeypatch, tmp_path, box) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "refused: inventory: llama_presets" in last and "; fix: " in last


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_host_that_is_no_llm_box_is_told_as_one(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(script, monkeypatch, tmp_path, Host("glaurung", frozenset({"clients"}))) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith("none of the hosts is in the group llm_servers")

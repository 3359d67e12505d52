"""What the comparison of memory predictors says where it cannot begin."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import bench_memory
from tests.support import ROOT


def test_a_folder_without_the_programs_is_refused_with_the_fix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_memory, "measure", lambda *_: pytest.fail("it began to measure"))
    for folder in (tmp_path / "none", tmp_path):
        assert bench_memory.main(["--binaries", str(folder), "--models", "x"]) == 2
        assert capsys.readouterr().err == (
            f"bench_memory: --binaries {folder}: llama-server is not there; fix: give the bin folder of a"
            " build with -DGGML_RPC=ON\n"
        )
    (tmp_path / "llama-server").touch()
    assert bench_memory.main(["--binaries", str(tmp_path), "--models", "x"]) == 2
    assert "llama-fit-params is not there" in capsys.readouterr().err


def test_a_page_without_a_real_model_is_not_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_memory, "measure", lambda *_: pytest.fail("it began to measure"))
    for name in bench_memory.PROGRAMS:
        (tmp_path / name).touch()
    binaries = ["--binaries", str(tmp_path), "--output", str(tmp_path / "out")]
    assert bench_memory.main([*binaries, "--models", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"bench_memory: --models {tmp_path}: no *.gguf there; fix: make lab\n"
    with pytest.raises(SystemExit):
        bench_memory.main(binaries)


def test_the_page_has_both_small_models() -> None:
    """Random weights have neither a real vocabulary nor mixed tensor types."""
    page = (ROOT / "docs/benchmarks/memory.md").read_text()
    for model in ("gemma-3-270m-q4_k_m", "smollm2-135m-instruct-q4_1"):
        rows = [line for line in page.splitlines() if line.startswith(f"| {model} | ")]
        assert len(rows) == 3 and not [row for row in rows if "outside" in row]

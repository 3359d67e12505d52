"""What the comparison of memory predictors says where it cannot begin."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import bench_memory


def test_a_folder_without_the_programs_is_refused_with_the_fix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_memory, "measure", lambda *_: pytest.fail("it began to measure"))
    for folder in (tmp_path / "none", tmp_path):
        assert bench_memory.main(["--models", str(tmp_path), "--binaries", str(folder)]) == 2
        assert capsys.readouterr().err == (
            f"bench_memory: --binaries {folder}: llama-server is not there; fix: give the bin folder of a"
            " build with -DGGML_RPC=ON\n"
        )
    (tmp_path / "llama-server").touch()
    words = ["--models", str(tmp_path), "--binaries", str(tmp_path)]
    assert bench_memory.main(words) == 2
    assert "llama-fit-params is not there" in capsys.readouterr().err
    for name in bench_memory.PROGRAMS:
        (tmp_path / name).touch()
    assert bench_memory.main(words) == 2
    assert f"--models {tmp_path}: no *.gguf there; fix: `make lab`" in capsys.readouterr().err

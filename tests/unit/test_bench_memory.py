"""What the comparison of memory predictors says where it cannot begin."""

from __future__ import annotations

from pathlib import Path

import pytest
from llama_common.memory import MIB, Estimate, Settings, Use, estimate
from llama_common.model import Model

from scripts import _tiny_models, bench_memory
from scripts._header import read_file
from scripts.bench_memory import Case, Cost, Figure
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


CASE = Case("tiny", Path("tiny.gguf"), Settings(4096))


@pytest.mark.parametrize(
    ("logged", "off", "met"),
    [
        (100 * MIB, 3 * MIB, True),
        (100 * MIB, 3 * MIB + 1, False),
        (32 * MIB, MIB, False),  # from here on it is 3 %
        (32 * MIB - 1, MIB, True),
        (32 * MIB - 1, MIB + 1, False),
        (0, MIB, True),
        (0, MIB + 1, False),
    ],
)
def test_the_bar_is_3_percent_or_1_mib_below_32_mib_for_either_predictor(
    logged: int, off: int, met: bool
) -> None:
    for header, fitted in ((off, 0), (-off, 0), (0, off), (0, -off)):
        assert Figure(CASE, "gpu", "cache", logged, logged + header, logged + fitted).met is met


def test_a_figure_is_of_the_server_the_header_and_the_estimator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("qwen3", _tiny_models.write("qwen3", tmp_path), Settings(4096, n_gpu_layers=0))
    for name, said in {"start": Use(1, 2, 3), "fit": Use(10, 20, 30)}.items():
        monkeypatch.setattr(bench_memory, name, lambda *_, said=said: Estimate(Use(), said))
    header = estimate(Model.of([read_file(case.model)]), case.settings).cpu
    weights, cache, _ = bench_memory.measure(case, tmp_path)
    assert (weights.logged, weights.header, weights.fitted) == (1, header.weights, 10)
    assert (cache.logged, cache.header, cache.fitted) == (2, header.cache, 20)


@pytest.mark.parametrize(("off", "code", "word"), [(3, 0, ""), (4, 1, "outside")])
def test_one_figure_outside_the_bar_is_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, off: int, code: int, word: str
) -> None:
    for name in (*bench_memory.PROGRAMS, "real.gguf"):
        (tmp_path / name).touch()
    logged = [Figure(CASE, "cpu", name, 100 * MIB, 100 * MIB, 100 * MIB) for name in ("weights", "compute")]
    wrong = Figure(CASE, "cpu", "cache", 100 * MIB, (100 + off) * MIB, 100 * MIB)
    for name, value in {
        "single": [CASE], "splits": [], "measure": [*logged, wrong],
        "version_of": "1", "cost": Cost(1.0, 1, 1),
    }.items():  # fmt: skip
        monkeypatch.setattr(bench_memory, name, lambda *_, value=value: value)
    folder = str(tmp_path)
    assert bench_memory.main(["--binaries", folder, "--models", folder, "--output", folder]) == code
    page = (tmp_path / "memory.md").read_text()
    assert f"| tiny | 4096 | CPU | cache | 100.00 | {100 + off}.00 | 100.00 | {word} |" in page

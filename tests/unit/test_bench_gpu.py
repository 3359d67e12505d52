"""The GPU lane without a GPU: the card, the shapes, the cases, the build and the page."""

from __future__ import annotations

import io
import lzma
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from llama_common.memory import MIB, Estimate, Use
from llama_common.model import Model

from scripts import _card, _gpu_inputs, _large_models, bench_gpu
from scripts._bare_server import NotServing, ended
from scripts._card import Card, NoCard
from scripts._gpu_inputs import NotPrepared
from scripts._header import read_file
from scripts._measure import Shape, Timed

ADA = Card("NVIDIA GeForce RTX 4070 Ti SUPER", 16_376, "580.95", "89")


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A nvidia-smi that does what a test says."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def made(script: str) -> None:
        (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (folder / "nvidia-smi").chmod(0o755)

    return made


def test_the_card_is_what_nvidia_smi_says(nvidia_smi: Callable[[str], None]) -> None:
    nvidia_smi("echo 'NVIDIA GeForce RTX 4070 Ti SUPER, 16376, 580.95, 8.9'; echo 'Other, 1, 1, 7.5'")
    assert _card.card() == ADA and ADA.slug == "geforce-rtx-4070-ti-super"
    nvidia_smi("echo 1234")
    assert _card.used_mib() == 1234


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'no devices were found'; exit 6", "failed with exit code 6: no devices were found"),
        ("exec sleep 60", "hangs: no answer in 0.2 s"),
        ("echo 'Card, [N/A], 580, 8.9'", "names no card of a known kind"),
        ("echo hello", "something else than was asked"),
    ],
)
def test_no_card_is_one_line(
    nvidia_smi: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, script: str, said: str
) -> None:
    monkeypatch.setattr(_card, "TIMEOUT_S", 0.2 if "sleep" in script else 10.0)
    nvidia_smi(script)
    with pytest.raises(NoCard, match=said):
        _card.card()


def test_a_machine_without_a_card_cannot_run_the_lane(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert bench_gpu.main([]) == 2
    assert capsys.readouterr().err == "bench_gpu: no NVIDIA GPU: nvidia-smi is not installed\n"


# --- the models ---


@pytest.mark.parametrize(
    ("shape", "billions"),
    [(_large_models.MOE, 30.5), (_large_models.DENSE, 26.9), (_large_models.DRAFT, 0.95)],
)
def test_the_shapes_have_the_parameters_of_their_models(shape: _large_models.Shape, billions: float) -> None:
    counted = sum(float(np.prod(dimensions)) for _, dimensions in _large_models.tensors(shape))
    assert counted / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize("shape", _large_models.TINY, ids=lambda shape: shape.name)
def test_a_model_is_written_whole_and_its_weights_are_even_around_zero(
    shape: _large_models.Shape, tmp_path: Path
) -> None:
    path = _large_models.write(shape, tmp_path)
    reader = gguf.GGUFReader(path)
    assert {tensor.name for tensor in reader.tensors} == {name for name, _ in _large_models.tensors(shape)}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.isfinite(values).all()
        if tensor.tensor_type == _large_models.Q4_K:
            assert abs(values.mean()) < 0.002 and values.std() == pytest.approx(0.02, rel=0.05)
    assert _large_models.write(shape, tmp_path) == path
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert _large_models.model(shape) == Model.of([read_file(path)])


def test_models_are_scaled_to_the_machine() -> None:
    moe, dense = bench_gpu.scaled(ADA, 40_960, 32 * 2**30)
    assert moe.layers == 48 and 40 <= dense.layers < 64 and dense.layers % 4 == 0
    moe, dense = bench_gpu.scaled(Card("H", 81_559, "5", "90"), 40_960, 128 * 2**30)
    assert (moe.layers, dense.layers) == (48, 64)
    with pytest.raises(NotPrepared, match="not even 4 layers fit"):
        bench_gpu.scaled(Card("x", 100, "5", "89"), 40_960, 2**33)


# --- the cases ---


def bench(folder: Path, **more: Any) -> bench_gpu.Bench:
    moe, dense, draft = _large_models.TINY
    values = {
        "card": Card("CPU", 64, "none", ""), "device": "cpu", "binary": folder / "llama-server",
        "version": "1 (abc)", "moe": moe, "dense": dense, "draft": draft, "context": 1024,
        "run": Shape("deep", 96, 12), "work": folder,
    }  # fmt: skip
    return bench_gpu.Bench(**{**values, **more})


def test_layers_and_experts_are_held_against_each_other_in_the_same_memory(tmp_path: Path) -> None:
    large = bench(tmp_path, card=ADA, moe=_large_models.MOE, context=40_960)
    cases = list(bench_gpu.layers_cases(large))
    assert len(cases) == 2 * len(bench_gpu.SHARES)
    for whole, experts in zip(cases[::2], cases[1::2], strict=True):
        assert whole.settings and experts.settings
        budget = float(whole.name.split(" ")[0]) * 2**30
        for settings in (whole.settings, experts.settings):
            assert 0.85 * budget < bench_gpu.taken(large.moe, settings) <= 1.01 * budget
        assert whole.settings.n_cpu_moe == 0 and whole.settings.n_gpu_layers < 49
        assert experts.settings.n_gpu_layers == 99 and experts.settings.n_cpu_moe > 0


def test_k_and_v_and_drafts(tmp_path: Path) -> None:
    for case in bench_gpu.cache_cases(bench(tmp_path)):
        words = " ".join(case.words)
        key, value = case.name.removeprefix("K ").split(", V ")
        assert f"--cache-type-k {key} --cache-type-v {value}" in words
        assert (case.settings is not None) == (key == value)
    none, *drafted = bench_gpu.draft_cases(bench(tmp_path))
    assert none.draft is None and all(case.draft for case in drafted)
    assert [case.words[-2:] for case in drafted] == [
        ("--spec-synth-len", str(length)) for length in bench_gpu.LENGTHS
    ]


class Fake:
    """Servers whose speed is made up; `full` are the values of n_cpu_moe from which on it fits."""

    def __init__(self, fits_from: int = 0) -> None:
        self.started: list[Sequence[str]] = []
        self.fits_from = fits_from
        self.broken = ""

    @contextmanager
    def __call__(self, _binary: Path, words: Sequence[str]) -> Iterator[Any]:
        self.started.append(words)
        experts = int(words[words.index("--n-cpu-moe") + 1]) if "--n-cpu-moe" in words else 0
        if experts < self.fits_from:
            raise NotServing("cudaMalloc failed: out of memory", memory=True)
        if self.broken and self.broken in words:
            raise NotServing("error: no kernel")
        runs = [Timed(96, 1000.0 + n, 12, 50.0 - experts + n / 10, 0.0, 1.0) for n in range(5)]
        yield SimpleNamespace(
            series=lambda *_: iter(runs), buffers=lambda: Estimate(Use(10 * MIB, MIB, MIB), Use())
        )


@pytest.fixture
def lane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The whole command with tiny shapes, without servers."""
    binary = tmp_path / "llama-server"
    binary.write_text("#!/bin/sh\necho 'version: 1 (abc)'\n")
    binary.chmod(0o755)

    def run(fake: Fake, *words: str) -> int:
        monkeypatch.setattr(bench_gpu, "serve", fake)
        options = ["--device", "cpu", "--shapes", "tiny", "--binaries", str(tmp_path)]
        places = ["--work", str(tmp_path / "work"), "--output", str(tmp_path / "out")]
        return bench_gpu.main([*options, *places, *words])

    return run


def test_the_whole_lane_writes_a_page(
    lane: Callable[..., int], tmp_path: Path, nvidia_smi: Callable[[str], None]
) -> None:
    nvidia_smi("cat $0.count 2>/dev/null | wc -l; echo >> $0.count")
    fake = Fake(fits_from=2)
    assert lane(fake) == 0
    page = (tmp_path / "out/gpu-cpu.md").read_text()
    assert (tmp_path / "out/gpu-cpu.png").read_bytes().startswith(b"\x89PNG")
    assert "| n_cpu_moe 2 | 1000.0 / 1002.0 / 1004.0 | 48.0 / 48.2 / 48.4 |" in page
    assert "| n_cpu_moe 1 | out of memory | out of memory |" in page
    assert "of 5 settings: 100.0% of the best of all." in page
    assert page.count("| K ") >= 5 and "8 drafted, 4 taken" in page and "abc" in page
    assert "| 12.0 |" in page and "| 1 | -11 |" in page, (
        "logged buffers, and what nvidia-smi's figure rose by"
    )
    assert "n_cpu_moe 0 |" not in page, "behind the first that does not fit nothing is run"
    before = len(fake.started)
    assert lane(fake) == 0 and len(fake.started) == before, "what is known is not measured again"


def test_a_case_that_fails_is_told_and_tried_again(
    lane: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = Fake()
    fake.broken = "--spec-synth-len"
    assert lane(fake, "--part", "draft") == 1
    assert "not measured: draft: 8 drafted, 1 taken: error: no kernel" in capsys.readouterr().err
    page = (tmp_path / "out/gpu-cpu.md").read_text()
    assert "| 8 drafted, 1 taken | failed | failed |" in page and page.count("Not measured.") == 3
    fake.broken = ""
    assert lane(fake, "--part", "draft") == 0
    assert len(fake.started) == 1 + 2 * len(bench_gpu.LENGTHS)


def test_what_a_cpu_measured_never_goes_among_the_benchmarks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench_gpu.main(["--device", "cpu"])
    assert "docs/benchmarks is for what a GPU measured" in capsys.readouterr().err


def test_why_a_server_ended(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("a\nggml_cuda: cudaMalloc failed: out of memory\n0.1 E could not load\nbye\n")
    error = ended(log)
    assert error.memory and str(error) == "0.1 E could not load"


# --- the inputs and the build ---


def test_pip_takes_the_controllers_pins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real pip, without an index: it has read all of them when it finds no package."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(NotPrepared, match="ERROR: ResolutionImpossible"):
        _gpu_inputs.wheels(tmp_path / "wheels", "3.12", lambda _: None)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """cmake and nvcc that write down what they are asked for, and the sources."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in ("cmake", "nvcc"):
        (folder / name).write_text(
            f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/asked\n[ ! -e {tmp_path}/fail ]\n'
        )
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    (tmp_path / "inputs").mkdir()
    with (
        lzma.open(tmp_path / "inputs" / _gpu_inputs.SOURCE, "wb") as out,
        tarfile.open(fileobj=out, mode="w") as tar,
    ):
        entry = tarfile.TarInfo("CMakeLists.txt")
        entry.size = 2
        tar.addfile(entry, io.BytesIO(b"x\n"))
    return tmp_path


def built(folder: Path, card: Card = ADA) -> Path:
    return _gpu_inputs.build(folder / "inputs", folder / "work", card, lambda _: None, 60)


def test_llama_cpp_is_built_once_for_the_cards_architecture(tools: Path) -> None:
    place = built(tools)
    asked = (tools / "asked").read_text()
    assert "-DGGML_CUDA=ON" in asked and "-DCMAKE_CUDA_ARCHITECTURES=89" in asked
    assert f"-DCMAKE_CUDA_COMPILER={tools}/tools/nvcc" in asked and "-DLLAMA_BUILD_UI=OFF" in asked
    assert "--target llama-server llama-fit-params" in asked
    assert (place.parent.parent / "source/CMakeLists.txt").read_text() == "x\n"
    assert built(tools) == place and (tools / "asked").read_text() == asked
    other = built(tools, Card("x", 1, "1", "120"))
    assert other != place and "-DCMAKE_CUDA_ARCHITECTURES=120" in (tools / "asked").read_text()
    assert "GGML_CUDA" not in " ".join(_gpu_inputs.options(Card("CPU", 0, "none", "")))


def test_a_build_that_fails_is_made_again(tools: Path) -> None:
    (tools / "fail").touch()
    with pytest.raises(NotPrepared, match=r"configure failed with exit code 1; look at .*configure\.log"):
        built(tools)
    (tools / "fail").unlink()
    assert built(tools).name == "bin"


def test_what_is_missing_is_named_with_the_fix(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tools / "tools/nvcc").unlink()
    monkeypatch.setenv("PATH", f"{tools}/tools")
    if not Path("/usr/local/cuda/bin/nvcc").exists():
        with pytest.raises(NotPrepared, match="nvcc is missing; fix: install the CUDA toolkit"):
            built(tools)
    (tools / "tools/cmake").unlink()
    with pytest.raises(NotPrepared, match="cmake is missing"):
        built(tools, Card("CPU", 0, "none", ""))
    (tools / "inputs" / _gpu_inputs.SOURCE).unlink()
    with pytest.raises(NotPrepared, match="is missing; fix: make test-gpu-inputs"):
        built(tools)

"""The GPU lane on the lab's CPU build: every part, with real servers and models of a few megabytes."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from scripts import bench_gpu
from tests.support import LLM, ROOT

pytestmark = [pytest.mark.usefixtures("lab"), pytest.mark.long]

RELEASE = "/opt/llama.cpp/upstream/current/"


@pytest.fixture(scope="module")
def binaries(lab: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lab's own build, which this machine can run unless it is the older Debian."""
    folder = tmp_path_factory.mktemp("build")
    archive = folder / "bin.tar"
    with archive.open("wb") as file:
        subprocess.run(
            [sys.executable, "-m", "lab", "ssh", LLM, f"tar -C {RELEASE} -c bin"],
            cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, timeout=120, check=True,
        )  # fmt: skip
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="tar")
    archive.unlink()
    server = folder / "bin/llama-server"
    done = subprocess.run([str(server), "--version"], capture_output=True, text=True, timeout=30, check=False)
    if done.returncode != 0:
        pytest.skip(f"the lab's build does not run here: {(done.stderr.splitlines() or ['nothing'])[-1]}")
    return server.parent


def test_every_part_runs(
    binaries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_gpu, "RUNS", 1)
    monkeypatch.setattr(bench_gpu, "SHARES", (0.75,))
    monkeypatch.setattr(bench_gpu, "CACHES", (("q8_0", "q4_0"),))
    monkeypatch.setattr(bench_gpu, "LENGTHS", (4,))
    monkeypatch.setattr(bench_gpu, "SWEEP", 2)
    words = ["--device", "cpu", "--shapes", "tiny", "--binaries", str(binaries)]
    words += ["--work", str(tmp_path / "work"), "--output", str(tmp_path / "out")]
    code = bench_gpu.main(words)
    assert code == 0, capsys.readouterr().err
    page = (tmp_path / "out/gpu-cpu.md").read_text()
    assert "Not measured." not in page and "failed" not in page and "out of memory" not in page
    for row in ("n_gpu_layers ", "K q8_0, V q4_0", "8 drafted, 4 taken", "n_cpu_moe 4", "tuner: n_cpu_moe 0"):
        assert f"{row}" in page
    assert (tmp_path / "out/gpu-cpu.png").is_file()

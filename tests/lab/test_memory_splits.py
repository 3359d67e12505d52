"""Both predictors of memory against what llama-server logs: every architecture, quantized caches, splits."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from lab import config
from scripts import bench_memory
from tests import support

pytestmark = pytest.mark.long

TARGETS = ("llama-server", "llama-fit-params", "ggml-rpc-server")
BUILD_S = 3600
# As the role builds, so that its compiler cache serves.
BUILD = """
set -eu
cache=/var/cache/llama.cpp
export CCACHE_DIR=$cache/ccache CCACHE_BASEDIR={root} CCACHE_NOHASHDIR=1 CCACHE_COMPILERCHECK=content
export CCACHE_SLOPPINESS=time_macros,include_file_mtime,include_file_ctime HOME=$cache
cmake -G Ninja -S {root}/src -B {tree} {options}
cmake --build {tree} --target {targets}
"""


@pytest.fixture(scope="module")
def binaries(on_host: Callable[..., support.Run], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lab's llama.cpp with the RPC backend, built there; this machine runs it."""
    folder = tmp_path_factory.mktemp("rpc")
    archive = folder / "bin.tar"
    wanted = support.expected()
    root = f"{wanted.builds_root}/upstream"
    tree = f"{root}/build/rpc"
    options = {**wanted.cmake_options()["upstream"], "GGML_RPC": "ON"}
    program = BUILD.format(
        root=root,
        tree=tree,
        options=shlex.join(f"-D{name}={value}" for name, value in options.items()),
        targets=" ".join(TARGETS),
    )
    try:
        on_host(support.LLM, "sudo -u llama-build sh >/dev/null", stdin=program, timeout=BUILD_S).check()
        with archive.open("wb") as file:
            subprocess.run(
                [sys.executable, "-m", "lab", "ssh", support.LLM, f"tar -C {tree} -ch bin"],
                cwd=support.ROOT, stdin=subprocess.DEVNULL, stdout=file, timeout=300, check=True,
            )  # fmt: skip
    finally:
        on_host(support.LLM, f"sudo rm -rf {tree}").check()
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="tar")
    archive.unlink()
    done = subprocess.run(
        [str(folder / "bin/llama-server"), "--version"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    if done.returncode != 0:
        pytest.skip(f"the lab's build does not run here: {(done.stderr.splitlines() or ['nothing'])[-1]}")
    return folder / "bin"


def test_every_figure_is_within_the_bar(
    binaries: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = config.from_environment().cache / "sources/models"
    code = bench_memory.main(
        ["--binaries", str(binaries), "--models", str(models), "--output", str(tmp_path)]
    )
    page = (tmp_path / "memory.md").read_text()
    outside = [line for line in page.splitlines() if line.endswith("| outside |")]
    assert (code, outside) == (0, []), capsys.readouterr().err
    splits = {line.split(" | ")[0] for line in page.splitlines() if "n_cpu_moe" in line}
    assert len(splits) >= 12
    real = [file.stem for file in models.glob("*.gguf")]
    assert len(real) == 2 and all(f"| {name} | " in page for name in real)

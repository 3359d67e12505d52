"""What the GPU lane needs on a machine without a network: llama.cpp's sources, wheels; the build."""

from __future__ import annotations

import hashlib
import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import yaml

from lab import sources
from scripts._card import Card

ROOT = Path(__file__).resolve().parent.parent
SOURCE, COMMIT, WHEELS = "llama.cpp.tar.xz", "commit", "wheels"
LIMIT_BYTES = 60_000_000
# Not needed to build a server: two thirds of the tree.
LEFT_OUT = ("models", "docs", "media", "tests", "gguf-py")
PACKAGES = ("gguf", "httpx", "jeepney", "pillow", "pydantic", "PyYAML")
TARGETS = ("llama-server", "llama-fit-params")
DOWNLOAD_TIMEOUT_S, CONFIGURE_TIMEOUT_S = 900, 300
Tell = Callable[[str], None]


class NotPrepared(Exception):
    """Inputs are missing or do not fit, or the build failed; the message is one line with the fix."""


def prepare(folder: Path, repositories: Path, python: str, tell: Tell) -> None:
    """Collect the inputs. `python`: the version that the other machine has, as 3.12. Raises NotPrepared."""
    folder.mkdir(parents=True, exist_ok=True)
    (repository,) = (one for one in sources.REPOSITORIES if one.name == "upstream")
    sources.prepare_repository(repository, repositories, ROOT)
    tell(f"packing {repository.tag} of llama.cpp")
    git = ["git", "-C", str(repositories / f"{repository.name}.git"), "archive", "--format=tar"]
    spec = [repository.commit, "--", ".", *(f":!{name}" for name in LEFT_OUT)]
    half = folder / f"{SOURCE}.partial"
    with (
        subprocess.Popen([*git, *spec], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process,
        lzma.open(half, "wb", preset=2) as out,
    ):
        assert process.stdout is not None
        shutil.copyfileobj(process.stdout, out, 1 << 20)
    if process.returncode != 0:
        raise NotPrepared(f"git archive failed with exit code {process.returncode}")
    half.replace(folder / SOURCE)
    (folder / COMMIT).write_text(f"{repository.commit}\n")
    wheels(folder / WHEELS, python, tell)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if size > LIMIT_BYTES:
        raise NotPrepared(f"{folder} has {size / 1e6:.1f} MB, more than {LIMIT_BYTES / 1e6:.0f} MB")
    tell(f"{folder}: {size / 1e6:.1f} MB for Python {python}; copy it to the machine with the GPU")


def wheels(folder: Path, python: str, tell: Tell) -> None:
    """Download what the lane imports, pinned as the controller's own environment. Raises NotPrepared."""
    tell("downloading wheels")
    shutil.rmtree(folder, ignore_errors=True)
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    # A constraint may have no extras, as psycopg[binary] has them.
    pins = [re.sub(r"\[.*?\]", "", line) for line in lines if line[:1] not in "#" and line]
    with tempfile.TemporaryDirectory() as temporary:
        constraints = Path(temporary) / "constraints.txt"
        constraints.write_text("\n".join(pins) + "\n")
        done = subprocess.run(
            [
                sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:",
                f"--python-version={python}", "--implementation=cp",
                *(f"--platform=manylinux{tag}_x86_64" for tag in ("_2_28", "_2_17", "2014")),
                f"--constraint={constraints}", f"--dest={folder}", *PACKAGES,
            ],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, check=False,
        )  # fmt: skip
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines()
        raise NotPrepared(f"pip download: {(said or ['failed'])[-1]}")


def options(card: Card) -> dict[str, str]:
    """The CMake options: those of the role, with CUDA for the card, or for the CPU where there is none."""
    data = yaml.safe_load((ROOT / "roles/llama_cpp/vars/main.yml").read_text())
    found = {str(name): str(value) for name, value in data["_llama_cpp_base_options"].items()}
    if not card.architecture:
        return found
    compiler = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    return {
        **found,
        "GGML_CUDA": "ON",
        "CMAKE_CUDA_ARCHITECTURES": card.architecture,
        "CMAKE_CUDA_COMPILER": compiler,
    }


def build(inputs: Path, folder: Path, card: Card, tell: Tell, timeout_s: float) -> Path:
    """The folder with the binaries, built once for sources, card and options. Raises NotPrepared."""
    archive = inputs / SOURCE
    if not archive.is_file():
        raise NotPrepared(
            f"{archive} is missing; fix: make test-gpu-inputs where there is a network, and copy it here"
        )
    chosen = options(card)
    if card.architecture and not Path(chosen["CMAKE_CUDA_COMPILER"]).exists():
        raise NotPrepared("nvcc is missing; fix: install the CUDA toolkit")
    if shutil.which("cmake") is None:
        raise NotPrepared("cmake is missing; fix: install it")
    with archive.open("rb") as file:
        told = [
            hashlib.file_digest(file, "sha256").hexdigest(),
            *(f"{k}={v}" for k, v in sorted(chosen.items())),
        ]
    place = folder / f"llama.cpp-{hashlib.sha256(' '.join(told).encode()).hexdigest()[:12]}"
    stamp = place / "built"
    if stamp.exists():
        return place / "build/bin"
    if not (place / "source").exists():
        half = place / "source.partial"
        shutil.rmtree(half, ignore_errors=True)
        tell(f"unpacking {archive.name}")
        with tarfile.open(archive) as tar:
            tar.extractall(half, filter="data")
        half.replace(place / "source")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    definitions = [f"-D{name}={value}" for name, value in chosen.items()]
    configure = ["cmake", "-S", str(place / "source"), "-B", str(place / "build"), *generator, *definitions]
    jobs = str(os.cpu_count() or 1)
    for what, argv, limit in (
        ("configure", configure, CONFIGURE_TIMEOUT_S),
        ("build", ["cmake", "--build", str(place / "build"), "-j", jobs, "--target", *TARGETS], timeout_s),
    ):
        tell(f"llama.cpp: {what}")
        log = place / f"{what}.log"
        with log.open("wb") as sink:
            try:
                done = subprocess.run(
                    argv, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, timeout=limit, check=False
                )
            except subprocess.TimeoutExpired:
                raise NotPrepared(f"{what}: not done in {limit:.0f} s; run it again to go on") from None
        if done.returncode != 0:
            raise NotPrepared(f"{what} failed with exit code {done.returncode}; look at {log}")
    stamp.write_text("\n".join(told) + "\n")
    return place / "build/bin"

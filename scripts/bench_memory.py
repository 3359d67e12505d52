#!/usr/bin/env python3
"""Compare both predictors of memory with the buffers that llama-server logs when it starts.

    scripts/bench_memory.py --binaries DIR --models DIR [--output DIR]

The first DIR holds llama-server, llama-fit-params and ggml-rpc-server of one CPU build (cmake -DGGML_RPC=ON).
Measured are tiny models with random weights of every architecture that the header predictor knows, every
*.gguf of --models, real ones (the lab's lie in ~/.cache/llmbox/sources/models), and splits between two
devices, the second of which is an RPC server. Writes memory.md.
Exit codes: 0 every figure is within the bar, 1 one is not, 2 could not measure (one line says why).
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import httpx
from llama_common.memory import MIB, RPC, Settings, estimate
from llama_common.model import Model

from lab.source_server import make_server
from scripts import _tiny_models
from scripts._header import client, read_file, read_url
from scripts._server_memory import NoFigure, as_served, fit, rpc_server, start

RELATIVE_BAR, SMALL_BAR_BYTES, SMALL_BYTES = 0.03, MIB, 32 * MIB
COMPONENTS = ("weights", "cache", "compute")

PROGRAMS = ("llama-server", "llama-fit-params", "ggml-rpc-server")


@dataclass(frozen=True)
class Case:
    """One start of llama-server."""

    name: str
    model: Path
    settings: Settings
    split: bool = False


@dataclass(frozen=True)
class Figure:
    """One component on one device, in bytes: what llama-server logged, and what either predictor said."""

    case: Case
    device: str
    component: str
    logged: int
    header: int
    fitted: int

    @property
    def met(self) -> bool:
        """Whether both predictions are within 3 %, or within 1 MiB of what is smaller than 32 MiB."""
        bar = SMALL_BAR_BYTES if self.logged < SMALL_BYTES else RELATIVE_BAR * self.logged
        return all(abs(said - self.logged) <= bar for said in (self.header, self.fitted))


def single(architectures: Iterable[str], folder: Path, models: Sequence[Path] = ()) -> Iterator[Case]:
    """One device: every architecture with a cache of at least 256 MiB, quantized and by two slots as well."""
    for architecture in architectures:
        model = _tiny_models.write(architecture, folder)
        context = 262_144 if architecture in ("gemma3", "gpt-oss", "qwen35") else 65_536
        yield Case(architecture, model, Settings(context, n_gpu_layers=0))
        yield Case(f"{architecture}, q8_0", model, Settings(2 * context, "q8_0", n_gpu_layers=0))
        yield Case(f"{architecture}, q4_0", model, Settings(4 * context, "q4_0", n_gpu_layers=0))
        yield Case(f"{architecture}, 2 slots", model, Settings(context, n_gpu_layers=0, parallel=2))
    if architectures:
        yield Case(
            "llama, no flash attention",
            _tiny_models.write("llama", folder),
            Settings(65_536, n_gpu_layers=0, flash_attention=False),
        )
    for model in models:
        yield Case(model.stem, model, Settings(131_072, n_gpu_layers=0))


def splits(folder: Path) -> Iterator[Case]:
    """Two devices: layers on the second one from none to all, and experts left behind."""
    cases = [("qwen3", ngl, 0) for ngl in (0, 1, 2, 4, 6, 99)]
    cases += [("qwen3moe", 99, moe) for moe in (1, 3, 6)] + [("qwen3moe", 4, 4)]
    cases += [("gemma4", 99, 3), ("gemma4", 3, 0), ("gpt-oss", 99, 2), ("qwen35", 3, 0)]
    for architecture, layers, moe in cases:
        model = _tiny_models.write(architecture, folder)
        context = 262_144 if architecture in ("gpt-oss", "qwen35") else 65_536
        name = f"{architecture}, n_gpu_layers {layers}, n_cpu_moe {moe}"
        yield Case(name, model, Settings(context, n_gpu_layers=layers, n_cpu_moe=moe), split=True)


def measure(case: Case, binaries: Path) -> list[Figure]:
    """Every component on every device that holds anything of it. Raises NoFigure."""
    model = Model.of([read_file(case.model)])
    said = estimate(model, case.settings, RPC if case.split else None)
    found = []
    for ask in (start, fit):
        with rpc_server(binaries / "ggml-rpc-server") if case.split else nullcontext() as address:
            binary = binaries / ("llama-server" if ask is start else "llama-fit-params")
            found.append(ask(binary, case.model, case.settings, address))
    logged, fitted = found[0], as_served(found[1], model, case.settings, RPC if case.split else None)
    figures = [
        Figure(
            case,
            device,
            component,
            *(getattr(getattr(one, device), component) for one in (logged, said, fitted)),
        )
        for device in ("gpu", "cpu")
        for component in COMPONENTS
    ]
    return [figure for figure in figures if figure.logged or figure.header]


def render(figures: Sequence[Figure], version: str, spent: Cost) -> str:
    """The page."""
    worst = max(
        (abs(f.header - f.logged) / f.logged for f in figures if f.logged >= SMALL_BYTES), default=0.0
    )
    met = sum(figure.met for figure in figures)
    lines = [
        "# Memory: predicted and logged",
        "",
        "Written by `scripts/bench_memory.py`. MiB on each device: what llama-server logs when it starts,",
        "what the header predictor says (`llama_common.memory`), what `llama-fit-params` says. Bar: within",
        "3 %, or 1 MiB below 32 MiB. `second` is an RPC server with a CPU behind it. The server runs without",
        "mmap and without repacking. `llama-fit-params` prints whole MiB and reserves logits for every token",
        "of a batch, llama-server for one a slot: its compute buffers are shown without the others, which is",
        "the header predictor's figure where that also gives, with them, the very MiB that it printed.",
        "",
        f"{version}. {met} of {len(figures)} figures within the bar; the header predictor is off by at most "
        f"{worst:.2%} where 32 MiB or more were logged.",
        "",
        f"One preset from the header of {spent.size / 1e9:.1f} GB, over HTTP: {spent.seconds:.2f} s,"
        f" {spent.read / MIB:.1f} MiB read (bar: 2 s, 32 MB).",
        "",
        "| model, flags | context | device | of | logged | header | fit-params | |",
        "|---|---:|---|---|---:|---:|---:|---|",
    ]
    for figure in figures:
        device = "second" if figure.device == "gpu" else "CPU"
        values = " | ".join(f"{value / MIB:.2f}" for value in (figure.logged, figure.header, figure.fitted))
        lines.append(
            f"| {figure.case.name} | {figure.case.settings.context} | {device} | {figure.component} "
            f"| {values} | {'' if figure.met else 'outside'} |"
        )
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Cost:
    """What working out one preset of a large file cost: seconds, bytes read and bytes of the file."""

    seconds: float
    read: int
    size: int


def cost() -> Cost:
    """Read the header of a file of 17 GB by HTTP ranges from this machine, and estimate a preset of it."""
    with tempfile.TemporaryDirectory() as folder:
        path = _tiny_models.write_large(Path(folder))
        size, read = path.stat().st_size, 0

        def counted(response: httpx.Response) -> None:
            nonlocal read
            read += int(response.headers["Content-Length"])

        with make_server(("127.0.0.1", 0), path.parent, path.parent) as server:
            Thread(target=server.serve_forever, daemon=True).start()
            with client() as web:
                web.event_hooks["response"] = [counted]
                began = time.monotonic()
                model = Model.of([read_url(web, f"http://127.0.0.1:{server.server_port}/{path.name}", size)])
                estimate(model, Settings(98_304, "q4_0", n_cpu_moe=16))
                seconds = time.monotonic() - began
            server.shutdown()
    return Cost(seconds, read, size)


def version_of(binary: Path) -> str:
    """What `llama-server --version` says in its first line. Raises NoFigure."""
    done = subprocess.run([str(binary), "--version"], capture_output=True, text=True, timeout=30, check=False)
    found = re.search(r"^version: (.+)$", done.stdout + done.stderr, re.MULTILINE)
    if found is None:
        raise NoFigure(f"{binary} names no version")
    return found[1]


def main(argv: Sequence[str]) -> int:
    """Run the command. Returns its exit code."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="exit codes: 0 every figure is within the bar, 1 one is not, 2 could not measure",
    )
    parser.add_argument("--binaries", type=Path, required=True, metavar="DIR")
    parser.add_argument("--models", type=Path, required=True, metavar="DIR", help="real ones, *.gguf")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"), metavar="DIR")
    arguments = parser.parse_args(argv)
    figures: list[Figure] = []
    for name in PROGRAMS:
        if not (arguments.binaries / name).is_file():
            print(
                f"bench_memory: --binaries {arguments.binaries}: {name} is not there; fix: give the bin"
                " folder of a build with -DGGML_RPC=ON",
                file=sys.stderr,
            )
            return 2
    real = sorted(arguments.models.glob("*.gguf"))
    if not real:  # or the page would lose them without a word
        print(f"bench_memory: --models {arguments.models}: no *.gguf there; fix: make lab", file=sys.stderr)
        return 2
    try:
        with tempfile.TemporaryDirectory() as folder:
            cases = [*single(sorted(_tiny_models.ARCHITECTURES), Path(folder), real), *splits(Path(folder))]
            for index, case in enumerate(cases, start=1):
                print(f"{index}/{len(cases)} {case.name}", file=sys.stderr, flush=True)
                figures += measure(case, arguments.binaries)
        version = version_of(arguments.binaries / "llama-server")
    except (NoFigure, OSError) as error:
        print(f"bench_memory: {error}", file=sys.stderr)
        return 2
    arguments.output.mkdir(parents=True, exist_ok=True)
    page = render(figures, f"llama.cpp {version}", cost())
    (arguments.output / "memory.md").write_text(page, encoding="utf-8")
    print(next(line for line in page.splitlines() if " figures within " in line))
    return 0 if all(figure.met for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

#!/usr/bin/env python3
"""Measure on the GPU of this machine what the presets rely on, with random weights of the production shapes.

    scripts/bench_gpu.py [--part NAME ...] [--inputs DIR] [--work DIR] [--output DIR]
    scripts/bench_gpu.py --prepare [--python VERSION]
    scripts/bench_gpu.py --device cpu --shapes tiny --binaries DIR --output DIR

Parts: layers (n_gpu_layers beside n_cpu_moe in the same GPU memory), cache (K and V of the same type and of
different ones), draft (a draft model with --spec-synth-len), tuner (its search beside every setting); each
start also tells predicted from real memory. llama.cpp is built for the card from --inputs, without a network;
--prepare collects those where there is one. Every case is kept in --work, and not measured again with the
same llama.cpp, driver and flags. Writes gpu-CARD.md and gpu-CARD.png. Exit codes: 0 all was measured, 1 a
case was not, 2 could not run (one line says why).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import json
import os
import shutil
import subprocess
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from statistics import median
from typing import Literal, get_args

from llama_common.memory import CUDA, MIB, Settings, estimate

from lab import config
from scripts import _gpu_inputs, _large_models
from scripts._bare_server import NotServing, serve
from scripts._card import Card, NoCard, card, used_mib
from scripts._chart import Bar, bar_chart
from scripts._gpu_inputs import NotPrepared
from scripts._large_models import Shape
from scripts._measure import NotMeasured
from scripts._measure import Shape as Run
from scripts._search import Axis, NothingFits, Setting, search
from scripts._server_memory import flags

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build/gpu"
INPUTS = ROOT / "build/gpu-inputs"
Part = Literal["layers", "cache", "draft", "tuner"]
Tell = Callable[[str], None]
BUILD_TIMEOUT_S = 3600.0
RUNS = 5
SHARES = (0.5, 0.75)  # of what the whole mixture takes on the GPU, or of the card where that is less
ROOM = 0.85  # of the card, and of main memory for what lies there, that a model may take
CACHES = (("f16", "f16"), ("q8_0", "q8_0"), ("q4_0", "q4_0"), ("f16", "q8_0"), ("q8_0", "q4_0"))
DRAFTED, LENGTHS = 8, (1, 2, 4, 6, 8)
SWEEP = 16  # settings of the tuner's axis, beside 0


@dataclass(frozen=True)
class Bench:
    """What is measured with what: the device, the shapes scaled to it, the lengths of the runs."""

    card: Card
    device: Literal["cuda", "cpu"]
    binary: Path
    version: str
    moe: Shape
    dense: Shape
    draft: Shape
    context: int
    run: Run
    work: Path

    def model(self, shape: Shape, tell: Tell) -> Path:
        """The file of a shape."""
        return _large_models.write(shape, self.work / "models", tell)


@dataclass(frozen=True)
class Case:
    """One start of llama-server. `settings` where the predictor knows all of its flags."""

    part: Part
    name: str
    shape: Shape
    words: tuple[str, ...]
    settings: Settings | None = None
    draft: Shape | None = None


@dataclass(frozen=True)
class Row:
    """What came of a case: speeds of every run in tokens per second, MiB of the GPU; `trouble` if none."""

    key: str
    part: Part
    name: str
    prefill: tuple[float, ...] = ()
    generation: tuple[float, ...] = ()
    predicted_mib: float | None = None
    logged_mib: float | None = None
    card_mib: float | None = None
    trouble: str = ""
    memory: bool = False


@dataclass
class Results:
    """Rows of earlier and of this run, by what they are measurements of."""

    file: Path
    rows: dict[str, Row] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path) -> Results:
        """What was kept; lines that cannot be read are passed over."""
        found = cls(file)
        for line in file.read_text().splitlines() if file.exists() else ():
            try:
                row = json.loads(line)
                row |= {name: tuple(row[name]) for name in ("prefill", "generation")}
                found.rows[row["key"]] = Row(**row)
            except (ValueError, TypeError, KeyError):
                continue
        return found

    def keep(self, row: Row) -> None:
        """Keep a row. Raises OSError."""
        self.rows[row.key] = row
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")


# --- what is measured ---


def fitted(shape: Shape, fits: Callable[[Shape], bool], step: int = 4) -> Shape:
    """The shape, with as many layers less as it takes to fit. Raises NotPrepared."""
    counts = range(shape.layers, 0, -step)
    index = bisect_left(counts, True, key=lambda count: fits(shape.scaled(count)))
    if index == len(counts):
        raise NotPrepared(f"{shape.name}: not even {counts[-1]} layers fit this machine")
    return shape.scaled(counts[index])


def scaled(device: Card, context: int, main_bytes: int) -> tuple[Shape, Shape]:
    """The mixture, which main memory must hold, and the dense one, for the card. Raises NotPrepared."""
    settings, most = Settings(context, "f16"), ROOM * device.memory_mib * MIB
    return (
        fitted(_large_models.MOE, lambda shape: _large_models.weights(shape) <= ROOM * main_bytes),
        fitted(_large_models.DENSE, lambda shape: taken(shape, settings) <= most),
    )


def taken(shape: Shape, settings: Settings) -> int:
    """Bytes of the GPU that the predictor says."""
    return estimate(_large_models.model(shape), settings, CUDA).gpu.total


def layers_cases(bench: Bench) -> Iterator[Case]:
    """Whole layers left on the CPU beside experts left there, each pair within the same GPU memory."""
    base = Settings(bench.context, "q4_0")
    whole = min(taken(bench.moe, base), int(ROOM * bench.card.memory_mib * MIB))
    layers = bench.moe.layers
    fewer = [replace(base, n_gpu_layers=count) for count in range(layers + 1, 0, -1)]
    experts = [replace(base, n_cpu_moe=count) for count in range(layers + 1)]
    for share in SHARES:
        budget = share * whole
        for kind, choices in (("n_gpu_layers", fewer), ("n_cpu_moe", experts)):

            def fits(settings: Settings, budget: float = budget) -> bool:
                return taken(bench.moe, settings) <= budget

            index = bisect_left(choices, True, key=fits)
            if index < len(choices):
                chosen = choices[index]
                name = f"{budget / 2**30:.1f} GiB: {kind} {getattr(chosen, kind)}"
                yield Case("layers", name, bench.moe, tuple(flags(chosen)), chosen)


def cache_cases(bench: Bench) -> Iterator[Case]:
    """K and V of the same type, which the build has a kernel for, and of different ones."""
    for key, value in CACHES:
        settings = Settings(bench.context, key)
        words = flags(settings)
        words[words.index("--cache-type-v") + 1] = value
        same = settings if key == value else None
        yield Case("cache", f"K {key}, V {value}", bench.dense, tuple(words), same)


def draft_cases(bench: Bench) -> Iterator[Case]:
    """No draft model, then one of whose tokens so many are taken, the target's own among them."""
    settings = Settings(bench.context, "q8_0")
    words = tuple(flags(settings))
    yield Case("draft", "no draft model", bench.dense, words, settings)
    for length in LENGTHS:
        more = ("--spec-type", "draft-simple", "--spec-draft-ngl", "99", "--spec-draft-n-max", str(DRAFTED))
        name = f"{DRAFTED} drafted, {length} taken"
        yield Case(
            "draft", name, bench.dense, (*words, *more, "--spec-synth-len", str(length)), None, bench.draft
        )


def tuner_cases(bench: Bench) -> Iterator[tuple[int, Case]]:
    """Every setting of the tuner's axis, with the value of n_cpu_moe, from less GPU memory to more."""
    layers = bench.moe.layers
    step = max(1, layers // SWEEP)
    for count in sorted({*range(0, layers + 1, step), layers}, reverse=True):
        settings = Settings(bench.context, "q4_0", n_cpu_moe=count)
        yield count, Case("tuner", f"n_cpu_moe {count}", bench.moe, tuple(flags(settings)), settings)


# --- measuring ---


def measure(bench: Bench, case: Case, results: Results, tell: Tell) -> Row:
    """What is known of a case, or measured now. Raises OSError."""
    before_now = known(bench, case, results)
    if before_now is not None and (not before_now.trouble or before_now.memory):
        return before_now
    path = bench.model(case.shape, tell)
    words = ["--model", str(path), *case.words]
    if case.draft is not None:
        words += ["--spec-draft-model", str(bench.model(case.draft, tell))]
    tell(f"{case.part}: {case.name}")
    row = Row(key_of(bench, case), case.part, case.name)
    if case.settings is not None:
        row = replace(row, predicted_mib=round(taken(case.shape, case.settings) / MIB, 1))
    before = memory(bench)
    try:
        with serve(bench.binary, words) as server:
            runs = list(server.series(bench.run, RUNS))
            buffers, after = server.buffers(), memory(bench)
        row = replace(
            row,
            prefill=tuple(round(run.prefill_tok_s, 2) for run in runs),
            generation=tuple(round(run.generation_tok_s, 2) for run in runs),
            logged_mib=round(buffers.gpu.total / MIB, 1),
            card_mib=None if before is None or after is None else float(after - before),
        )
    except NotServing as error:
        row = replace(row, trouble=str(error), memory=error.memory)
    except NotMeasured as error:
        row = replace(row, trouble=str(error))
    results.keep(row)
    tell(f"{case.part}: {case.name}: {row.trouble or said(row)}")
    return row


def key_of(bench: Bench, case: Case) -> str:
    """Everything that a row depends on; of the repository, that of the page is its commit's."""
    told = [bench.card.name, bench.card.driver, bench.version, asdict(case), asdict(bench.run), RUNS]
    return json.dumps(told, sort_keys=True)


def known(bench: Bench, case: Case, results: Results) -> Row | None:
    """What was measured of a case before."""
    return results.rows.get(key_of(bench, case))


def memory(bench: Bench) -> int | None:
    """MiB of the card in use, None where there is no card."""
    try:
        return used_mib()
    except NoCard:
        if bench.device == "cuda":
            raise
        return None


def said(row: Row) -> str:
    """The medians of a row."""
    return f"prefill {median(row.prefill):.1f} tok/s, generation {median(row.generation):.1f} tok/s"


def tuned(bench: Bench, results: Results, tell: Tell, *, only_known: bool = False) -> tuple[list[Row], str]:
    """The whole sweep, then the tuner's search on what was measured: how near, in how many runs."""
    rows: dict[int, Row] = {}
    full = False
    for count, case in tuner_cases(bench):
        if full:
            break
        row = known(bench, case, results) if only_known else measure(bench, case, results, tell)
        if row is None:
            return list(rows.values()), ""
        rows[count] = row
        full = row.memory  # what takes more does not fit either
    speeds = {count: median(row.generation) if row.generation else None for count, row in rows.items()}
    values = tuple(sorted(count for count, _ in tuner_cases(bench)))
    asked: list[int] = []

    def measured(setting: Setting) -> float | None:
        asked.append(setting["n_cpu_moe"])
        return speeds.get(setting["n_cpu_moe"])

    best = max((speed for speed in speeds.values() if speed), default=0.0)
    try:
        found = search((Axis("n_cpu_moe", values, "falls"),), {"n_cpu_moe": values[-1]}, measured)
    except NothingFits:
        return list(rows.values()), "no setting fits"
    return list(rows.values()), (
        f"The search, on these medians, ends at n_cpu_moe {found.setting['n_cpu_moe']} after {len(asked)} of "
        f"{len(values)} settings: {found.speed / best:.1%} of the best of all."
    )


def everything(bench: Bench, parts: Sequence[Part], results: Results, tell: Tell) -> tuple[list[Row], str]:
    """All rows of the parts, those known of the others, and what the tuner's search came to."""
    rows: list[Row] = []
    for cases in (layers_cases, cache_cases, draft_cases):
        for case in cases(bench):
            row = measure(bench, case, results, tell) if case.part in parts else known(bench, case, results)
            rows += [row] if row else []
    some, note = tuned(bench, results, tell, only_known="tuner" not in parts)
    return [*rows, *some], note


# --- the page ---

TITLES: dict[Part, tuple[str, str]] = {
    "layers": (
        "Layers or experts on the CPU",
        "The same mixture of experts within the same predicted GPU memory: whole layers left on the CPU "
        "(`n_gpu_layers`), or the experts of some (`n_cpu_moe`).",
    ),
    "cache": ("The type of the KV cache", "The dense model behind a deep prompt."),
    "draft": (
        "A draft model",
        "`--spec-synth-len` decides how many drafted tokens are taken, so that only the mechanism is timed.",
    ),
    "tuner": ("The tuner beside every setting", "Generation decides."),
}


def page(bench: Bench, rows: Sequence[Row], note: str, chart: str) -> str:
    """The page."""
    shapes = ", ".join(
        f"{shape.name} ({shape.layers} layers, {_large_models.weights(shape) / 1e9:.2f} GB)"
        for shape in (bench.moe, bench.dense, bench.draft)
    )
    device = (
        f"{bench.card.memory_mib} MiB, driver {bench.card.driver}" if bench.device == "cuda" else "no GPU"
    )
    lines = [
        f"# GPU: {bench.card.name}",
        "",
        f"Written by `scripts/bench_gpu.py` at commit {commit()}, {datetime.now(UTC):%Y-%m-%d}. "
        f"{bench.card.name}, {device}, {os.cpu_count()} CPUs. llama.cpp {bench.version}.",
        "",
        f"Random weights in Q4_K: {shapes}. Context {bench.context}. {RUNS} runs after one that is thrown "
        f"away, each of about {bench.run.prompt} tokens read and {bench.run.generate} written: min / median "
        "/ max in tokens per second. Random experts are chosen all equally often, a trained model's are not.",
        "",
        f"![generation, median with smallest and largest]({chart})",
    ]
    for part, (title, about) in TITLES.items():
        mine = [row for row in rows if row.part == part]
        lines += ["", f"## {title}", "", about if mine else "Not measured."]
        if mine:
            lines += ["", "| | prefill | generation |", "|---|---:|---:|"]
            lines += [
                f"| {row.name} | {speeds(row.prefill, row)} | {speeds(row.generation, row)} |" for row in mine
            ]
        if part == "tuner" and note:
            lines += ["", note]
    lines += ["", "## Memory: predicted and real", "", *memory_table(rows)]
    return "\n".join(lines) + "\n"


def speeds(values: Sequence[float], row: Row) -> str:
    """Smallest, median and largest, or why there are none."""
    if not values:
        return "out of memory" if row.memory else "failed"
    return " / ".join(f"{value:.1f}" for value in (min(values), median(values), max(values)))


def memory_table(rows: Sequence[Row]) -> list[str]:
    """Every start whose flags the predictor knows."""
    lines = [
        "MiB of the GPU: what the header predicts, the buffers that llama-server logs, and by how much "
        "nvidia-smi's figure rises (with what CUDA takes for each process).",
        "",
        "| start | predicted | logged | error | nvidia-smi | beyond the buffers |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        if row.predicted_mib is None or row.logged_mib is None:
            continue
        error = f"{row.predicted_mib / row.logged_mib - 1:+.2%}" if row.logged_mib else "-"
        beyond = f"{row.card_mib - row.logged_mib:.0f}" if row.card_mib is not None else "-"
        card_mib = f"{row.card_mib:.0f}" if row.card_mib is not None else "-"
        figures = (f"{row.predicted_mib:.1f}", f"{row.logged_mib:.1f}", error, card_mib, beyond)
        lines.append(f"| {row.part}: {row.name} | {' | '.join(figures)} |")
    return lines


def chart(bench: Bench, rows: Sequence[Row]) -> bytes:
    """Generation of every case. Raises ValueError when there is none."""
    bars = [Bar.of(f"{row.part}: {row.name}", row.generation) for row in rows if row.generation]
    return bar_chart(f"{bench.card.name}: generation", "tok/s", bars)


# --- the command ---


def commit() -> str:
    """The commit under test, marked when the work tree was changed; "unknown" outside a repository."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=30, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "--", ".", ":!docs"],
            capture_output=True, text=True, timeout=30, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{head}+changes" if dirty else head


def bench_of(args: argparse.Namespace, tell: Tell) -> Bench:
    """The device, its binaries and the models' shapes. Raises NoCard, NotPrepared, OSError."""
    device = card() if args.device == "cuda" else Card(args.name, args.memory_mib, "none", "")
    binaries = args.binaries or _gpu_inputs.build(args.inputs, args.work, device, tell, BUILD_TIMEOUT_S)
    binary = Path(binaries) / "llama-server"
    try:
        done = subprocess.run(
            [str(binary), "--version"], capture_output=True, text=True, timeout=60, check=False
        )
    except OSError as error:
        raise NotPrepared(f"{binary}: {error.strerror}") from None
    told = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("version: ")]
    if done.returncode != 0 or not told:
        raise NotPrepared(f"{binary} --version failed: {(done.stderr.splitlines() or ['nothing'])[-1]}")
    version = told[0].removeprefix("version: ")
    if args.shapes == "tiny":
        moe, dense, draft = _large_models.TINY
        return Bench(
            device, args.device, binary, version, moe, dense, draft, 1024, Run("deep", 96, 12), args.work
        )
    context = args.context
    main = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    moe, dense = scaled(device, context, main)
    need = sum(_large_models.weights(shape) for shape in (moe, dense, _large_models.DRAFT))
    args.work.mkdir(parents=True, exist_ok=True)
    if not (args.work / "models").exists() and shutil.disk_usage(args.work).free < 1.1 * need:
        raise NotPrepared(
            f"{args.work} has no room for {need / 1e9:.0f} GB of models; fix: --work DIR on a larger disk"
        )
    run = Run("deep", min(16_384, context // 2), 128)
    return Bench(
        device, args.device, binary, version, moe, dense, _large_models.DRAFT, context, run, args.work
    )


def report(args: argparse.Namespace) -> int:
    """Measure and write the page. Raises NoCard, NotPrepared, OSError."""

    def tell(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    if args.prepare:
        cache = config.from_environment().cache / "sources"
        _gpu_inputs.prepare(args.inputs, cache, args.python, tell)
        return 0
    bench = bench_of(args, tell)
    if args.build:
        print(f"llama.cpp {bench.version} for {bench.card.name}: {bench.binary.parent}")
        return 0
    results = Results.read(args.work / f"{bench.card.slug}.jsonl")
    rows, note = everything(bench, args.part or get_args(Part), results, tell)
    args.output.mkdir(parents=True, exist_ok=True)
    name = f"gpu-{bench.card.slug}"
    if any(row.generation for row in rows):
        (args.output / f"{name}.png").write_bytes(chart(bench, rows))
    (args.output / f"{name}.md").write_text(page(bench, rows, note, f"{name}.png"), encoding="utf-8")
    missing = [row for row in rows if row.trouble and not row.memory]
    for row in missing:
        tell(f"not measured: {row.part}: {row.name}: {row.trouble}")
    print(f"{len(rows) - len(missing)} of {len(rows)} cases measured: {args.output / name}.md")
    return 1 if missing or not rows else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="exit codes: 0 all was measured, 1 a case was not, 2 could not run",
    )
    parser.add_argument("--part", action="append", default=[], choices=get_args(Part), help="only this part")
    parser.add_argument("--build", action="store_true", help="build llama.cpp, and measure nothing")
    parser.add_argument("--inputs", type=Path, default=INPUTS, metavar="DIR", help="what --prepare collected")
    parser.add_argument("--work", type=Path, default=WORK, metavar="DIR", help="builds, models and results")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/benchmarks", metavar="DIR")
    parser.add_argument("--context", type=int, default=40_960, metavar="TOKENS", help="default 40960")
    parser.add_argument("--binaries", type=Path, metavar="DIR", help="a build that is there already")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: try the lane out")
    parser.add_argument("--shapes", choices=("production", "tiny"), default="production")
    parser.add_argument("--prepare", action="store_true", help="collect the inputs: needs a network")
    parser.add_argument(
        "--python", default=f"{sys.version_info[0]}.{sys.version_info[1]}", metavar="VERSION",
        help="with --prepare: of the machine with the GPU (default: this one's)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    args.name, args.memory_mib = "CPU", 64  # what splits are worked out for without a card
    if args.device == "cpu" and args.output == ROOT / "docs/benchmarks":
        parser.error("--device cpu needs --output: docs/benchmarks is for what a GPU measured")
    if args.context < 4096 or args.context % 256:
        parser.error(f"--context {args.context}: give a multiple of 256, at least 4096")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit code."""
    args = parse(argv)
    # The card that nvidia-smi names first, and that one alone.
    os.environ.update(CUDA_DEVICE_ORDER="PCI_BUS_ID", CUDA_VISIBLE_DEVICES="0")
    try:
        return report(args)
    except (NoCard, NotPrepared, OSError) as error:
        print(f"bench_gpu: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""The runner behind `make lint`, `make test` and the targets `test-*`.

    python tests/run.py lint|unit|ocr|lab|vm|gate [--keep]
    python tests/run.py gpu
    python tests/run.py long [--from CASE] [--only TEXT] [--issue NAME]

A stage that fails stops only those that need it. What this machine cannot run is skipped with its reason,
never passed. The last line is always `N passed, N failed, N skipped`. Exit codes: 0 all passed, 1 something
failed or nothing ran (with `gpu` on a machine without one: 0), 130 interrupted. The lab that the run made is
removed in any case, unless --keep.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lab import interrupt

if __name__ == "__main__":
    interrupt.exit_quietly()

import argparse
import datetime
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import time
import traceback
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from types import FrameType

from lab import config, packages
from lab.shell import LabError

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
RESULTS = ROOT / "build" / "test-results"
INVENTORY = "inventory/lab"
GATE_LAB = "gate"
LONG_LAB = "long"
DEBIAN_13 = "debian-13"  # a case of its own: everything the gate does on hosts, on the next Debian
DEBIAN_13_LAB = "long13"
UEFI = "uefi-machine"  # a case of its own: tests/vm, on a lab that has nothing but the UEFI machine
UEFI_LAB = "uefi"
GPU_PARTS = ("build", "layers", "cache", "draft", "tuner")  # of scripts/bench_gpu.py
KILL_GRACE_S = 30
PYTEST_NO_TESTS = 5
MINUTE = 60


@dataclass(frozen=True)
class Tally:
    """Checks counted."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.passed + other.passed, self.failed + other.failed, self.skipped + other.skipped)

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


@dataclass(frozen=True)
class Outcome:
    """What a stage found: the count and one line for each thing that failed or was skipped."""

    tally: Tally
    notes: tuple[str, ...] = ()

    def __add__(self, other: Outcome) -> Outcome:
        return Outcome(self.tally + other.tally, self.notes + other.notes)


NOTHING = Outcome(Tally())


def passed() -> Outcome:
    """One check that passed."""
    return Outcome(Tally(passed=1))


def failed(note: str) -> Outcome:
    """One check that failed, and why."""
    return Outcome(Tally(failed=1), (f"FAILED  {note}",))


def skipped(note: str) -> Outcome:
    """One check that this machine cannot make, and why."""
    return Outcome(Tally(skipped=1), (f"SKIPPED {note}",))


@dataclass(frozen=True)
class Stage:
    """A step of a run: what it is called, what it does, and which stages it builds on."""

    name: str
    run: Callable[[], Outcome]
    needs: tuple[str, ...] = ()


@dataclass
class Report:
    """The stages that ran, in order."""

    rows: list[tuple[str, Outcome, float]] = field(default_factory=list)

    @property
    def tally(self) -> Tally:
        """The count over all stages."""
        return sum((outcome.tally for _, outcome, _ in self.rows), Tally())

    def broken(self, name: str) -> bool:
        """Whether the stage `name` is no ground to stand on: it failed, or did not run."""
        return not any(
            row == name and outcome.tally.passed and not outcome.tally.failed for row, outcome, _ in self.rows
        )

    def show(self) -> None:
        """Print one line per stage, the reasons, and the last line."""
        print("\n== Summary")
        for name, outcome, seconds in self.rows:
            print(f"  {name:<14} {clock(seconds):>8}  {outcome.tally}")
        for _, outcome, _ in self.rows:
            for note in outcome.notes:
                print(f"  {note}")
        print(f"  in all         {clock(sum(seconds for _, _, seconds in self.rows)):>8}")
        print(self.tally, flush=True)

    @property
    def exit_code(self) -> int:
        """0 when something ran and nothing failed."""
        return 0 if self.tally.passed and not self.tally.failed else 1


def clock(seconds: float) -> str:
    """Seconds as m:ss."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"


# --- running programs ---


def environment(**extra: str) -> dict[str, str]:
    """The environment of every program of a run: this venv first on PATH, the repository's settings."""
    return {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
        "PYTHONUNBUFFERED": "1",
        **extra,
    }


def shown(argv: Sequence[str]) -> str:
    """A command line for a person: what follows the first words is counted when it is long."""
    words = [word.removeprefix(f"{ROOT}/") for word in argv]
    return " ".join(words) if len(words) <= 16 else f"{' '.join(words[:4])} … (+{len(words) - 4} more)"


def execute(argv: Sequence[str], *, timeout: float, env: dict[str, str] | None = None) -> int | None:
    """Run a program with its output shown. Returns its exit code, None when it ran past `timeout` seconds.

    An interruption is passed on to the program's whole group, which gets time to clean up after itself.
    """
    print(f"+ {shown(argv)}", flush=True)
    with subprocess.Popen(argv, cwd=ROOT, env=env or environment(), start_new_session=True) as process:
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            end_group(process, signal.SIGTERM)
            return None
        except KeyboardInterrupt:
            end_group(process, signal.SIGINT)
            raise


def end_group(process: subprocess.Popen[bytes], signum: int) -> None:
    """Send `signum` to the program's group, and SIGKILL to what is left of it after the grace time."""
    try:
        os.killpg(process.pid, signum)
        process.wait(KILL_GRACE_S)
    except ProcessLookupError:
        return
    except subprocess.TimeoutExpired:
        pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def command_stage(
    what: str, argv: Sequence[str], *, timeout: float, env: dict[str, str] | None = None
) -> Outcome:
    """A program as one check: exit code 0 passes."""
    code = execute(argv, timeout=timeout, env=env)
    if code is None:
        return failed(f"{what}: not done after {clock(timeout)}")
    return passed() if code == 0 else failed(f"{what}: exit code {code}")


# --- lint ---


def sources() -> list[str]:
    """Files of the repository, new ones included, without what git ignores."""
    argv = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True, timeout=MINUTE)
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def is_shell(path: Path) -> bool:
    """Whether a file is a shell script."""
    if not path.is_file() or path.is_symlink():
        return False
    if path.suffix == ".sh":
        return True
    with path.open("rb") as file:
        return re.match(rb"#!.*\b(ba|da)?sh\b", file.readline(80)) is not None


def lint() -> Outcome:
    """Each linter is one check."""
    files = sources()
    yaml_files = [name for name in files if name.endswith((".yml", ".yaml"))]
    shell_files = [name for name in files if is_shell(ROOT / name)]
    checks = {
        "ruff": ["ruff", "check", "--output-format=concise", "."],
        "ruff format": ["ruff", "format", "--check", "."],
        "mypy": ["mypy", "."],
        "yamllint": ["yamllint", "--strict", *yaml_files],
        "ansible-lint": ["ansible-lint"],
        "shellcheck": ["shellcheck", *shell_files],
    }
    outcome = NOTHING
    try:
        packages.ensure(config.from_environment(), {"shellcheck": "shellcheck"})
    except LabError as error:
        print(error, file=sys.stderr)
    for name, argv in checks.items():
        program = shutil.which(argv[0], path=environment()["PATH"])
        if program is None:
            outcome += skipped(f"lint: {argv[0]} is not installed")
        else:
            outcome += command_stage(f"lint: {name}", [program, *argv[1:]], timeout=5 * MINUTE)
    return outcome


# --- pytest ---


def pytest(label: str, *args: str, timeout: float, env: dict[str, str] | None = None) -> Outcome:
    """Run pytest and count from its JUnit file."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    junit = RESULTS / f"{re.sub(r'[^A-Za-z0-9]+', '-', label)}.xml"
    junit.unlink(missing_ok=True)
    argv = [sys.executable, "-m", "pytest", "-q", "--color=no", f"--junitxml={junit}", *args]
    code = execute(argv, timeout=timeout, env=env)
    outcome = read_junit(junit, label) if junit.is_file() else NOTHING
    if code is None:
        return outcome + failed(f"{label}: not done after {clock(timeout)}")
    if code == PYTEST_NO_TESTS:
        return failed(f"{label}: pytest found no test in {' '.join(args)}")
    if code != 0 and not outcome.tally.failed:
        return outcome + failed(f"{label}: pytest ended with exit code {code}")
    return outcome


def read_junit(path: Path, label: str) -> Outcome:
    """Count the cases of a JUnit file. A case that fails and then errors in its teardown counts once."""
    results: dict[str, Outcome] = {}
    for case in ET.parse(path).getroot().iter("testcase"):  # noqa: S314  pytest's own file
        name = f"{label}: {case.get('classname', '').rpartition('.')[2]}::{case.get('name', '')}"
        problem = next((child for child in case if child.tag in ("failure", "error")), None)
        skip = case.find("skipped")
        if problem is not None:
            results[name] = failed(f"{name}: {first_line(problem.get('message'))}")
        elif skip is not None:
            results.setdefault(name, skipped(f"{name}: {first_line(skip.get('message'))}"))
        else:
            results.setdefault(name, passed())
    return sum(results.values(), NOTHING)


def first_line(text: str | None) -> str:
    """The first line of a message, short enough for a summary."""
    return next((line.strip()[:160] for line in (text or "").splitlines() if line.strip()), "no message")


def unit() -> Outcome:
    """Unit tests: no root, no network."""
    return pytest("unit", "tests/unit", "--numprocesses=3", timeout=15 * MINUTE)


# --- ocr ---

# What shows that a server is there -> its Debian package; a test whose server is missing is skipped.
OCR_SERVERS = {"redis-server": "redis-server", "pg_createcluster": "postgresql", "smbd": "samba"}


def ocr() -> Outcome:
    """The OCR service with real servers on loopback."""
    from ocr_pipeline.synthetic import plates

    from scripts import _second_plates, _third_plates

    try:
        others = _second_plates.PACKAGES | _third_plates.PACKAGES
        packages.ensure(config.from_environment(), OCR_SERVERS | plates.PACKAGES | others)
    except LabError as error:
        print(error, file=sys.stderr)
    return pytest("ocr", "tests/ocr", "-m", "not long", timeout=20 * MINUTE)


# --- lab ---


def needs_root() -> str | None:
    """Why this machine cannot boot a lab, or None."""
    return None if os.geteuid() == 0 else "the lab boots real hosts and needs root: run it as root"


def lab_stages(name: str, *, suite: str | None = None, keep: bool = False) -> list[Stage]:
    """Boot a lab, look at it bare, do all that `make lab` does, test it, remove it."""
    extra = {"LAB_NAME": name, **({"LAB_SUITE": suite} if suite else {})}
    env = environment(**extra)
    playbook = [str(BIN / "ansible-playbook"), "-i", INVENTORY]
    python = sys.executable

    def up() -> Outcome:
        if reason := needs_root():
            return skipped(f"lab: {reason}")
        # Bare hosts are what the next stage checks: what an earlier run left would not be.
        execute([python, "-m", "lab", "down"], timeout=5 * MINUTE, env=env)
        return command_stage("lab up", [python, "-m", "lab", "up"], timeout=15 * MINUTE, env=env)

    def bare_check() -> Outcome:
        return command_stage(
            "site.yml --check --diff on bare hosts",
            [*playbook, "site.yml", "--check", "--diff"],
            timeout=10 * MINUTE,
            env=env,
        )

    def site() -> Outcome:
        # What a person runs: site.yml, the first preset, verify_health and one chat.
        return command_stage("make lab", [python, "scripts/make_lab.py"], timeout=60 * MINUTE, env=env)

    def deploy() -> Outcome:
        return pytest(
            "deploy", "tests/deploy", "--ansible-inventory", INVENTORY, timeout=10 * MINUTE, env=env
        )

    def tests() -> Outcome:
        return pytest("lab", "tests/lab", "-m", "not long", timeout=45 * MINUTE, env=env)

    def down() -> Outcome:
        if needs_root():
            return NOTHING
        if keep:
            print(f"kept: LAB_NAME={name} python3 -m lab status")
            return NOTHING
        return command_stage("lab down", [python, "-m", "lab", "down"], timeout=5 * MINUTE, env=env)

    return [
        Stage("lab up", up),
        Stage("check on bare", bare_check, ("lab up",)),
        Stage("site", site, ("lab up",)),
        Stage("deploy", deploy, ("site",)),
        Stage("lab tests", tests, ("site",)),
        Stage("lab down", down),
    ]


# --- the UEFI machine ---


def vm_stages(*, keep: bool = False) -> list[Stage]:
    """Make the UEFI machine, test on it, remove it."""
    env = environment(LAB_NAME=UEFI_LAB)
    down = [sys.executable, "-m", "lab", "down"]

    def tests() -> Outcome:
        if reason := needs_root():
            return skipped(f"vm: {reason}")
        return pytest("vm", "tests/vm", timeout=120 * MINUTE, env=env)

    def removal() -> Outcome:
        if keep or needs_root():
            return NOTHING
        return command_stage("lab down", down, timeout=5 * MINUTE, env=env)

    return [Stage("vm", tests), Stage("lab down", removal)]


# --- gpu ---


def needs_gpu() -> str | None:
    """Why this machine has no NVIDIA GPU to measure with, or None."""
    if shutil.which("nvidia-smi") is None:
        return "no NVIDIA GPU: nvidia-smi is not installed"
    try:
        done = subprocess.run(
            ["nvidia-smi", "--list-gpus"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=30,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "no NVIDIA GPU that answers: nvidia-smi hangs"
    if done.returncode != 0 or not done.stdout.strip():
        return f"no NVIDIA GPU: nvidia-smi ends with exit code {done.returncode}"
    return None


def gpu_environment() -> tuple[str, dict[str, str]]:
    """A Python with what the lane imports, and its environment: the controller's, or one of the wheels.

    Raises RuntimeError when there is neither.
    """
    paths = [ROOT, *(ROOT / f"apps/{app}/src" for app in ("llama_common", "llmbox"))]
    env = environment(PYTHONPATH=os.pathsep.join(map(str, paths)))
    controller = ROOT / ".venv/bin/python"
    if controller.exists():
        return str(controller), env
    own, wheels = ROOT / "build/gpu/venv", ROOT / "build/gpu-inputs/wheels"
    python = str(own / "bin/python")
    if (own / "complete").exists():
        return python, env
    if not wheels.is_dir():
        fix = "make test-gpu-inputs where there is a network, and copy it here"
        raise RuntimeError(f"build/gpu-inputs is missing; fix: {fix}")
    files = sorted(str(file) for file in wheels.glob("*.whl"))
    for argv in (
        [sys.executable, "-m", "venv", "--clear", str(own)],
        [python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", *files],
    ):
        if execute(argv, timeout=5 * MINUTE) != 0:
            raise RuntimeError(
                "the wheels of build/gpu-inputs cannot be installed; fix: make test-gpu-inputs "
                f"GPU_PYTHON={sys.version_info[0]}.{sys.version_info[1]} where there is a network"
            )
    (own / "complete").touch()
    return python, env


def gpu_part(part: str) -> Stage:
    """One part of the GPU lane; a part that was measured before is read, not measured again."""

    def run() -> Outcome:
        try:
            python, env = gpu_environment()
        except RuntimeError as error:
            return failed(f"gpu {part}: {error}")
        # Each part writes the page with all that were measured so far.
        argv = [python, "scripts/bench_gpu.py", *(("--build",) if part == "build" else ("--part", part))]
        return command_stage(f"gpu {part}", argv, timeout=90 * MINUTE, env=env)

    return Stage(f"gpu {part}", run, () if part == "build" else ("gpu build",))


def gpu_stages() -> list[Stage]:
    """Build llama.cpp for the card, then measure part by part; one line where there is no card."""
    if reason := needs_gpu():
        return [Stage("gpu", lambda: skipped(f"gpu: {reason}"))]
    return [gpu_part(part) for part in GPU_PARTS]


# --- stages in order ---


def run_stages(stages: Iterable[Stage], report: Report, *, always: str = "lab down") -> None:
    """Run stages in order into `report`; the one named `always` also when an interruption ends the others."""
    pending = list(stages)
    try:
        while pending:
            run_stage(pending.pop(0), report)
    except KeyboardInterrupt:
        report.rows.append(("interrupted", failed("interrupted: the stages after this did not run"), 0.0))
        for stage in pending:
            if stage.name == always:
                run_stage(stage, report)
        raise


def run_stage(stage: Stage, report: Report) -> None:
    """Run one stage, or say which one it waits for in vain."""
    print(f"\n== {stage.name}", flush=True)
    started = time.monotonic()
    missing = [name for name in stage.needs if report.broken(name)]
    try:
        outcome = skipped(f"{stage.name}: needs the stage '{missing[0]}'") if missing else stage.run()
    except Exception as error:  # whatever it is, the stages after it run, above all the one that cleans up
        traceback.print_exc()
        outcome = failed(f"{stage.name}: {type(error).__name__}: {first_line(str(error))}")
    seconds = time.monotonic() - started
    report.rows.append((stage.name, outcome, seconds))
    print(f"-- {stage.name}: {outcome.tally} in {clock(seconds)}", flush=True)


# --- the long run ---


@dataclass(frozen=True)
class Result:
    """The stored result of one case of the long run."""

    case: str
    commit: str
    date: str
    seconds: float
    passed: int
    failed: int
    skipped: int
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """passed, failed or skipped."""
        return "failed" if self.failed else "passed" if self.passed else "skipped"


def cache() -> Path:
    """Where results of the long run are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "llmbox" / "test-long"


def commit() -> str:
    """The commit under test; a changed work tree is marked, and its results are never taken as done."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run(
        [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True, timeout=MINUTE
    ).stdout.strip()
    dirty = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs/test-runs"],
        capture_output=True,
        text=True,
        check=True,
        timeout=MINUTE,
    ).stdout.strip()
    return f"{head}+changes" if dirty else head


def result_path(case: str) -> Path:
    """The file of a case's result."""
    return cache() / f"{re.sub(r'[^A-Za-z0-9]+', '-', case).strip('-')}.json"


def stored(case: str) -> Result | None:
    """The stored result of a case; None without one, or when it cannot be read."""
    try:
        data = json.loads(result_path(case).read_text())
        return Result(**{**data, "notes": tuple(data["notes"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def store(result: Result) -> None:
    """Keep a result; a run that is killed leaves whole files only."""
    path = result_path(result.case)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(result), indent=1) + "\n")
    partial.replace(path)


def to_run(
    cases: Sequence[str], start: str | None, head: str, known: Callable[[str], Result | None]
) -> list[str]:
    """Cases still to run: from `start` on, or all that have not passed at this very commit."""
    if start is not None:
        if start not in cases:
            raise ValueError(f"--from {start}: no such case; the cases are: {', '.join(cases)}")
        return list(cases[cases.index(start) :])
    if head.endswith("+changes"):
        return list(cases)

    def done(case: str) -> bool:
        result = known(case)
        return result is not None and result.commit == head and result.verdict == "passed"

    return [case for case in cases if not done(case)]


def long_tests() -> list[str]:
    """Node ids of the tests that are marked long."""
    listed = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--collect-only",
            "-m",
            "long",
            "tests/unit",
            "tests/ocr",
            "tests/lab",
        ],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=2 * MINUTE,
        check=False,
    )
    if listed.returncode not in (0, PYTEST_NO_TESTS):
        raise RuntimeError(
            f"pytest could not collect the long tests:\n{listed.stdout[-2000:]}{listed.stderr}"
        )
    return [line for line in listed.stdout.splitlines() if "::" in line]


def keep_result(case: str, head: str, outcome: Outcome, seconds: float) -> None:
    """Store what a case found as soon as it is known: a run that is killed later goes on from there."""
    tally = outcome.tally
    counts = (tally.passed, tally.failed, tally.skipped)
    store(Result(case, head, now(), round(seconds, 1), *counts, outcome.notes))


def long_stage(case: str, head: str, env: dict[str, str]) -> Stage:
    """One long test as a stage."""

    def run() -> Outcome:
        started = time.monotonic()
        outcome = pytest(case, case, timeout=60 * MINUTE, env=env)
        keep_result(case, head, outcome, time.monotonic() - started)
        return outcome

    return Stage(case, run, ("site",))


def one_row(case: str, stages: Sequence[Stage], report: Report, head: str) -> None:
    """Run stages as one case, one row of `report`."""
    inner = Report()
    started = time.monotonic()
    try:
        run_stages(stages, inner)
    finally:
        outcome = sum((row[1] for row in inner.rows), NOTHING)
        report.rows.append((case, outcome, time.monotonic() - started))
        keep_result(case, head, outcome, time.monotonic() - started)


def run_long(start: str | None, only: str, issue: str, *, keep: bool) -> Report:
    """Run the long cases that are still to run and have `only` in their name; write the summary of all.

    Raises ValueError for an unknown --from, RuntimeError when the tests cannot be collected.
    """
    head = commit()
    # What runs on a lab of its own.
    own_lab = {
        UEFI: vm_stages(keep=keep),
        DEBIAN_13: lab_stages(DEBIAN_13_LAB, suite="trixie", keep=keep),
    }
    cases = [*long_tests(), *own_lab]
    todo = [case for case in to_run(cases, start, head, stored) if only in case]
    print(f"{len(todo)} of {len(cases)} cases to run at {head}")
    report = Report()
    on_lab = [case for case in todo if case not in own_lab]
    stages: list[Stage] = []
    if on_lab:
        by_name = {stage.name: stage for stage in lab_stages(LONG_LAB, keep=keep)}
        env = environment(LAB_NAME=LONG_LAB)
        stages += [by_name["lab up"], by_name["site"]]
        stages += [long_stage(case, head, env) for case in on_lab]
        stages += [by_name["lab down"]]
    try:
        run_stages(stages, report)
        for case, its_stages in own_lab.items():
            if case in todo:
                one_row(case, its_stages, report, head)
    finally:
        write_summary(ROOT / "docs" / "test-runs" / f"{issue}.md", issue, cases, head)
    return report


def now() -> str:
    """The date and minute, UTC."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def write_summary(path: Path, issue: str, cases: Sequence[str], head: str) -> None:
    """Write the summary of the long run: one row for each case that has a stored result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        f"# Long run, issue {issue}",
        "",
        f"Commit {head}, {now()}, {os.cpu_count()} cores. "
        "`make test-long` writes this page; a case keeps its result until it runs again.",
        "",
        "| case | result | seconds | commit | date |",
        "|---|---|---:|---|---|",
    ]
    results = [result for case in cases if (result := stored(case)) is not None]
    lines += [
        f"| `{result.case}` | {result.verdict} ({result.passed}/{result.failed}/{result.skipped}) "
        f"| {result.seconds:.0f} | {result.commit} | {result.date} |"
        for result in results
    ]
    lines += ["", "In brackets: checks passed / failed / skipped.", ""]
    if missing := len(cases) - len(results):
        lines += [f"Not run on this machine: {missing} of {len(cases)} cases.", ""]
    path.write_text("\n".join(lines))
    print(f"summary: {path.relative_to(ROOT)}")


# --- the command line ---


def on_terminate(_signum: int, _frame: FrameType | None) -> None:
    """End on SIGTERM as on Ctrl-C, so that the lab is removed."""
    raise KeyboardInterrupt


def alone(folder: Path) -> None:
    """Keep others out until this process ends: their labs have the same names.

    Raises RuntimeError when another run is on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".test-run.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise RuntimeError(
            "another run of the tests on hosts is on, on this machine; wait until it has ended"
        ) from None


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=["lint", "unit", "ocr", "lab", "vm", "gate", "long", "gpu"])
    parser.add_argument("--from", dest="start", metavar="CASE", help="long: run CASE and all after it")
    parser.add_argument("--only", default="", metavar="TEXT", help="long: cases with TEXT in their name")
    parser.add_argument(
        "--issue",
        default=os.environ.get("ISSUE", "1"),
        metavar="NAME",
        help="long: the summary goes to docs/test-runs/NAME.md (default: $ISSUE or 1)",
    )
    parser.add_argument("--keep", action="store_true", help="leave the lab up afterwards")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line says."""
    args = parse(argv)
    signal.signal(signal.SIGTERM, on_terminate)
    report = Report()
    fast = [Stage("lint", lint), Stage("unit", unit), Stage("ocr", ocr)]
    lab = lab_stages(GATE_LAB, keep=args.keep)  # never the lab that LAB_NAME chooses: it is made anew
    plans = {"lint": fast[:1], "unit": fast[1:2], "ocr": fast[2:], "lab": lab, "gate": [*fast, *lab]}
    plans["vm"] = vm_stages(keep=args.keep)
    if args.what == "gpu":
        plans["gpu"] = gpu_stages()
    try:
        if args.what not in ("lint", "unit", "ocr", "gpu"):
            alone(config.from_environment().cache)
        if args.what == "long":
            report = run_long(args.start, args.only, args.issue, keep=args.keep)
        else:
            run_stages(plans[args.what], report)
    except KeyboardInterrupt:
        report.show()
        return 130
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        report.rows.append((args.what, failed(first_line(str(error))), 0.0))
    report.show()
    if args.what == "gpu" and not report.tally.failed:
        return 0  # there need not be one
    return report.exit_code


if __name__ == "__main__":
    interrupt.raise_again()
    sys.exit(main())

#!/usr/bin/env python3
"""Measure every preset of an LLM box, against its floor and against what this box did before.

    scripts/verify_throughput.py --inventory DIR [--limit PATTERN] [--preset NAME ...] [--json FILE]

Each user preset is asked for in turn, as a client would, and the one that served before comes back. Each run
has the server for itself: the gateway holds other requests meanwhile and serves them between two runs. Every
run is added to a history on this machine, and a chart of each preset's is drawn beside it. A gateway that
wants a key is shown the one in the environment variable LLMBOX_KEY. Progress goes to standard error, a table
and one line for each figure that fell short to standard output, JSON to FILE (`-`: standard output, instead
of the table). Exit codes: 0 all well, 1 something fell short, 2 could not run or a host could not be reached,
130 interrupted.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lab import interrupt
from scripts import _venv

if __name__ == "__main__":
    interrupt.exit_quietly()
    _venv.enter()

import argparse
import os
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from statistics import median
from typing import Any

import httpx
from llama_common.presets import Expect, Speed
from llama_common.problems import InventoryError
from llmbox.status import ON_TRIAL

from roles.llama_cpp.library.llama_cpp_build import HostError
from scripts import _command, _history_chart
from scripts._ask_host import Unreachable, ask, reach
from scripts._gpu_watch import GpuWatch, watched
from scripts._history import History, Run
from scripts._inventory import Host, InventoryUnreadable, load
from scripts._llm_box import GROUP, LlmBox, presets_of
from scripts._measure import Meter, NotMeasured, Timed, shapes
from scripts._refusal import KEY_VARIABLE
from scripts._screen import table
from scripts._statistics import BASELINE_LEAST, Verdict, judge, spread
from scripts.verify_health import (
    Check,
    HostReport,
    as_json,
    ensure_writable,
    exit_code,
    is_own,
    line,
    naming_the_option,
    running_release,
)

RUNS = 5  # of each shape
HOPELESS = 0.9  # a box on which only a larger slowdown could be told is too busy for any verdict
OFF_TIMEOUT_S = 180
GPU_UNITS = {
    "utilization_percent": "%",
    "power_w": "W",
    "temperature_c": "°C",
    "memory_mib": "MiB",
}
HEADERS = ("host", "preset", "figure", "best", "median", "spread", "floor", "target", "before", "verdict")
NOTHING = "-"
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Figure:
    """One speed of a preset: what was measured now, tokens per second, and what it is held against."""

    preset: str
    name: str
    values: tuple[float, ...]
    expected: Speed | None
    verdict: Verdict

    def checks(self) -> list[Check]:
        """The best run against the floor, and the newest runs against this box's own baseline."""
        name, unit, best = f"{self.preset}.{self.name}", "tok/s", round(max(self.values), 2)
        floor = self.expected.floor if self.expected else None
        target = self.expected.target if self.expected else None
        detail = f"target {target:g} {unit}, {best / target - 1:+.1%}" if target else ""
        good = floor is None or best >= floor
        if not good:
            detail = (
                f"the best of {len(self.values)} runs, median {median(self.values):.1f} {unit}, is under the "
                f"floor of {floor:g} {unit} in llama_presets.{self.preset}.expect.{self.name}_tok_s; fix: "
                f"look for another load and at lmswitch logs {self.preset}, or lower the floor"
            )
        trend = self.verdict
        limit = None
        if trend.baseline:
            limit = round(trend.baseline.level * (1 - trend.baseline.threshold), 2)
        return [
            Check(name, good, best, unit, floor, detail),
            Check(f"{name}_trend", not trend.slower, round(trend.level, 2), unit, limit, told(trend)),
        ]

    def cells(self) -> list[str]:
        """The row for a person."""
        speed = self.expected
        before = self.verdict.baseline
        return [
            self.preset,
            self.name,
            f"{max(self.values):.1f}",
            f"{median(self.values):.1f}",
            f"±{spread(self.values):.1%}",
            f"{speed.floor:g}" if speed and speed.floor else NOTHING,
            f"{speed.target:g}" if speed else NOTHING,
            f"{before.level:.1f} ±{before.spread:.1%}" if before else NOTHING,
            f"{self.verdict.word} {self.verdict.change:+.1%}" if before else self.verdict.word,
        ]


def told(trend: Verdict) -> str:
    """A verdict in one line: against what, and what it can see."""
    before = trend.baseline
    if before is None:
        return f"no baseline yet: it takes {BASELINE_LEAST} runs of the same preset, release and driver"
    least = before.detectable
    seen = f"a slowdown of {least:.0%} would be seen" if least < HOPELESS else "no slowdown could be told"
    noise = f"; the runs vary too much for a finer verdict (±{before.noise:.1%})" if before.noisy else ""
    beside = f"{trend.change:+.1%} beside {before.level:.1f} tok/s of {before.runs} runs before"
    fix = "; fix: look for another load, for heat and for what changed on the box" if trend.slower else ""
    return f"{beside}; {seen}{noise}{fix}"


@dataclass(frozen=True)
class Measured:
    """What was found on one host."""

    report: HostReport
    figures: tuple[Figure, ...] = ()
    charts: tuple[Path, ...] = ()


# --- pure: from runs to figures and checks ---


def figures(preset: str, expect: Expect, made: Sequence[Run], runs: Sequence[Run]) -> list[Figure]:
    """The figures of what was `made` just now; `runs` are all that the host ever made, oldest first."""
    found = []
    for shape in dict.fromkeys(run.shape for run in made):
        now = [run for run in made if run.shape == shape]
        alike = [run for run in runs if run.alike(now[-1])]
        short = shape == "short"
        for name, speed in (("generation", expect.generation_tok_s), ("prefill", expect.prefill_tok_s)):

            def values(of: Sequence[Run], field: str = f"{name}_tok_s") -> list[float]:
                return [float(getattr(run, field)) for run in of]

            full = name if short else f"{name}_{shape}"
            verdict = judge(values(alike))
            found.append(Figure(preset, full, tuple(values(now)), speed if short else None, verdict))
    return found


def gpu_checks(preset: str, runs: Sequence[Run], trouble: str) -> list[Check]:
    """What the GPU did in these runs, for information; one line when there is none."""
    seen = [run.gpu for run in runs if run.gpu]
    if not seen:
        return [Check(f"{preset}.gpu", True, None, "", None, trouble or "no sample fell into a run")]
    checks = []
    for name, unit in GPU_UNITS.items():
        values = [float(value) for gpu in seen if (value := gpu.get(name)) is not None]
        value = round(median(values), 1) if values else None
        checks.append(Check(f"{preset}.gpu_{name.rpartition('_')[0]}", True, value, unit, None))
    return checks


# --- measuring ---


@dataclass(frozen=True)
class Box:
    """A host to be measured: its data, its gateway, its GPUs, and where its runs are kept."""

    host: Host
    data: LlmBox
    client: httpx.Client
    gpu: GpuWatch
    history: History


def measure_host(host: Host, presets: Sequence[str], history: History, tell: Tell) -> Measured:
    """Measure the presets of one host. Never raises for what is wrong there. Raises OSError (the history)."""
    checks: list[Check] = []
    found: list[Figure] = []
    charts: list[Path] = []
    try:
        data = LlmBox.of(host.variables)
        wanted = [name for name in data.names("user") if not presets or name in presets]
        status = look(host, data)["status"]
        if status is None:
            raise Unreachable("lmswitch status --json gave no answer; fix: run site.yml")
        key = os.environ.get(KEY_VARIABLE)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        with (
            reach(host, data.front.host, data.front.port) as url,
            httpx.Client(base_url=url, trust_env=False, headers=headers) as client,
            watched(host) as gpu,
        ):
            box = Box(host, data, client, gpu, history)
            try:
                for preset in wanted:
                    made, some = measure_preset(box, preset, tell)
                    checks += made
                    found += some
                    charts += draw(host, preset, data.config.llama_presets[preset].expect, history)
            finally:
                put_back(box, status.get("active"), wanted, tell)
    except (InventoryError, HostError, Unreachable) as error:
        return Measured(HostReport(host.name, error=str(error)))
    return Measured(HostReport(host.name, tuple(checks)), tuple(found), tuple(charts))


def look(host: Host, box: LlmBox) -> Mapping[str, Any]:
    """What the LLM box says about itself. Raises Unreachable."""
    found: Mapping[str, Any] = ask(host, {"llm": box.request()}, become=True)["llm"]
    return found


def measure_preset(box: Box, preset: str, tell: Tell) -> tuple[list[Check], list[Figure]]:
    """All runs of one preset, kept in the history; its checks and figures. Raises Unreachable, OSError."""
    made: list[Run] = []
    wanted, why = 2 * RUNS, ""
    try:
        kinds = shapes(box.data.slot_context(preset))
        wanted = len(kinds) * RUNS
        tell(f"{preset}: waiting until it serves")
        meter = Meter(box.client, preset, tell)
        meter.wake()
        seen = deployed(box)
        release = running_release([one for one in seen["servers"] if is_own(one, seen)]) or "unknown"
        for shape in kinds:
            for number, timed in enumerate(meter.series(shape, RUNS), 1):
                deployed(box)
                made.append(kept(preset, shape.name, release, timed, box.gpu))
                box.history.append(made[-1])
                tell(
                    f"{preset} {shape.name} {number}/{RUNS}: prefill {timed.prefill_tok_s:.1f} tok/s of "
                    f"{timed.prompt_tokens} tokens, generation {timed.generation_tok_s:.1f} tok/s"
                )
    except NotMeasured as error:
        why = str(error)
        tell(f"{preset}: not measured: {why}")
    checks = [Check(f"{preset}.measured", not why, len(made), "runs", wanted, why)]
    if not made:
        return checks, []
    found = figures(preset, box.data.config.llama_presets[preset].expect, made, box.history.runs())
    checks += [check for figure in found for check in figure.checks()]
    return checks + gpu_checks(preset, made, box.gpu.trouble), found


def deployed(box: Box) -> Mapping[str, Any]:
    """What the box says about itself. Raises NotMeasured while a preset is on trial, Unreachable.

    A trial's flags or release are not those that a run would be kept under, and both only take turns.
    """
    seen = look(box.host, box.data)
    if (seen["status"] or {}).get("on_trial"):
        raise NotMeasured(f"{ON_TRIAL}, or wait for its end")
    return seen


def kept(preset: str, shape: str, release: str, timed: Timed, gpu: GpuWatch) -> Run:
    """A run as the history keeps it."""
    return Run(
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        preset=preset,
        shape=shape,
        release=release,
        driver=gpu.driver,
        prompt_tokens=timed.prompt_tokens,
        prefill_tok_s=round(timed.prefill_tok_s, 3),
        generated_tokens=timed.generated_tokens,
        generation_tok_s=round(timed.generation_tok_s, 3),
        gpu=gpu.during(timed.began, timed.ended),
    )


def draw(host: Host, preset: str, expect: Expect, history: History) -> list[Path]:
    """Draw a preset's history beside it; nothing before the first run. Raises OSError."""
    runs = [run for run in history.runs() if run.preset == preset]
    if not runs:
        return []
    file = history.file.with_name(f"{host.name}-{preset}.png")
    file.write_bytes(_history_chart.draw(f"{preset} on {host.name}", expect, runs))
    return [file]


def put_back(box: Box, before: str | None, wanted: Sequence[str], tell: Tell) -> None:
    """Have what served before serve again, wherever the measurement ended: another preset, or nothing."""
    if not wanted or list(wanted) == [before]:
        return
    if before in box.data.names("user"):
        tell(f"going back to {before}")
        try:
            Meter(box.client, str(before)).wake()
        except NotMeasured as error:
            tell(f"{before} does not serve again: {error}; fix: lmswitch {before}")
    elif before is None:
        tell("switching off again what was off")
        command = f"sudo -n -u {shlex.quote(box.data.user)} lmswitch off"
        try:
            argv = box.host.ssh(command)
            none = subprocess.DEVNULL
            subprocess.run(argv, stdin=none, stdout=none, stderr=none, timeout=OFF_TIMEOUT_S, check=True)
        except (OSError, subprocess.SubprocessError):
            tell("it could not be switched off; fix: lmswitch off")


# --- showing ---


def screen(found: Sequence[Measured]) -> str:
    """One row for each figure, then one line for each check that fell short, then where the charts are."""
    rows = [[one.report.host, *figure.cells()] for one in found for figure in one.figures]
    parts = [table(HEADERS, rows)] if rows else []
    lines = []
    for one in found:
        if one.report.error:
            could_not = "" if one.report.verdict == "refused" else "could not be asked: "
            lines.append(f"{one.report.host}: {could_not}{one.report.error}")
        lines += [f"{one.report.host}: {line(check)}" for check in one.report.checks if not check.ok]
        lines += [f"{one.report.host}: {gpu_line(one.report.checks, preset)}" for preset in measured(one)]
    charts = [f"chart: {chart}" for one in found for chart in one.charts]
    return "\n\n".join(part for part in (*parts, "\n".join(lines), "\n".join(charts)) if part)


def measured(one: Measured) -> list[str]:
    """The presets that have figures."""
    return list(dict.fromkeys(figure.preset for figure in one.figures))


def gpu_line(checks: Sequence[Check], preset: str) -> str:
    """What the GPU did while a preset was measured."""
    seen = [check for check in checks if check.name.startswith(f"{preset}.gpu")]
    words = [
        check.detail if check.value is None else f"{check.name.rpartition('_')[2]} {check.value} {check.unit}"
        for check in seen
    ]
    return f"{preset}: GPU: {', '.join(word for word in words if word)}"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = _command.parser(__doc__, "0 all well, 1 something fell short, 2 could not run")
    parser.add_argument(
        "--preset", action="append", default=[], metavar="NAME", help="only this preset (may be repeated)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the report there; - is standard output")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verification."""
    args = parse(argv)
    return _command.attempt("verify_throughput", args.inventory, lambda: report(args))


def report(args: argparse.Namespace) -> int:
    """Measure the hosts and show what they do. Raises InventoryUnreadable, InventoryError, OSError."""

    def progress(text: str) -> None:
        print(_command.typed(text, args.inventory), file=sys.stderr, flush=True)

    file = Path(args.json) if args.json and args.json != "-" else None
    if file is not None:
        ensure_writable(file)
    progress(f"reading {args.inventory}")
    hosts = [host for host in load(args.inventory, limit=args.limit) if GROUP in host.groups]
    if not hosts:
        raise InventoryUnreadable(f"{args.inventory}: none of the hosts is in the group {GROUP}")
    ensure_known(hosts, args.preset)
    found = []
    for host in hosts:
        history = History.of(args.inventory, host.name)
        history.ensure_writable()
        tell = partial(progress_of, progress, host.name)
        one = measure_host(host, args.preset, history, tell)
        error = one.report.error and _command.typed(one.report.error, args.inventory)
        found.append(replace(one, report=replace(one.report, error=error)))
    reports = [one.report for one in found]
    print(as_json(reports).rstrip() if args.json == "-" else screen(found), flush=True)
    if file is not None:
        with naming_the_option(file):
            file.write_text(as_json(reports))
    return exit_code(reports)


def progress_of(progress: Tell, host: str, text: str) -> None:
    """Progress on one of the hosts."""
    progress(f"{host}: {text}")


def ensure_known(hosts: Sequence[Host], presets: Sequence[str]) -> None:
    """Raises InventoryUnreadable when none of the hosts has one of `presets`; InventoryError."""
    known = list(dict.fromkeys(name for host in hosts for name in presets_of(host.variables)))
    unknown = [name for name in presets if name not in known]
    if unknown:
        raise InventoryUnreadable(f"--preset {unknown[0]}: no such preset; give one of {', '.join(known)}")


if __name__ == "__main__":
    _command.end(main)

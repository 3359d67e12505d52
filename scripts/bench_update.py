#!/usr/bin/env python3
"""Measure real updates of llama.cpp and the way back, on the LLM box of a lab.

    scripts/bench_update.py [--inventory DIR] [--slower OPTION=VALUE[,…]] [--output DIR]

playbooks/update_llama_cpp.yml runs for three new releases of the first preset's build, from the same old one
each time: the same commit built again, the commit of another build, and the same commit with CMake options
that make it slow. What it measured and decided is its own output. Then a release that serves is rolled back
with playbooks/rollback_llama_cpp.yml while a client asks. Afterwards the box is as it was. Writes update.md
and update.png. Exit codes: 0 written, 2 could not measure (one line says why).
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import secrets
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts._chart import Bar, bar_chart
from scripts._compare import MOST_PAIRS
from scripts._inventory import ROOT, InventoryUnreadable, environment, load
from scripts._llm_box import GROUP
from scripts._statistics import ratio_of_medians
from scripts._traffic import Traffic, clients_beside
from scripts._verdict import LEAST, LEAST_PAIRS
from scripts.bench import NoMeasurement, commit, machine, verdict
from scripts.bench_gateway import Box

UPDATE, ROLLBACK = "playbooks/update_llama_cpp.yml", "playbooks/rollback_llama_cpp.yml"
PLAY_S = 7200.0
ROLLBACKS, ROLLBACK_BAR_S = 3, 60.0
SLOWER = "GGML_AVX2=OFF"  # without AVX as well a run takes longer than the gateway lends its server for
CLIENT_PAUSE_S = 0.1
SWITCHED = {"ON": True, "OFF": False}  # as an inventory writes them
UNUSED_OPTION = "LLMBOX_BENCH"  # no tree knows it: another release, and nothing differs for the compiler
_FIGURE = r"([\d.]+) -> ([\d.]+) tok/s"
_PAIR = re.compile(rf"\] (?P<preset>\S+) \d+: generation {_FIGURE}, prefill {_FIGURE}$", re.MULTILINE)
_WORD = r"\] {build}: (keep|roll back|undecided)$"
_REASON = re.compile(r"\]   (\S.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Case:
    """A new release: what it is, the build's data that asks for it, and the verdict that is right.

    `right` is empty where nobody knows it beforehand.
    """

    name: str
    data: Mapping[str, Any]
    right: str = ""


@dataclass(frozen=True)
class Outcome:
    """What one run of the playbook measured and decided. Pairs are (old, new) in tokens per second."""

    case: Case
    word: str
    reasons: tuple[str, ...]
    generation: tuple[tuple[float, float], ...]
    prefill: tuple[tuple[float, float], ...]
    seconds: float
    kept: bool  # whether the new release is current, and the box serves with it

    @property
    def right(self) -> bool:
        """Whether it ended as it should: the known verdict, and the release that the verdict names serves."""
        return self.word == (self.case.right or self.word) and self.kept == (self.word == "keep")


@dataclass(frozen=True)
class WayBack:
    """One rollback: seconds of the playbook, and of the longest request of a client meanwhile."""

    seconds: float
    waited: float


def cases(builds: Mapping[str, Any], build: str, slower: str) -> list[Case]:
    """The new releases of a build. Raises NoMeasurement when there is no other commit."""
    mine = builds[build]
    other = next((one for name, one in builds.items() if name != build), None)
    if other is None:
        raise NoMeasurement(f"llama_cpp_builds has only {build}: a second one gives another commit")
    options = dict(item.partition("=")[::2] for item in slower.split(","))
    throttled = {option: SWITCHED.get(value, value) for option, value in options.items()}

    def variant(options: Mapping[str, str | bool], **more: Any) -> dict[str, Any]:
        data = {**copy.deepcopy(dict(mine)), **more}
        data["cmake_options"] = {**data.get("cmake_options", {}), **options}
        return data

    token = secrets.token_hex(4)  # a release that was rejected or built before would be no new one
    return [
        Case("the same commit, built again", variant({UNUSED_OPTION: token}), "keep"),
        Case(
            "another commit",
            variant({UNUSED_OPTION: token}, repo=other["repo"], commit=other["commit"]),
        ),
        Case(f"built with {slower}", variant(throttled), "roll back"),
    ]


# --- running ---


def play(words: Sequence[str], inventory: Path) -> tuple[int, float, str]:
    """Exit code, seconds and output of a playbook, whose own lines of progress are passed on."""
    argv = ["ansible-playbook", "-i", str(inventory), *words]
    began = time.monotonic()
    lines: list[str] = []
    with subprocess.Popen(
        argv, cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        watchdog = threading.Timer(PLAY_S, process.kill)
        watchdog.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line)
                if line.startswith("  ["):
                    print(line, end="", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)  # it was not necessarily a terminal, which tells all of them
            raise
        finally:
            watchdog.cancel()
    return process.returncode, time.monotonic() - began, "".join(lines)


class Bench:
    """The box, the build whose releases change, and what was current before."""

    def __init__(self, box: Box, inventory: Path) -> None:
        self.box = box
        self.inventory = inventory
        config = box.wanted.config
        self.preset = box.wanted.names("user")[0]
        self.build = config.llama_presets[self.preset].build
        self.directory = f"{box.wanted.builds_root}/{self.build}"
        self.box.lmswitch(self.preset)
        self.old = self.current()
        self.before = self.root(f"basename $(readlink {self.directory}/previous) 2>/dev/null || true")
        self.had = self.there()

    def root(self, command: str) -> str:
        """Standard output of a shell command of root. Raises NoMeasurement."""
        return self.box.run(f"sudo sh -c {shlex.quote(command)}").strip()

    def current(self) -> str:
        """The release that is current."""
        return self.root(f"basename $(readlink {self.directory}/current)")

    def there(self) -> set[str]:
        """The releases that stand there."""
        return set(self.root(f"ls {self.directory}/releases").split())

    def serving(self) -> str:
        """The release whose program the preset runs, "" when it is none of this build."""
        manager = self.box.as_user("systemctl --user show --property=MainPID --value")
        pid = self.box.run(f"{manager} llama-{self.preset}.service").strip()
        program = self.root(f"readlink /proc/{pid}/exe || true")
        found = re.fullmatch(rf"{self.directory}/releases/([^/]+)/bin/llama-server", program)
        return found[1] if found else ""

    def make_current(self, release: str, former: str) -> None:
        """Point the links as an update does, forget that it was rejected, and serve. Raises NoMeasurement."""
        swaps = [f"cd {self.directory}", f"rm -f rejected/{release}"]
        for name, target in (("current", release), ("previous", former)):
            swap = f"ln -sfn releases/{target} .{name} && mv -T .{name} {name}"
            swaps.append(swap if target else f"rm -f {name}")
        self.root(" && ".join(swaps))
        self.box.lmswitch(f"--restart {self.preset}")

    def restore(self) -> None:
        """The box as it was: the old release serves, the new ones are gone. Raises NoMeasurement."""
        self.make_current(self.old, self.before)
        for name in self.there() - self.had:
            self.root(f"cd {self.directory} && rm -rf releases/{name} rejected/{name}")

    def update(self, case: Case) -> Outcome:
        """One run of the playbook. Raises NoMeasurement."""
        builds = {**self.box.host.variables["llama_cpp_builds"], self.build: case.data}
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump({"llama_cpp_builds": builds}, file)
            file.flush()
            words = [UPDATE, "--limit", self.box.host.name, "--extra-vars", f"@{file.name}"]
            code, seconds, said = play(words, self.inventory)
        current = self.current()
        return self.read(case, code, seconds, said, kept=current != self.old and self.serving() == current)

    def read(self, case: Case, code: int, seconds: float, said: str, *, kept: bool) -> Outcome:
        """What the playbook said. Raises NoMeasurement."""
        found = re.search(_WORD.format(build=re.escape(self.build)), said, re.MULTILINE)
        if not found:
            why = (line for line in said.splitlines() if line.lstrip().startswith(("refused:", "msg:")))
            last = next(why, said[-300:])
            raise NoMeasurement(f"{case.name}: {UPDATE} ended with {code} and no verdict: {last.strip()}")
        pairs = [
            tuple(float(figure) for figure in match.groups()[1:])
            for match in _PAIR.finditer(said)
            if match["preset"] == self.preset
        ]
        return Outcome(
            case,
            found[1],
            tuple(_REASON.findall(said[found.end() :])),
            tuple((pair[0], pair[1]) for pair in pairs),
            tuple((pair[2], pair[3]) for pair in pairs),
            seconds,
            kept,
        )

    def roll_back(self, release: str) -> WayBack:
        """From a release that serves to the old one, beside a client. Raises NoMeasurement."""
        self.make_current(release, self.old)
        url = self.box.wanted.url(self.box.host.address)
        with clients_beside(url, [self.preset], clients=1, pause_s=CLIENT_PAUSE_S) as traffic:
            words = [ROLLBACK, "--limit", self.box.host.name, "--extra-vars", f"build={self.build}"]
            code, seconds, said = play(words, self.inventory)
        if code != 0 or self.current() != self.old or self.serving() != self.old:
            raise NoMeasurement(f"{ROLLBACK} ended with {code}, and {self.serving()} serves: {said[-300:]}")
        return WayBack(seconds, waited(traffic))


def waited(traffic: Traffic) -> float:
    """The longest request. Raises NoMeasurement when one was lost."""
    lost = [one for one in traffic.sent if not one.ok]
    if lost or not traffic.sent:
        raise NoMeasurement(f"{len(lost)} of {len(traffic.sent)} requests were lost: {traffic.summary()}")
    return max(one.took for one in traffic.sent)


# --- the page ---


def spread(values: Sequence[float], digits: int = 1) -> str:
    """`min / median / max`."""
    return " / ".join(f"{value:.{digits}f}" for value in (min(values), median(values), max(values)))


def rows(found: Outcome) -> list[str]:
    """A row for each figure of a case."""
    lines = []
    for name, pairs in (("generation", found.generation), ("prefill", found.prefill)):
        if not pairs:
            continue
        old, new = zip(*pairs, strict=True)
        ratio = ratio_of_medians(pairs) if len(pairs) >= LEAST_PAIRS else None
        shown = f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})" if ratio else ""
        lines.append(
            f"| {found.case.name} | {name} | {spread(old)} | {spread(new)} | {len(pairs)} | {shown} |"
        )
    return lines


def bars(found: Sequence[Outcome]) -> list[Bar]:
    """Generation with the old and the new release."""
    made = []
    for one in found:
        for side, name in enumerate(("old", one.case.name)):
            if one.generation:
                made.append(Bar.of(name, [pair[side] for pair in one.generation]))
    return made


def page(
    found: Sequence[Outcome], back: Sequence[WayBack], *, where: str, revision: str, day: str, what: str
) -> str:
    """The Markdown page."""
    slow = found[-1]
    ratio = min(
        (ratio_of_medians(pairs).value for pairs in (slow.generation, slow.prefill) if pairs), default=1.0
    )
    seconds, waits = [one.seconds for one in back], [one.waited for one in back]
    lines = [
        "# Updates of llama.cpp, and the way back",
        "",
        f"`make bench` writes this page. Commit {revision}, {day}.",
        f"{where}; the lab runs on it too. {what}",
        "",
        "![Generation with the old and the new release](update.png)",
        "",
        "| new release | verdict | end state | the whole playbook |",
        "|---|---|---|---:|",
        *(
            f"| {one.case.name} | {one.word} | {'the new' if one.kept else 'the old'} release serves"
            f"{'' if one.right else ', **wrong**'} | {one.seconds:.0f} s |"
            for one in found
        ),
        "",
        "| new release | tok/s of | old: min / median / max | new: min / median / max | pairs "
        "| ratio of the medians (95 % interval) |",
        "|---|---|---:|---:|---:|---:|",
        *(line for one in found for line in rows(one)),
        "",
        "| bar | measured | |",
        "|---|---:|---|",
        f"| the slow release, whose generation or prefill is below {LEAST:g} of the old one's, is rolled "
        f"back | {ratio:.2f}, {slow.word} | {verdict(ratio if slow.right else 1.0, LEAST)} |",
        f"| rollback_llama_cpp.yml, at most {ROLLBACK_BAR_S:g} s, {len(back)} times, min / median / max "
        f"| {spread(seconds)} s | {verdict(max(seconds), ROLLBACK_BAR_S)} |",
        f"| the longest request of a client during it | {spread(waits)} s | none lost |",
        "",
        "What the playbook said:",
        "",
        *(f"- {one.case.name}: {one.word}: {'; '.join(one.reasons)}" for one in found),
        "",
        "Pairs are one run with each release, one right after the other, which comes first alternating "
        f"(at least {LEAST_PAIRS}, up to {MOST_PAIRS} while the verdict is open). The interval is a "
        "bootstrap over pairs. The playbook's time has the build in it, which the compiler cache serves "
        "where it can.",
        "",
    ]
    return "\n".join(lines)


def measure(bench: Bench, slower: str) -> tuple[list[Outcome], list[WayBack]]:
    """Everything, in order; the box is as it was afterwards. Raises NoMeasurement."""
    found, back = [], []
    try:
        for case in cases(bench.box.host.variables["llama_cpp_builds"], bench.build, slower):
            print(f"-- {case.name}", file=sys.stderr, flush=True)
            found.append(bench.update(case))
            if case.name != found[0].case.name:
                bench.restore()
                continue
            (release,) = bench.there() - bench.had
            for number in range(ROLLBACKS):
                back.append(bench.roll_back(release))
                print(f"rollback {number + 1}: {back[-1].seconds:.1f} s", file=sys.stderr, flush=True)
            bench.restore()
    finally:
        bench.restore()
    return found, back


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="exit codes: 0 written, 2 could not measure",
    )
    parser.add_argument("--inventory", default="inventory/lab", metavar="DIR")
    parser.add_argument(
        "--slower", default=SLOWER, metavar="OPTION=VALUE[,…]", help=f"make a slow release (default {SLOWER})"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "docs/benchmarks", metavar="DIR")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write."""
    args = parse(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was changed for a while is put back
    where, revision = machine(), commit()
    try:
        hosts = [host for host in load(ROOT / args.inventory) if GROUP in host.groups]
        if not hosts:
            raise NoMeasurement(f"{args.inventory} has no host in the group {GROUP}")
        bench = Bench(Box(hosts[0]), ROOT / args.inventory)
        found, back = measure(bench, args.slower)
    except (NoMeasurement, InventoryUnreadable) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    what = f"Build {bench.build}, release {bench.old[:12]}; preset {bench.preset}."
    day = time.strftime("%Y-%m-%d", time.gmtime())
    text = page(found, back, where=where, revision=revision, day=day, what=what)
    print(text)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "update.md").write_text(text)
    chart = bar_chart("Generation with the old and the new release", "tok/s", bars(found))
    (args.output / "update.png").write_bytes(chart)
    return 0


if __name__ == "__main__":
    sys.exit(main())

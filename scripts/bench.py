#!/usr/bin/env python3
"""Measure a no-op site.yml beside the cheapest work that Ansible can do on the same hosts.

    scripts/bench.py [--inventory DIR] [--repetitions N] [--output DIR]

Three things in turn, N times: site.yml on hosts that need nothing (`changed=0`, otherwise it is no
measurement), a play that runs as many `stat` tasks on each host as site.yml ran tasks there, and
`ansible all -m ping`. While site.yml runs, the memory of its whole process tree on this machine is sampled.
Writes site-noop.md and site-noop.png.
Exit codes: 0 written, 2 could not measure (one line says why).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts import _venv

if __name__ == "__main__":
    _venv.enter()

import argparse
import json
import os
import platform
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from scripts._chart import Bar, bar_chart
from scripts._inventory import ROOT, Host, environment

REPETITIONS = 3
TIMEOUT_S = 900
SAMPLE_S = 0.25
RATIO_BAR = 2.0
SECONDS_BAR = 60.0
MEMORY_BAR_MB = 300
SITE, STAT, PING = "site.yml, nothing to do", "as many stat tasks", "ansible all -m ping"
_RECAP = re.compile(
    r"^(?P<host>\S+)\s+: ok=(?P<ok>\d+)\s+changed=(?P<changed>\d+)\s+unreachable=(?P<gone>\d+)"
    r"\s+failed=(?P<failed>\d+)",
    re.MULTILINE,
)


class NoMeasurement(Exception):
    """There is nothing to measure; the message is one line."""


@dataclass
class Memory:
    """Peaks of a process tree in bytes: the sum of its processes' resident and proportional set sizes."""

    rss: int = 0
    pss: int = 0
    samples: int = 0

    def add(self, rss: int, pss: int) -> None:
        """Take one sample in."""
        self.rss, self.pss, self.samples = max(self.rss, rss), max(self.pss, pss), self.samples + 1


@dataclass
class Series:
    """The seconds of each repetition, by what was run."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {SITE: [], STAT: [], PING: []})

    def middle(self, what: str) -> float:
        """The median."""
        return median(self.seconds[what])

    def bars(self) -> list[Bar]:
        """For the chart."""
        return [Bar.of(what, values) for what, values in self.seconds.items()]


# --- memory of a process tree ---


def tree(root: int, parents: Mapping[int, int]) -> list[int]:
    """`root` and all its descendants, from a table of parents by process."""
    children: dict[int, list[int]] = {}
    for pid, parent in parents.items():
        children.setdefault(parent, []).append(pid)
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def parents() -> dict[int, int]:
    """The parent of every process of this machine."""
    table = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                stat = (folder / "stat").read_text()
            except OSError:
                continue
            table[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
    return table


def sizes(pid: int) -> tuple[int, int]:
    """Resident and proportional set size of a process in bytes; 0 when it is gone."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0, 0
    values = dict(re.findall(r"^(Rss|Pss):\s+(\d+) kB", text, re.MULTILINE))
    return int(values.get("Rss", 0)) * 1024, int(values.get("Pss", 0)) * 1024


def watch(root: int, stop: threading.Event, memory: Memory) -> None:
    """Sample the process tree under `root` until `stop`."""
    while not stop.wait(SAMPLE_S):
        each = [sizes(pid) for pid in tree(root, parents())]
        memory.add(sum(rss for rss, _ in each), sum(pss for _, pss in each))


# --- running ---


def timed(argv: Sequence[str], memory: Memory | None = None) -> tuple[float, str]:
    """Seconds and standard output of a program. Raises NoMeasurement when it fails or hangs."""
    started = time.monotonic()
    with subprocess.Popen(
        argv, cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        stop = threading.Event()
        watcher = threading.Thread(target=watch, args=(process.pid, stop, memory or Memory()))
        if memory is not None:
            watcher.start()
        try:
            output, _ = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise NoMeasurement(f"{' '.join(argv)}: not done after {TIMEOUT_S} s") from None
        finally:
            stop.set()
            if memory is not None:
                watcher.join()
    seconds = time.monotonic() - started
    if process.returncode != 0:
        last = next((line for line in reversed(output.splitlines()) if line.strip()), "")
        raise NoMeasurement(f"{' '.join(argv)}: exit code {process.returncode}: {last}")
    return seconds, output


def over_ssh(host: Host, command: str, timeout_s: float, **given: Any) -> str:
    """Standard output of a shell command on a host, `given` its `stdin` or `input`. Raises NoMeasurement."""
    try:
        done: subprocess.CompletedProcess[str] = subprocess.run(
            host.ssh(command), **given, stdout=subprocess.PIPE, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        raise NoMeasurement(f"{host.name}: not done after {timeout_s:g} s: {command[:80]}") from None
    if done.returncode != 0:
        raise NoMeasurement(f"{host.name}: exit code {done.returncode}: {command[:80]}")
    return done.stdout


def executed(output: str) -> dict[str, int]:
    """Tasks that really ran on each host (`ok` of the recap: what was skipped does not count).

    Raises NoMeasurement when something changed or failed, or when no host but this machine took part: then it
    was no run without work.
    """
    _, _, recap = output.rpartition("PLAY RECAP")
    rows = list(_RECAP.finditer(recap))
    if not [row for row in rows if row["host"] != "localhost" and int(row["ok"])]:
        raise NoMeasurement(
            "site.yml ran on no host of the inventory; fix: --inventory DIR with hosts "
            "(`.venv/bin/ansible-inventory -i DIR --graph` shows them)"
        )
    failed = [row["host"] for row in rows if int(row["failed"]) or int(row["gone"])]
    if failed:
        raise NoMeasurement(f"site.yml failed on {', '.join(failed)}: mend that, then measure")
    changed = [row["host"] for row in rows if int(row["changed"])]
    if changed:
        raise NoMeasurement(
            f"site.yml changed {', '.join(changed)}: run it until it changes nothing, then measure"
        )
    return {row["host"]: int(row["ok"]) for row in rows}


def stat_playbook(tasks: Mapping[str, int]) -> str:
    """A playbook of `stat` tasks, as many on each host as in `tasks`, the plays one after the other."""
    plays = [
        {
            "name": f"As many stat tasks as on {host}",
            "hosts": host,
            "gather_facts": False,
            "become": host != "localhost",
            "tasks": [{"name": "Look at a file", "ansible.builtin.stat": {"path": "/etc/hostname"}}] * count,
        }
        for host, count in tasks.items()
    ]
    return json.dumps(plays)


def measure(inventory: str, repetitions: int, progress: bool = True) -> tuple[Series, dict[str, int], Memory]:
    """Run everything in turn. Raises NoMeasurement."""
    if not (ROOT / inventory).exists():
        raise NoMeasurement(f"--inventory {inventory}: no such file or directory; give one with hosts")
    playbook = ["ansible-playbook", "-i", inventory]
    memory = Memory()
    series = Series()
    _, output = timed([*playbook, "site.yml"])  # warms connections and caches, and counts the tasks
    tasks = executed(output)
    with tempfile.TemporaryDirectory() as folder:
        stats = Path(folder) / "stats.json"
        stats.write_text(stat_playbook(tasks))
        commands = {
            SITE: [*playbook, "site.yml"],
            STAT: [*playbook, str(stats)],
            PING: ["ansible", "-i", inventory, "all", "-m", "ansible.builtin.ping"],
        }
        for number in range(1, repetitions + 1):
            for what, argv in commands.items():
                seconds, output = timed(argv, memory if what == SITE else None)
                if what == SITE:
                    executed(output)
                series.seconds[what].append(seconds)
                if progress:
                    print(f"[{number}/{repetitions}] {what}: {seconds:.1f} s", file=sys.stderr, flush=True)
    return series, tasks, memory


# --- the page ---


def machine() -> str:
    """Processor, cores, memory and load of this machine."""
    cpu = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    total = int(re.findall(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[0])
    name = cpu[1] if cpu else platform.machine()
    load = os.getloadavg()[0]
    return (
        f"{name}, {os.cpu_count()} cores, {total / 2**20:.0f} GiB of memory, load average {load:.1f} before"
    )


def commit() -> str:
    """The commit that was measured, and whether files differ from it (benchmark pages apart)."""
    head, changed = (
        subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
        ).stdout.strip()
        for words in (
            ["rev-parse", "--short=12", "HEAD"],
            ["status", "--porcelain", "--", ".", ":!docs/benchmarks"],
        )
    )
    return f"{head} with uncommitted changes" if changed else head


def verdict(value: float, bar: float) -> str:
    """Whether a value is within its bar."""
    return "met" if value <= bar else "**not met**"


def page(
    series: Series, tasks: Mapping[str, int], memory: Memory, *, where: str, revision: str, day: str
) -> str:
    """The Markdown page."""
    ratio = series.middle(SITE) / series.middle(STAT)
    pairs = ", ".join(f"{a / b:.2f}" for a, b in zip(series.seconds[SITE], series.seconds[STAT], strict=True))
    rows = [
        f"| {what} | {min(values):.1f} s | {median(values):.1f} s | {max(values):.1f} s | "
        f"{median(values) / series.middle(STAT):.2f} |"
        for what, values in series.seconds.items()
    ]
    repetitions = len(series.seconds[SITE])
    lines = [
        "# A run of site.yml that changes nothing",
        "",
        f"`make bench` writes this page. Commit {revision}, {day}. {where}; the lab runs on it too.",
        f"{repetitions} repetitions, the three in turn, after one run to warm up.",
        "",
        "![Seconds of each run](site-noop.png)",
        "",
        "| run | fastest | median | slowest | ratio to stat |",
        "|---|---:|---:|---:|---:|",
        *rows,
        "",
        f"site.yml to stat in each repetition: {pairs}. Ratios above and below are of the medians.",
        "",
        "| bar | measured | |",
        "|---|---:|---|",
        f"| at most {RATIO_BAR:g} x as many stat tasks | {ratio:.2f} x | {verdict(ratio, RATIO_BAR)} |",
        f"| at most {SECONDS_BAR:g} s for all hosts | {series.middle(SITE):.1f} s "
        f"| {verdict(series.middle(SITE), SECONDS_BAR)} |",
        f"| controller's memory at most {MEMORY_BAR_MB} MB "
        f"| {memory.rss / 1e6:.0f} MB RSS, {memory.pss / 1e6:.0f} MB PSS "
        f"| {verdict(memory.rss / 1e6, MEMORY_BAR_MB)} |",
        "",
        "Tasks that ran: "
        + ", ".join(f"{host} {count}" for host, count in tasks.items())
        + ". Counted is `ok` of the"
        " recap, so a skipped task counts for nothing on either side; gathering facts is one task.",
        "",
        f"Memory is the peak of the sum over ansible-playbook's process tree ({memory.samples} samples, "
        f"one every {SAMPLE_S:g} s). RSS counts pages that processes share once for each of them, PSS once.",
        "",
    ]
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--inventory", default="inventory/lab", metavar="DIR")
    parser.add_argument("--repetitions", type=int, default=REPETITIONS, metavar="N")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/benchmarks", metavar="DIR")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write."""
    args = parse(argv)
    if args.repetitions < 1:
        print(f"bench: --repetitions {args.repetitions}: must be at least 1", file=sys.stderr)
        return 2
    where = machine()
    try:
        series, tasks, memory = measure(args.inventory, args.repetitions)
    except NoMeasurement as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    args.output.mkdir(parents=True, exist_ok=True)
    day = time.strftime("%Y-%m-%d", time.gmtime())
    text = page(series, tasks, memory, where=where, revision=commit(), day=day)
    (args.output / "site-noop.md").write_text(text)
    chart = bar_chart("A no-op site.yml beside as many stat tasks", "s", series.bars())
    (args.output / "site-noop.png").write_bytes(chart)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

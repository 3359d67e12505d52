#!/usr/bin/env python3
"""Measure the gateway beside llama-server itself, on the LLM box of a lab.

    scripts/bench_gateway.py [--inventory DIR] [--only overhead|switch|cold] [--output DIR]

overhead: small requests on 8 connections, straight to llama-server's socket and through the gateway in turn;
one stream each way in turn; the gateway's memory with idle connections open. switch: a request that names the
other preset, to its first token, through the gateway and through llama-server's own router (the same binary,
flags and files, both in memory) in turn. cold: the same with the new model's file evicted first, with and
without prefetch. Writes gateway.md and gateway.png.
Exit codes: 0 written, 2 could not measure (one line says why).
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts._chart import Bar, bar_chart
from scripts._inventory import ROOT, Host, InventoryUnreadable, load
from scripts._llm_box import GROUP, LlmBox
from scripts.bench import NoMeasurement, commit, machine, verdict

PROBE = ROOT / "scripts" / "_gateway_probe.py"
TIMEOUT_S = 1800
CONNECTIONS, RATE, REQUESTS, REPETITIONS, TOKENS, IDLE = 8, 20, 60, 5, 200, 500
PAIRS, COLD_ROUNDS, ROUTER_PORT = 15, 3, 18080
P50_BAR_MS, P99_BAR_MS, STREAM_BAR, RSS_BAR_MB, SWITCH_BAR = 2.0, 10.0, 0.98, 90, 1.10
PREFETCH_READ_BAR, COLD_READ_BAR = 0.05, 0.90


class Box:
    """The LLM box over ssh."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.wanted = LlmBox.of(host.variables)
        self.llmbox = str(host.variables["llmbox_path"])
        self.dwell = float(host.variables["llm_gateway_min_dwell"]) + 0.5

    def run(self, command: str, stdin: str = "") -> str:
        """Standard output of a shell command of the sudo user. Raises NoMeasurement."""
        try:
            done = subprocess.run(
                self.host.ssh(command),
                input=stdin,
                stdout=subprocess.PIPE,
                text=True,
                timeout=TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise NoMeasurement(f"{self.host.name}: not done after {TIMEOUT_S} s: {command[:80]}") from None
        if done.returncode != 0:
            raise NoMeasurement(f"{self.host.name}: exit code {done.returncode}: {command[:80]}")
        return done.stdout

    def as_user(self, command: str) -> str:
        """The same command as the LLM user, with a way to its service manager."""
        user = self.wanted.user
        return f"sudo -u {user} env XDG_RUNTIME_DIR=/run/user/$(id -u {user}) {command}"

    def probe(self, **asked: object) -> dict[str, Any]:
        """What the probe found."""
        command = self.as_user(f"{self.llmbox}/bin/python - {shlex.quote(json.dumps(asked))}")
        found: dict[str, Any] = json.loads(self.run(command, PROBE.read_text()))
        return found

    def lmswitch(self, word: str) -> None:
        """lmswitch on the box."""
        self.run(self.as_user(f"lmswitch {word}"))

    @property
    def gateway(self) -> str:
        """Where a program on the box reaches the gateway."""
        return f"127.0.0.1:{self.wanted.front.port}"

    def presets(self) -> dict[str, Any]:
        """presets.json of the box."""
        found: dict[str, Any] = json.loads(self.run(f"cat {self.wanted.presets_json}"))["presets"]
        return found

    def set_prefetch(self, value: bool) -> None:
        """Change the gateway's setting on the box, as the role would; the gateway restarts."""
        path = f"{self.host.variables['llama_presets_dir']}/gateway.json"
        settings = json.loads(self.run(f"cat {path}"))
        settings["prefetch"] = value
        self.run(f"sudo tee {path} >/dev/null", json.dumps(settings, indent=4) + "\n")
        self.run(self.as_user("systemctl --user restart llm-gateway.service"))


def overhead(box: Box) -> dict[str, Any]:
    """Latency, streams, memory."""
    box.lmswitch(box.wanted.names("user")[0])
    pid = box.run(box.as_user("systemctl --user show --value --property=MainPID llm-gateway.service")).strip()
    return box.probe(
        what="overhead",
        direct=box.wanted.config.llama_presets_listen,
        gateway=box.gateway,
        gateway_pid=int(pid),
        connections=CONNECTIONS,
        rate=RATE,
        requests=REQUESTS,
        repetitions=REPETITIONS,
        tokens=TOKENS,
        idle=IDLE,
    )


def two_presets(box: Box) -> dict[str, Any]:
    """Two presets of one build with different models: a router has only one binary. Raises NoMeasurement."""
    presets = {name: preset for name, preset in box.presets().items() if preset["scope"] == "user"}
    for one, first in presets.items():
        for other, second in presets.items():
            if first["build"] == second["build"] and first["model"] != second["model"]:
                return {one: first, other: second}
    raise NoMeasurement("the inventory has no two presets of one build with different models")


def switch(box: Box) -> dict[str, Any]:
    """Pairs of switches."""
    commands = {name: preset["command"] for name, preset in two_presets(box).items()}
    return box.probe(
        what="switch",
        presets=commands,
        gateway=box.gateway,
        router_port=ROUTER_PORT,
        pairs=PAIRS,
        dwell=box.dwell,
    )


def cold(box: Box) -> dict[str, Any]:
    """Rounds with and without prefetch."""
    other, preset = sorted(
        two_presets(box).items(), key=lambda item: box.wanted.config.files(item[1]["model"])[0].size
    )
    found = {}
    try:
        for name, value in (("with", True), ("without", False)):
            box.set_prefetch(value)
            found[name] = box.probe(
                what="cold",
                gateway=box.gateway,
                file=preset[1]["model_path"],
                preset=preset[0],
                unit=preset[1]["unit"],
                other=other[0],
                repetitions=COLD_ROUNDS,
                dwell=box.dwell,
            )["rounds"]
    finally:
        box.set_prefetch(True)
    return found


# --- the page ---


def quantile(values: Sequence[float], part: float) -> float:
    """The value below which `part` of the sorted values lie."""
    return values[min(len(values) - 1, int(part * len(values)))]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """min / median / max."""
    return " / ".join(f"{value:.{digits}f}" for value in (min(values), median(values), max(values)))


def overhead_lines(found: dict[str, Any]) -> tuple[list[str], list[Bar]]:
    """The rows about overhead."""
    rows, bars = [], []
    for name, part, bar in (("p50", 0.50, P50_BAR_MS), ("p99", 0.99, P99_BAR_MS)):
        each = [
            (quantile(pair["gateway"], part) - quantile(pair["direct"], part)) * 1000
            for pair in found["latency"]
        ]
        rows.append(
            f"| added latency {name}, {CONNECTIONS} connections, ms | {spread(each)} | <= {bar:g} "
            f"| {verdict(median(each), bar)} |"
        )
    for way in ("direct", "gateway"):
        each = [quantile(pair[way], 0.5) * 1000 for pair in found["latency"]]
        rows.append(f"| latency p50, {way}, ms | {spread(each)} | | |")
        bars.append(Bar.of(f"/tokenize p50, {way}", each))
    ratios = [pair["gateway"] / pair["direct"] for pair in found["stream"]]
    rows.append(
        f"| streamed tok/s, gateway to direct | {spread(ratios, 3)} | >= {STREAM_BAR:g} "
        f"| {verdict(-median(ratios), -STREAM_BAR)} |"
    )
    speeds = [pair["direct"] for pair in found["stream"]]
    rows.append(f"| streamed tok/s, direct | {spread(speeds, 1)} | | |")
    memory = found["rss_with_idle"] / 1e6
    rows.append(
        f"| gateway's RSS with {IDLE} idle connections, MB | {memory:.0f} | <= {RSS_BAR_MB} "
        f"| {verdict(memory, RSS_BAR_MB)} |"
    )
    held = found["idle_open"] if found["idle_answers"] else 0
    rows.append(
        f"| idle connections still open, one of them used | {held} | {IDLE} | {verdict(IDLE - held, 0)} |"
    )
    return rows, bars


def switch_lines(found: dict[str, Any]) -> tuple[list[str], list[Bar]]:
    """The rows about switching."""
    gateway = [pair["gateway"] for pair in found["pairs"]]
    router = [pair["router"] for pair in found["pairs"]]
    ratio = median(gateway) / median(router)
    pairs = [pair["gateway"] / pair["router"] for pair in found["pairs"]]
    return [
        f"| switch to first token, gateway, s | {spread(gateway)} | | |",
        f"| switch to first token, router mode, s | {spread(router)} | | |",
        f"| ratio of the medians of {len(pairs)} pairs | {ratio:.2f} | <= {SWITCH_BAR:g} "
        f"| {verdict(ratio, SWITCH_BAR)} |",
        f"| ratio in each pair | {spread(pairs)} | | |",
    ], [
        Bar.of("switch, gateway", [seconds * 1000 for seconds in gateway]),
        Bar.of("switch, router mode", [seconds * 1000 for seconds in router]),
    ]


def cold_lines(found: dict[str, Any]) -> tuple[list[str], list[Bar]]:
    """The rows about a cold file."""
    rows, bars = [], []
    for name, bar, sign in (("with", PREFETCH_READ_BAR, 1), ("without", COLD_READ_BAR, -1)):
        shares = [one["read_share"] for one in found[name]]
        seconds = [one["seconds"] for one in found[name]]
        word = "<=" if sign > 0 else ">="
        rows += [
            f"| cold file {name} prefetch: part that the server reads | {spread(shares, 3)} | {word} {bar:g} "
            f"| {verdict(sign * median(shares), sign * bar)} |",
            f"| cold file {name} prefetch: to first token, s | {spread(seconds)} | | |",
        ]
        bars.append(Bar.of(f"cold file {name} prefetch", [second * 1000 for second in seconds]))
    return rows, bars


PARTS = {
    "overhead": (overhead, overhead_lines),
    "switch": (switch, switch_lines),
    "cold": (cold, cold_lines),
}


def page(rows: Sequence[str], *, where: str, revision: str, day: str) -> str:
    """The Markdown page."""
    lines = [
        "# The gateway beside llama-server",
        "",
        f"`make bench` writes this page. Commit {revision}, {day}. {where}; clients run on it too.",
        "Figures are min / median / max; what is compared was measured in turn.",
        "",
        "![Milliseconds](gateway.png)",
        "",
        "| what | measured | bar | |",
        "|---|---:|---:|---|",
        *rows,
        "",
        f"Latency: `POST /tokenize` on {CONNECTIONS} connections, {RATE} requests a second on each with "
        f"jitter, {REPETITIONS} repetitions of {CONNECTIONS * REQUESTS}; added is the difference of the "
        "quantiles in one repetition. Streams: one at a time, alternating which way comes first. Switches: "
        "a streamed chat of one "
        "token that names the other preset, both files in memory; the router runs the same binary with the "
        "presets' own flags from an INI file and `--models-max 1`. Cold file: evicted with posix_fadvise, "
        "checked with mincore; what the new server read is `read_bytes` of /proc/PID/io.",
        "",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--inventory", default="inventory/lab", metavar="DIR")
    parser.add_argument("--only", choices=sorted(PARTS))
    parser.add_argument("--output", type=Path, default=ROOT / "docs/benchmarks", metavar="DIR")
    args = parser.parse_args(argv)
    where = machine()
    rows: list[str] = []
    bars: list[Bar] = []
    try:
        hosts = [host for host in load(ROOT / args.inventory) if GROUP in host.groups]
        if not hosts:
            raise NoMeasurement(f"{args.inventory} has no host in the group {GROUP}")
        box = Box(hosts[0])
        for name, (measure, lines) in PARTS.items():
            if args.only in (None, name):
                print(f"-- {name}", file=sys.stderr, flush=True)
                more_rows, more_bars = lines(measure(box))
                rows += more_rows
                bars += more_bars
    except (NoMeasurement, InventoryUnreadable) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    text = page(rows, where=where, revision=commit(), day=time.strftime("%Y-%m-%d", time.gmtime()))
    print(text)
    if args.only is None:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "gateway.md").write_text(text)
        (args.output / "gateway.png").write_bytes(bar_chart("The gateway beside llama-server", "ms", bars))
    return 0


if __name__ == "__main__":
    sys.exit(main())

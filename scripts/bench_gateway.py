#!/usr/bin/env python3
"""Measure the gateway beside llama-server itself, on the LLM box of a lab.

    scripts/bench_gateway.py [--inventory DIR] [--only overhead|switch|cold] [--output DIR]

overhead: small requests on 8 connections, straight to llama-server's socket and through the gateway in turn;
one stream each way in turn; the gateway's memory with idle connections open. switch: a request that names the
other preset, to its first token, through the gateway and through llama-server's own router (the same binary,
flags and files, both in memory) in turn. cold: the same with the new model's file evicted first, with and
without prefetch, and again with the box's disk slowed down, where this machine can do that to a host of its
lab. Writes gateway.md and its charts.
Exit codes: 0 written, 2 could not measure (one line says why).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lab.config import from_environment
from lab.shell import LabError
from lab.throttle import CannotThrottle, slow_reads
from scripts._chart import Bar, bar_chart
from scripts._inventory import ROOT, Host, InventoryUnreadable, load
from scripts._llm_box import GROUP, LlmBox
from scripts._statistics import ratio_of_medians
from scripts.bench import NoMeasurement, commit, machine, over_ssh, verdict

PROBE = ROOT / "scripts" / "_gateway_probe.py"
TIMEOUT_S = 1800
CONNECTIONS, RATE, REQUESTS, REPETITIONS, TOKENS, IDLE = 8, 20, 60, 5, 200, 500
PAIRS, COLD_ROUNDS, ROUTER_PORT = 15, 3, 18080
STREAMS = 30  # pairs: a stream's speed varies by 5 %, and 2 % are to be told
P50_BAR_MS, P99_BAR_MS, STREAM_BAR, RSS_BAR_MB, SWITCH_BAR = 2.0, 10.0, 0.98, 90, 1.10
RESIDENT_BAR, PREFETCH_READ_BAR, COLD_READ_BAR, OUTAGE_BAR = 0.01, 0.05, 0.90, 0.5
SLOW_BYTES_PER_S, SLOW_TOLERANCE = 50_000_000, 1.2


class Box:
    """The LLM box over ssh."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.wanted = LlmBox.of(host.variables)
        self.llmbox = str(host.variables["llmbox_path"])
        self.dwell = float(host.variables["llm_gateway_min_dwell"]) + 0.5
        self.settings = f"{host.variables['llama_presets_dir']}/gateway.json"

    def run(self, command: str, stdin: str | int = "") -> str:
        """Standard output of a shell command of the sudo user; `stdin` is text, or a descriptor.

        Raises NoMeasurement.
        """
        given: dict[str, Any] = {"stdin": stdin} if isinstance(stdin, int) else {"input": stdin}
        return over_ssh(self.host, command, TIMEOUT_S, **given)

    def as_user(self, command: str) -> str:
        """The same command as the LLM user, with a way to its service manager."""
        user = self.wanted.user
        return f"sudo -u {user} env XDG_RUNTIME_DIR=/run/user/$(id -u {user}) {command}"

    def probe(self, **asked: object) -> dict[str, Any]:
        """What the probe found. It ends when its standard input does: with this program, in any case."""
        words = [f"{self.llmbox}/bin/python", "-c", PROBE.read_text(), json.dumps(asked)]
        ours, leash = os.pipe()
        try:
            found: dict[str, Any] = json.loads(self.run(self.as_user(shlex.join(words)), ours))
        finally:
            os.close(leash)
            os.close(ours)
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

    @contextmanager
    def own_settings(self) -> Iterator[None]:
        """The gateway's settings may be changed in the body; afterwards they are what they were."""
        before = self.run(f"cat {self.settings}")
        try:
            yield
        finally:
            self.set(before)

    def set(self, settings: str) -> None:
        """Give the gateway this file of settings and restart it."""
        self.run(f"sudo tee {self.settings} >/dev/null", settings)
        self.run(self.as_user("systemctl --user restart llm-gateway.service"))

    def set_prefetch(self, value: bool) -> None:
        """Change one setting."""
        settings = json.loads(self.run(f"cat {self.settings}"))
        self.set(json.dumps({**settings, "prefetch": value}, indent=4) + "\n")

    @contextmanager
    def slow_disk(self, asked: dict[str, Any]) -> Iterator[float]:
        """The box reads from its disk at SLOW_BYTES_PER_S in the body, which gets the rate that was measured.

        `asked` names the file to read. Raises CannotThrottle.
        """
        lab = from_environment()
        host = next((one for one in lab.hosts if one.address == self.host.address), None)
        if host is None:
            raise CannotThrottle(f"{self.host.name} is no host of this machine's lab {lab.name}")
        with slow_reads(lab, host, SLOW_BYTES_PER_S):
            rate: float = self.probe(**{**asked, "what": "read_rate"})["rate"]
            if rate > SLOW_TOLERANCE * SLOW_BYTES_PER_S:
                raise CannotThrottle(f"the limit has no effect here: {rate / 1e6:.0f} MB/s were read")
            yield rate


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
        streams=STREAMS,
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
    """Rounds with and without prefetch, at the disk's own speed and slowed down."""
    other, (name, preset) = sorted(
        two_presets(box).items(), key=lambda item: box.wanted.config.files(item[1]["model"])[0].size
    )
    asked = {
        "what": "cold",
        "gateway": box.gateway,
        "file": preset["model_path"],
        "preset": name,
        "unit": preset["unit"],
        "other": other[0],
        "repetitions": COLD_ROUNDS,
        "dwell": box.dwell,
    }
    found: dict[str, Any] = {"own": {}, "slow": {}, "rates": [], "skipped": ""}
    with box.own_settings():
        for way, value in (("with", True), ("without", False)):
            box.set_prefetch(value)
            found["own"][way] = box.probe(**asked)["rounds"]
            try:
                with box.slow_disk(asked) as rate:
                    found["rates"].append(rate)
                    found["slow"][way] = box.probe(**asked)["rounds"]
            except CannotThrottle as error:
                found["skipped"] = str(error)
    return found


# --- the page ---


def quantile(values: Sequence[float], part: float) -> float:
    """The value below which `part` of the sorted values lie."""
    return values[min(len(values) - 1, int(part * len(values)))]


def row(what: str, values: Sequence[float], digits: int = 2, bar: str = "", met: str = "") -> str:
    """One line of the table: min, median, max."""
    figures = [f"{value:.{digits}f}" for value in (min(values), median(values), max(values))]
    return f"| {' | '.join([what, *figures, bar, met])} |"


def compared(what: str, pairs: Sequence[tuple[float, float]], bar: float) -> str:
    """The row about the first values' median over the second's, between the ends of its 95 % interval."""
    whole = ratio_of_medians([(second, first) for first, second in pairs])
    figures = (whole.low, whole.value, whole.high)
    return row(f"{what}, medians, and 95 % interval", figures, 2, f"<= {bar:g}", verdict(whole.value, bar))


def overhead_lines(found: dict[str, Any]) -> tuple[list[str], list[Bar]]:
    """The rows about overhead."""
    rows, bars = [], []
    for name, part, bar in (("p50", 0.50, P50_BAR_MS), ("p99", 0.99, P99_BAR_MS)):
        each = [
            (quantile(pair["gateway"], part) - quantile(pair["direct"], part)) * 1000
            for pair in found["latency"]
        ]
        what = f"added latency {name}, {CONNECTIONS} connections, ms"
        rows.append(row(what, each, 2, f"<= {bar:g}", verdict(median(each), bar)))
    for way in ("direct", "gateway"):
        each = [quantile(pair[way], 0.5) * 1000 for pair in found["latency"]]
        rows.append(row(f"latency p50, {way}, ms", each))
        bars.append(Bar.of(f"/tokenize p50, {way}", each))
    whole = ratio_of_medians([(pair["direct"], pair["gateway"]) for pair in found["stream"]])
    what = f"streamed tok/s, gateway to direct, {len(found['stream'])} pairs, medians, and 95 % interval"
    met = verdict(-whole.value, -STREAM_BAR)
    rows.append(row(what, (whole.low, whole.value, whole.high), 3, f">= {STREAM_BAR:g}", met))
    for way in ("direct", "gateway"):
        rows.append(row(f"streamed tok/s, {way}", [pair[way] for pair in found["stream"]], 1))
    memory = [one["rss"] / 1e6 for one in found["idle"]]
    what = f"gateway's RSS with {IDLE} idle connections, MB"
    rows.append(row(what, memory, 0, f"<= {RSS_BAR_MB}", verdict(max(memory), RSS_BAR_MB)))
    held = [one["open"] for one in found["idle"]]
    what = "idle connections still open, one of them used"
    rows.append(row(what, held, 0, str(IDLE), verdict(IDLE - min(held), 0)))
    return rows, bars


def switch_lines(found: dict[str, Any]) -> tuple[list[str], list[Bar]]:
    """The rows about switching, for each target by itself: presets differ in what their start takes."""
    rows, bars = [], []
    for target in dict.fromkeys(pair["to"] for pair in found["pairs"]):
        what = f"switch to {target}"
        pairs = [(pair["gateway"], pair["router"]) for pair in found["pairs"] if pair["to"] == target]
        for way, seconds in zip(("gateway", "router mode"), zip(*pairs, strict=True), strict=True):
            rows.append(row(f"{what}, first token, {way}, s", seconds))
            bars.append(Bar.of(f"{what}, {way}", seconds))
        rows += [
            compared(f"{what}: gateway to router mode, {len(pairs)} pairs", pairs, SWITCH_BAR),
            row(f"{what}: ratio in each pair", [gateway / router for gateway, router in pairs]),
        ]
    return rows, bars


def cold_lines(found: dict[str, Any]) -> tuple[list[str], list[Bar]]:
    """The rows about a cold file."""
    rounds = [one for speed in ("own", "slow") for each in found[speed].values() for one in each]
    left = [one["resident_before"] for one in rounds]
    what = "cold file: part in memory before"
    rows, bars = [row(what, left, 3, f"<= {RESIDENT_BAR:g}", verdict(max(left), RESIDENT_BAR))], []
    for way, bar, sign in (("with", PREFETCH_READ_BAR, 1), ("without", COLD_READ_BAR, -1)):
        rounds = found["own"][way]
        shares = [one["read_share"] for one in rounds]
        outages = [one["outage"] for one in rounds]
        limit, met = f"{'<=' if sign > 0 else '>='} {bar:g}", verdict(sign * median(shares), sign * bar)
        what = f"cold file {way} prefetch"
        rows += [
            row(f"{what}: part that the server reads", shares, 3, limit, met),
            row(f"{what}: to first token, s", [one["seconds"] for one in rounds]),
            row(f"{what}: outage, s", outages),
        ]
        bars.append(Bar.of(f"outage, cold file {way} prefetch", outages))
    slow = f"disk at {SLOW_BYTES_PER_S / 1e6:g} MB/s"
    outage_ratio = f"{slow}: outage, with prefetch to without"
    if found["skipped"]:
        return [*rows, f"| {outage_ratio} | | | | <= {OUTAGE_BAR:g} | SKIPPED: {found['skipped']} |"], bars
    rows.append(row(f"{slow}: reads, MB/s", [rate / 1e6 for rate in found["rates"]], 1))
    outages_of = {way: [one["outage"] for one in rounds] for way, rounds in found["slow"].items()}
    for way, outages in outages_of.items():
        rows.append(row(f"{slow}, {way} prefetch: outage, s", outages))
        bars.append(Bar.of(f"outage, {slow}, {way} prefetch", outages))
    pairs = list(zip(outages_of["with"], outages_of["without"], strict=True))
    return [*rows, compared(outage_ratio, pairs, OUTAGE_BAR)], bars


# File: title, unit, and the parts whose bars are in it.
CHARTS = {
    "gateway.png": ("Switching: the gateway beside llama-server's router mode", "s", ("switch", "cold")),
    "gateway-latency.png": (f"Small requests on {CONNECTIONS} connections", "ms", ("overhead",)),
}
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
        "What is compared was measured in turn.",
        "",
        *(f"![{title}]({name})" for name, (title, _, _) in CHARTS.items()),
        "",
        "| what | min | median | max | bar | |",
        "|---|---:|---:|---:|---:|---|",
        *rows,
        "",
        f"Latency: `POST /tokenize` on {CONNECTIONS} connections, {RATE} requests a second on each with "
        f"jitter, {REPETITIONS} repetitions of {CONNECTIONS * REQUESTS}; added is the difference of the "
        "quantiles in one repetition. Streams: one at a time, alternating which way comes first. Switches: "
        "a streamed chat of one token that names the other preset, both files in memory, each way first in "
        "turn; the router runs the same binary with the presets' own flags from an INI file and "
        "`--models-max 1`. Cold file: evicted with posix_fadvise, "
        "checked with mincore; what the new server read is `read_bytes` of /proc/PID/io. Outage: the longest "
        "wait of a client that sends whatever preset serves one `/tokenize` after the other; with prefetch "
        "the old server goes on serving while the file is read. The slow disk: reads of the whole box are "
        "limited by its control group.",
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
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was changed for a while is put back
    where, revision = machine(), commit()
    rows: list[str] = []
    bars: dict[str, list[Bar]] = {}
    try:
        hosts = [host for host in load(ROOT / args.inventory) if GROUP in host.groups]
        if not hosts:
            raise NoMeasurement(f"{args.inventory} has no host in the group {GROUP}")
        box = Box(hosts[0])
        for name, (measure, lines) in PARTS.items():
            if args.only in (None, name):
                print(f"-- {name}", file=sys.stderr, flush=True)
                more_rows, bars[name] = lines(measure(box))
                rows += more_rows
    except (NoMeasurement, InventoryUnreadable, LabError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    text = page(rows, where=where, revision=revision, day=time.strftime("%Y-%m-%d", time.gmtime()))
    print(text)
    if args.only is None:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "gateway.md").write_text(text)
        for file, (title, unit, parts) in CHARTS.items():
            shown = [bar for part in parts for bar in bars[part]]
            (args.output / file).write_bytes(bar_chart(title, unit, shown))
    return 0


if __name__ == "__main__":
    sys.exit(main())

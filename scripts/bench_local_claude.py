#!/usr/bin/env python3
"""Measure what local-claude's settings save, and what its start costs, on a client of an inventory.

    scripts/bench_local_claude.py [--claude PROGRAM] [--inventory DIR] [--only rote|real|start] [--output DIR]

The real Claude Code on the first client, the gateway and the first preset for agents on the first LLM box. A
turn, the next one, a new session in the same directory and one in another directory, with bare settings and
with local-claude, in turn: with a model that is written by hand and takes no time (rote), and with the
preset's own, which gets a template that shows it tools for as long as it takes (real). Then local-claude
beside a stub in claude's place (start). Writes local-claude.md, its figures and charts.
Exit codes: 0 written, 2 could not measure (one line says why).
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lab.config import from_environment
from scripts import _rote_model
from scripts._chart import Bar, bar_chart
from scripts._inventory import ROOT, Host, InventoryUnreadable, load
from scripts._llm_box import GROUP
from scripts._tool_template import AGENT, CHOOSES, ONLY_TOOLS, template_flags
from scripts.bench import NoMeasurement, commit, machine, over_ssh, verdict
from scripts.bench_gateway import Box, row
from scripts.verify_agent import client

PROBE = ROOT / "scripts" / "_client_probe.py"
CLIENTS = "clients"
REPETITIONS, ROTE_REPETITIONS, PAIRS = 3, 5, 20
TURN_TIMEOUT_S = 900
COPY_TIMEOUT_S = 300
OUTPUT_TOKENS = 200  # of an answer with bare settings: a base model may go on
START_BAR_MS = 150
BARE, OURS = "bare settings", "local-claude"
# What is typed, in which directory, and how much of its prompt must have been read before.
STEPS: Mapping[str, tuple[str, str, tuple[str, ...], float]] = {
    "first turn": ("Say hello.", "a", (), 0.0),
    "second turn": ("And again.", "a", ("--continue",), 0.99),
    "new session": ("Say hello.", "a", (), 0.90),
    "another directory": ("Say hello.", "b", (), 0.80),
}
Turn = dict[str, float]
Turns = dict[str, dict[str, list[Turn]]]


class Client:
    """The client machine over ssh, with Claude Code in a folder of its own."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.folder = f"{self.run('echo ~').strip()}/bench-local-claude"

    def run(
        self, command: str, timeout_s: float = TURN_TIMEOUT_S + 60, stdin: Any = subprocess.DEVNULL
    ) -> str:
        """Standard output of a shell command. Raises NoMeasurement."""
        return over_ssh(self.host, command, timeout_s, stdin=stdin)

    def give(self, claude: Path) -> None:
        """Copy Claude Code there, and a stub that only ends."""
        place = f"{self.folder}/bin"
        with claude.resolve().open("rb") as file:
            self.run(
                f"mkdir -p {place} {self.folder}/stub && cat > {place}/claude && chmod +x {place}/claude",
                COPY_TIMEOUT_S,
                file,
            )
        self.run(f"printf '#!/bin/sh\\n' > {self.folder}/stub/claude && chmod +x {self.folder}/stub/claude")

    def probe(self, **asked: Any) -> dict[str, Any]:
        """What the probe found. Raises NoMeasurement when what it ran did not end well."""
        words = ["timeout", str(TURN_TIMEOUT_S), "python3", "-c", PROBE.read_text(), json.dumps(asked)]
        found: dict[str, Any] = json.loads(self.run(shlex.join(words)))
        if not found["ok"]:
            raise NoMeasurement(f"{self.host.name}: {' '.join(str(found['said']).split())[-300:]}")
        return found

    def forget(self) -> None:
        """Leave nothing."""
        self.run(f"rm -rf {self.folder}")


class Bench:
    """Both machines, and the preset for agents."""

    def __init__(self, box: Box, client: Client) -> None:
        self.box, self.client = box, client
        self.preset = next(name for name, data in box.wanted.config.llama_presets.items() if data.agent)
        self.url = box.wanted.url(box.host.address)
        self.local_claude = f"{client.run('echo ~').strip()}/.local/bin/local-claude"

    @contextmanager
    def served(self, *flags: str) -> Iterator[None]:
        """The preset with more flags, as a drop-in; afterwards nothing serves."""
        folder = f"{self.box.wanted.home}/.config/systemd/user/llama-{self.preset}.service.d"
        command = shlex.join([*self.box.presets()[self.preset]["command"], *flags])
        reload = self.box.as_user("systemctl --user daemon-reload")
        self.box.run(
            f"{self.box.as_user(f'mkdir -p {folder}')} && "
            f"{self.box.as_user(f'tee {folder}/bench.conf')} >/dev/null && {reload}",
            f"[Service]\nExecStart=\nExecStart={command}\n",
        )
        try:
            self.box.lmswitch(f"--restart {self.preset}")
            yield
        finally:
            self.box.run(f"sudo rm {folder}/bench.conf; sudo rmdir {folder} 2>/dev/null; {reload}")
            self.box.lmswitch("off")

    @contextmanager
    def by_rote(self) -> Iterator[tuple[str, ...]]:
        """Flags for the model that is written by hand, which lies on the box for as long as it takes."""
        place = f"{self.box.wanted.home}/rote.gguf"
        vocabulary = next((from_environment().cache / "sources/models").glob(_rote_model.VOCABULARY))
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rote.gguf"
            _rote_model.write(file, vocabulary, "Bash", {"command": "true", "description": "Nothing"})
            with file.open("rb") as content:
                self.box.run(self.box.as_user(f"tee {place}") + " >/dev/null", content.fileno())
        try:
            yield ("--model", place)
        finally:
            self.box.run(f"sudo rm {place}")

    def words(self, way: str) -> tuple[list[str], dict[str, str]]:
        """The command without claude's arguments, and its environment."""
        limits = {"API_TIMEOUT_MS": str(TURN_TIMEOUT_S * 1000)}
        if way == OURS:
            command = [self.local_claude, "--host", self.url, "--model", self.preset, "--skip-checks"]
            return command, limits
        kinds = [f"ANTHROPIC_DEFAULT_{kind}_MODEL" for kind in ("OPUS", "SONNET", "HAIKU")]
        return ["claude"], {
            **limits,
            **dict.fromkeys(["ANTHROPIC_MODEL", *kinds], self.preset),
            "ANTHROPIC_BASE_URL": self.url,
            "ANTHROPIC_AUTH_TOKEN": "none",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(OUTPUT_TOKENS),
        }

    def turn(self, way: str, step: str, number: int) -> Turn:
        """One turn, and what the gateway wrote about its first whole request. Raises NoMeasurement."""
        prompt, directory, options, _ = STEPS[step]
        command, limits = self.words(way)
        before = len(self.audited())
        name = "ours" if way == OURS else "bare"
        place = f"{self.client.folder}/{name}"
        found = self.client.probe(
            what="turn",
            argv=[
                *command,
                *("-p", prompt, "--output-format", "stream-json", "--verbose", "--include-partial-messages"),
                *options,
            ],
            cwd=f"{place}/{number}{directory}",
            env={
                **limits,
                "HOME": place,
                "PATH": f"{self.client.folder}/bin:/usr/local/bin:/usr/bin:/bin",
            },
        )
        asked = sorted(self.audited()[before:], key=lambda entry: str(entry["time"]))
        if not asked or any(entry["status"] != 200 for entry in asked):
            raise NoMeasurement(f"{way}, {step}: the gateway's log has {asked}")
        # Not one that follows in the turn, which finds this one in the cache; nor a small one beside it.
        most = max(entry["prompt_tokens"] for entry in asked)
        first = next(entry for entry in asked if 2 * entry["prompt_tokens"] > most)
        return {
            "prompt": first["prompt_tokens"],
            "reused": (first["cached_tokens"] or 0) / first["prompt_tokens"],
            "first_s": found["first_s"],
            "requests": len(asked),
        }

    def audited(self) -> list[dict[str, Any]]:
        """The gateway's lines about messages, oldest first."""
        lines = self.box.run(f"sudo cat {self.box.wanted.home}/.local/state/llmbox/audit.jsonl").splitlines()
        return [entry for entry in map(json.loads, lines) if entry["path"] == "/v1/messages"]

    def turns(self, repetitions: int, *flags: str, ways: Sequence[str] = (BARE, OURS)) -> Turns:
        """Every step both ways, from a cold server each, alternating which way comes first."""
        found: Turns = {way: {step: [] for step in STEPS} for way in ways}
        for number in range(1, repetitions + 1):
            for way in ways if number % 2 else reversed(ways):
                with self.served(*flags):
                    for step in STEPS:
                        one = self.turn(way, step, number)
                        found[way][step].append(one)
                        print(
                            f"[{number}/{repetitions}] {way}, {step}: {one['prompt']} tokens, "
                            f"{one['reused']:.1%} reused, {one['first_s']:.1f} s to the first event",
                            file=sys.stderr,
                            flush=True,
                        )
        return found

    def rote(self) -> Turns:
        """The turns with a model that takes next to no time: what is measured is the prompt."""
        with self.by_rote() as flags:
            return self.turns(ROTE_REPETITIONS, *flags)

    def real(self) -> Turns:
        """The turns with the preset's own model, and a template that shows it the tools."""
        return self.turns(REPETITIONS, *template_flags(AGENT))

    def start(self) -> dict[str, list[float]]:
        """local-claude beside a stub in claude's place, its checks done and kept as on any day."""
        place = self.client.folder
        asked = {
            "what": "start",
            "cwd": place,
            "ours": [self.local_claude, "--host", self.url, "--model", self.preset, "-p", "x"],
            "stub": [f"{place}/stub/claude", "-p", "x"],
            "env": {"HOME": place, "PATH": f"{place}/stub:/usr/bin:/bin"},
        }
        with self.served(*template_flags(CHOOSES, *ONLY_TOOLS)):
            self.client.probe(**asked, pairs=1)  # does the checks, and asks claude for its options
            return self.client.probe(**asked, pairs=PAIRS)


# --- the page ---


def turn_lines(found: Turns) -> list[str]:
    """The rows about turns."""
    rows = []
    for step, (_, _, _, bar) in STEPS.items():
        for way, steps in found.items():
            each = steps[step]
            rows.append(row(f"{step}, {way}: tokens of the prompt", [one["prompt"] for one in each], 0))
            reused = [100 * one["reused"] for one in each]
            judged = bar and way == OURS
            limit, met = (f">= {100 * bar:g}", verdict(-min(reused), -100 * bar)) if judged else ("", "")
            rows.append(row(f"{step}, {way}: found in the cache, %", reused, 1, limit, met))
            seconds = [one["first_s"] for one in each]
            rows.append(row(f"{step}, {way}: to the first event of the answer, s", seconds, 1))
    return rows


def read_again(found: Turns) -> str:
    """What the share in the cache costs: a few percent may be most of the time."""
    each = sorted(found[OURS]["new session"], key=lambda one: one["first_s"])
    tokens = ", ".join(f"{one['prompt'] * (1 - one['reused']):.0f}" for one in each)
    seconds = ", ".join(f"{one['first_s']:.1f}" for one in each)
    return (
        f"Of a new session's prompt local-claude's repetitions read {tokens} tokens again, and their first "
        f"events came after {seconds} s. Why the cache ended where it did was not measured."
    )


def start_lines(found: Mapping[str, Sequence[float]]) -> list[str]:
    """The rows about the start."""
    added = [(ours - stub) * 1000 for ours, stub in zip(found["ours"], found["stub"], strict=True)]
    limit, met = f"<= {START_BAR_MS}", verdict(median(added), START_BAR_MS)
    return [
        row("local-claude's start, before claude is executed, ms", added, 0, limit, met),
        row("of it on the processor, ms", [1000 * seconds for seconds in found["cpu"]], 0),
    ]


def bars(found: Turns) -> list[Bar]:
    """The chart's bars."""
    return [
        Bar.of(f"{step}, {way}", [one["first_s"] for one in steps[step]])
        for step in STEPS
        for way, steps in found.items()
    ]


ROTE, REAL, START = "rote", "real", "start"
# A part's heading, what measures it, its rows, and a picture where there is one.
PARTS: Mapping[str, tuple[str, Callable[[Bench], Any], Callable[[Any], list[str]], str]] = {
    ROTE: (
        "With a model that is written by hand (`scripts/_rote_model.py`): one layer, full attention, so that "
        "what is measured is the prompt and not the machine",
        Bench.rote,
        turn_lines,
        "local-claude.png",
    ),
    REAL: (
        f"With Gemma 3 270M behind {AGENT}'s template. It keeps a window of its past only, so the cache "
        "holds a prompt up to the last point at which llama-server put a copy aside",
        Bench.real,
        turn_lines,
        "local-claude-gemma.png",
    ),
    START: (
        f"The start: {PAIRS} pairs with a stub in claude's place, checks done before and kept; the bar holds "
        "for the median",
        Bench.start,
        start_lines,
        "",
    ),
}


def page(measured: Mapping[str, Mapping[str, Any]]) -> str:
    """The Markdown page, of the parts that were measured."""
    lines = [
        "# What local-claude's settings save, and what its start costs",
        "",
        "`make bench` writes this page. The real Claude Code in the lab's client host, through the gateway, "
        "on one machine. A second turn continues the session of the first; a new session asks the same in "
        "the same directory, then in another one. Each way begins with a server that was started anew; which "
        "comes first alternates. Bare settings: address, one model for every name, no other traffic. Tokens "
        "are those of a turn's first whole request, as llama-server counts them. Times begin when the "
        "command is typed, so Claude Code's own start is in them. Bars of the cache hold each time.",
    ]
    for name, (heading, _, rows, picture) in PARTS.items():
        if name in measured:
            part = measured[name]
            lines += [
                "",
                f"{heading}. Commit {part['commit']}, {part['day']}; {part['where']}.",
                *(["", f"![To the first event of the answer]({picture})"] if picture else []),
                "",
                "| what | min | median | max | bar | |",
                "|---|---:|---:|---:|---:|---|",
                *rows(part["found"]),
                *(["", read_again(part["found"])] if name == REAL else []),
            ]
    return "\n".join([*lines, ""])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--claude",
        type=Path,
        metavar="PROGRAM",
        help="Claude Code, which is copied to the client (default: claude on PATH)",
    )
    parser.add_argument("--inventory", default="inventory/lab", metavar="DIR")
    parser.add_argument("--only", choices=sorted(PARTS), help="measure this; the rest of the page stays")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/benchmarks", metavar="DIR")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was changed for a while is put back
    args.output.mkdir(parents=True, exist_ok=True)
    figures = args.output / "local-claude.json"
    measured = json.loads(figures.read_text()) if figures.exists() else {}
    try:
        with bench(args.inventory, client(args.claude)) as both:
            for name, (_, measure, _, _) in PARTS.items():
                if args.only in (None, name):
                    about = {"where": machine(), "commit": commit()}
                    found = measure(both)
                    day = time.strftime("%Y-%m-%d", time.gmtime())
                    measured[name] = {**about, "day": day, "found": found}
                    figures.write_text(json.dumps(measured, indent=1) + "\n")
    except (NoMeasurement, InventoryUnreadable, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    write(args.output, measured)
    return 0


def write(output: Path, measured: Mapping[str, Mapping[str, Any]]) -> None:
    """The page and its charts."""
    (output / "local-claude.md").write_text(page(measured))
    for name, (_, _, _, picture) in PARTS.items():
        if picture and name in measured:
            chart = bar_chart("To the first event of the answer", "s", bars(measured[name]["found"]))
            (output / picture).write_bytes(chart)


@contextmanager
def bench(inventory: str, claude: Path) -> Iterator[Bench]:
    """Both machines of an inventory; nothing stays on the client. Raises NoMeasurement."""
    hosts = load(ROOT / inventory)
    boxes = [host for host in hosts if GROUP in host.groups]
    clients = [host for host in hosts if CLIENTS in host.groups]
    for group, found in ((GROUP, boxes), (CLIENTS, clients)):
        if not found:
            raise NoMeasurement(f"{inventory} has no host in the group {group}")
    there = Client(clients[0])
    try:
        there.give(claude)
        yield Bench(Box(boxes[0]), there)
    finally:
        there.forget()


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Let the real Claude Code do a small task on a live preset, and judge what it left on the disk.

    scripts/verify_agent.py --inventory DIR [--limit PATTERN] [--preset NAME ...] [--claude PROGRAM]
                            [--seconds N] [--turns N] [--tokens N] [--keep] [--json FILE]

The task: a FastAPI app, a test, pytest, and a patch for what fails, in a throw-away directory
(docs/agent-test.md). Each preset that is meant for agents is asked for as by any client, or those that
--preset names. Five results a preset. A gateway that wants a key is shown the one in the environment variable
LLMBOX_KEY. Progress goes to standard error, a table and one line for each result that fell short to standard
output, JSON to FILE (`-`: standard output, instead of the table). Exit codes: 0 all well, 1 something fell
short, 2 could not run or a host could not be reached, 130 interrupted.
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
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace

import httpx
from llama_common.problems import InventoryError

from roles.llama_cpp.library.llama_cpp_build import HostError
from scripts import _agent_run, _command, _confine
from scripts._agent_judge import Result, judge
from scripts._agent_run import Limits, Recorded
from scripts._ask_host import Unreachable, reach
from scripts._inventory import Host, InventoryUnreadable, load
from scripts._llm_box import GROUP, LlmBox, presets_of
from scripts._measure import Meter, NotMeasured
from scripts._refusal import KEY_VARIABLE
from scripts.verify_health import (
    Check,
    HostReport,
    as_json,
    ensure_writable,
    exit_code,
    naming_the_option,
    screen,
)

INSTALL = "npm install -g @anthropic-ai/claude-code"
Tell = Callable[[str], None]


def checks(preset: str, results: Sequence[Result]) -> list[Check]:
    """The five results of a preset as checks of a report."""
    return [
        Check(f"{preset}.{one.name}", one.ok, one.value, "", one.wanted, "" if one.ok else one.detail)
        for one in results
    ]


def not_run(preset: str, why: str) -> list[Check]:
    """The five results of a preset that could not be asked: all fell short."""
    return checks(preset, judge(Recorded(work="/", stderr=why)))


def chosen(box: LlmBox, wanted: Sequence[str]) -> list[str]:
    """The presets to try on a box: those that are named, or those for agents."""
    presets = box.config.llama_presets
    return [name for name in box.names("user") if (name in wanted if wanted else presets[name].agent)]


def try_host(host: Host, options: argparse.Namespace, tell: Tell) -> HostReport:
    """Each chosen preset of a host. Never raises for what is wrong there. Raises OSError."""
    found: list[Check] = []
    key = os.environ.get(KEY_VARIABLE, "")
    try:
        box = LlmBox.of(host.variables)
        with reach(host, box.front.host, box.front.port) as url:
            for preset in chosen(box, options.preset):
                found += try_preset(box, preset, url, key, options, tell)
    except (InventoryError, HostError, Unreachable) as error:
        return HostReport(host.name, error=str(error))
    if not found:
        return HostReport(host.name, error="no preset has `agent: true`; fix: give one with --preset NAME")
    return HostReport(host.name, tuple(found))


def try_preset(
    box: LlmBox, preset: str, url: str, key: str, options: argparse.Namespace, tell: Tell
) -> list[Check]:
    """One run on one preset. Raises OSError when the client cannot be started."""
    tell(f"{preset}: waiting until it serves")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=url, trust_env=False, headers=headers) as client:
        try:
            Meter(client, preset).wake()
        except NotMeasured as error:
            return not_run(preset, str(error))
    limits = Limits(options.seconds, options.turns, options.tokens)
    with _agent_run.throw_away(keep=options.keep) as place:
        if options.keep:
            tell(f"{preset}: {place.root} will be kept")
        recorded = _agent_run.record(
            place,
            options.claude,
            url,
            preset,
            box.slot_context(preset),
            key,
            limits,
            lambda text: tell(f"{preset}: {text}"),
        )
    tell(f"{preset}: ended after {recorded.seconds:.0f} s")
    return checks(preset, judge(recorded))


def client(given: Path | None) -> Path:
    """The client's program. Raises InventoryUnreadable."""
    found = shutil.which(str(given or "claude"))
    if found is None:
        fix = f"install it with `{INSTALL}`, or give --claude PROGRAM"
        raise InventoryUnreadable(f"{given or 'claude'}: no such program; {fix}")
    return Path(found).absolute()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    limits = Limits()
    parser = _command.parser(__doc__, "0 all well, 1 something fell short, 2 could not run")
    parser.add_argument(
        "--preset",
        action="append",
        default=[],
        metavar="NAME",
        help="this preset (may be repeated; default: those with `agent: true`)",
    )
    parser.add_argument(
        "--claude", type=Path, metavar="PROGRAM", help="Claude Code (default: claude on PATH)"
    )
    for name, default, what in (
        ("seconds", limits.seconds, "time"),
        ("turns", limits.turns, "answers of the model"),
        ("tokens", limits.tokens, "tokens read and written"),
    ):
        parser.add_argument(
            f"--{name}",
            type=type(default),
            default=default,
            metavar="N",
            help=f"end a run after so much {what} (default: %(default)g)"
            if name == "seconds"
            else f"end a run after so many {what} (default: %(default)s)",
        )
    parser.add_argument("--keep", action="store_true", help="leave the throw-away directory")
    parser.add_argument("--json", metavar="FILE", help="write the report there; - is standard output")
    options = parser.parse_args(argv)
    for name in ("seconds", "turns", "tokens"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name} {getattr(options, name)}: must be more than 0")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the test."""
    options = parse(argv)
    return _command.attempt("verify_agent", options.inventory, lambda: report(options))


def report(options: argparse.Namespace) -> int:
    """Try the hosts and show what they can do. Raises InventoryUnreadable, InventoryError, OSError."""

    def progress(text: str) -> None:
        print(_command.typed(text, options.inventory), file=sys.stderr, flush=True)

    file = Path(options.json) if options.json and options.json != "-" else None
    if file is not None:
        ensure_writable(file)
    options.claude = client(options.claude)
    progress(f"reading {options.inventory}")
    hosts = [host for host in load(options.inventory, limit=options.limit) if GROUP in host.groups]
    if not hosts:
        raise InventoryUnreadable(f"{options.inventory}: none of the hosts is in the group {GROUP}")
    ensure_known(hosts, options.preset)
    if not _confine.abi():
        progress("this kernel has no Landlock: only the client's own rules keep the model in its directory")
    reports = []
    for host in hosts:
        one = try_host(host, options, lambda text, name=host.name: progress(f"{name}: {text}"))  # type: ignore[misc]
        reports.append(replace(one, error=one.error and _command.typed(one.error, options.inventory)))
    print(as_json(reports).rstrip() if options.json == "-" else screen(reports), flush=True)
    if file is not None:
        with naming_the_option(file):
            file.write_text(as_json(reports))
    return exit_code(reports)


def ensure_known(hosts: Sequence[Host], presets: Sequence[str]) -> None:
    """Raises InventoryUnreadable when none of the hosts has one of `presets`; InventoryError."""
    known = list(dict.fromkeys(name for host in hosts for name in presets_of(host.variables)))
    if unknown := [name for name in presets if name not in known]:
        raise InventoryUnreadable(f"--preset {unknown[0]}: no such preset; give one of {', '.join(known)}")


if __name__ == "__main__":
    _command.end(main)

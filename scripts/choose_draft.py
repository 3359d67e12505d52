#!/usr/bin/env python3
"""Measure the draft of every preset with `draft: auto` on its own box, and keep it only where it is faster.

    scripts/choose_draft.py --inventory DIR [--limit PATTERN] [--preset NAME ...] [--again] [--json FILE]

Which draft it is, the headers in the lock say: a head for multi-token prediction, else the smallest model
with the same tokenizer. The preset serves without and with it in turn, through its gateway, and afterwards
what it served before. Decision and figures are written to host_vars/HOST/drafts.yml of the inventory, one
preset after the other; site.yml then starts the preset accordingly. What is decided is measured again when
model, draft, release or driver have changed, or with --again. A gateway that wants a key is shown the one in
the environment variable LLMBOX_KEY. Progress goes to standard error. Exit codes: 0 all decided, 1 one could
not be decided, 2 could not run or a host could not be reached, 130 interrupted.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import httpx
from llama_common import draft as drafts
from llama_common import fit
from llama_common.derive import presets_plan
from llama_common.dialect import Dialect
from llama_common.draft import MTP, Draft
from llama_common.memory import NotPredicted
from llama_common.presets import DraftChoice, HostConfig
from llama_common.problems import InventoryError
from llama_common.rules import LOCK_COMMAND

from scripts import _command, _draft_choice
from scripts._ask_host import Unreachable, ask, reach
from scripts._compare import Bench
from scripts._draft_choice import Judged
from scripts._gpu_watch import watched
from scripts._inventory import Host, InventoryUnreadable, load
from scripts._llm_box import GROUP, LlmBox, presets_of
from scripts._lock import lockfile
from scripts._measure import Meter, NotMeasured, Shape, shapes
from scripts._refusal import KEY_VARIABLE
from scripts._trial import TrialFailed, trial
from scripts.plan_vram import run as run_on
from scripts.verify_health import (
    Check,
    HostReport,
    as_json,
    ensure_writable,
    exit_code,
    naming_the_option,
)

Tell = Callable[[str], None]
Commands = tuple[list[str], list[str]]
TOO_LARGE = "with it the preset takes"  # how a reason begins that is a prediction


@dataclass(frozen=True)
class Box:
    """A host whose drafts are chosen: its data, and what it said of itself."""

    host: Host
    data: LlmBox
    seen: Mapping[str, Any]
    driver: str
    helps: Mapping[str, str]

    def release(self, preset: str) -> str:
        """The release that a preset runs; empty when the box has none."""
        build = self.data.config.llama_presets[preset].build
        return Path((self.seen["builds"].get(build) or {}).get("current") or "").name

    def dialect(self, preset: str) -> Dialect:
        """What that release's llama-server takes."""
        return Dialect.from_help(self.helps.get(self.data.config.llama_presets[preset].build))


# --- pure ---


def candidate(config: HostConfig, preset: str, dialect: Dialect) -> Draft:
    """The draft that a preset is measured with. Raises NotMeasured, with what is missing."""
    model = config.llama_presets[preset].model
    if model not in drafts.headers(config):
        raise NotMeasured(f"the lock has no header of {model}; run {LOCK_COMMAND}")
    for one in drafts.candidates(config, preset):
        if one.type != MTP or dialect.knows_draft(MTP):
            return one
    raise NotMeasured(
        f"there is no draft for it: {model} has no head that predicts further tokens, and no smaller model "
        "of gguf_models has its tokenizer; fix: add one and lock it, or write draft: none"
    )


def identity(config: HostConfig, preset: str, draft: Draft, release: str, driver: str) -> dict[str, Any]:
    """What a decision is for: it holds as long as all of it is the same."""
    return {
        "type": draft.type,
        "draft": draft.model,
        "model_sha256": config.files(config.llama_presets[preset].model)[0].sha256,
        "draft_sha256": config.files(draft.model)[0].sha256 if draft.model else None,
        "release": release,
        "driver": driver,
    }


def decided(config: HostConfig, preset: str, wanted: Mapping[str, Any], large: str) -> DraftChoice | None:
    """The decision that still holds; none that left it open.

    One by prediction holds as long as that says the same (`large`): the preset may have been made smaller.
    """
    choice = config.llama_drafts.get(preset)
    if choice is None or choice.verdict == "undecided":
        return None
    if choice.reason.startswith(TOO_LARGE) and choice.reason != large:
        return None
    return choice if all(getattr(choice, name) == value for name, value in wanted.items()) else None


def with_draft(config: HostConfig, preset: str, choice: DraftChoice | None) -> HostConfig:
    """The same data with another decision for one preset; with none for None."""
    others = {name: one for name, one in config.llama_drafts.items() if name != preset}
    return config.model_copy(update={"llama_drafts": others | ({preset: choice} if choice else {})})


def too_large(config: HostConfig, preset: str) -> str:
    """Why a preset with its draft fits the card or main memory not; "" when it does, or nobody can say."""
    room = fit.Room.of(config)
    try:
        taken = fit.estimate_of(config, preset, fit.models(config), gpu=bool(room.gpu))
    except NotPredicted:
        return ""
    return "; ".join(
        f"{TOO_LARGE} {fit.gib(fit.use_of(taken, place).total)} of {fit.PLACES[place][0]}, "
        f"which has {fit.gib(room.at(place))}"
        for place in room.lacking(taken)
    )


def commands(box: Box, preset: str, choice: DraftChoice) -> Commands:
    """The preset's command lines without and with the draft, by the release's own path.

    Raises NotMeasured when the box does not run what the inventory says.
    """
    config, release = box.data.config, box.release(preset)

    def line(of: HostConfig) -> list[str]:
        plan = presets_plan(
            of, models_dir=box.data.models_dir, releases_root=box.data.builds_root, dialects=dict(box.helps)
        )
        words: list[str] = plan[preset]["command"]
        return words

    deployed = (((box.seen["presets"] or {}).get("presets") or {}).get(preset) or {}).get("command")
    if deployed != line(config):
        raise NotMeasured("the box runs it with other flags than the inventory says; fix: run site.yml")
    old, new = (
        [words[0].replace("/current/", f"/releases/{release}/"), *words[1:]]
        for words in (line(with_draft(config, preset, None)), line(with_draft(config, preset, kept(choice))))
    )
    return old, new


def kept(choice: DraftChoice) -> DraftChoice:
    """The same as if it were kept."""
    return choice.model_copy(update={"verdict": "kept"})


# --- on the box ---


def look(host: Host) -> Box:
    """What a host says of itself. Raises Unreachable, InventoryError."""
    data = LlmBox.of(host.variables)
    seen = ask(host, {"llm": data.request()}, become=True)["llm"]
    wanted = {data.config.llama_presets[name].build for name in auto(data.config)}
    helps = {
        build: run_on(host, f"cat {shlex.quote(f'{data.builds_root}/{build}/current/help.txt')}")
        for build in sorted(wanted)
        if seen["builds"].get(build, {}).get("current")
    }
    with watched(host) as gpu:
        return Box(host, data, seen, gpu.driver, helps)


def auto(config: HostConfig) -> list[str]:
    """The presets whose draft is to be chosen."""
    return [name for name, preset in config.llama_presets.items() if preset.draft == "auto"]


def choose_host(
    host: Host, presets: Sequence[str], keep: Callable[[str, DraftChoice], None], *, again: bool, tell: Tell
) -> list[Check]:
    """Decide for the presets of one host; `keep` is told of each. Raises Unreachable, InventoryError."""
    box = look(host)
    checks = []
    key = os.environ.get(KEY_VARIABLE)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    front = box.data.front
    with (
        reach(host, front.host, front.port) as url,
        httpx.Client(base_url=url, trust_env=False, headers=headers) as client,
    ):
        for preset in auto(box.data.config):
            if presets and preset not in presets:
                continue
            try:
                choice = choose(box, client, preset, again=again, tell=tell)
            except NotMeasured as error:
                tell(f"{preset}: {error}")
                checks.append(Check(f"{preset}.draft", False, None, "", None, str(error)))
                continue
            if choice is not box.data.config.llama_drafts.get(preset):
                keep(preset, choice)
            checks.append(as_check(preset, choice))
    return checks


def choose(box: Box, client: httpx.Client, preset: str, *, again: bool, tell: Tell) -> DraftChoice:
    """The decision for one preset: the one that holds, else a new one. Raises NotMeasured, Unreachable."""
    config, release = box.data.config, box.release(preset)
    if not release:
        raise NotMeasured("its build has no release on the box; fix: run site.yml")
    draft = candidate(config, preset, box.dialect(preset))
    wanted = identity(config, preset, draft, release, box.driver)
    blank = DraftChoice(verdict="undecided", reason="", measured=now(), pairs=0, **wanted)
    large = too_large(with_draft(config, preset, kept(blank)), preset)
    known = decided(config, preset, wanted, large)
    if known and not again:
        tell(f"{preset}: {known.verdict} already, {known.measured}: {known.reason}")
        return known
    if large:
        judged = Judged("rejected", large, {})
    else:
        missing = [
            file.file
            for file in (config.files(draft.model) if draft.model else [])
            if box.seen["files"].get(file.file) != file.size
        ]
        if missing:
            raise NotMeasured(f"{missing[0]} is not on the box; fix: run site.yml")
        tell(f"{preset}: draft {draft.text}, 5 to 9 pairs without and with it")
        shape = shapes(box.data.slot_context(preset))[0]
        judged = measure(box.host, client, preset, shape, commands(box, preset, blank), tell)
    choice = blank.model_copy(
        update={
            "verdict": judged.word,
            "reason": judged.reason[:1000],
            "measured": now(),
            "pairs": judged.pairs,
            "figures": dict(judged.figures),
        }
    )
    tell(f"{preset}: {choice.verdict}: {choice.reason}")
    return choice


def measure(
    host: Host, client: httpx.Client, preset: str, shape: Shape, both: Commands, tell: Tell
) -> Judged:
    """Without and with the draft in turn, on trial. Raises NotMeasured, Unreachable."""
    try:
        with trial(host, preset) as held:
            meter = Meter(client, preset, tell)
            open_yet = partial(_draft_choice.is_open, shape=shape)
            bench = Bench(held, client, meter, preset, shape, both, tell, is_open=open_yet)
            return _draft_choice.judge(bench.compare(), shape)
    except TrialFailed as error:
        raise NotMeasured(str(error)) from None


def now() -> str:
    """The time as a decision has it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ")


def as_check(preset: str, choice: DraftChoice) -> Check:
    """The entry in the report: the ratio that decided, beside 1."""
    figure = choice.figures.get("answer")
    value = figure.ratio if figure else None
    detail = f"{choice.draft or 'its own head'} {choice.verdict}: {choice.reason}"
    return Check(f"{preset}.draft", choice.verdict != "undecided", value, "times", 1, detail)


# --- the command ---


def told(reports: Sequence[HostReport]) -> Iterator[str]:
    """A line for each preset, and for each host that could not be asked."""
    for report in reports:
        if report.error:
            yield f"{report.host}: {report.error}"
        for check in report.checks:
            yield f"{report.host}: {check.name.removesuffix('.draft')}: {check.detail}"
    if not any(report.error or report.checks for report in reports):
        yield "no preset has draft: auto"


def choose_and_keep(host: Host, args: argparse.Namespace, command: str) -> HostReport:
    """One host. Raises InventoryUnreadable, OSError."""

    def tell(text: str) -> None:
        print(_command.typed(f"{host.name}: {text}", args.inventory), file=sys.stderr, flush=True)

    made: dict[str, DraftChoice] = {}

    def keep(preset: str, choice: DraftChoice) -> None:
        made[preset] = choice
        _draft_choice.write(path, config, made, command)
        tell(f"{lockfile.shown(path)}: written; now run site.yml")

    try:
        config = LlmBox.of(host.variables).config
        if not auto(config):
            return HostReport(host.name)
        path = _draft_choice.path_of(args.inventory, host.name)
        return HostReport(host.name, tuple(choose_host(host, args.preset, keep, again=args.again, tell=tell)))
    except (Unreachable, InventoryError) as error:
        return HostReport(host.name, error=str(error))


def typed(report: HostReport, inventory: Path) -> HostReport:
    """The report with fixes that can be typed as they stand."""
    checks = (replace(check, detail=_command.typed(check.detail, inventory)) for check in report.checks)
    return replace(
        report, error=report.error and _command.typed(report.error, inventory), checks=tuple(checks)
    )


def ensure_auto(hosts: Sequence[Host], presets: Sequence[str]) -> None:
    """Raises InventoryUnreadable where no host has a draft to choose for one of `presets`; InventoryError."""
    every = [(name, p) for host in hosts for name, p in presets_of(host.variables).items()]
    for wanted in presets:
        drafts = [preset.get("draft", "none") for name, preset in every if name == wanted]
        if not drafts:
            known = ", ".join(sorted({name for name, _ in every}))
            raise InventoryUnreadable(f"--preset {wanted}: no such preset; known: {known}")
        if "auto" not in drafts:
            raise InventoryUnreadable(
                f"--preset {wanted}: nothing to choose, it has draft: {drafts[0]}; fix: write draft: auto"
            )


def report(args: argparse.Namespace) -> int:
    """Choose for every host and show it. Raises InventoryUnreadable, InventoryError, OSError."""
    file = Path(args.json) if args.json and args.json != "-" else None
    if file is not None:
        ensure_writable(file)
    hosts = [host for host in load(args.inventory, limit=args.limit) if GROUP in host.groups]
    if not hosts:
        raise InventoryUnreadable(f"{args.inventory}: none of the hosts is in the group {GROUP}")
    ensure_auto(hosts, args.preset)
    command = f"scripts/choose_draft.py --inventory {lockfile.shown(args.inventory)}"
    reports = [typed(choose_and_keep(host, args, command), args.inventory) for host in hosts]
    print(as_json(reports) if args.json == "-" else "\n".join(told(reports)))
    if file is not None:
        with naming_the_option(file):
            file.write_text(as_json(reports))
    return exit_code(reports)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit code."""
    parser = _command.parser(__doc__, "0 all decided, 1 one is open, 2 could not run or reach a host")
    parser.add_argument(
        "--preset", action="append", default=[], metavar="NAME", help="only this one; may be repeated"
    )
    parser.add_argument("--again", action="store_true", help="measure what is decided too")
    parser.add_argument("--json", metavar="FILE", help="write the report there; - is standard output")
    args = parser.parse_args(argv)
    return _command.attempt("choose_draft", args.inventory, lambda: report(args))


if __name__ == "__main__":
    _command.end(main)

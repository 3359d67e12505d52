#!/usr/bin/env python3
"""Find the fastest n_cpu_moe, threads and ubatch for a preset, on its real server at its real context.

    scripts/tune_moe.py --inventory DIR --preset NAME [--limit HOST] [--budget MINUTES] [--write]

Each setting is a start of the preset's server with another command line and three runs behind a deep prompt,
with the server for itself: the gateway serves other requests between the runs. Every point is kept on this
machine; a second run goes on where the first one ended. The change to the preset is shown as a diff of the
inventory, and made only with --write. However this ends, the box serves afterwards what it served before. A
gateway that wants a key is shown the one in the environment variable LLMBOX_KEY. Progress goes to standard
error, the table and the diff to standard output. Exit codes: 0 searched to the end, 1 not (time was over, or
no setting fits), 2 could not run, 130 interrupted.
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
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, get_args

import httpx
from llama_common import fit
from llama_common.derive import presets_plan
from llama_common.memory import BATCH, BATCH_FLAGS, UBATCH, NotPredicted
from llama_common.model import Model
from llama_common.presets import HostConfig, Preset
from llama_common.rules import LOCK_COMMAND

from scripts import _command, _preset_edit, _tuning_chart
from scripts._ask_host import Unreachable, ask, reach
from scripts._gpu_watch import watched
from scripts._inventory import Host, InventoryUnreadable, load
from scripts._llm_box import GROUP, LlmBox, presets_of
from scripts._measure import DEEP_GENERATE, ROOM, Meter, NotMeasured, Shape, shapes
from scripts._preset_edit import CannotEdit
from scripts._refusal import KEY_VARIABLE
from scripts._screen import table
from scripts._search import Axis, NothingFits, OutOfTime, Setting, search
from scripts._trial import TrialFailed, trial
from scripts._tuning import LEAST_GAIN, Case, Goal, NotTuned, Point, Points, Tell, Tuner, gain, shown, told
from scripts.plan_vram import headers, run
from scripts.verify_health import ensure_writable, naming_the_option

NAMES = ("n_cpu_moe", "threads", "ubatch")  # the one that matters most first
UBATCHES = (128, 256, 512, 1024, 2048)
BUDGET_MIN = 60.0
CORES = "nproc; lscpu --parse=CORE,SOCKET 2>/dev/null || true"


@dataclass(frozen=True)
class Found:
    """What a search came to. `changes`: what the preset should say otherwise."""

    host: str
    case: Case
    goal: Goal
    used: Setting
    points: tuple[Point, ...]
    best: Setting
    finished: bool
    gain: float | None = None
    changes: Mapping[str, int] = field(default_factory=dict)
    diff: str = ""
    written: bool = False
    note: str = ""

    @property
    def code(self) -> int:
        """The exit code."""
        return 0 if self.finished else 1

    def as_json(self) -> str:
        """The report for programs."""
        goal: dict[str, Any] = {"ok": self.finished, **asdict(self)}
        points = [{**asdict(point), "case": None, "tok_s": point.speed(self.goal)} for point in self.points]
        for point in points:
            del point["case"]
        return json.dumps({**goal, "points": points}, indent=1) + "\n"


# --- what is searched ---


def axes(
    preset: Preset, model: Model | None, card: int, cores: tuple[int, int], asked: Mapping[str, Sequence[int]]
) -> tuple[tuple[Axis, ...], dict[str, int]]:
    """The axes of a preset and the setting in use. `cores`: of the CPU, and with its second threads.

    Raises NotTuned.
    """
    physical, logical = cores
    batch = _flag(preset, "batch", BATCH)
    values: dict[str, tuple[int, ...]] = {
        "threads": tuple(range(1, logical + 1)),
        "ubatch": tuple(value for value in UBATCHES if value <= batch),
    }
    if card and preset.n_gpu_layers:
        if model is None:
            raise NotTuned(
                f"whether {preset.model} has experts is not known: neither the lock nor its source has its "
                f"header; fix: {LOCK_COMMAND}"
            )
        if model.number("expert_count"):
            layers = model.layers - model.number("nextn_predict_layers")
            values["n_cpu_moe"] = tuple(range(layers + 1))
    for name in asked:
        if name not in values:
            raise NotTuned(
                f"--axis {name}: this preset has no experts on a GPU; give one of {', '.join(values)}"
            )
    chosen = {name: sorted(asked.get(name) or values[name]) for name in NAMES if name in (asked or values)}
    used = {
        "n_cpu_moe": preset.n_cpu_moe,
        "threads": preset.threads or physical,
        "ubatch": _flag(preset, "ubatch", UBATCH),
    }
    memory = {"n_cpu_moe": "falls", "ubatch": "rises"}
    made = tuple(
        # The setting in use is always one of them: everything else is held against it.
        Axis(name, tuple(sorted({*found, used[name]})), memory.get(name, "same"))  # type: ignore[arg-type]
        for name, found in chosen.items()
    )
    return made, {axis.name: used[axis.name] for axis in made}


def _flag(preset: Preset, name: str, default: int) -> int:
    """The value of --batch-size or --ubatch-size in a preset's arguments."""
    for flag, value in zip(preset.extra_args, preset.extra_args[1:], strict=False):
        if BATCH_FLAGS.get(flag) == name and value.isdecimal():
            default = int(value)
    return default


def changed(preset: Preset, setting: Setting) -> Preset:
    """The preset with a setting."""
    keys: dict[str, Any] = {name: value for name, value in setting.items() if name != "ubatch"}
    if "ubatch" in setting:
        keys["extra_args"] = _preset_edit.with_ubatch(preset.extra_args, setting["ubatch"])
    return preset.model_copy(update=keys)


def with_setting(config: HostConfig, name: str, setting: Setting) -> HostConfig:
    """The data of a host with a setting in one of its presets."""
    preset = changed(config.llama_presets[name], setting)
    return config.model_copy(update={"llama_presets": {**config.llama_presets, name: preset}})


def too_large(config: HostConfig, name: str, models: Mapping[str, Model]) -> Callable[[Setting], str]:
    """Why a setting cannot fit: what its weights, cache and buffers take, beside what is left free."""
    card = config.gpu_room

    def judge(setting: Setting) -> str:
        if not card:
            return ""
        try:
            taken = fit.estimate_of(with_setting(config, name, setting), name, models).gpu.total
        except NotPredicted:
            return ""
        return f"needs {fit.gib(taken)} of {fit.gib(card)}" if taken > card else ""

    return judge


def with_room(
    made: Sequence[Axis], config: HostConfig, name: str, models: Mapping[str, Model]
) -> tuple[Axis, ...]:
    """The axes without the n_cpu_moe whose experts main memory has no room for; the one in use stays.

    The search could not tell them from those the card has no room for: it takes n_cpu_moe to help there.
    """
    room = fit.Room.of(config)
    used = config.llama_presets[name].n_cpu_moe

    def fits(value: int) -> bool:
        try:
            data = with_setting(config, name, {"n_cpu_moe": value})
            return "cpu" not in room.lacking(fit.estimate_of(data, name, models))
        except NotPredicted:
            return True

    return tuple(
        replace(axis, values=tuple(value for value in axis.values if value == used or fits(value)))
        if axis.name == "n_cpu_moe" and room.cpu
        else axis
        for axis in made
    )


@dataclass(frozen=True)
class Commands:
    """The command lines of one preset on its box, from the inventory's data and the release's own flags."""

    box: LlmBox
    preset: str
    help: str

    def __call__(self, setting: Setting) -> list[str]:
        """That of a setting. Raises InventoryError."""
        config = with_setting(self.box.config, self.preset, setting)
        plan = presets_plan(
            config,
            models_dir=self.box.models_dir,
            releases_root=self.box.builds_root,
            dialects={config.llama_presets[self.preset].build: self.help},
        )
        words: list[str] = plan[self.preset]["command"]
        return words

    def base(self, names: Sequence[str]) -> str:
        """A hash of everything but the settings that are searched, the size of the card included."""
        words = [*self(dict.fromkeys(names, 1)), str(self.box.config.gpu_room)]
        return hashlib.sha256("\0".join(words).encode()).hexdigest()[:16]


def cores_of(said: str) -> tuple[int, int]:
    """Cores of the CPU, and those with their second threads, in what CORES prints. Raises NotTuned."""
    lines = said.splitlines()
    logical = next((int(line) for line in lines if line.isdecimal()), 0)
    if not logical:
        raise NotTuned(f"nproc said {said.strip()[:40]!r} on the host, no number of CPUs")
    cores = {line for line in lines if re.fullmatch(r"\d+,\d*", line)}
    return min(len(cores) or logical, logical), logical


# --- measuring ---


def tune(host: Host, args: argparse.Namespace, tell: Tell) -> Found:
    """Search the settings of a preset on a host. Raises NotTuned, Unreachable, InventoryError, OSError."""
    box = LlmBox.of(host.variables)
    name = args.preset

    def say(text: str) -> None:
        tell(f"{name}: {text}")

    preset = box.config.llama_presets[name]
    release_dir = f"{box.builds_root}/{preset.build}/current"
    commands = Commands(box, name, run(host, f"cat {release_dir}/help.txt"))
    release = Path(run(host, f"readlink -f {release_dir}").strip()).name
    seen = ask(host, {"llm": box.request()}, become=True)["llm"]
    deployed = ((seen["presets"] or {}).get("presets", {}).get(name) or {}).get("command")
    if deployed != commands({}):
        raise NotTuned(
            f"{host.name} runs {name} with other flags than this inventory says; fix: run site.yml"
        )
    models = headers(box)
    card = box.config.llama_presets_gpu_memory_mib
    made, used = axes(preset, models.get(preset.model), card, cores_of(run(host, CORES)), args.axis)
    made = with_room(made, box.config, name, models)
    shape = depth(box.slot_context(name), args.depth)
    with watched(host) as gpu:
        driver = gpu.driver
    case = Case(
        preset=name,
        release=release,
        driver=driver,
        model=box.config.files(preset.model)[0].sha256,
        base=commands.base([axis.name for axis in made]),
        prompt=shape.prompt,
        generate=shape.generate,
    )
    key = os.environ.get(KEY_VARIABLE)
    headers_ = {"Authorization": f"Bearer {key}"} if key else {}
    points = Points.of(args.inventory, host.name)
    with (
        points.locked(),
        reach(host, box.front.host, box.front.port) as url,
        httpx.Client(base_url=url, trust_env=False, headers=headers_) as client,
        trial(host, name) as held,
    ):
        tuner = Tuner(
            held,
            Meter(client, name, tell),
            points,
            case,
            commands,
            too_large(box.config, name, models),
            say,
            goal=args.goal,
            budget_s=60 * args.budget,
            clock=time.monotonic,
            fresh=args.fresh,
        )
        if tuner.known:
            say(f"{tuner.known} points are known from an earlier run")
        found = searched(host.name, tuner, made, used)
        say("the box goes back to what it served")
    return found


def depth(context: int, asked: int | None) -> Shape:
    """The run that every setting is measured by: the deepest canonical one, or as deep as was asked for.

    Raises NotMeasured, NotTuned.
    """
    if asked is None:
        return replace(shapes(context)[-1], name="deep")
    most = context - DEEP_GENERATE - ROOM
    if asked > most:
        raise NotTuned(f"--depth {asked}: a slot of {context} tokens has room for a prompt of {most}")
    return Shape("deep", asked, DEEP_GENERATE)


def searched(host: str, tuner: Tuner, made: tuple[Axis, ...], used: Setting) -> Found:
    """Search, then hold the best setting against the one in use in runs of their own. Raises NotTuned, …"""
    nothing = Found(host, tuner.case, tuner.goal, used, (), used, finished=False)
    try:
        best = search(made, used, tuner)
    except NothingFits:
        note = "no setting that was tried fits into memory"
        return replace(nothing, points=tuple(tuner.found), note=note)
    except OutOfTime:
        note = "the time was over before the search came to a setting that fits; fix: a larger --budget"
        return replace(nothing, points=tuple(tuner.found), note=note)
    better = best.speed > (tuner.point(used).speed(tuner.goal) or 0.0)
    change: float | None = None
    changes: dict[str, int] = {}
    if best.setting != dict(used) and better:
        first = tuner.point(used)
        if first.speed(tuner.goal):
            change = gain(tuner.point(used, again=True), tuner.point(best.setting, again=True), tuner.goal)
        # The setting in use does not even run: then there is nothing to hold the best one against.
        if not first.speed(tuner.goal) or (change is not None and change >= LEAST_GAIN):
            changes = {name: value for name, value in best.setting.items() if value != used[name]}
    note = "" if best.finished else "the time was over before the search: run it again to go on"
    return Found(
        host,
        tuner.case,
        tuner.goal,
        used,
        tuple(tuner.found),
        best.setting,
        best.finished,
        change,
        changes,
        note=note,
    )


# --- proposing ---


def proposed(found: Found, host: Host, inventory: Path, *, write: bool) -> Found:
    """With the diff of the inventory, made if it is to be. Raises CannotEdit, OSError."""
    if not found.changes:
        return found
    file = _preset_edit.find(inventory, host.name, sorted(host.groups), found.case.preset)
    with file.open(encoding="utf-8", newline="") as stream:
        before = stream.read()
    after = _preset_edit.edit(before, found.case.preset, found.changes)
    if write:
        preset, others = found.case.preset, presets_of_others(found, load(inventory, partly=True))
        put(file, after)
        try:
            read = load(inventory, partly=True)
            now = presets_of_others(found, read)
            if also := ", ".join(name for name in sorted(now) if now[name] != others[name]):
                raise CannotEdit(
                    f"{file}: {preset} of {also} would change with it, where nothing was measured; fix: move"
                    f" it to files of their own (host_vars/{host.name}), or change it by hand for all of them"
                )
            own = next(one for one in read if one.name == host.name)
            fresh = LlmBox.of(own.variables).config
            want = changed(LlmBox.of(host.variables).config.llama_presets[found.case.preset], found.changes)
            if fresh.llama_presets[found.case.preset] != want:
                raise CannotEdit(f"{file}: another place of the inventory overrides it; fix: change that one")
        except BaseException:
            put(file, before)
            raise
    return replace(found, diff=_preset_edit.diff(file, before, after), written=write)


def presets_of_others(found: Found, hosts: Sequence[Host]) -> dict[str, Any]:
    """What each other LLM box has for the preset."""
    preset = found.case.preset
    return {
        one.name: (one.variables.get("llama_presets") or {}).get(preset)
        for one in hosts
        if one.name != found.host and GROUP in one.groups
    }


def put(file: Path, text: str) -> None:
    """Write a file whole or not at all, with the mode that it has. Raises OSError."""
    new = file.with_name(f".{file.name}.new")
    try:
        with new.open("w", encoding="utf-8", newline="") as stream:
            stream.write(text)
        new.chmod(file.stat().st_mode & 0o7777)
        new.replace(file)
    finally:
        new.unlink(missing_ok=True)


# --- showing ---


def screen(found: Found) -> str:
    """The points, fastest first, then what to do."""
    ranked = sorted(
        (point for point in found.points if not point.again),
        key=lambda point: -(point.speed(found.goal) or 0.0),
    )
    rows = [
        [
            *(str(value) for value in point.setting.values()),
            *(_speeds(values) for values in (point.prefill, point.generation)),
            f"{point.speed(found.goal):.1f}" if point.outcome == "measured" else "-",
            point.outcome + (" (in use)" if point.setting == found.used else ""),
        ]
        for point in ranked
    ]
    names = list(found.used)
    lines = [table((*names, "prefill", "generation", found.goal, "tok/s"), rows)] if rows else []
    again = [point for point in found.points if point.again]
    lines += [f"once more: {told(point, found.goal)}" for point in again[-2:]]
    where = f"{found.host}: {found.case.preset}"
    if found.gain is not None:
        lines.append(f"{where}: {shown(found.best)} is {found.gain:+.1%} beside {shown(found.used)}")
    if found.note:
        lines.append(f"{where}: {found.note}")
    if not found.changes:
        lines.append(f"{where}: no change: nothing was faster by {LEAST_GAIN:.0%} than {shown(found.used)}")
    elif found.written:
        lines.append(f"{found.diff}\nwritten; then: .venv/bin/ansible-playbook site.yml --limit {found.host}")
    elif found.diff:  # else the change must be made by hand, as the note says
        lines.append(f"{found.diff}\nnot written; fix: the same command with --write")
    return "\n".join(lines)


def _speeds(values: Sequence[float]) -> str:
    return f"{sorted(values)[len(values) // 2]:.1f}" if values else "-"


def report(args: argparse.Namespace) -> int:
    """Tune one preset of one host. Raises InventoryUnreadable, InventoryError, OSError."""

    def progress(text: str) -> None:
        print(_command.typed(text, args.inventory), file=sys.stderr, flush=True)

    file = Path(args.json) if args.json and args.json != "-" else None
    for option, each in (("--json", file), ("--chart", args.chart)):
        if each is not None:
            ensure_writable(each, option)
    progress(f"reading {args.inventory}")
    host = the_host(load(args.inventory, limit=args.limit), args.preset)
    try:
        found = tune(host, args, lambda text: progress(f"{host.name}: {text}"))
        try:
            found = proposed(found, host, args.inventory, write=args.write)
        except CannotEdit as error:
            found = replace(found, note=f"{shown(found.changes)} is better; {error}", finished=False)
    except (NotTuned, NotMeasured, TrialFailed, Unreachable) as error:
        print(
            _command.typed(f"tune_moe: {host.name}: {args.preset}: {error}", args.inventory), file=sys.stderr
        )
        return _command.COULD_NOT_RUN
    print(found.as_json().rstrip() if args.json == "-" else screen(found), flush=True)
    if file is not None:
        with naming_the_option(file):
            file.write_text(found.as_json())
    chart = args.chart or Points.of(args.inventory, host.name).file.with_name(
        f"{host.name}-{args.preset}.png"
    )
    title = f"{args.preset} on {host.name}: tokens per second, {args.goal}"
    with naming_the_option(chart, "--chart"):
        chart.write_bytes(_tuning_chart.draw(title, found.points, found.best, found.goal))
    progress(f"chart: {chart}")
    return found.code


def the_host(hosts: Sequence[Host], preset: str) -> Host:
    """The one LLM box that has the preset. Raises InventoryUnreadable, InventoryError."""
    boxes = [host for host in hosts if GROUP in host.groups]
    if not boxes:
        raise InventoryUnreadable(f"none of the hosts is in the group {GROUP}")
    having = [host for host in boxes if preset in presets_of(host.variables)]
    if not having:
        known = dict.fromkeys(name for host in boxes for name in presets_of(host.variables))
        raise InventoryUnreadable(f"--preset {preset}: no such preset; give one of {', '.join(known)}")
    if len(having) > 1:
        names = ", ".join(host.name for host in having)
        raise InventoryUnreadable(f"--preset {preset} is on {names}; fix: --limit HOST with one of them")
    if presets_of(having[0].variables)[preset].get("scope", "user") != "user":
        raise InventoryUnreadable(
            f"--preset {preset} is a system service; only presets behind the gateway are tuned"
        )
    return having[0]


# --- the command line ---


def axis_of(text: str) -> tuple[str, tuple[int, ...]]:
    """NAME, NAME=2-8 or NAME=2,4,8; no values: all that make sense."""
    name, given, values = text.partition("=")
    if name not in NAMES or (given and not re.fullmatch(r"\d{1,5}-\d{1,5}|\d{1,5}(,\d{1,5})*", values)):
        raise argparse.ArgumentTypeError(
            f"{text}: write NAME, NAME=2-8 or NAME=2,4,8 with one of {', '.join(NAMES)}"
        )
    low, _, high = values.partition("-")
    found = range(int(low), int(high) + 1) if high else [int(one) for one in values.split(",") if one]
    if (values and not found) or (found and (min(found) < (name != "n_cpu_moe") or max(found) > 65536)):
        raise argparse.ArgumentTypeError(f"{text}: no such values")
    return name, tuple(found)


def minutes(text: str) -> float:
    """A budget."""
    value = float(text)
    if not 0 < value <= 24 * 60:
        raise argparse.ArgumentTypeError(f"{text}: give minutes, at most {24 * 60}")
    return value


def tokens(text: str) -> int:
    """A depth."""
    value = int(text)
    if value < 64:
        raise argparse.ArgumentTypeError(f"{text}: give tokens, at least 64")
    return value


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    codes = "0 searched to the end, 1 time was over or no setting fits, 2 could not run, 130 interrupted"
    parser = _command.parser(__doc__, codes)
    parser.add_argument("--preset", required=True, metavar="NAME")
    parser.add_argument(
        "--axis", action="append", default=[], type=axis_of, metavar="NAME[=VALUES]",
        help="search only this setting (may be repeated), and only these values: 2-8 or 2,4,8",
    )  # fmt: skip
    parser.add_argument(
        "--goal", choices=get_args(Goal), default="turn",
        help="what is to be fast: a turn that reads 2048 tokens and writes 512 (default), or one of both",
    )  # fmt: skip
    parser.add_argument(
        "--depth", type=tokens, metavar="TOKENS", help="length of the prompt before every run"
    )
    parser.add_argument(
        "--budget", type=minutes, default=BUDGET_MIN, metavar="MINUTES",
        help=f"begin no point that would end later (default {BUDGET_MIN:g})",
    )  # fmt: skip
    parser.add_argument("--fresh", action="store_true", help="measure everything anew, forget earlier runs")
    parser.add_argument("--write", action="store_true", help="make the change in the inventory")
    parser.add_argument("--json", metavar="FILE", help="write the report there; - is standard output")
    parser.add_argument(
        "--chart", type=Path, metavar="FILE", help="draw the points there (PNG), not beside them"
    )
    args = parser.parse_args(argv)
    names = [name for name, _ in args.axis]
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            parser.error(f"--axis {name}: given twice; fix: all its values in one")
    args.axis = dict(args.axis)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit code."""
    args = parse(argv)
    return _command.attempt("tune_moe", args.inventory, lambda: report(args))


if __name__ == "__main__":
    _command.end(main)

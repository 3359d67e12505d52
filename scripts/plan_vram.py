#!/usr/bin/env python3
"""Show what every preset takes of every host's GPU and main memory, and what stays free on the card.

    scripts/plan_vram.py --inventory DIR [--limit PATTERN] [--json FILE] [--chart FILE] [--offline]

A host that can be asked runs its own llama-fit-params with the preset's exact flags. For the others, and with
--offline, the figures come from the header of the model: the one in the lock, else read by HTTP ranges (at
most 32 MB). An architecture that is not known is named, never guessed at. Main memory is held against what
the inventory declares of it, and where it declares nothing, not checked. --chart writes a PNG. Exit codes: 0
every preset fits, 1 one does not, 2 one could not be worked out.
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
import shlex
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from llama_common import fit
from llama_common.derive import presets_plan
from llama_common.dialect import Dialect
from llama_common.flags import is_flag, normalize
from llama_common.memory import CUDA, MIB, UNMODELLED_FLAGS, Estimate, NotPredicted, Settings, Use, estimate
from llama_common.model import Model

from scripts import _command
from scripts._ask_host import Unreachable, explain
from scripts._chart import Bar, bar_chart
from scripts._header import NoHeader, client, read_url
from scripts._inventory import Host, InventoryUnreadable, load
from scripts._llm_box import LlmBox
from scripts._screen import table
from scripts._server_memory import NoFigure, as_served, parse_fit
from scripts.verify_health import Check, HostReport, as_json, ensure_writable, naming_the_option

ASK_TIMEOUT_S = 120
PARTS = ("weights", "KV cache", "compute buffers")
GROUP = "llama_hosts"
NO_GPU, NOT_CHECKED = "no GPU", "not checked"


@dataclass(frozen=True)
class Plan:
    """One preset on one host: what it takes, and who says so; `problem` where nobody can."""

    host: str
    preset: str
    room: fit.Room
    taken: Estimate | None = None
    source: str = ""
    problem: str = ""

    @property
    def fits(self) -> bool:
        """Whether it is known and fits."""
        return self.taken is not None and not self.room.lacking(self.taken)

    def free(self, place: fit.Place, otherwise: str) -> str:
        """The MiB that stay free somewhere; something else where nobody said how much there is."""
        room = self.room.at(place)
        if self.taken is None or not room:
            return otherwise
        return f"{(room - fit.use_of(self.taken, place).total) / MIB:.0f}"

    @property
    def check(self) -> Check:
        """The entry in the JSON report, in MiB."""
        card = round(self.room.gpu / MIB)
        if self.taken is None:
            return Check(self.preset, False, None, "MiB", card, self.problem)
        gpu, cpu = self.taken.gpu, self.taken.cpu
        detail = (
            f"{self.source}: GPU weights {gpu.weights / MIB:.0f}, cache {gpu.cache / MIB:.0f}, "
            f"compute {gpu.compute / MIB:.0f}; CPU weights {cpu.weights / MIB:.0f}, "
            f"cache {cpu.cache / MIB:.0f}, compute {cpu.compute / MIB:.0f}; "
            f"margin {self.free('gpu', NO_GPU)}, in main memory {self.free('cpu', NOT_CHECKED)}"
        )
        return Check(self.preset, self.fits, round(gpu.total / MIB), "MiB", card or None, detail)


def headers(box: LlmBox) -> dict[str, Model]:
    """The models of a host, from the lock or over HTTP; one that cannot be read is left out."""
    found = fit.models(box.config)
    with client() as web:
        for name in box.config.gguf_models:
            files = box.config.files(name)
            if name in found or not all(file.url for file in files):
                continue
            try:
                found[name] = Model.of([read_url(web, file.url or "", file.size) for file in files])
            except NoHeader as error:
                print(f"plan_vram: {error}", file=sys.stderr)
    return found


def run(host: Host, command: str) -> str:
    """Standard output of a command on the host. Raises Unreachable."""
    try:
        done = subprocess.run(
            host.ssh(command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ASK_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Unreachable(f"no answer over ssh in {ASK_TIMEOUT_S} s") from None
    except FileNotFoundError:
        raise Unreachable("this machine has no ssh client; install openssh-client") from None
    if done.returncode != 0:
        raise Unreachable(explain(host, done.returncode, done.stderr))
    return done.stdout


def fit_command(command: Sequence[str], server: Dialect, estimator: Dialect) -> list[str]:
    """A llama-server command line as one of llama-fit-params: the flags that it knows, but not `--fit`."""
    words = [command[0].removesuffix("llama-server") + "llama-fit-params", "--fit-print", "on"]
    index = 1
    while index < len(command):
        flag = normalize(command[index])
        count = 1 + (server.values(flag) if is_flag(command[index]) else 0)
        if flag != "--fit" and estimator.knows(flag):
            words += command[index : index + count]
        index += count
    return words


def untold(command: Sequence[str], estimator: Dialect) -> list[str]:
    """Flags of a llama-server command line that take or move memory, and that llama-fit-params has not."""
    of_memory = UNMODELLED_FLAGS - {"--spec-type"}  # of a draft: `ask` sees to it
    flags = [normalize(word) for word in command if is_flag(word)]
    return [flag for flag in flags if flag in of_memory and not estimator.knows(flag)]


def ask(host: Host, box: LlmBox, models: dict[str, Model], preset: str) -> Estimate:
    """What the host's own llama-fit-params says, and of a draft, of which it knows nothing, the header.

    Raises Unreachable, NoFigure, NotPredicted.
    """
    entry = box.config.llama_presets[preset]
    release = f"{box.builds_root}/{entry.build}/current"
    user = f"sudo -n -u {shlex.quote(box.user)} "
    server = run(host, f"cat {release}/help.txt")
    estimator = run(host, f"{user}{release}/bin/llama-fit-params --help")
    plan = presets_plan(
        box.config, models_dir=box.models_dir, releases_root=box.builds_root, dialects={entry.build: server}
    )
    command, dialect = plan[preset]["command"], Dialect.from_help(estimator)
    if missing := untold(command, dialect):
        raise NoFigure(f"llama-fit-params has no {missing[0]}, which takes or moves memory")
    fit.refuse_mtp(box.config, preset)
    gpu = CUDA if box.config.llama_presets_gpu_memory_mib else None
    words = fit_command(command, Dialect.from_help(server), dialect)
    said = parse_fit(run(host, user + shlex.join(words)))
    drafts = box.config.models_of(preset)[1:]
    try:
        settings = Settings.of(entry.model_dump())
    except NotPredicted:
        if drafts:
            raise
        return said
    for draft in drafts:
        if draft not in models:
            raise NotPredicted(f"no header of {draft} is known")
        said += estimate(models[draft], fit.as_draft(settings), gpu)
    if entry.model not in models or drafts:
        return said
    return as_served(said, models[entry.model], settings, gpu)


def plan_host(host: Host, *, offline: bool, tell: Callable[[str], None]) -> list[Plan]:
    """The plans of every preset of a host; `tell` hears why it was not asked. Raises InventoryError."""
    box = LlmBox.of(host.variables)
    room = fit.Room.of(box.config)
    models = headers(box)
    plans = []
    for name in box.config.llama_presets:
        source, taken, problem = "header", None, ""
        if not offline:
            try:
                taken, source = ask(host, box, models, name), "llama-fit-params"
            except (Unreachable, NoFigure, NotPredicted) as error:
                tell(f"{host.name}: {name}: {error}; using the header")
        if taken is None:
            try:
                taken = fit.estimate_of(box.config, name, models, gpu=bool(room.gpu))
            except NotPredicted as error:
                problem = str(error)
        plans.append(Plan(host.name, name, room, taken, source if taken else "", problem))
    return plans


def screen(plans: Sequence[Plan]) -> str:
    """The table, in MiB, and a line for each preset that has no figures."""
    rows = []
    for plan in plans:
        if plan.taken is None:
            continue
        gpu, cpu = plan.taken.gpu, plan.taken.cpu
        rows.append(
            (
                plan.host,
                plan.preset,
                *_columns(gpu),
                plan.free("gpu", NO_GPU),
                *_columns(cpu),
                plan.free("cpu", NOT_CHECKED),
                plan.source,
                "ok" if plan.fits else "does not fit",
            )
        )
    parts = ("KV", "compute", "sum", "free")
    names = ("host", "preset", "GPU weights", *parts, "CPU weights", *parts, "from", "MiB")
    lines = [table(names, rows)] if rows else []
    return "\n".join(
        lines + [f"{plan.host}: {plan.preset}: {plan.problem}" for plan in plans if plan.problem]
    )


def _columns(use: Use) -> tuple[str, ...]:
    """The parts and their sum, in MiB."""
    return tuple(f"{value / MIB:.0f}" for value in (use.weights, use.cache, use.compute, use.total))


def chart(plans: Sequence[Plan]) -> bytes:
    """Stacked bars of the GPU's memory, a line at what presets may take of it. Raises ValueError."""
    bars = []
    for plan in plans:
        if plan.taken is not None and plan.room.gpu:
            gpu = plan.taken.gpu
            parts = tuple(part / 2**30 for part in (gpu.weights, gpu.cache, gpu.compute))
            bars.append(Bar(f"{plan.host} {plan.preset}", parts, limit=plan.room.gpu / 2**30))
    return bar_chart("GPU memory of each preset, and what it may take of the card", "GiB", bars, PARTS)


def report(args: argparse.Namespace) -> int:
    """Work everything out and show it. Raises InventoryUnreadable, InventoryError, OSError."""

    def tell(text: str) -> None:
        print(f"plan_vram: {_command.typed(text, args.inventory)}", file=sys.stderr)

    file = Path(args.json) if args.json and args.json != "-" else None
    for option, each in (("--json", file), ("--chart", args.chart)):
        if each is not None:
            ensure_writable(each, option)
    hosts = [host for host in load(args.inventory, limit=args.limit) if GROUP in host.groups]
    if not hosts:
        raise InventoryUnreadable(f"{args.inventory}: none of the hosts is in the group {GROUP}")
    plans = [
        replace(plan, problem=_command.typed(plan.problem, args.inventory))
        for host in hosts
        for plan in plan_host(host, offline=args.offline, tell=tell)
    ]
    reports = [
        HostReport(host.name, tuple(plan.check for plan in plans if plan.host == host.name)) for host in hosts
    ]
    print(as_json(reports) if args.json == "-" else screen(plans))
    if file is not None:
        with naming_the_option(file):
            file.write_text(as_json(reports))
    if args.chart is not None:
        try:
            with naming_the_option(args.chart, "--chart"):
                args.chart.write_bytes(chart(plans))
        except ValueError:
            print("plan_vram: no chart: no host with a GPU has a preset with figures", file=sys.stderr)
    if any(plan.taken is None for plan in plans):
        return _command.COULD_NOT_RUN
    return 0 if all(plan.fits for plan in plans) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit code."""
    parser = _command.parser(__doc__, "0 all fit, 1 one does not, 2 one could not be worked out")
    parser.add_argument("--json", metavar="FILE", help="write the report there; - is standard output")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="write a picture there (PNG)")
    parser.add_argument("--offline", action="store_true", help="ask no host: headers alone")
    args = parser.parse_args(argv)
    return _command.attempt("plan_vram", args.inventory, lambda: report(args))


if __name__ == "__main__":
    _command.end(main)

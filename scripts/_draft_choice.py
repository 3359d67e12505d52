"""Whether a draft is kept, from what a preset did without and with it, and the file that remembers it.

Pure but for reading and writing that file. In a Comparison (scripts/_verdict.py) the old side is without the
draft, the new one with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

from llama_common.presets import DraftChoice, DraftFigure, HostConfig

from scripts._inventory import InventoryUnreadable
from scripts._lock import ROOT, lockfile
from scripts._measure import Shape
from scripts._statistics import Ratio, ratio_of_medians
from scripts._verdict import LEAST_PAIRS, PROBES, Comparison, Pairs

WORTH = 1.05  # a draft under this, times the speed without it, is not worth its memory
FILE_NAME = "drafts.yml"

Word = Literal["kept", "rejected", "undecided"]
Figure = Literal["answer", "generation", "prefill"]


@dataclass(frozen=True)
class Judged:
    """A verdict, why in one line, and the figures that it rests on."""

    word: Word
    reason: str
    figures: Mapping[Figure, DraftFigure]
    pairs: int = 0


def answers(found: Comparison, shape: Shape) -> Pairs:
    """Tokens written per second of a whole answer: what the canonical prompt takes to be read counts too."""

    def speed(prefill: float, generation: float) -> float:
        return shape.generate / (shape.prompt / prefill + shape.generate / generation)

    return tuple(
        (speed(read[0], written[0]), speed(read[1], written[1]))
        for read, written in zip(found.prefill, found.generation, strict=True)
    )


def judge(found: Comparison, shape: Shape) -> Judged:
    """Kept, rejected or undecided."""
    old, new = found.old, found.new
    if old.start:
        return Judged("undecided", f"it does not start without the draft either: {old.start}", {})
    if new.start:
        return Judged("rejected", f"it does not start with it: {new.start}", {})
    figures, ratio = _figures(found, shape)
    count = len(found.generation)
    broken = [
        f"with it the preset {words}: {getattr(new, probe)}"
        for probe, words in PROBES.items()
        if getattr(new, probe) and not getattr(old, probe)
    ]
    if broken:
        return Judged("rejected", broken[0], figures, count)
    if ratio is None:
        return Judged("undecided", f"it could not be measured: {found.trouble or 'too few runs'}", {}, count)
    generation = figures["generation"]
    times = (
        f"an answer comes {ratio.value:.2f} times as fast ({ratio.low:.2f} to {ratio.high:.2f} in {count} "
        f"pairs), generation {generation.without:.1f} -> {generation.drafted:.1f} tok/s"
    )
    both = "".join(
        f"; without it too the preset {words}: {said}"
        for probe, words in PROBES.items()
        if (said := getattr(old, probe)) and getattr(new, probe)
    )
    if ratio.high < WORTH:
        return Judged(
            "rejected", f"{times}; at least {WORTH:g} times is worth its memory{both}", figures, count
        )
    if ratio.low > 1:
        return Judged("kept", f"{times}{both}", figures, count)
    return Judged("undecided", f"{times}; the runs vary too much{both}", figures, count)


def _figures(found: Comparison, shape: Shape) -> tuple[dict[Figure, DraftFigure], Ratio | None]:
    """The figures, and the ratio that decides; nothing while there are too few pairs."""
    if len(found.generation) < LEAST_PAIRS:
        return {}, None
    pairs: dict[Figure, Pairs] = {
        "answer": answers(found, shape),
        "generation": found.generation,
        "prefill": found.prefill,
    }
    ratios = {name: ratio_of_medians(these) for name, these in pairs.items()}
    figures = {
        name: DraftFigure(
            without=round(median(pair[0] for pair in these), 2),
            drafted=round(median(pair[1] for pair in these), 2),
            ratio=round(ratios[name].value, 4),
            low=round(ratios[name].low, 4),
            high=round(ratios[name].high, 4),
        )
        for name, these in pairs.items()
    }
    return figures, ratios["answer"]


def is_open(found: Comparison, shape: Shape) -> bool:
    """Whether more pairs could still decide it."""
    return judge(found, shape).word == "undecided" and not found.trouble and not found.old.start


# --- the file of a host ---


def path_of(inventory: Path, host: str) -> Path:
    """Where the decisions of a host stand. Raises InventoryUnreadable: a file there would hide variables."""
    folder = (inventory if inventory.is_dir() else inventory.parent) / "host_vars" / host
    for single in (folder.with_name(f"{host}{suffix}") for suffix in (".yml", ".yaml", ".json")):
        if single.exists() and not folder.exists():
            raise InventoryUnreadable(
                f"{lockfile.shown(single)}: Ansible stops reading it once the folder {host} is beside it; "
                f"fix: make that folder and move the file into it as main{single.suffix}"
            )
    return folder / FILE_NAME


def render(choices: Mapping[str, DraftChoice], path: Path, command: str) -> str:
    """The text of the file: equal decisions are equal bytes."""
    lines = [f"# Written by: {command}", "# Run that again to measure anew; do not edit."]
    lines = ["---", *lines, "llama_drafts:" if choices else "llama_drafts: {}"]
    if path.resolve().is_relative_to(ROOT):
        depth = "../" * (len(path.resolve().relative_to(ROOT).parts) - 1)
        schema = lockfile.SCHEMA.relative_to(ROOT)
        lines.insert(0, f"# yaml-language-server: $schema={depth}{schema}")
    for preset, choice in sorted(choices.items()):
        lines.append(f"  {preset}:")
        for key, value in choice.model_dump(mode="json").items():
            if key != "figures":
                lines.append(f"    {key}: {json.dumps(value)}")
                continue
            lines.append("    figures:" if value else "    figures: {}")
            for name, figure in value.items():
                pairs = ", ".join(f"{inner}: {json.dumps(number)}" for inner, number in figure.items())
                lines.append(f"      {name}: {{{pairs}}}")
    return "\n".join(lines) + "\n"


def write(path: Path, config: HostConfig, new: Mapping[str, DraftChoice], command: str) -> bool:
    """Put `new` decisions beside those that still mean a preset. Returns whether the file changed.

    Raises OSError.
    """
    kept = {
        name: choice
        for name, choice in config.llama_drafts.items()
        if name in config.llama_presets and config.llama_presets[name].draft == "auto"
    }
    text = render({**kept, **new}, path, command)
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    lockfile.write(path, text)
    return True

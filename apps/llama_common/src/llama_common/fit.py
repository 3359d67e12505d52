"""Whether presets fit into the GPU's memory, and the smallest change with which one would.

Works on the facts of the lock alone: no file is read and no host is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from llama_common.draft import MTP
from llama_common.fields import AGENT_CONTEXT_FLOOR
from llama_common.memory import (
    CONTEXT_STEP,
    Estimate,
    NotPredicted,
    Settings,
    estimate,
)
from llama_common.model import Model
from llama_common.presets import HostConfig, Preset
from llama_common.problems import Problem
from llama_common.rules import LOCK_COMMAND

KV_STEPS: Final = ("f16", "q8_0", "q4_0")
"""KV cache types from large to small, between which a fix chooses."""


@dataclass(frozen=True)
class Unchecked:
    """A preset of which nobody can say whether it fits; `reason` is one line with what to do."""

    preset: str
    reason: str


@dataclass(frozen=True)
class Change:
    """One key of a preset that makes it fit, and what it takes of the GPU then, in bytes."""

    key: str
    value: int | str
    gpu_bytes: int

    @property
    def text(self) -> str:
        """`n_cpu_moe: 18 (15.2 GiB)`."""
        return f"{self.key}: {self.value} ({gib(self.gpu_bytes)})"


def gib(count: int) -> str:
    """Bytes as GiB with two decimals."""
    return f"{count / 2**30:.2f} GiB"


def models(config: HostConfig) -> dict[str, Model]:
    """The models whose facts the lock has, and that are still the ones that it was written for."""
    found = {}
    for name, header in config.llama_lock.headers.items():
        if name in config.gguf_models and config.files(name)[0].sha256 == header.sha256:
            found[name] = Model.from_facts(header.model_dump())
    return found


def preset_estimate(
    preset: Preset, names: Sequence[str], known: Mapping[str, Model], gpu: bool = True
) -> Estimate:
    """The memory of a preset with its models, the draft model last. Raises NotPredicted."""
    for name in names:
        if name not in known:
            raise NotPredicted(f"the lock has no header of {name}; run {LOCK_COMMAND}")
    settings = Settings.of(preset.model_dump())
    device = {} if gpu else {"gpu": None}
    total = estimate(known[names[0]], settings, **device)
    for name in names[1:]:
        total += estimate(known[name], as_draft(settings), **device)
    return total


def as_draft(settings: Settings) -> Settings:
    """Those of a draft model beside these: the same context, an unquantized cache, no experts of its own."""
    return replace(settings, kv_cache_type="f16", n_cpu_moe=0)


def refuse_mtp(config: HostConfig, name: str) -> None:
    """Raises NotPredicted for a preset whose draft is a head that predicts further tokens."""
    draft = config.draft(name)
    if draft and draft.type == MTP:
        raise NotPredicted(f"the memory of a head that predicts further tokens ({MTP}) is not predicted")


def estimate_of(config: HostConfig, name: str, known: Mapping[str, Model], *, gpu: bool = True) -> Estimate:
    """The memory of a preset with the draft that it is started with. Raises NotPredicted."""
    refuse_mtp(config, name)
    return preset_estimate(config.llama_presets[name], config.models_of(name), known, gpu)


def check(config: HostConfig) -> tuple[list[Problem], list[Unchecked]]:
    """The presets that do not fit, and those that cannot be checked. Nothing without a GPU's memory."""
    problems: list[Problem] = []
    unchecked: list[Unchecked] = []
    card = config.gpu_room
    if not card:
        return problems, unchecked
    known = models(config)
    for name, preset in config.llama_presets.items():
        names = config.models_of(name)
        try:
            taken = estimate_of(config, name, known)
        except NotPredicted as error:
            unchecked.append(Unchecked(name, str(error)))
            continue
        if taken.gpu.total <= card:
            continue
        found = list(changes(preset, names, known, card))
        use = taken.gpu
        problems.append(
            Problem(
                ("llama_presets", name, "context"),
                preset.context,
                f"the preset takes {gib(use.total)} of the GPU (weights {gib(use.weights)}, KV cache "
                f"{gib(use.cache)}, compute buffers {gib(use.compute)}); it has {gib(card)} for "
                "them (llama_presets_gpu_memory_mib without llama_presets_gpu_reserved_mib)",
                "write " + ", or ".join(change.text for change in found)
                if found
                else "choose a smaller model, or a smaller quantization of it",
            )
        )
    return problems, unchecked


def changes(preset: Preset, names: Sequence[str], known: Mapping[str, Model], card: int) -> Iterator[Change]:
    """For each key that helps, the smallest change of it alone that fits the preset into `card` bytes."""

    def taken(**keys: int | str) -> int:
        return preset_estimate(preset.model_copy(update=keys), names, known).gpu.total

    model = known[names[0]]
    if model.number("expert_count"):
        yield from _first("n_cpu_moe", range(preset.n_cpu_moe + 1, model.layers + 1), taken, card)
    step = CONTEXT_STEP * preset.parallel
    floor = AGENT_CONTEXT_FLOOR * preset.parallel if preset.agent else step
    yield from _first("context", range(preset.context - step, floor - 1, -step), taken, card)
    if preset.flash_attention and preset.kv_cache_type in KV_STEPS:
        smaller = KV_STEPS[KV_STEPS.index(preset.kv_cache_type) + 1 :]
        yield from _first("kv_cache_type", smaller, taken, card)
    if not model.number("expert_count"):
        most = min(preset.n_gpu_layers, model.layers + 1)
        yield from _first("n_gpu_layers", range(most - 1, -1, -1), taken, card)


def _first(key: str, values: Sequence[int | str], taken: Callable[..., int], card: int) -> Iterator[Change]:
    """The first of the values, each of which takes less than the one before, that fits."""
    if not values:
        return
    low, high = 0, len(values) - 1
    least = taken(**{key: values[high]})
    if least > card:
        return
    most = taken(**{key: values[low]})
    if most <= card:
        high, least = low, most
    # What a preset takes is nearly linear in each key: guessing by a straight line needs a few tries only.
    while high - low > 1:
        guess = low + round((high - low) * (most - card) / (most - least)) if most > least else low
        middle = min(max(guess, low + 1), high - 1)
        here = taken(**{key: values[middle]})
        if here <= card:
            high, least = middle, here
        else:
            low, most = middle, here
    yield Change(key, values[high], least)

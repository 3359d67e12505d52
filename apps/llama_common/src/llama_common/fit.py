"""Whether presets fit into the GPU's memory and the host's, and the smallest change with which one would.

Works on the facts of the lock alone: no file is read and no host is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from llama_common.draft import MTP
from llama_common.fields import AGENT_CONTEXT_FLOOR
from llama_common.memory import (
    CONTEXT_STEP,
    Estimate,
    NotPredicted,
    Settings,
    Use,
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
    """One key of a preset that makes it fit, and what it takes then of what was too small, in bytes."""

    key: str
    value: int | str
    taken: int

    @property
    def text(self) -> str:
        """`n_cpu_moe: 18 (15.2 GiB)`."""
        return f"{self.key}: {self.value} ({gib(self.taken)})"


Place = Literal["gpu", "cpu"]
PLACES: Final[Mapping[Place, tuple[str, str]]] = {
    "gpu": ("the GPU", "llama_presets_gpu"),
    "cpu": ("main memory", "llama_presets_main"),
}
"""What each is called, and how the keys begin that declare it."""


@dataclass(frozen=True)
class Room:
    """The bytes that presets may take of the GPU's memory and of the host's; 0: none, or nobody said."""

    gpu: int
    cpu: int = 0

    @classmethod
    def of(cls, config: HostConfig) -> Room:
        """That of a host."""
        return cls(config.gpu_room, config.main_room)

    def at(self, place: Place) -> int:
        """That of one place."""
        return self.gpu if place == "gpu" else self.cpu

    def lacking(self, taken: Estimate) -> list[Place]:
        """Where a preset does not fit."""
        return [place for place in PLACES if self.at(place) and use_of(taken, place).total > self.at(place)]


def use_of(taken: Estimate, place: Place) -> Use:
    """What a preset takes of one place."""
    return taken.gpu if place == "gpu" else taken.cpu


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
    """The presets that do not fit, and those that cannot be checked. Nothing where no memory is declared."""
    problems: list[Problem] = []
    unchecked: list[Unchecked] = []
    room = Room.of(config)
    if room == Room(0, 0):
        return problems, unchecked
    known = models(config)
    for name, preset in config.llama_presets.items():
        names = config.models_of(name)
        try:
            taken = estimate_of(config, name, known, gpu=bool(room.gpu))
        except NotPredicted as error:
            unchecked.append(Unchecked(name, str(error)))
            continue
        for place in room.lacking(taken):
            found = remedies(preset, names, known, room, place)
            problems.append(
                Problem(
                    ("llama_presets", name, "context"),
                    preset.context,
                    _excess(place, taken, room),
                    "write " + ", or ".join(found)
                    if found
                    else "choose a smaller model, or a smaller quantization of it",
                )
            )
    return problems, unchecked


def _excess(place: Place, taken: Estimate, room: Room) -> str:
    """What a preset takes, and what there is for it."""
    use, (called, key) = use_of(taken, place), PLACES[place]
    return (
        f"the preset takes {gib(use.total)} of {called} (weights {gib(use.weights)}, KV cache "
        f"{gib(use.cache)}, compute buffers {gib(use.compute)}); it has {gib(room.at(place))} for "
        f"them ({key}_memory_mib without {key}_reserved_mib)"
    )


def remedies(
    preset: Preset, names: Sequence[str], known: Mapping[str, Model], room: Room, place: Place
) -> list[str]:
    """What to write, each enough by itself: one key or, where no key alone is, one beside a smaller type of
    the KV cache, in the end with all experts in the CPU's memory.
    """
    before = room.lacking(preset_estimate(preset, names, known, bool(room.gpu)))
    for given in _given_up(preset, known[names[0]], place):
        smaller = preset.model_copy(update=given)
        if set(room.lacking(preset_estimate(smaller, names, known, bool(room.gpu)))) <= set(before):
            first = "".join(f"{key}: {value} and " for key, value in given.items())
            if found := [f"{first}{change.text}" for change in changes(smaller, names, known, room, place)]:
                return found
    return []


def _given_up(preset: Preset, model: Model, place: Place) -> Iterator[dict[str, int | str]]:
    """What is changed before one more key is looked for, the least first."""
    kinds = dict(_smaller(preset, model, place)).get("kv_cache_type", ())
    yield {}
    for kind in kinds:
        yield {"kv_cache_type": kind}
    if place == "gpu" and model.number("expert_count"):
        last: dict[str, int | str] = {"kv_cache_type": kinds[-1]} if kinds else {}
        yield {**last, "n_cpu_moe": model.layers}


def changes(
    preset: Preset, names: Sequence[str], known: Mapping[str, Model], room: Room, place: Place = "gpu"
) -> Iterator[Change]:
    """For each key that helps, the smallest change of it alone that fits the preset into one place.

    None that moves so much to the other one that it does not fit there.
    """

    def estimated(**keys: int | str) -> Estimate:
        return preset_estimate(preset.model_copy(update=keys), names, known, bool(room.gpu))

    def taken(**keys: int | str) -> int:
        return use_of(estimated(**keys), place).total

    before = room.lacking(estimated())
    for key, values in _smaller(preset, known[names[0]], place):
        for change in _first(key, values, taken, room.at(place)):
            if all(each in before for each in room.lacking(estimated(**{key: change.value}))):
                yield change


def _smaller(preset: Preset, model: Model, place: Place) -> Iterator[tuple[str, Sequence[int | str]]]:
    """Values of each key, each of which takes less of that place than the one before."""
    experts = bool(model.number("expert_count"))
    if experts:
        more = range(preset.n_cpu_moe + 1, model.layers + 1)
        fewer = range(min(preset.n_cpu_moe, model.layers) - 1, -1, -1)
        yield "n_cpu_moe", more if place == "gpu" else fewer
    step = CONTEXT_STEP * preset.parallel
    floor = AGENT_CONTEXT_FLOOR * preset.parallel if preset.agent else step
    yield "context", range(preset.context - step, floor - 1, -step)
    if preset.flash_attention and preset.kv_cache_type in KV_STEPS:
        yield "kv_cache_type", KV_STEPS[KV_STEPS.index(preset.kv_cache_type) + 1 :]
    most = min(preset.n_gpu_layers, model.layers + 1)
    if place == "gpu" and not experts:
        yield "n_gpu_layers", range(most - 1, -1, -1)
    if place == "cpu":
        yield "n_gpu_layers", range(most + 1, model.layers + 2)


def _first(key: str, values: Sequence[int | str], taken: Callable[..., int], room: int) -> Iterator[Change]:
    """The first of the values, each of which takes less than the one before, that fits."""
    if not values:
        return
    low, high = 0, len(values) - 1
    least = taken(**{key: values[high]})
    if least > room:
        return
    most = taken(**{key: values[low]})
    if most <= room:
        high, least = low, most
    # What a preset takes is nearly linear in each key: guessing by a straight line needs a few tries only.
    while high - low > 1:
        guess = low + round((high - low) * (most - room) / (most - least)) if most > least else low
        middle = min(max(guess, low + 1), high - 1)
        here = taken(**{key: values[middle]})
        if here <= room:
            high, least = middle, here
        else:
            low, most = middle, here
    yield Change(key, values[high], least)

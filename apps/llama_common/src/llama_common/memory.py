"""How much memory a preset takes on the GPU and on the CPU, from the header of its model alone.

Weights, KV cache and recurrent state are sums; compute buffers come from a dry run over the graph of one
batch. Sources, all of llama.cpp b11434: src/llama-model.cpp (which layer lies where), src/llama-kv-cache*.cpp
and src/llama-memory-recurrent.cpp (caches), src/llama-context.cpp (`sched_reserve`), src/llama-graph.cpp and
src/models/ (graphs). docs/benchmarks/memory.md compares the outcome with what llama-server logs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from llama_common.graph import CPU, Device, buffer_sizes
from llama_common.graphs import ARCHITECTURES, build
from llama_common.model import Model, layer_of

MIB: Final = 2**20
UBATCH: Final = 512
BATCH: Final = 2048
"""llama-server's defaults for --ubatch-size and --batch-size."""
CONTEXT_STEP: Final = 256
CUDA: Final = Device("GPU", alignment=128, takes_over=True)
RPC: Final = Device("GPU", alignment=64)
"""llama.cpp's RPC backend over a CPU server: the second device of the tests."""

_EXPERTS: Final = re.compile(r"^blk\.(\d+)\.ffn_(up|down|gate|gate_up)_(ch|)exps")
_EMBEDDING_TWICE: Final = ("gemma4",)
"""Their output layer is made before the embedding that it shares, and becomes a copy on the CPU as well."""
BATCH_FLAGS: Final = {"-ub": "ubatch", "--ubatch-size": "ubatch", "-b": "batch", "--batch-size": "batch"}
UNMODELLED_FLAGS: Final = frozenset(
    (
        "-ot", "--override-tensor", "-cmoe", "--cpu-moe", "-ncffn", "--n-cpu-ffn", "-nkvo", "--no-kv-offload",
        "-kvu", "--kv-unified", "--swa-full", "-sm", "--split-mode", "-ts", "--tensor-split", "-mg",
        "--main-gpu", "-dev", "--device", "--rpc", "--no-op-offload", "--embedding",
        "--embeddings", "--rerank", "--reranking", "--pooling", "--mmproj", "-mm", "--mmproj-url", "-mmu",
        "--lora", "--lora-scaled", "--control-vector", "--spec-type", "--no-host",
    )
)  # fmt: skip
"""Flags that move or add memory in ways that are not predicted here."""


class NotPredicted(Exception):
    """This model or these flags are beyond the predictor; the message is one line that names what."""


@dataclass(frozen=True)
class Settings:
    """The flags of llama-server that decide about memory. Context in tokens over all slots."""

    context: int
    kv_cache_type: str = "f16"
    n_gpu_layers: int = 99
    n_cpu_moe: int = 0
    parallel: int = 1
    flash_attention: bool = True
    batch: int = BATCH
    ubatch: int = UBATCH
    mixed: bool = True  # whether graphs have the inputs for text and embeddings in one batch, as b11434 has
    outputs: int | None = None  # tokens of a batch that get logits; None: one a slot, as llama-server

    @classmethod
    def of(cls, preset: Mapping[str, Any]) -> Settings:
        """The settings of a preset's keys, its extra_args among them. Raises NotPredicted."""
        values: dict[str, Any] = {}
        if preset.get("projector"):
            raise NotPredicted("the memory that pictures take (projector) is not predicted")
        items = list(preset.get("extra_args") or ())
        for index, item in enumerate(items):
            flag = item.partition("=")[0]
            if flag in UNMODELLED_FLAGS:
                raise NotPredicted(f"extra_args has {flag}, whose memory the header does not tell")
            if flag in BATCH_FLAGS and index + 1 < len(items) and items[index + 1].isdecimal():
                values[BATCH_FLAGS[flag]] = int(items[index + 1])
        keys = ("context", "kv_cache_type", "n_gpu_layers", "n_cpu_moe", "parallel", "flash_attention")
        values |= {key: preset[key] for key in keys if key in preset}
        return cls(**values)

    @property
    def slot_context(self) -> int:
        """Tokens of one slot, rounded up as llama.cpp does."""
        return -(-(self.context // self.parallel) // CONTEXT_STEP) * CONTEXT_STEP

    @property
    def tokens(self) -> int:
        """Tokens of the largest batch that is computed at once."""
        largest = min(self.slot_context * self.parallel, self.batch, self.ubatch)
        return -(-largest // self.parallel) * self.parallel


@dataclass(frozen=True)
class Use:
    """Bytes on one device."""

    weights: int = 0
    cache: int = 0  # KV cache and recurrent state
    compute: int = 0

    @property
    def total(self) -> int:
        """Their sum."""
        return self.weights + self.cache + self.compute

    def __add__(self, other: Use) -> Use:
        return Use(self.weights + other.weights, self.cache + other.cache, self.compute + other.compute)


@dataclass(frozen=True)
class Estimate:
    """What a preset takes."""

    gpu: Use = field(default_factory=Use)
    cpu: Use = field(default_factory=Use)

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(self.gpu + other.gpu, self.cpu + other.cpu)


def known(architecture: str) -> bool:
    """Whether models of this architecture can be predicted."""
    return architecture in ARCHITECTURES


def estimate(model: Model, settings: Settings, gpu: Device | None = CUDA) -> Estimate:
    """The memory of a model under these settings; `gpu` None on a machine without one.

    Raises NotPredicted, which names an architecture that is not known here.
    """
    if not known(model.architecture):
        raise NotPredicted(f"the architecture {model.architecture or '(none)'} is not known to the predictor")
    offloaded = 0 if gpu is None else settings.n_gpu_layers
    first = max(model.layers + 1 - offloaded, 0) if offloaded else model.layers + 1
    on_gpu = [layer >= first for layer in range(model.layers + 1)]
    weights = _weights(model, settings, on_gpu)
    try:
        graph, caches = build(
            model, settings, on_gpu, moe_on_cpu=settings.n_cpu_moe, with_gpu=gpu is not None
        )
    except KeyError as error:
        raise NotPredicted(f"the header lacks {error.args[0]}, which {model.architecture} needs") from None
    devices = [CPU] if gpu is None else [gpu, CPU]
    sizes = buffer_sizes(graph, devices)
    compute = (0, sizes[0]) if gpu is None else (sizes[0], sizes[1])
    return Estimate(*(Use(weights[place], caches[place], compute[place]) for place in (0, 1)))


def _weights(model: Model, settings: Settings, on_gpu: list[bool]) -> tuple[int, int]:
    """Bytes of weights on the GPU and on the CPU."""
    spare = model.layers - model.number("nextn_predict_layers")
    places = [0, 0]
    for name, weight in model.weights.items():
        layer = layer_of(name)
        if layer is not None and layer >= spare:
            continue  # it predicts further tokens, and is not loaded without that
        if layer is None:
            gpu = on_gpu[-1] and name.startswith("output")
            if name == "token_embd.weight" and "output.weight" not in model.weights:
                if on_gpu[-1]:
                    places[0] += weight.size  # the output layer reads a copy of it
                elif model.architecture in _EMBEDDING_TWICE:
                    places[1] += weight.size
        else:
            expert = _EXPERTS.match(name)
            gpu = on_gpu[layer] and not (expert and layer < settings.n_cpu_moe)
        if name == "rope_freqs.weight":
            gpu = on_gpu[0]
        places[0 if gpu else 1] += weight.size
    return places[0], places[1]

"""What of a GGUF header decides how much memory a model takes: small enough to stand in the lock file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from llama_common.gguf import Header, Length

_BLOCK: Final = re.compile(r"^blk\.(\d+)\.(.+)$")
_KEPT: Final = re.compile(
    r"\.(?:block_count|context_length|embedding_length(?:_per_layer_input)?|feed_forward_length|final_logit_softcapping|attention\.(?!layer_norm)"
    r"\S+|rope\.(?:dimension_count(?:_swa)?|scaling\.\S+)|expert_\S+|ssm\.\S+|full_attention_interval|"
    r"nextn_predict_layers|vocab_size)$"
)


@dataclass(frozen=True)
class Weight:
    """One tensor: the number of its type, its shape (the fastest dimension first) and its bytes."""

    type: int
    shape: tuple[int, ...]
    size: int


@dataclass(frozen=True)
class Model:
    """The architecture, the numbers of the metadata by their names without it, and every tensor by name."""

    architecture: str
    numbers: Mapping[str, Any]
    weights: Mapping[str, Weight]

    @classmethod
    def of(cls, headers: Sequence[Header]) -> Model:
        """The model of a file, or of the parts of a split one, the first part first."""
        first = headers[0]
        prefix = f"{first.architecture}."
        numbers = {
            key.removeprefix(prefix): value
            for key, value in first.metadata.items()
            if key.startswith(prefix) and _KEPT.search(key) and not isinstance(value, str | Length)
        }
        tokens = first.metadata.get("tokenizer.ggml.tokens")
        if isinstance(tokens, Length):
            numbers["vocab_size"] = tokens.items
        weights = {
            tensor.name: Weight(tensor.type, tensor.shape, tensor.size)
            for header in headers
            for tensor in header.tensors
        }
        return cls(first.architecture, numbers, weights)

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Model:
        """The inverse of `facts`."""
        weights = {}
        for pattern, runs in facts["tensors"].items():
            for kind, shape, size, first, count in runs:
                for layer in range(first, first + count):
                    name = pattern.replace("*", str(layer), 1)
                    weights[name] = Weight(kind, tuple(shape), size)
        return cls(facts["architecture"], dict(facts["numbers"]), weights)

    def facts(self) -> dict[str, Any]:
        """Plain data for the lock: layers with equal tensors are a run: type, shape, bytes, first, count."""
        runs: dict[str, list[list[Any]]] = {}
        for name, weight in sorted(self.weights.items(), key=lambda item: _place(item[0])):
            match = _BLOCK.match(name)
            pattern = f"blk.*.{match[2]}" if match else name
            layer = int(match[1]) if match else 0
            known = runs.setdefault(pattern, [])
            this = [weight.type, list(weight.shape), weight.size]
            if known and known[-1][:3] == this and known[-1][3] + known[-1][4] == layer:
                known[-1][4] += 1
            else:
                known.append([*this, layer, 1])
        numbers = {key: _shortened(value) for key, value in sorted(self.numbers.items())}
        return {"architecture": self.architecture, "numbers": numbers, "tensors": dict(sorted(runs.items()))}

    @cached_property
    def layers(self) -> int:
        """Transformer blocks, those that only predict further tokens included."""
        return int(self.numbers["block_count"])

    @cached_property
    def types(self) -> frozenset[int]:
        """The numbers of all tensor types in the file."""
        return frozenset(weight.type for weight in self.weights.values())

    def number(self, key: str, default: int = 0, *, layer: int = 0) -> int:
        """A number of the metadata; of a list, the one of the layer."""
        value = self.numbers.get(key, default)
        if isinstance(value, list):
            value = value[min(layer, len(value) - 1)] if value else default
        return int(value)

    def weight(self, layer: int, name: str) -> Weight | None:
        """The tensor `blk.<layer>.<name>`, or None."""
        return self.weights.get(f"blk.{layer}.{name}")


def layer_of(name: str) -> int | None:
    """The layer of a tensor; None of one that belongs to none."""
    match = _BLOCK.match(name)
    return int(match[1]) if match else None


def _place(name: str) -> tuple[str, int]:
    match = _BLOCK.match(name)
    return (match[2], int(match[1])) if match else (name, 0)


def _shortened(value: Any) -> Any:
    """A list of equal items as one of them."""
    if isinstance(value, list) and value and all(item == value[0] for item in value):
        return value[0]
    return value

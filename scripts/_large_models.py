"""GGUF files of the production models' shapes with random weights in Q4_K: as large, as slow, and nonsense.

What is measured with them is memory and speed, which depend on shapes and types and not on values; but for
experts, of which random weights choose all equally often.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from llama_common.model import Model, Weight

Q4_K, F32 = gguf.GGMLQuantizationType.Q4_K, gguf.GGMLQuantizationType.F32
BLOCK, BLOCK_BYTES = gguf.GGML_QUANT_SIZES[Q4_K]
ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT
TEMPLATE_BLOCKS = 1 << 16
# Of a Q4_K block (ggml-common.h, block_q4_K): value = d * scale * q - dmin * minimum, with q from 0 to 15.
# All scales and minimums are 32, in the packed form of six bits each, so that values are even around 0.
SCALES = bytes([160] * 8 + [0] * 4)
DEVIATION = 0.02
STEP = DEVIATION / (32 * 4.61)  # 4.61: standard deviation of the whole numbers from 0 to 15


@dataclass(frozen=True)
class Shape:
    """What decides a model's size and speed. `every` in `full` layers has attention, the others a state."""

    name: str
    architecture: str
    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    head: int
    words: int
    experts: int = 0
    used: int = 0
    expert_ffn: int = 0
    every: int = 1
    state: int = 0
    groups: int = 0
    state_heads: int = 0

    def scaled(self, layers: int) -> Shape:
        """The same with fewer layers."""
        return replace(self, layers=layers)


# config.json of Qwen3-30B-A3B, of Qwen3.5-27B (of Qwen3.6-27B alike), and of Qwen3-0.6B.
MOE = Shape("moe-30b-a3b", "qwen3moe", 48, 2048, 6144, 32, 4, 128, 151_936, 128, 8, 768)
DENSE = Shape(
    "dense-27b",
    "qwen35",
    64,
    5120,
    17_408,
    24,
    4,
    256,
    248_320,
    every=4,
    state=128,
    groups=16,
    state_heads=48,
)
DRAFT = Shape("draft-0.6b", "qwen3", 28, 1024, 3072, 16, 8, 128, DENSE.words)
TINY = (
    Shape("moe-tiny", "qwen3moe", 4, 256, 512, 4, 2, 64, 2048, 8, 2, 256),
    Shape("dense-tiny", "qwen35", 4, 256, 512, 4, 2, 64, 2048, every=4, state=64, groups=2, state_heads=4),
    Shape("draft-tiny", "qwen3", 2, 256, 512, 4, 2, 64, 2048),
)


def tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor with its dimensions, the fastest first."""
    yield "token_embd.weight", (shape.width, shape.words)
    yield "output_norm.weight", (shape.width,)
    yield "output.weight", (shape.width, shape.words)
    for index in range(shape.layers):
        attention = (index + 1) % shape.every == 0
        parts = {
            **(_attention if attention else _state)(shape),
            **(_experts if shape.experts else _ffn)(shape),
        }
        # The norm before the feed-forward part has another name beside a state.
        parts["post_attention_norm.weight" if shape.state else "ffn_norm.weight"] = (shape.width,)
        for name, dimensions in parts.items():
            yield f"blk.{index}.{name}", dimensions


def _attention(shape: Shape) -> dict[str, tuple[int, ...]]:
    query, cache = shape.heads * shape.head, shape.kv_heads * shape.head
    found: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (shape.width,),
        # Beside a state the query has a gate of the same size.
        "attn_q.weight": (shape.width, 2 * query if shape.state else query),
        "attn_k.weight": (shape.width, cache),
        "attn_v.weight": (shape.width, cache),
        "attn_output.weight": (query, shape.width),
        "attn_q_norm.weight": (shape.head,),
        "attn_k_norm.weight": (shape.head,),
    }
    return found


def _state(shape: Shape) -> dict[str, tuple[int, ...]]:
    values, keys = shape.state * shape.state_heads, shape.state * shape.groups
    return {
        "attn_norm.weight": (shape.width,),
        "attn_qkv.weight": (shape.width, 2 * keys + values),
        "attn_gate.weight": (shape.width, values),
        "ssm_conv1d.weight": (4, 2 * keys + values),
        "ssm_dt.bias": (shape.state_heads,),
        "ssm_a": (shape.state_heads,),
        "ssm_beta.weight": (shape.width, shape.state_heads),
        "ssm_alpha.weight": (shape.width, shape.state_heads),
        "ssm_norm.weight": (shape.state,),
        "ssm_out.weight": (values, shape.width),
    }


def _ffn(shape: Shape) -> dict[str, tuple[int, ...]]:
    return {
        "ffn_gate.weight": (shape.width, shape.ffn),
        "ffn_up.weight": (shape.width, shape.ffn),
        "ffn_down.weight": (shape.ffn, shape.width),
    }


def _experts(shape: Shape) -> dict[str, tuple[int, ...]]:
    return {
        "ffn_gate_inp.weight": (shape.width, shape.experts),
        "ffn_gate_exps.weight": (shape.width, shape.expert_ffn, shape.experts),
        "ffn_up_exps.weight": (shape.width, shape.expert_ffn, shape.experts),
        "ffn_down_exps.weight": (shape.expert_ffn, shape.width, shape.experts),
    }


def kind(name: str, dimensions: tuple[int, ...]) -> gguf.GGMLQuantizationType:
    """The type of a tensor: what is small, or no matrix, stays in F32 as in any quantized file."""
    narrow = len(dimensions) == 1 or name.endswith(("ssm_conv1d.weight", "ffn_gate_inp.weight"))
    return F32 if narrow or dimensions[0] % BLOCK else Q4_K


def size(dimensions: tuple[int, ...], of: gguf.GGMLQuantizationType) -> int:
    """Bytes of a tensor."""
    values, width = gguf.GGML_QUANT_SIZES[of]
    return math.prod(dimensions) // values * width


def weights(shape: Shape) -> int:
    """Bytes of all tensors of a model."""
    return sum(size(dimensions, kind(name, dimensions)) for name, dimensions in tensors(shape))


def model(shape: Shape) -> Model:
    """What the header of the file says, without the file."""
    found = {}
    for name, dimensions in tensors(shape):
        of = kind(name, dimensions)
        padded = -(-size(dimensions, of) // ALIGNMENT) * ALIGNMENT
        found[name] = Weight(int(of), dimensions, padded)
    return Model(shape.architecture, {**_numbers(shape), "vocab_size": shape.words}, found)


def write(shape: Shape, folder: Path, tell: Callable[[str], None] = lambda _: None) -> Path:
    """The model's file; one that is there already, whole, stays. Raises OSError."""
    path = folder / f"{shape.name}-{shape.layers}.gguf"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    tell(f"writing {path.name}, {weights(shape) / 1e9:.1f} GB")
    half = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(half, shape.architecture)
    _metadata(writer, shape)
    for name, dimensions in tensors(shape):
        of = kind(name, dimensions)
        shown = np.dtype(np.float32)  # with raw_dtype the shape is that of the values
        writer.add_tensor_info(name, dimensions[::-1], shown, size(dimensions, of), raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.default_rng(7)
    blocks = _blocks(random)
    for name, dimensions in tensors(shape):
        writer.write_tensor_data(_data(name, dimensions, kind(name, dimensions), blocks, random))
    writer.close()
    half.replace(path)
    return path


def _numbers(shape: Shape) -> dict[str, int]:
    """The metadata that decides about memory and speed."""
    numbers = {
        "context_length": 262_144,
        "block_count": shape.layers,
        "embedding_length": shape.width,
        "feed_forward_length": shape.ffn,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "attention.key_length": shape.head,
        "attention.value_length": shape.head,
        "rope.dimension_count": shape.head,
    }
    if shape.experts:
        numbers |= {
            "expert_count": shape.experts,
            "expert_used_count": shape.used,
            "expert_feed_forward_length": shape.expert_ffn,
        }
    if shape.state:
        numbers |= {
            "full_attention_interval": shape.every,
            "ssm.conv_kernel": 4,
            "ssm.inner_size": shape.state * shape.state_heads,
            "ssm.state_size": shape.state,
            "ssm.time_step_rank": shape.state_heads,
            "ssm.group_count": shape.groups,
            "rope.dimension_count": shape.head // 4,
        }
    return numbers


def _metadata(writer: gguf.GGUFWriter, shape: Shape) -> None:
    for key, value in _numbers(shape).items():
        writer.add_uint32(f"{shape.architecture}.{key}", value)
    if shape.state:
        part = shape.head // 8 // 3
        sections = [part, part, shape.head // 8 - 2 * part, 0]
        writer.add_array(f"{shape.architecture}.rope.dimension_sections", sections)
    writer.add_float32(f"{shape.architecture}.attention.layer_norm_rms_epsilon", 1e-6)
    words = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256))]
    words += [f"w{index}" for index in range(shape.words - len(words))]
    kinds = [2, 3, 3, *(6,) * 256]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * shape.words)
    writer.add_token_types(kinds + [1] * (shape.words - len(kinds)))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def _blocks(random: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Blocks of random weights, which a large tensor repeats."""
    blocks = np.empty((TEMPLATE_BLOCKS, BLOCK_BYTES), np.uint8)
    scale, minimum = np.float16(STEP), np.float16(7.5 * STEP)
    blocks[:, :4] = np.frombuffer(scale.tobytes() + minimum.tobytes(), np.uint8)
    blocks[:, 4:16] = np.frombuffer(SCALES, np.uint8)
    blocks[:, 16:] = random.integers(0, 256, (TEMPLATE_BLOCKS, BLOCK_BYTES - 16), np.uint8)
    return blocks.reshape(-1)


def _data(
    name: str,
    dimensions: tuple[int, ...],
    of: gguf.GGMLQuantizationType,
    blocks: npt.NDArray[np.uint8],
    random: np.random.Generator,
) -> npt.NDArray[np.uint8] | npt.NDArray[np.float32]:
    if of == Q4_K:
        return np.resize(blocks, size(dimensions, of))
    if name.endswith("norm.weight"):
        return np.ones(dimensions[::-1], np.float32)
    values = random.standard_normal(dimensions[::-1], np.float32) * np.float32(DEVIATION)
    return -np.abs(values) if name.endswith("ssm_a") else values  # a state decays

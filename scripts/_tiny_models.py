"""Tiny GGUF files with random weights, one of each architecture that the memory predictor knows.

Their shapes are small where nothing depends on it and telling where something does: grouped-query attention,
windows, two head sizes, experts, recurrent layers. The files load in llama-server and speak nonsense.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Shapes = dict[str, tuple[int, ...]]
WIDTH, HEADS, KV_HEADS, HEAD, FFN, LAYERS, WORDS = 512, 8, 4, 64, 1408, 6, 2048
EXPERTS, EXPERTS_USED, EXPERT_FFN = 8, 2, 320
ALIGNMENT = 32


def _dense(layer: str) -> Shapes:
    return {
        f"{layer}.attn_norm.weight": (WIDTH,),
        f"{layer}.attn_q.weight": (WIDTH, HEADS * HEAD),
        f"{layer}.attn_k.weight": (WIDTH, KV_HEADS * HEAD),
        f"{layer}.attn_v.weight": (WIDTH, KV_HEADS * HEAD),
        f"{layer}.attn_output.weight": (HEADS * HEAD, WIDTH),
        f"{layer}.ffn_norm.weight": (WIDTH,),
        **_ffn(layer),
    }


def _ffn(layer: str) -> Shapes:
    return {
        f"{layer}.ffn_gate.weight": (WIDTH, FFN),
        f"{layer}.ffn_up.weight": (WIDTH, FFN),
        f"{layer}.ffn_down.weight": (FFN, WIDTH),
    }


def _routed(layer: str) -> Shapes:
    return {
        f"{layer}.ffn_gate_inp.weight": (WIDTH, EXPERTS),
        f"{layer}.ffn_gate_exps.weight": (WIDTH, EXPERT_FFN, EXPERTS),
        f"{layer}.ffn_up_exps.weight": (WIDTH, EXPERT_FFN, EXPERTS),
        f"{layer}.ffn_down_exps.weight": (EXPERT_FFN, WIDTH, EXPERTS),
    }


def _head_norms(layer: str, size: int = HEAD) -> Shapes:
    return {f"{layer}.attn_q_norm.weight": (size,), f"{layer}.attn_k_norm.weight": (size,)}


def _llama(layer: str, _: int) -> Shapes:
    return _dense(layer)


def _qwen2(layer: str, _: int) -> Shapes:
    sizes = {"q": HEADS * HEAD, "k": KV_HEADS * HEAD, "v": KV_HEADS * HEAD}
    return _dense(layer) | {f"{layer}.attn_{name}.bias": (size,) for name, size in sizes.items()}


def _qwen3(layer: str, _: int) -> Shapes:
    return _dense(layer) | _head_norms(layer)


def _qwen3moe(layer: str, _: int) -> Shapes:
    dense = {name: shape for name, shape in _dense(layer).items() if name not in _ffn(layer)}
    return dense | _head_norms(layer) | _routed(layer)


def _gemma3(layer: str, _: int) -> Shapes:
    after = {f"{layer}.post_attention_norm.weight": (WIDTH,), f"{layer}.post_ffw_norm.weight": (WIDTH,)}
    return _dense(layer) | _head_norms(layer) | after


def _gemma4(layer: str, index: int) -> Shapes:
    size = HEAD if index % 3 < 2 else 2 * HEAD
    shapes = _gemma3(layer, index) | _head_norms(layer, size)
    shapes[f"{layer}.attn_q.weight"] = (WIDTH, HEADS * size)
    shapes[f"{layer}.attn_output.weight"] = (HEADS * size, WIDTH)
    for name in "kv":
        shapes[f"{layer}.attn_{name}.weight"] = (WIDTH, KV_HEADS * size)
    names = (
        "pre_ffw_norm_2.weight",
        "post_ffw_norm_1.weight",
        "post_ffw_norm_2.weight",
        "ffn_gate_inp.scale",
    )
    return shapes | _routed(layer) | {f"{layer}.{name}": (WIDTH,) for name in names}


def _gpt_oss(layer: str, index: int) -> Shapes:
    shapes = {name: shape for name, shape in _qwen2(layer, index).items() if name not in _ffn(layer)}
    del shapes[f"{layer}.ffn_norm.weight"]
    shapes |= _routed(layer)
    for name, size in (("gate", EXPERT_FFN), ("up", EXPERT_FFN), ("down", WIDTH)):
        shapes[f"{layer}.ffn_{name}_exps.bias"] = (size, EXPERTS)
    return shapes | {
        f"{layer}.ffn_gate_inp.bias": (EXPERTS,),
        f"{layer}.attn_output.bias": (WIDTH,),
        f"{layer}.attn_sinks.weight": (HEADS,),
        f"{layer}.post_attention_norm.weight": (WIDTH,),
    }


STATE, GROUPS, NET_HEADS, KERNEL = 64, 4, 8, 4


def _qwen35(layer: str, index: int) -> Shapes:
    shapes = _ffn(layer) | {
        f"{layer}.attn_norm.weight": (WIDTH,),
        f"{layer}.post_attention_norm.weight": (WIDTH,),
    }
    if (index + 1) % 3 == 0:
        return (
            shapes
            | _head_norms(layer)
            | {
                f"{layer}.attn_q.weight": (WIDTH, 2 * HEADS * HEAD),
                f"{layer}.attn_k.weight": (WIDTH, KV_HEADS * HEAD),
                f"{layer}.attn_v.weight": (WIDTH, KV_HEADS * HEAD),
                f"{layer}.attn_output.weight": (HEADS * HEAD, WIDTH),
            }
        )
    values, keys = STATE * NET_HEADS, STATE * GROUPS
    return shapes | {
        f"{layer}.attn_qkv.weight": (WIDTH, 2 * keys + values),
        f"{layer}.attn_gate.weight": (WIDTH, values),
        f"{layer}.ssm_conv1d.weight": (KERNEL, 2 * keys + values),
        f"{layer}.ssm_dt.bias": (NET_HEADS,),
        f"{layer}.ssm_a": (NET_HEADS,),
        f"{layer}.ssm_beta.weight": (WIDTH, NET_HEADS),
        f"{layer}.ssm_alpha.weight": (WIDTH, NET_HEADS),
        f"{layer}.ssm_norm.weight": (STATE,),
        f"{layer}.ssm_out.weight": (values, WIDTH),
    }


_EXPERT_KEYS = {
    "expert_count": EXPERTS,
    "expert_used_count": EXPERTS_USED,
    "expert_feed_forward_length": EXPERT_FFN,
}
ARCHITECTURES: dict[str, tuple[Callable[[str, int], Shapes], Mapping[str, Any]]] = {
    "llama": (_llama, {}),
    "qwen2": (_qwen2, {}),
    "qwen3": (_qwen3, {}),
    "qwen3moe": (_qwen3moe, _EXPERT_KEYS),
    "gemma3": (_gemma3, {"attention.sliding_window": 512}),
    "gemma4": (
        _gemma4,
        {
            **_EXPERT_KEYS,
            "attention.sliding_window": 512,
            "attention.sliding_window_pattern": [True, True, False] * 2,
            "attention.shared_kv_layers": 0,
            "attention.key_length": 2 * HEAD,
            "attention.value_length": 2 * HEAD,
            "attention.key_length_swa": HEAD,
            "attention.value_length_swa": HEAD,
            "rope.dimension_count": 2 * HEAD,
            "rope.dimension_count_swa": HEAD,
            "embedding_length_per_layer_input": 0,
        },
    ),
    "gpt-oss": (_gpt_oss, {**_EXPERT_KEYS, "attention.sliding_window": 128}),
    "qwen35": (
        _qwen35,
        {
            "full_attention_interval": 3,
            "ssm.conv_kernel": KERNEL,
            "ssm.inner_size": STATE * NET_HEADS,
            "ssm.state_size": STATE,
            "ssm.time_step_rank": NET_HEADS,
            "ssm.group_count": GROUPS,
            "rope.dimension_sections": [8, 8, 8, 8],
            "rope.dimension_count": HEAD,
        },
    ),
}


def write(architecture: str, folder: Path, *, weights: bool = True) -> Path:
    """The file of one architecture, at most 100 MB of F16; the same bytes every time.

    Without `weights` it has a hole in their place: enough to read the header.
    """
    shapes_of, keys = ARCHITECTURES[architecture]
    path = folder / f"tiny-{architecture}.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    numbers = {
        "context_length": 1_048_576,
        "block_count": LAYERS,
        "embedding_length": WIDTH,
        "feed_forward_length": FFN,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": HEAD,
        "attention.value_length": HEAD,
        "rope.dimension_count": HEAD,
        **keys,
    }
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-6)
    for key, value in numbers.items():
        name = f"{architecture}.{key}"
        if isinstance(value, list):
            writer.add_array(name, value)
        else:
            writer.add_uint32(name, value)
    _vocabulary(writer)
    random = np.random.default_rng(7)
    shapes: Shapes = {"token_embd.weight": (WIDTH, WORDS), "output_norm.weight": (WIDTH,)}
    if architecture not in ("gemma3", "gemma4"):
        shapes["output.weight"] = (WIDTH, WORDS)
    if architecture == "gemma4":
        shapes["rope_freqs.weight"] = (HEAD,)
    for index in range(LAYERS):
        shapes |= shapes_of(f"blk.{index}", index)
    hole = 0
    for name, shape in shapes.items():
        narrow = len(shape) == 1 or name.endswith((".bias", "ssm_conv1d.weight", "ffn_gate_inp.weight"))
        kind = np.dtype(np.float32 if narrow else np.float16)
        if weights:
            data = random.standard_normal(shape[::-1], dtype=np.float32) * np.float32(0.05)
            writer.add_tensor(name, data.astype(kind))
        else:
            size = math.prod(shape) * kind.itemsize
            writer.add_tensor_info(name, shape[::-1], kind, size)
            hole += -(-size // ALIGNMENT) * ALIGNMENT
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    if weights:
        writer.write_tensors_to_file()
    else:
        writer.write_ti_data_to_file()
    writer.close()
    if not weights:
        with path.open("r+b") as file:
            end = file.seek(0, 2)
            file.truncate(-(-end // ALIGNMENT) * ALIGNMENT + hole)
    return path


def write_large(folder: Path) -> Path:
    """A file of 17 GB on paper: the header of a Qwen 3 MoE 30B in Q4_K with a whole vocabulary, and a hole.

    Shapes: config.json of Qwen3-30B-A3B (48 layers, width 2048, 128 experts of 768, 151,936 tokens).
    """
    path = folder / "large.gguf"
    writer = gguf.GGUFWriter(path, "qwen3moe")
    numbers = {
        "context_length": 262_144,
        "block_count": 48,
        "embedding_length": 2048,
        "feed_forward_length": 6144,
        "attention.head_count": 32,
        "attention.head_count_kv": 4,
        "attention.key_length": 128,
        "attention.value_length": 128,
        "expert_count": 128,
        "expert_used_count": 8,
        "expert_feed_forward_length": 768,
    }
    for key, value in numbers.items():
        writer.add_uint32(f"qwen3moe.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"token {index:06d}" for index in range(151_936)])
    writer.add_token_merges([f"pair{index:06d} of{index:06d}" for index in range(151_387)])
    layer = {
        **dict.fromkeys(("attn_norm", "ffn_norm"), (2048,)),
        **dict.fromkeys(("attn_q_norm", "attn_k_norm"), (128,)),
        "attn_q": (2048, 4096),
        "attn_k": (2048, 512),
        "attn_v": (2048, 512),
        "attn_output": (4096, 2048),
        "ffn_gate_inp": (2048, 128),
        "ffn_down_exps": (768, 2048, 128),
        **dict.fromkeys(("ffn_gate_exps", "ffn_up_exps"), (2048, 768, 128)),
    }
    shapes: Shapes = {"token_embd.weight": (2048, 151_936), "output.weight": (2048, 151_936)}
    shapes["output_norm.weight"] = (2048,)
    for index in range(48):
        shapes |= {f"blk.{index}.{name}.weight": shape for name, shape in layer.items()}
    hole = 0
    for name, shape in shapes.items():
        small = len(shape) == 1 or "gate_inp" in name
        kind = gguf.GGMLQuantizationType.F32 if small else gguf.GGMLQuantizationType.Q4_K
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        size = math.prod(shape) // block * block_bytes
        writer.add_tensor_info(name, shape[::-1], np.dtype(np.float32), size, raw_dtype=kind)
        hole += -(-size // ALIGNMENT) * ALIGNMENT
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        end = file.seek(0, 2)
        file.truncate(-(-end // ALIGNMENT) * ALIGNMENT + hole)
    return path


def write_draft(model: Path, folder: Path) -> Path:
    """A file of some megabytes with random weights and the tokenizer of `model`: its draft, and a bad one."""
    path = folder / "tiny-draft.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    width, heads, ffn = 64, 2, 128
    numbers = {
        "context_length": 1_048_576,
        "block_count": 1,
        "embedding_length": width,
        "feed_forward_length": ffn,
        "attention.head_count": heads,
        "attention.head_count_kv": heads,
        "rope.dimension_count": width // heads,
    }
    for key, value in numbers.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-6)
    words = 0
    for field in gguf.GGUFReader(model).fields.values():
        if not field.name.startswith("tokenizer."):
            continue
        value = field.contents()
        words = len(value) if field.name == "tokenizer.ggml.tokens" else words
        kind, *sub = field.types
        writer.add_key_value(field.name, value, kind, sub[-1] if sub else None)
    square = (width, width)
    shapes: Shapes = {
        "token_embd.weight": (width, words),
        "output_norm.weight": (width,),
        **dict.fromkeys(("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight"), (width,)),
        **{f"blk.0.attn_{name}.weight": square for name in ("q", "k", "v", "output")},
        **{f"blk.0.ffn_{name}.weight": (width, ffn) for name in ("gate", "up")},
        "blk.0.ffn_down.weight": (ffn, width),
    }
    random = np.random.default_rng(7)
    for name, shape in shapes.items():
        data = random.standard_normal(shape[::-1], dtype=np.float32) * np.float32(0.05)
        writer.add_tensor(name, data.astype(np.float32 if len(shape) == 1 else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _vocabulary(writer: gguf.GGUFWriter) -> None:
    """A byte-level vocabulary without merges."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256))]
    words += [f"w{index}" for index in range(WORDS - len(words))]
    kinds = [2, 3, 3, *(6,) * 256]
    kinds += [1] * (WORDS - len(kinds))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * WORDS)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)

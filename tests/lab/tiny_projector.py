"""A multimodal projector with random weights: it lets a real llama-server take pictures for a text model.

What the model sees through it is noise, and its answers are nonsense. The protocol and the server are real.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

WIDTH, HEADS, FFN, LAYERS, PATCH, SIZE = 64, 2, 128, 2, 28, 224


def write(path: Path, embedding: int) -> Path:
    """The file, for a model whose embeddings have this length; the same bytes every time."""
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_bool("clip.use_gelu", True)
    writer.add_string("clip.projector_type", "mlp")
    for key, value in {
        "image_size": SIZE,
        "patch_size": PATCH,
        "embedding_length": WIDTH,
        "feed_forward_length": FFN,
        "block_count": LAYERS,
        "projection_dim": embedding,
        "attention.head_count": HEADS,
    }.items():
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    for key in ("image_mean", "image_std"):
        writer.add_array(f"clip.vision.{key}", [0.5, 0.5, 0.5])
    shapes: dict[str, tuple[int, ...]] = {
        "v.patch_embd.weight": (WIDTH, 3, PATCH, PATCH),
        "v.position_embd.weight": ((SIZE // PATCH) ** 2, WIDTH),
        "mm.0.weight": (embedding, WIDTH),
        "mm.0.bias": (embedding,),
        "mm.2.weight": (embedding, embedding),
        "mm.2.bias": (embedding,),
    }
    for index in range(LAYERS):
        layer = f"v.blk.{index}"
        for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
            shapes |= {f"{layer}.{name}.weight": (WIDTH, WIDTH), f"{layer}.{name}.bias": (WIDTH,)}
        for name in ("ln1", "ln2"):
            shapes |= {f"{layer}.{name}.weight": (WIDTH,), f"{layer}.{name}.bias": (WIDTH,)}
        shapes |= {f"{layer}.ffn_up.weight": (FFN, WIDTH), f"{layer}.ffn_up.bias": (FFN,)}
        shapes |= {f"{layer}.ffn_down.weight": (WIDTH, FFN), f"{layer}.ffn_down.bias": (WIDTH,)}
    random = np.random.default_rng(7)
    for name, shape in shapes.items():
        writer.add_tensor(name, random.standard_normal(shape, dtype=np.float32) * np.float32(0.02))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

"""The graph of one batch for each architecture that is known here, in the order in which llama.cpp builds it.

Source: src/llama-graph.cpp and src/models/*.cpp of llama.cpp b11434.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

from llama_common.graph import Graph, Tensor
from llama_common.model import Model, Weight

if TYPE_CHECKING:
    from llama_common.memory import Settings

KV_TYPE_BYTES: Final = {
    "f32": (1, 4), "f16": (1, 2), "bf16": (1, 2), "q8_0": (32, 34), "q4_0": (32, 18), "q4_1": (32, 20),
    "iq4_nl": (32, 18), "q5_0": (32, 22), "q5_1": (32, 24),
}  # fmt: skip
"""Items and bytes of one block of a KV cache type (ggml-common.h)."""

_GPU, _CPU = 0, 1
_ROTATED: Final = 64


class Builder:
    """A graph under construction, with the model's numbers at hand."""

    def __init__(
        self, model: Model, settings: Settings, on_gpu: list[bool], *, moe_on_cpu: int, with_gpu: bool
    ) -> None:
        self.model = model
        self.settings = settings
        self.graph = Graph()
        self.caches = [0, 0]
        self.moe_on_cpu = moe_on_cpu
        self.with_gpu = with_gpu
        self.on_gpu = on_gpu
        self.tokens = settings.tokens
        self.slots = settings.parallel
        self.outputs = min(self.tokens, settings.parallel if settings.outputs is None else settings.outputs)
        self.layers = model.layers - model.number("nextn_predict_layers")
        self.width = int(model.numbers["embedding_length"])
        self._weights: dict[str, Tensor | None] = {}
        # With fewer layers on the GPU than there are, norms stay where the scheduler puts them.
        self._norms_fixed = with_gpu and all(on_gpu)

    # -- the model's numbers

    def heads(self, layer: int) -> int:
        return self.model.number("attention.head_count", layer=layer)

    def kv_heads(self, layer: int) -> int:
        return self.model.number("attention.head_count_kv", self.heads(layer), layer=layer)

    def head_size(self, layer: int, kind: str = "key") -> int:
        full = self.model.number(f"attention.{kind}_length", self.width // max(1, self.heads(0)))
        return self.model.number(f"attention.{kind}_length_swa", full) if self.sliding(layer) else full

    def sliding(self, layer: int) -> bool:
        """Whether a layer looks back over a window only."""
        pattern = SLIDING.get(self.model.architecture)
        if pattern is None or not self.model.number("attention.sliding_window") or layer >= self.layers:
            return False
        given = self.model.numbers.get("attention.sliding_window_pattern", pattern)
        if isinstance(given, list):
            return layer < len(given) and bool(given[layer])
        if isinstance(given, bool):
            return given
        return bool(given == 0 or layer % given < given - 1)

    def device(self, layer: int) -> int:
        return _GPU if self.with_gpu and self.on_gpu[layer] else (_CPU if self.with_gpu else 0)

    @property
    def cpu(self) -> int:
        return _CPU if self.with_gpu else 0

    # -- weights

    def weight(self, name: str, layer: int | None = None) -> Tensor | None:
        """A tensor of the model, on its device; None where the model has none."""
        full = name if layer is None else f"blk.{layer}.{name}"
        if full not in self._weights:
            found = self.model.weights.get(full)
            self._weights[full] = None if found is None else self._placed(found, full, layer)
        return self._weights[full]

    def needed(self, name: str, layer: int | None = None) -> Tensor:
        """The same. Raises KeyError where the model has none."""
        found = self.weight(name, layer)
        if found is None:
            raise KeyError(name if layer is None else f"blk.{layer}.{name}")
        return found

    def _placed(self, weight: Weight, name: str, layer: int | None) -> Tensor:
        if layer is None:
            device = self.cpu if name.startswith("token_embd") else self.device(-1)
        else:
            expert = "exps." in name
            device = self.cpu if expert and layer < self.moe_on_cpu else self.device(layer)
        return self.graph.weight(weight.shape, weight.size, device, on_host=True)

    def output_weight(self) -> Tensor:
        """The output layer, which may read the token embedding."""
        found = self.weight("output.weight")
        if found is not None:
            return found
        shared = self.model.weights["token_embd.weight"]
        return self.graph.weight(shared.shape, shared.size, self.device(-1), on_host=True)

    # -- pieces of graphs

    def norm(self, x: Tensor, name: str | None, layer: int | None = None) -> Tensor:
        """RMS norm, with its weight where the model has one."""
        weight = self.weight(name, layer) if name else None
        x = self.graph.elementwise("rms_norm", x)
        if weight is None:
            return x
        if layer is not None and self._norms_fixed:
            x.device = self.device(layer)
        return self.graph.elementwise("mul", x, weight)

    def add_bias(self, x: Tensor, name: str, layer: int) -> Tensor:
        bias = self.weight(name, layer)
        return x if bias is None else self.graph.elementwise("add", x, bias)

    def linear(self, x: Tensor, name: str, layer: int) -> Tensor:
        """x times `name`.weight, plus `name`.bias where there is one."""
        return self.add_bias(
            self.graph.matmul(self.needed(f"{name}.weight", layer), x), f"{name}.bias", layer
        )

    def embed(self, scaled: bool = False) -> Tensor:
        """The rows of the token embedding. Inputs that a text does not use are in the graph all the same."""
        graph, table = self.graph, self.needed("token_embd.weight")
        ids = graph.input((self.tokens,))
        raw = graph.input((self.width, self.tokens))
        rows = graph.op("get_rows", (self.width, self.tokens), table, ids)
        if not self.settings.mixed:
            for choice in (rows, raw):
                graph.expand(choice)
            return graph.expand(graph.elementwise("scale", rows) if scaled else rows)
        mixed_ids = graph.input((self.tokens,))
        mixed_slots = graph.input((self.tokens,), 8)
        mixed = graph.input((self.width, self.tokens))
        copy = graph.elementwise("dup", mixed)
        mixed_rows = graph.op("get_rows", (self.width, self.tokens), table, mixed_ids)
        blended = graph.view(copy, copy.shape, None, mixed_rows, mixed_slots, op="set_rows")
        for choice in (rows, raw, blended):
            graph.expand(choice)
        if scaled:
            rows = graph.elementwise("mul", rows, graph.input((1, self.tokens)))
        return graph.expand(rows)

    def ffn(self, x: Tensor, layer: int) -> Tensor:
        """The gated feed-forward block."""
        up = self.linear(x, "ffn_up", layer)
        gate = self.linear(x, "ffn_gate", layer)
        return self.linear(self.graph.op("glu", gate.shape, gate, up), "ffn_down", layer)

    def experts(
        self,
        x: Tensor,
        layer: int,
        logits: Tensor | None = None,
        *,
        normalized: bool = True,
        late_softmax: bool = False,
    ) -> Tensor:
        """The mixture of experts."""
        graph, tokens = self.graph, self.tokens_of(x)
        count = int(self.model.numbers["expert_count"])
        used = self.model.number("expert_used_count", layer=layer)
        if logits is None:
            logits = self.linear(x, "ffn_gate_inp", layer)
        probabilities = logits if late_softmax else graph.elementwise("soft_max", logits)
        order = graph.op("argsort", (count, tokens), probabilities)
        chosen = graph.view(order, (used, tokens), (*order.strides[:1], order.strides[1], *order.strides[2:]))
        weights = graph.op(
            "get_rows", (1, used, tokens), graph.reshape(probabilities, 1, count, tokens), chosen
        )
        if late_softmax:
            flat = graph.elementwise("soft_max", graph.reshape(weights, used, tokens))
            weights = graph.reshape(flat, 1, used, tokens)
        if normalized:
            flat = graph.reshape(weights, used, tokens)
            sums = graph.elementwise("clamp", graph.op("sum_rows", (1, tokens), flat))
            weights = graph.reshape(graph.elementwise("div", flat, sums), 1, used, tokens)
        scale = self.model.numbers.get("expert_weights_scale")
        if scale not in (None, 0.0, 1.0):
            weights = graph.elementwise("scale", weights)
        graph.expand(weights)
        x = graph.reshape(x, self.width, 1, tokens)

        def apply(name: str, of: Tensor) -> Tensor:
            table = self.needed(f"{name}.weight", layer)
            result = graph.op("mul_mat_id", (table.shape[1], used, tokens), table, of, chosen)
            bias = self.weight(f"{name}.bias", layer)
            return result if bias is None else graph.elementwise("add_id", result, bias, chosen)

        if self.weight("ffn_gate_up_exps.weight", layer) is not None:
            both = apply("ffn_gate_up_exps", x)
            half = (both.shape[0] // 2, *both.shape[1:])
            gate, up = graph.view(both, half, both.strides), graph.view(both, half, both.strides)
        else:
            up = apply("ffn_up_exps", x)
            gate = apply("ffn_gate_exps", x)
        result = apply("ffn_down_exps", graph.op("glu", gate.shape, gate, up))
        result = graph.expand(graph.elementwise("mul", result, weights))
        parts = [
            graph.expand(
                graph.view(result, (self.width, tokens), (4, result.strides[2], *(result.strides[3],) * 2))
            )
            for _ in range(used)
        ]
        combined = parts[0]
        for part in parts[1:]:
            combined = graph.expand(graph.op("add", (self.width, tokens), combined, part))
        return combined if used > 1 else graph.elementwise("cont", combined)

    def tokens_of(self, x: Tensor) -> int:
        return x.shape[1]

    def outputs_of(self, x: Tensor, ids: Tensor) -> Tensor:
        """The rows of the tokens that get logits."""
        return self.graph.op("get_rows", (x.shape[0], self.outputs), x, ids)

    def finish(self, logits: Tensor) -> None:
        """The softcap of the logits, where the model has one, and the end of the graph."""
        logits.is_output = True
        self.graph.expand(logits)


class Attention:
    """The caches and inputs of attention, shared by all layers of the same kind."""

    def __init__(self, builder: Builder, layers: Iterable[int], *, sliding: bool = False) -> None:
        self.builder = builder
        settings, model, graph = builder.settings, builder.model, builder.graph
        self.sliding = sliding
        self.layers = list(layers)
        cells = settings.slot_context
        if sliding:
            cells = min(cells, -(-(model.number("attention.sliding_window") + settings.tokens) // 256) * 256)
        self.cells = cells
        flash = settings.flash_attention
        tokens, slots = builder.tokens, builder.slots
        per_block, block_bytes = KV_TYPE_BYTES[settings.kv_cache_type]
        largest_value = max(
            (builder.kv_heads(i) * builder.head_size(i, "value") for i in range(model.layers)), default=0
        )
        self.store: dict[int, tuple[Tensor, Tensor]] = {}
        for layer in self.layers:
            keys = builder.kv_heads(layer) * builder.head_size(layer)
            values = builder.kv_heads(layer) * builder.head_size(layer, "value") if flash else largest_value
            place = builder.device(layer)
            for items in (keys, values):
                builder.caches[_GPU if builder.with_gpu and place == _GPU else _CPU] += (
                    items * cells * slots * block_bytes // per_block
                )
            self.store[layer] = (
                graph.store((keys, cells, slots), block_bytes / per_block, place),
                graph.store((values, cells, slots), block_bytes / per_block, place),
            )
        self.key_ids = graph.input((tokens,), 8)
        self.value_ids = graph.input((tokens if flash else tokens * largest_value,), 8)
        self.mask = graph.input((cells, tokens // slots, 1, slots), 2 if flash else 4)
        self.key_turn, self.value_turn = self._turns(per_block > 1)

    def _turns(self, quantized: bool) -> tuple[Tensor | None, Tensor | None]:
        """Quantized caches hold keys and values turned by a Hadamard matrix, where the heads' size allows."""
        builder = self.builder
        turns: list[Tensor | None] = []
        for kind in ("key", "value"):
            sizes = {builder.head_size(layer, kind) for layer in self.layers}
            full = builder.model.number(f"attention.{kind}_length", builder.width // max(1, builder.heads(0)))
            if not quantized or len(sizes) != 1 or full % _ROTATED:
                turns.append(None)
                continue
            side, size = _ROTATED, sizes.pop()
            while kind == "key" and size % (2 * side) == 0:
                side *= 2
            turns.append(builder.graph.input((side, side)))
        return turns[0], turns[1]

    def _turned(self, x: Tensor, turn: Tensor | None) -> Tensor:
        if turn is None:
            return x
        graph, side = self.builder.graph, turn.shape[0]
        count = x.shape[0] * x.shape[1] * x.shape[2] * x.shape[3]
        flat = graph.reshape(x, side, count // side)
        return graph.reshape(graph.op("mul_mat", flat.shape, turn, flat), *x.shape)

    def apply(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, layer: int, *, cache_of: int | None = None
    ) -> Tensor:
        """Store keys and values, attend. Returns [heads x head size, tokens]."""
        builder, graph = self.builder, self.builder.graph
        slots, tokens = builder.slots, builder.tokens
        flash = builder.settings.flash_attention
        q = self._turned(q, self.key_turn)
        k = None if k is None else self._turned(k, self.key_turn)
        v = None if v is None else self._turned(v, self.value_turn)
        graph.expand(q)
        for tensor in (k, v) if self.builder.model.architecture in SLIDING else (v, k):
            if tensor is not None:
                graph.expand(tensor)
        keys, values = self.store[layer if cache_of is None else cache_of]
        if k is not None:
            rows = graph.view(
                k, (k.shape[0] * k.shape[1], tokens), (4, k.strides[2], *(k.strides[2] * tokens,) * 2)
            )
            graph.expand(graph.view(keys, keys.shape, keys.strides, rows, self.key_ids, op="set_rows"))
        if v is not None:
            if flash:
                rows = graph.view(
                    v, (v.shape[0] * v.shape[1], tokens), (4, v.strides[2], *(v.strides[2] * tokens,) * 2)
                )
            else:
                rows = graph.reshape(v, 1, v.shape[0] * v.shape[1] * tokens)
            graph.expand(
                graph.view(values, values.shape, values.strides, rows, self.value_ids, op="set_rows")
            )
        heads, kv_heads = builder.heads(layer), builder.kv_heads(layer)
        size, value_size = builder.head_size(layer), builder.head_size(layer, "value")
        part = tokens // slots
        q = graph.view(
            q, (size, heads, part, slots), (q.strides[0], q.strides[1], q.strides[2], q.strides[2] * part)
        )
        q = graph.permute(q, 0, 2, 1, 3)
        k_all = graph.permute(graph.view(keys, (size, kv_heads, self.cells, slots)), 0, 2, 1, 3)
        v_all = graph.permute(graph.view(values, (value_size, kv_heads, self.cells, slots)), 0, 2, 1, 3)
        if flash:
            sinks = builder.weight("attn_sinks.weight", layer)
            operands = [q, k_all, v_all, self.mask, *([sinks] if sinks else [])]
            result = graph.op("flash_attn", (value_size, heads, part, slots), *operands)
            result = graph.reshape(result, value_size * heads, tokens)
        else:
            scores = graph.op("mul_mat", (self.cells, part, heads, slots), k_all, q)
            scores = graph.op("soft_max", scores.shape, scores, self.mask)
            mixed = graph.op("mul_mat", (value_size, part, heads, slots), v_all, scores)
            result = graph.op("cont", (value_size * heads, tokens), graph.permute(mixed, 0, 2, 1, 3))
        graph.expand(result)
        return self._turned(result, self.value_turn)


def _by_kind(builder: Builder, layers: int) -> tuple[Attention, Attention]:
    """Attention over everything, and over a window, for the first `layers` layers."""
    kinds = [
        [layer for layer in range(layers) if builder.sliding(layer) == sliding] for sliding in (False, True)
    ]
    return Attention(builder, kinds[0]), Attention(builder, kinds[1], sliding=True)


def _project(builder: Builder, x: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values by head; the biases, where there are any, are in."""
    graph, tokens = builder.graph, builder.tokens
    size, value_size = builder.head_size(layer), builder.head_size(layer, "value")
    heads, kv_heads = builder.heads(layer), builder.kv_heads(layer)
    q, k, v = (builder.linear(x, f"attn_{name}", layer) for name in "qkv")
    return (
        graph.reshape(q, size, heads, tokens),
        graph.reshape(k, size, kv_heads, tokens),
        graph.reshape(v, value_size, kv_heads, tokens),
    )


def _rope(builder: Builder, x: Tensor, positions: Tensor, factors: Tensor | None = None) -> Tensor:
    return builder.graph.elementwise("rope", x, positions, *([factors] if factors else []))


def _start(builder: Builder, *, scaled: bool = False) -> tuple[Tensor, Tensor]:
    return builder.embed(scaled), builder.graph.input(
        (builder.tokens * _POSITIONS.get(builder.model.architecture, 1),)
    )


def decoder(builder: Builder) -> None:
    """Llama, Mistral, Qwen 2, Qwen 3, Qwen 3 MoE: they differ in biases, norms of the heads, and experts."""
    graph = builder.graph
    x, positions = _start(builder)
    attention = Attention(builder, range(builder.layers))
    ids = graph.input((builder.outputs,))
    for layer in range(builder.layers):
        residual = x
        y = builder.norm(x, "attn_norm.weight", layer)
        q, k, v = _project(builder, y, layer)
        if builder.weight("attn_q_norm.weight", layer) is not None:
            q = builder.norm(q, "attn_q_norm.weight", layer)
        q = _rope(builder, q, positions)
        if builder.weight("attn_k_norm.weight", layer) is not None:
            k = builder.norm(k, "attn_k_norm.weight", layer)
        k = _rope(builder, k, positions)
        y = builder.linear(attention.apply(q, k, v, layer), "attn_output", layer)
        if layer == builder.layers - 1:
            y, residual = builder.outputs_of(y, ids), builder.outputs_of(residual, ids)
        x = graph.elementwise("add", y, residual)
        y = builder.norm(x, "ffn_norm.weight", layer)
        routed = builder.weight("ffn_gate_inp.weight", layer) is not None
        y = builder.experts(y, layer) if routed else builder.ffn(y, layer)
        x = graph.elementwise("add", y, x)
    x = builder.norm(x, "output_norm.weight")
    x.is_output = True
    builder.finish(graph.matmul(builder.output_weight(), x))


def gemma3(builder: Builder) -> None:
    """Gemma 3: five sliding layers to each one that sees everything, norms before and after each block."""
    graph = builder.graph
    x, positions = _start(builder, scaled=True)
    attentions = _by_kind(builder, builder.layers)
    ids = graph.input((builder.outputs,))
    for layer in range(builder.layers):
        y = builder.norm(x, "attn_norm.weight", layer)
        q, k, v = _project(builder, y, layer)
        q = _rope(builder, builder.norm(q, "attn_q_norm.weight", layer), positions)
        k = _rope(builder, builder.norm(k, "attn_k_norm.weight", layer), positions)
        q = graph.elementwise("scale", q)
        y = attentions[builder.sliding(layer)].apply(q, k, v, layer)
        y = builder.linear(y, "attn_output", layer)
        if layer == builder.layers - 1:
            y, x = builder.outputs_of(y, ids), builder.outputs_of(x, ids)
        x = graph.elementwise("add", builder.norm(y, "post_attention_norm.weight", layer), x)
        y = builder.ffn(builder.norm(x, "ffn_norm.weight", layer), layer)
        x = graph.elementwise("add", builder.norm(y, "post_ffw_norm.weight", layer), x)
    _softcapped(builder, x)


def gemma4(builder: Builder) -> None:
    """Gemma 4: two head sizes, layers that share an earlier cache, dense and routed blocks side by side."""
    graph, model = builder.graph, builder.model
    x, positions = _start(builder, scaled=True)
    own = model.layers - model.number("attention.shared_kv_layers")
    attentions = _by_kind(builder, own)
    ids = graph.input((builder.outputs,))
    if model.number("embedding_length_per_layer_input"):
        raise KeyError("a graph for embedding_length_per_layer_input")
    for layer in range(builder.layers):
        size, heads, kv_heads = builder.head_size(layer), builder.heads(layer), builder.kv_heads(layer)
        sliding, tokens = builder.sliding(layer), builder.tokens
        factors = None if sliding else builder.weight("rope_freqs.weight")
        y = builder.norm(x, "attn_norm.weight", layer)
        q = graph.reshape(builder.linear(y, "attn_q", layer), size, heads, tokens)
        q = _rope(builder, builder.norm(q, "attn_q_norm.weight", layer), positions, factors)
        k = v = None
        if layer < own:
            k = builder.linear(y, "attn_k", layer)
            v = k if builder.weight("attn_v.weight", layer) is None else builder.linear(y, "attn_v", layer)
            k, v = graph.reshape(k, size, kv_heads, tokens), graph.reshape(v, size, kv_heads, tokens)
            k = builder.norm(k, "attn_k_norm.weight", layer)
            v = builder.norm(v, None)
            k = _rope(builder, k, positions, factors)
        # Without a cache of its own a layer uses the last one of its kind.
        source = layer if layer < own else own - (2 if sliding else 1)
        y = builder.linear(attentions[sliding].apply(q, k, v, layer, cache_of=source), "attn_output", layer)
        x = graph.elementwise("add", builder.norm(y, "post_attention_norm.weight", layer), x)
        if builder.weight("ffn_gate_inp.weight", layer) is None:
            y = builder.ffn(builder.norm(x, "ffn_norm.weight", layer), layer)
        else:
            dense = builder.ffn(builder.norm(x, "ffn_norm.weight", layer), layer)
            dense = builder.norm(dense, "post_ffw_norm_1.weight", layer)
            routed = builder.norm(x, "pre_ffw_norm_2.weight", layer)
            scores = graph.elementwise("scale", builder.norm(x, None))
            scores = graph.elementwise("mul", scores, builder.needed("ffn_gate_inp.scale", layer))
            scores = graph.matmul(builder.needed("ffn_gate_inp.weight", layer), scores)
            routed = builder.experts(routed, layer, scores)
            y = graph.elementwise("add", dense, builder.norm(routed, "post_ffw_norm_2.weight", layer))
        x = graph.elementwise("add", builder.norm(y, "post_ffw_norm.weight", layer), x)
        scale = builder.weight("layer_output_scale.weight", layer)
        if scale is not None:
            x = graph.elementwise("mul", x, scale)
    _softcapped(builder, x, ids)


def gpt_oss(builder: Builder) -> None:
    """gpt-oss: every other layer looks over a window, all are mixtures of experts with biases."""
    graph = builder.graph
    x, positions = _start(builder)
    attentions = _by_kind(builder, builder.layers)
    ids = graph.input((builder.outputs,))
    for layer in range(builder.layers):
        q, k, v = _project(builder, builder.norm(x, "attn_norm.weight", layer), layer)
        q, k = _rope(builder, q, positions), _rope(builder, k, positions)
        y = builder.linear(attentions[builder.sliding(layer)].apply(q, k, v, layer), "attn_output", layer)
        x = graph.elementwise("add", y, x)
        y = builder.norm(x, "post_attention_norm.weight", layer)
        x = graph.elementwise("add", builder.experts(y, layer, normalized=False, late_softmax=True), x)
    x.is_output = True
    x = builder.norm(builder.outputs_of(x, ids), "output_norm.weight")
    x.is_output = True
    builder.finish(graph.matmul(builder.output_weight(), x))


def qwen35(builder: Builder) -> None:
    """Qwen 3.5 and 3.6: gated delta nets, every fourth layer attends."""
    graph, model = builder.graph, builder.model
    x = builder.embed()
    every = model.number("full_attention_interval", 4)
    listed = model.numbers.get("attention.recurrent_layers")

    def recurrent(layer: int) -> bool:
        if layer >= builder.layers:
            return False
        return bool(listed[layer]) if isinstance(listed, list) else (layer + 1) % every != 0

    recurrence = _Recurrence(builder, [layer for layer in range(builder.layers) if recurrent(layer)])
    attention = Attention(builder, (layer for layer in range(builder.layers) if not recurrent(layer)))
    positions = graph.input((builder.tokens * _POSITIONS["qwen35"],))
    ids = graph.input((builder.outputs,))
    for layer in range(builder.layers):
        y = graph.expand(builder.norm(x, "attn_norm.weight", layer))
        if recurrent(layer):
            y = recurrence.apply(y, layer)
        else:
            y = _gated_attention(builder, attention, y, positions, layer)
        x = graph.elementwise("add", y, x)
        y = builder.ffn(builder.norm(x, "post_attention_norm.weight", layer), layer)
        x = graph.elementwise("add", y, x)
    _softcapped(builder, x, ids)


def _gated_attention(
    builder: Builder, attention: Attention, x: Tensor, positions: Tensor, layer: int
) -> Tensor:
    """Attention whose queries bring a gate along."""
    graph, tokens = builder.graph, builder.tokens
    size, heads, kv_heads = builder.head_size(layer), builder.heads(layer), builder.kv_heads(layer)
    both, k, v = (builder.linear(x, f"attn_{name}", layer) for name in "qkv")
    row = 4 * size * 2
    strides = (4, row, row * heads, row * heads * tokens)
    q = builder.norm(graph.view(both, (size, heads, tokens), strides), "attn_q_norm.weight", layer)
    k = builder.norm(graph.reshape(k, size, kv_heads, tokens), "attn_k_norm.weight", layer)
    gate = graph.op("cont", (size * heads, tokens), graph.view(both, (size, heads, tokens), strides))
    v = graph.reshape(v, size, kv_heads, tokens)
    q, k = _rope(builder, q, positions), _rope(builder, k, positions)
    y = attention.apply(q, k, v, layer)
    return builder.linear(graph.elementwise("mul", y, graph.elementwise("unary", gate)), "attn_output", layer)


class _Recurrence:
    """The states of gated delta nets, two for each layer: of the convolution and of the net."""

    def __init__(self, builder: Builder, layers: list[int]) -> None:
        self.builder = builder
        model, graph, slots = builder.model, builder.graph, builder.slots
        self.inner, self.state = model.number("ssm.inner_size"), model.number("ssm.state_size")
        self.groups, self.heads = model.number("ssm.group_count"), model.number("ssm.time_step_rank")
        self.kernel = model.number("ssm.conv_kernel")
        self.channels = self.inner + 2 * self.groups * self.state
        self.rows = {"conv": (self.kernel - 1) * self.channels, "net": self.state * self.inner}
        self.store = {}
        for layer in layers:
            place = builder.device(layer)
            builder.caches[_GPU if builder.with_gpu and place == _GPU else _CPU] += (
                4 * slots * sum(self.rows.values())
            )
            for kind, row in self.rows.items():
                self.store[kind, layer] = graph.store((row, slots), 4, place)
        self.copy_ids = graph.input((slots,))
        self.main_ids = graph.view(self.copy_ids, (slots,))

    def _load(self, kind: str, layer: int) -> Tensor:
        """The states of the slots of a batch."""
        graph, slots, row = self.builder.graph, self.builder.slots, self.rows[kind]
        states = graph.reshape(self.store[kind, layer], row, slots)
        nothing = graph.view(states, (0,), (4, 0, 0, 0))
        graph.expand(graph.view(nothing, (0,), (4, 0, 0, 0), op="scale"))
        loaded = graph.op("get_rows", (row, slots), states, self.copy_ids)
        output = graph.expand(graph.view(loaded, (row, slots)))
        rest = graph.view(loaded, (row, 0))
        graph.expand(graph.view(self.store[kind, layer], (row, 0), None, rest, op="cpy"))
        return output

    def apply(self, x: Tensor, layer: int) -> Tensor:
        """One recurrent layer. Returns [width, tokens]."""
        builder, graph, slots = self.builder, self.builder.graph, self.builder.slots
        part = builder.tokens // slots
        mixed = builder.linear(x, "attn_qkv", layer)
        mixed = graph.reshape(mixed, mixed.shape[0], part, slots)
        z = builder.linear(x, "attn_gate", layer)
        beta = graph.reshape(builder.linear(x, "ssm_beta", layer), 1, self.heads, part, slots)
        beta = graph.elementwise("unary", beta)
        alpha = graph.reshape(builder.linear(x, "ssm_alpha", layer), self.heads, part, slots)
        alpha = graph.elementwise(
            "unary", graph.elementwise("add", alpha, builder.needed("ssm_dt.bias", layer))
        )
        gate = graph.elementwise("mul", alpha, builder.needed("ssm_a", layer))
        gate = graph.reshape(gate, 1, self.heads, part, slots)
        history = graph.reshape(self._load("conv", layer), self.kernel - 1, self.channels, slots)
        turned = graph.permute(mixed, 1, 0, 2, 3)
        joined = graph.op("concat", (self.kernel - 1 + part, self.channels, slots), history, turned)
        last = graph.view(joined, (self.kernel - 1, self.channels, slots), joined.strides)
        stored = graph.view(self.store["conv", layer], (self.rows["conv"], slots))
        graph.expand(graph.view(stored, stored.shape, stored.strides, last, op="cpy"))
        state = graph.reshape(self._load("net", layer), self.state, self.state, self.heads, slots)
        table = builder.needed("ssm_conv1d.weight", layer)
        convolved = graph.op("ssm_conv", (self.channels, part, slots), joined, table)
        convolved = graph.elementwise("unary", convolved)
        row = 4 * self.channels
        steps = (4, 4 * self.state, row, row * part)
        q, k = (
            graph.elementwise(
                "scale",
                graph.elementwise(
                    "rms_norm", graph.view(convolved, (self.state, self.groups, part, slots), steps)
                ),
            )
            for _ in range(2)
        )
        v = graph.view(convolved, (self.state, self.heads, part, slots), steps)
        rows = builder.tokens + self.state * slots
        result = graph.op("gated_delta_net", (self.state * self.heads, rows), q, k, v, gate, beta, state)
        output = graph.view(result, (self.state, self.heads, part, slots))
        new = graph.view(result, (self.state, self.state, self.heads, slots))
        kept = graph.view(self.store["net", layer], (self.rows["net"], slots))
        graph.expand(graph.view(kept, kept.shape, kept.strides, new, op="cpy"))
        y = builder.norm(output, "ssm_norm.weight", layer)
        z = graph.elementwise("unary", graph.reshape(z, self.state, self.heads, part, slots))
        y = graph.reshape(graph.elementwise("mul", y, z), self.state * self.heads, part, slots)
        return graph.reshape(builder.linear(y, "ssm_out", layer), builder.width, builder.tokens)


def _softcapped(builder: Builder, x: Tensor, ids: Tensor | None = None) -> None:
    """The end of the Gemma graphs. With `ids` only now the rows that get logits are picked."""
    graph = builder.graph
    x = builder.norm(x, "output_norm.weight")
    if ids is not None:
        x.is_output = True
        x = builder.outputs_of(x, ids)
    x.is_output = True
    logits = graph.matmul(builder.output_weight(), x)
    if builder.model.numbers.get("final_logit_softcapping"):
        for name in ("scale", "unary", "scale"):
            logits = graph.elementwise(name, logits)
    builder.finish(logits)


SLIDING: Final[dict[str, int]] = {"gemma3": 6, "gemma4": 6, "gpt-oss": 2}
"""Architectures with sliding windows, and the pattern that holds where the header names none."""

_POSITIONS: Final = {"qwen35": 4}

ARCHITECTURES: Final[dict[str, Callable[[Builder], None]]] = {
    "llama": decoder,
    "qwen2": decoder,
    "qwen3": decoder,
    "qwen3moe": decoder,
    "gemma3": gemma3,
    "gemma4": gemma4,
    "gpt-oss": gpt_oss,
    "qwen35": qwen35,
}


def build(
    model: Model, settings: Settings, on_gpu: list[bool], *, moe_on_cpu: int, with_gpu: bool
) -> tuple[Graph, tuple[int, int]]:
    """The graph of one full batch, and the bytes of the caches on GPU and CPU. Raises KeyError."""
    builder = Builder(model, settings, on_gpu, moe_on_cpu=moe_on_cpu, with_gpu=with_gpu)
    ARCHITECTURES[model.architecture](builder)
    return builder.graph, (builder.caches[0], builder.caches[1])

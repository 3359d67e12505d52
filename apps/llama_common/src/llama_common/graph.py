"""The memory of a compute graph: which device runs each operation, how large each device's buffer becomes.

llama.cpp reserves its compute buffers by a dry run over the graph of one full batch. This module does the
same on shapes alone. Sources, all of llama.cpp b11434: ggml/src/ggml-alloc.c (the allocator: best fit,
results over operands where the operation can), ggml/src/ggml-backend.cpp (which device runs what, what is
copied between them), ggml/src/ggml.c (the order of nodes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

F32_BYTES: Final = 4
OFFLOAD_MIN_BATCH: Final = 32
"""A GPU takes over an operation whose weights lie in main memory from this many rows on (ggml-cuda.cu)."""

_IN_PLACE: Final = frozenset(
    (
        "fill",
        "scale",
        "add",
        "add_id",
        "sub",
        "mul",
        "div",
        "sqr",
        "sqrt",
        "unary",
        "rope",
        "rms_norm",
        "clamp",
        "soft_max",
    )
)
_VIEWS: Final = frozenset(("view", "reshape", "permute", "transpose"))

Shape = tuple[int, ...]


@dataclass(eq=False, slots=True)
class Tensor:
    """One tensor of a graph. `shape` has four dimensions, the fastest first; `strides` are in bytes."""

    op: str
    shape: Shape
    strides: Shape
    sources: tuple[Tensor, ...] = ()
    root: Tensor | None = None  # whose memory a view shows
    is_input: bool = False
    is_output: bool = False
    device: int | None = None  # where memory that is there already lies, or where the operation is to run
    external: bool = False  # weights and caches: not the graph's memory
    weight_bytes: int = 0
    on_host: bool = False  # weights in plain main memory, which a GPU can take over

    @property
    def size(self) -> int:
        """Bytes."""
        if self.weight_bytes:
            return self.weight_bytes
        if 0 in self.shape:
            return 0
        return self.strides[0] + sum(
            (count - 1) * step for count, step in zip(self.shape, self.strides, strict=True)
        )


def padded(shape: Sequence[int]) -> Shape:
    """A shape of four dimensions."""
    return (*shape, *(1,) * (4 - len(shape)))


def packed(shape: Sequence[int], element: int) -> Shape:
    """The strides of a tensor without gaps, `element` bytes an item."""
    strides = [element]
    for count in padded(shape)[:3]:
        strides.append(strides[-1] * count)
    return tuple(strides)


@dataclass
class Graph:
    """Nodes in the order in which they are computed, and the leaves that they need."""

    nodes: list[Tensor] = field(default_factory=list)
    leaves: list[Tensor] = field(default_factory=list)
    _seen: set[int] = field(default_factory=set)
    _made: list[Tensor] = field(default_factory=list)

    def input(self, shape: Sequence[int], element: int = F32_BYTES) -> Tensor:
        """What the caller fills before each batch."""
        return self._keep(Tensor("none", padded(shape), packed(shape, element), is_input=True))

    def store(self, shape: Sequence[int], element: float, device: int) -> Tensor:
        """Memory that is there already: a cache, `element` bytes an item on average."""
        return self._keep(
            Tensor("none", padded(shape), packed(shape, max(1, round(element))), external=True, device=device)
        )

    def weight(self, shape: Sequence[int], size: int, device: int, *, on_host: bool) -> Tensor:
        """A tensor of the model."""
        return self._keep(
            Tensor(
                "none",
                padded(shape),
                packed(shape, F32_BYTES),
                external=True,
                device=device,
                weight_bytes=size,
                on_host=on_host,
            )
        )

    def op(self, name: str, shape: Sequence[int], *sources: Tensor, element: int = F32_BYTES) -> Tensor:
        """A result with memory of its own."""
        return self._keep(Tensor(name, padded(shape), packed(shape, element), sources))

    def view(
        self,
        of: Tensor,
        shape: Sequence[int],
        strides: Sequence[int] | None = None,
        *more: Tensor,
        op: str = "view",
    ) -> Tensor:
        """A result that shows the memory of another tensor."""
        root = of.root or of
        steps = packed(shape, of.strides[0]) if strides is None else tuple(strides)
        return self._keep(Tensor(op, padded(shape), steps, (*more, of) if more else (of,), root))

    def reshape(self, of: Tensor, *shape: int) -> Tensor:
        """The same items in another shape."""
        return self.view(of, shape, op="reshape")

    def permute(self, of: Tensor, *axes: int) -> Tensor:
        """Axis i of `of` becomes axis axes[i]."""
        shape, strides = [0] * 4, [0] * 4
        for axis, place in enumerate(axes):
            shape[place], strides[place] = of.shape[axis], of.strides[axis]
        return self.view(of, shape, strides, op="permute")

    def elementwise(self, name: str, first: Tensor, *others: Tensor) -> Tensor:
        """A result with the first operand's shape."""
        return self.op(name, first.shape, first, *others)

    def matmul(self, weight: Tensor, right: Tensor) -> Tensor:
        """weight^T x right."""
        return self.op("mul_mat", (weight.shape[1], *right.shape[1:]), weight, right)

    def expand(self, result: Tensor) -> Tensor:
        """Append what `result` needs, operands first, and itself."""
        stack: list[tuple[Tensor, int]] = [(result, 0)]
        while stack:
            tensor, index = stack.pop()
            if index == 0:
                if id(tensor) in self._seen:
                    continue
                self._seen.add(id(tensor))
            if index < len(tensor.sources):
                stack.append((tensor, index + 1))
                stack.append((tensor.sources[index], 0))
            elif tensor.op == "none":
                self.leaves.append(tensor)
            else:
                self.nodes.append(tensor)
        return result

    def _keep(self, tensor: Tensor) -> Tensor:
        self._made.append(tensor)  # ids stay unique while it lives
        return tensor


@dataclass(frozen=True)
class Device:
    """A backend: its alignment in bytes, and whether it takes over operations on weights in main memory."""

    name: str
    alignment: int = 128
    takes_over: bool = False


CPU: Final = Device("CPU", alignment=64)


class _Buffer:
    """One device's buffer in the dry run."""

    def __init__(self, alignment: int) -> None:
        self.alignment = alignment
        self.largest = 0
        self.free: list[list[int]] = [[0, 2**62]]  # [offset, size], by offset; the last one has no end

    def allocate(self, size: int) -> int:
        size = self._aligned(size)
        best = None
        for block in self.free[:-1]:
            if block[1] >= size and (best is None or block[1] <= best[1]):
                best = block
        block = best or self.free[-1]
        offset = block[0]
        block[0] += size
        block[1] -= size
        if block[1] == 0:
            self.free.remove(block)
        self.largest = max(self.largest, offset + size)
        return offset

    def release(self, offset: int, size: int) -> None:
        size = self._aligned(size)
        if size == 0:
            return
        place = next((i for i, block in enumerate(self.free) if block[0] > offset), len(self.free))
        self.free.insert(place, [offset, size])
        for left in (place, place - 1):
            if (
                0 <= left < len(self.free) - 1
                and self.free[left][0] + self.free[left][1] == self.free[left + 1][0]
            ):
                self.free[left][1] += self.free.pop(left + 1)[1]

    def _aligned(self, size: int) -> int:
        return -(-size // self.alignment) * self.alignment


def assign(graph: Graph, devices: Sequence[Device]) -> dict[int, int]:
    """The device that each tensor belongs to, by id; the last device is the CPU."""
    cpu = len(devices) - 1
    at: dict[int, int] = {}
    for leaf in graph.leaves:
        if leaf.external and leaf.device is not None:
            at[id(leaf)] = leaf.device
        elif leaf.is_input:
            at[id(leaf)] = cpu
    for node in graph.nodes:
        where = node.device if node.device is not None else _wanted(node, devices)
        if where is not None:
            at[id(node)] = where
    real = [node for node in graph.nodes if node.op not in _VIEWS]
    for gpu_only in (True, False):
        for order in (real, list(reversed(real))):
            current: int | None = None
            for node in order:
                found = at.get(id(node))
                if found is not None:
                    current = None if gpu_only and found == cpu else found
                elif current is not None:
                    at[id(node)] = current
    for node in graph.nodes:
        if id(node) not in at:
            at[id(node)] = at.get(id(node.root), 0) if node.root is not None else 0
        for source in node.sources:
            if id(source) not in at:
                at[id(source)] = (
                    at.get(id(source.root), at[id(node)]) if source.root is not None else at[id(node)]
                )
    return at


def _wanted(node: Tensor, devices: Sequence[Device]) -> int | None:
    """Where a node must or should run by itself: where its memory is, else where its weights are."""
    cpu = len(devices) - 1
    if node.root is not None and node.root.external:
        return node.root.device
    if node.op in ("rope", "flash_attn"):
        return None
    for source in node.sources:
        if source.weight_bytes:
            if source.device == cpu and source.on_host and _rows(node) >= OFFLOAD_MIN_BATCH:
                for index, device in enumerate(devices[:-1]):
                    if device.takes_over:
                        return index
            return source.device
    return None


def _rows(node: Tensor) -> int:
    if node.op == "get_rows":
        return 0
    if node.op == "mul_mat":
        return node.shape[1]
    if node.op in ("mul_mat_id", "rope"):
        return node.shape[2]
    return node.shape[1] * node.shape[2] * node.shape[3]


def _split(
    graph: Graph, devices: Sequence[Device]
) -> tuple[list[Tensor], dict[int, int], dict[int, tuple[Tensor, ...]]]:
    """The nodes with copies between devices put in, where each runs, and what each reads then."""
    at = assign(graph, devices)
    sources = {id(node): node.sources for node in graph.nodes}
    if len(devices) == 1:
        return graph.nodes, at, sources
    order: list[Tensor] = []
    copies: dict[tuple[int, int], Tensor] = {}
    real = [node for node in graph.nodes if node.op not in _VIEWS]
    current = at[id(real[0])]
    inputs: list[Tensor] = []
    part: list[Tensor] = []

    def close() -> None:
        for source in inputs:
            hold = graph.view(source, source.shape, source.strides)
            hold.op = "none"
            at[id(hold)], sources[id(hold)] = at[id(source)], (source,)
            copy = copies[id(source), current]
            order.extend((hold, copy))
        order.extend(part)
        inputs.clear()
        part.clear()

    for node in graph.nodes:
        if node.op in _VIEWS:
            part.append(node)
            continue
        foreign_weight = inputs and any(
            source.weight_bytes and at[id(source)] != current for source in node.sources
        )
        if at[id(node)] != current or foreign_weight:
            close()
            current = at[id(node)]
        read = []
        for source in node.sources:
            if at[id(source)] == current:
                read.append(source)
                continue
            copy = copies.get((id(source), current))
            if copy is None:
                copy = graph.op("none", source.shape)
                copy.strides, copy.weight_bytes = source.strides, 0
                copy = copies.setdefault((id(source), current), copy)
                if source.weight_bytes:
                    copy.weight_bytes = source.weight_bytes
                at[id(copy)] = current
                sources[id(copy)] = ()
                inputs.append(source)
            read.append(copy)
        sources[id(node)] = tuple(read)
        part.append(node)
    close()
    return order, at, sources


def buffer_sizes(graph: Graph, devices: Sequence[Device]) -> list[int]:
    """Bytes of each device's compute buffer, in the order of `devices`; the last one is the CPU."""
    nodes, at, sources = _split(graph, devices)
    buffers = [_Buffer(device.alignment) for device in devices]
    children: dict[int, int] = {}
    views: dict[int, int] = {}
    place: dict[int, tuple[int, int]] = {}

    def allocate(tensor: Tensor, device: int) -> None:
        key = id(tensor)
        if key in place or tensor.external or tensor.root is not None:
            return
        if tensor.op in _IN_PLACE:
            for parent in sources.get(key, ()):
                # A view is not in `place`: the allocator never writes over memory that one shows.
                if (
                    id(parent) in place
                    and not parent.is_output
                    and children[id(parent)] == 1
                    and not views.get(id(parent), 0)
                    and (parent.shape, parent.strides) == (tensor.shape, tensor.strides)
                ):
                    place[key] = place.pop(id(parent))
                    return
        place[key] = device, buffers[device].allocate(tensor.size)

    def release(tensor: Tensor) -> None:
        if tensor.is_output or id(tensor) not in place:
            return
        where, offset = place.pop(id(tensor))
        buffers[where].release(offset, tensor.size)

    for leaf in graph.leaves:
        allocate(leaf, at.get(id(leaf), 0))
    for node in nodes:
        if node.root is not None and node.op != "none":
            views[id(node.root)] = views.get(id(node.root), 0) + 1
        for source in sources[id(node)]:
            children[id(source)] = children.get(id(source), 0) + 1
    for node in nodes:
        for source in sources[id(node)]:
            allocate(source, at[id(node)])
        allocate(node, at[id(node)])
        for source in sources[id(node)]:
            children[id(source)] -= 1
            if children[id(source)] or views.get(id(source), 0):
                continue
            if source.root is None:
                release(source)
                continue
            views[id(source.root)] -= 1
            if not views[id(source.root)] and not children.get(id(source.root), 0):
                release(source.root)
    return [buffer.largest for buffer in buffers]

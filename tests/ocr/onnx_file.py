"""The smallest ONNX file: it takes a picture, and its output is always the same. Written by hand: the package
`onnx` is only in the environment that trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FLOAT, FLOAT16 = 1, 10  # of TensorProto.DataType


def _varint(value: int) -> bytes:
    found = b""
    while value > 127:
        found += bytes([value & 127 | 128])
        value >>= 7
    return found + bytes([value])


def _field(number: int, value: int | str | bytes) -> bytes:
    """A field of a protobuf message."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    content = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _info(name: str, kind: int, shape: Sequence[int | str]) -> bytes:
    dimensions = b"".join(_field(1, _field(1 if isinstance(side, int) else 2, side)) for side in shape)
    tensor = _field(1, kind) + _field(2, dimensions)
    return _field(1, name) + _field(2, _field(1, tensor))


def write(
    path: Path,
    output: NDArray[np.float32],
    *,
    names: dict[int, str] | None = None,
    shape: Sequence[int | str] = (1, 3, 64, 64),
    kind: int = FLOAT,
) -> str:
    """Write it, and give back its path. `names`: the classes, as YOLO exports have them."""
    dims = b"".join(_field(1, side) for side in output.shape)
    constant = dims + _field(2, FLOAT) + _field(8, "c") + _field(9, output.astype("<f4").tobytes())
    node = _field(1, "c") + _field(2, "output0") + _field(4, "Identity")
    graph = (
        _field(1, node)
        + _field(2, "g")
        + _field(5, constant)
        + _field(11, _info("images", kind, shape))
        + _field(12, _info("output0", FLOAT, output.shape))
    )
    model = _field(1, 8) + _field(7, graph) + _field(8, _field(1, "") + _field(2, 13))
    if names is not None:
        model += _field(14, _field(1, "names") + _field(2, str(names)))
    path.write_bytes(model)
    return str(path)

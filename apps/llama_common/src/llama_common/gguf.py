"""The header of a GGUF file: what it says of the model and of its tensors. No tensor is ever read.

Format: docs/gguf.md of the ggml project, versions 2 and 3 (little-endian). The `gguf` package reads the same,
but maps whole files into memory; a header that was fetched over HTTP has no file behind it.

local-claude sends this source to hosts whose python3 is 3.7 perhaps: nothing newer, and no other module.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # not in python 3.7, and annotations are not looked at there
    from typing import Final

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
MAX_HEADER_BYTES: Final = 32_000_000
FIRST_PIECE_BYTES: Final = 2**20
MAX_TENSORS: Final = 100_000
MAX_KEYS: Final = 65_536
MAX_DIMENSIONS: Final = 4

GGML_TYPES: Final = {
    0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 8: "q8_0", 9: "q8_1", 10: "q2_K",
    11: "q3_K", 12: "q4_K", 13: "q5_K", 14: "q6_K", 15: "q8_K", 16: "iq2_xxs", 17: "iq2_xs", 18: "iq3_xxs",
    19: "iq1_s", 20: "iq4_nl", 21: "iq3_s", 22: "iq2_s", 23: "iq4_xs", 24: "i8", 25: "i16", 26: "i32",
    27: "i64", 28: "f64", 29: "iq1_m", 30: "bf16", 34: "tq1_0", 35: "tq2_0", 39: "mxfp4", 40: "nvfp4",
    41: "q1_0", 42: "q2_0",
}  # fmt: skip
"""Names of tensor types by their number in the file, as ggml.h of llama.cpp b11434 has them."""

_SCALARS: Final = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_KEPT_ARRAY: Final = 4096
"""Longer arrays are the tokenizer's: their length is kept, not their items."""
TOKENS: Final = "tokenizer.ggml.tokens"
_FIRST_TOKEN: Final = 5
"""llama.cpp compares vocabularies from this token on (SPEC_VOCAB_CHECK_START_TOKEN_ID)."""
_FILLER: Final = re.compile(rb"\[PAD\d+\]")
"""What converters fill a vocabulary up with, to the size of the embedding table."""


class HeaderError(ValueError):
    """These bytes are no GGUF header that can be used; the message is one line."""


class MoreNeeded(Exception):
    """The header goes on behind the bytes that are there."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: name, number of its type, dimensions (the fastest first), bytes in the file."""

    name: str
    type: int
    shape: tuple[int, ...]
    size: int

    @property
    def type_name(self) -> str:
        """`q4_K`, or `type 41` for a number that ggml does not have."""
        return GGML_TYPES.get(self.type, f"type {self.type}")


@dataclass(frozen=True)
class Header:
    """What a GGUF file says before its tensors. Long arrays stand in `metadata` as their length."""

    metadata: Mapping[str, Any]
    tensors: tuple[TensorInfo, ...]

    @property
    def architecture(self) -> str:
        """`general.architecture`."""
        return str(self.metadata.get("general.architecture", ""))


@dataclass(frozen=True)
class Length:
    """Stands for an array of that many items which were not kept.

    `digest` is the SHA-256 of a vocabulary: of its tokens from the sixth on, without filler at its end.
    """

    items: int
    digest: str = ""


class _Reader:
    """A position in bytes that may end too early."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, count: int) -> int:
        """Move on by `count` bytes; returns where they begin."""
        start = self.at
        if count > MAX_HEADER_BYTES:
            raise HeaderError("a text or an array is larger than a header may be; the file is damaged")
        if start + count > len(self.data):
            raise MoreNeeded
        self.at = start + count
        return start

    def number(self, form: str) -> Any:
        return struct.unpack_from(form, self.data, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        length = self.number("<Q")
        start = self.take(length)
        return self.data[start : start + length].decode("utf-8", "replace")

    def value(self, kind: int, *, vocabulary: bool = False) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self._array(vocabulary)
        if kind not in _SCALARS:
            raise HeaderError(f"a value of the unknown kind {kind}; the file is damaged")
        return self.number(_SCALARS[kind])

    def _array(self, vocabulary: bool) -> Any:
        kind, count = self.number("<I"), self.number("<Q")
        if kind == _STRING:
            if count > MAX_HEADER_BYTES:
                raise HeaderError(f"an array of {count} texts; the file is damaged")
            return self._texts(count, vocabulary)
        if kind not in _SCALARS:
            raise HeaderError(f"an array of the unknown kind {kind}; the file is damaged")
        size = struct.calcsize(_SCALARS[kind])
        start = self.take(size * count)
        if count > _KEPT_ARRAY:
            return Length(count)
        return [
            struct.unpack_from(_SCALARS[kind], self.data, start + index * size)[0] for index in range(count)
        ]

    def _texts(self, count: int, vocabulary: bool) -> Length:
        """Texts are stepped over: a vocabulary has hundreds of thousands, and only their number counts."""
        data, at, end = self.data, self.at, len(self.data)
        length_of = struct.Struct("<Q").unpack_from
        begins = []
        for _ in range(count):
            if at + 8 > end:
                raise MoreNeeded
            begins.append(at)
            at += 8 + length_of(data, at)[0]
        if at > end:
            raise MoreNeeded
        self.at = at
        if not vocabulary:
            return Length(count)
        first = begins[_FIRST_TOKEN] if count > _FIRST_TOKEN else at
        while begins and _FILLER.fullmatch(data, begins[-1] + 8, at):
            at = begins.pop()
        return Length(count, hashlib.sha256(memoryview(data)[first : max(first, at)]).hexdigest())


def parse(data: bytes, file_size: int) -> Header:
    """The header at the start of a file of `file_size` bytes.

    Raises MoreNeeded when `data` ends within it, HeaderError when it is none.
    """
    if data[:4] != MAGIC[: len(data[:4])]:
        raise HeaderError("does not begin with GGUF")
    reader = _Reader(data)
    reader.take(4)
    version = reader.number("<I")
    if version not in VERSIONS:
        raise HeaderError(f"GGUF version {version}; known are {VERSIONS[0]} and {VERSIONS[1]}, little-endian")
    tensor_count, key_count = reader.number("<Q"), reader.number("<Q")
    if tensor_count > MAX_TENSORS or key_count > MAX_KEYS:
        raise HeaderError(f"{tensor_count} tensors and {key_count} keys; the file is damaged")
    metadata = {}
    for _ in range(key_count):
        key = reader.text()
        metadata[key] = reader.value(reader.number("<I"), vocabulary=key == TOKENS)
    tensors = []
    for _ in range(tensor_count):
        name, dimensions = reader.text(), reader.number("<I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise HeaderError(f"tensor {name!r} has {dimensions} dimensions; the file is damaged")
        shape = tuple(reader.number("<Q") for _ in range(dimensions))
        tensors.append((name, reader.number("<I"), shape, reader.number("<Q")))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise HeaderError(f"general.alignment = {alignment!r}; the file is damaged")
    begin = -(-reader.at // alignment) * alignment
    return Header(metadata, tuple(_sized(tensors, file_size - begin)))


def _sized(tensors: Iterable[tuple[str, int, tuple[int, ...], int]], data_size: int) -> Iterable[TensorInfo]:
    """Each tensor with its bytes: up to where the next one begins, so that no table of types is needed."""
    listed = list(tensors)
    offsets = sorted({offset for *_, offset in listed} | {data_size})
    following = dict(zip(offsets, offsets[1:]))  # noqa: B905, RUF007 - both are of python 3.10
    for name, kind, shape, offset in listed:
        size = following.get(offset, 0)
        if size <= offset:
            raise HeaderError(f"tensor {name!r} begins behind the end of the file; the file is cut off")
        yield TensorInfo(name, kind, shape, size - offset)


def read(fetch: Callable[[int, int], bytes], file_size: int) -> Header:
    """The header of a file of `file_size` bytes, in pieces that `fetch(start, end)` brings.

    `end` is not included. Reads at most 32 MB. Raises HeaderError, and whatever `fetch` raises.
    """
    data = b""
    wanted = FIRST_PIECE_BYTES
    while True:
        wanted = min(wanted, file_size, MAX_HEADER_BYTES)
        piece = fetch(len(data), wanted)
        if len(piece) != wanted - len(data):
            raise HeaderError(f"{len(piece)} bytes came instead of {wanted - len(data)}")
        data += piece
        try:
            return parse(data, file_size)
        except MoreNeeded:
            if wanted == file_size:
                raise HeaderError("the file ends within its header") from None
            if wanted == MAX_HEADER_BYTES:
                raise HeaderError("its header is larger than 32 MB") from None
        wanted *= 4


def read_file(path: Path) -> Header:
    """The header of a file of this machine. Raises OSError, HeaderError."""
    with path.open("rb") as file:

        def fetch(start: int, end: int) -> bytes:
            file.seek(start)
            return file.read(end - start)

        return read(fetch, path.stat().st_size)

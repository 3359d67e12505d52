"""Whether the release of a preset's build takes its flags and its model: asked before a switch, not after.

In each release lie help.txt, what its llama-server says of its flags, and types.json, the tensor types that
its source knows by number. What is not there is not checked. The types of a model are those of the lock, or
where it has no header those of its files.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from llama_common import gguf
from llama_common.dialect import Dialect
from llama_common.flags import is_flag, normalize

from llmbox.presets import REMEDY, BoxModel, BoxPreset

HELP, TYPES = "help.txt", "types.json"


def refusal(preset: BoxPreset) -> str:
    """Why a preset cannot run on the release that its command names; empty when nothing speaks against it."""
    binary = Path(preset.command[0])
    release = binary.parent.parent
    return _unknown_flag(preset, release) or _unknown_type(preset, release)


def _unknown_flag(preset: BoxPreset, release: Path) -> str:
    try:
        dialect = Dialect.from_help((release / HELP).read_text(errors="replace"))
    except OSError:
        return ""
    if not dialect.complete:
        return ""
    index = 1
    while index < len(preset.command):
        item = preset.command[index]
        flag = normalize(item)
        index += 1 + dialect.values(flag)
        if not is_flag(item):
            continue
        if flag in dialect.removed:
            return f"llama-server of the build {preset.build}: {flag}: {dialect.removed[flag]}; {REMEDY}"
        if not dialect.knows(flag):
            guess = dialect.closest(flag)
            hint = f", did you mean {guess}?" if guess else ""
            return f"llama-server of the build {preset.build} does not know {flag}{hint}; {REMEDY}"
    return ""


def _unknown_type(preset: BoxPreset, release: Path) -> str:
    known = _types(release)
    for model in preset.models if known else []:
        missing = sorted((set(model.tensor_types) or _types_in(model)) - known.keys())
        if missing:
            return _refused_type(preset, release, model, missing[0])
    return ""


def _refused_type(preset: BoxPreset, release: Path, model: BoxModel, kind: int) -> str:
    others = sorted(release.parent.parent.glob(f"*/current/{TYPES}"))
    for file in others:
        name = _types(file.parent).get(kind)
        if name:
            build = file.parent.parent.name
            return (
                f"{model.name} has tensors of type {name.upper()}, which the build {preset.build} does not"
                f" know; write build: {build}, which does"
            )
    return (
        f"{model.name} has tensors of type {kind}, which the build {preset.build} does not know; use a "
        "build that does, or another file of the model"
    )


def _types_in(model: BoxModel) -> set[int]:
    """The tensor types that the files of a model say; what cannot be read says nothing."""
    found: set[int] = set()
    for path in model.files:
        with contextlib.suppress(OSError, gguf.HeaderError):
            found |= {tensor.type for tensor in gguf.read_file(path).tensors}
    return found


def _types(release: Path) -> dict[int, str]:
    """The tensor types that a release knows; empty where nothing says so."""
    try:
        return {int(number): str(name) for number, name in json.loads((release / TYPES).read_text()).items()}
    except (OSError, ValueError, AttributeError):
        return {}

"""Whether the release of a preset's build takes its flags and its model: asked before a switch, not after.

In each release lie help.txt, what its llama-server says of its flags, and types.json, the tensor types that
its source knows by number. What is not there is not checked.
"""

from __future__ import annotations

import json
from pathlib import Path

from llama_common.dialect import Dialect
from llama_common.flags import is_flag, normalize

from llmbox.presets import REMEDY, BoxPreset

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
    missing = [kind for kind in preset.tensor_types if known and kind not in known]
    if not missing:
        return ""
    kind = missing[0]
    others = sorted(release.parent.parent.glob(f"*/current/{TYPES}"))
    for file in others:
        name = _types(file.parent).get(kind)
        if name:
            build = file.parent.parent.name
            return (
                f"{preset.model} has tensors of type {name.upper()}, which the build {preset.build} does not"
                f" know; write build: {build}, which does"
            )
    return (
        f"{preset.model} has tensors of type {kind}, which the build {preset.build} does not know; use a "
        "build that does, or another file of the model"
    )


def _types(release: Path) -> dict[int, str]:
    """The tensor types that a release knows; empty where nothing says so."""
    try:
        return {int(number): str(name) for number, name in json.loads((release / TYPES).read_text()).items()}
    except (OSError, ValueError, AttributeError):
        return {}

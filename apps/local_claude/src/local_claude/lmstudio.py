"""Two traps of LM Studio that nothing in its window shows, found in its own files.

A quantization of the KV cache counts only in the form {"checked": true, "value": "q8_0"}; a bare value is
silently ignored and the cache stays f16. And a model without a context of its own gets a few thousand tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from local_claude.checks import Result
from local_claude.environment import read_object
from local_claude.options import CONTEXT_FLOOR

CONFIGS = "~/.lmstudio/.internal/user-concrete-model-default-config"
K, V = "llm.load.llama.kCacheQuantizationType", "llm.load.llama.vCacheQuantizationType"
CONTEXT = "llm.load.contextLength"
MAX_FILES = 500
NAME = "LM Studio's files"


def traps(folder: Path | None = None) -> list[Result]:
    """One result for each file that does not do what it seems to do."""
    top = folder if folder is not None else Path(CONFIGS).expanduser()
    found = []
    for path in sorted(top.rglob("*.json"))[:MAX_FILES]:
        fields = _fields(path)
        found += [Result(NAME, "warn", f"{path}: {detail}", fix) for detail, fix in _of(fields)]
    return found


def _of(fields: dict[str, Any]) -> Iterator[tuple[str, str]]:
    types = {}
    for key in (K, V):
        value = fields.get(key)
        if isinstance(value, dict) and value.get("checked") is True:
            types[key] = value.get("value")
        elif isinstance(value, str):
            right = json.dumps({"checked": True, "value": value})
            yield f"{key} = {json.dumps(value)} is silently ignored, the cache stays f16", f"write {right}"
        elif isinstance(value, dict) and value.get("value") not in (None, "f16"):
            yield f"{key} is not checked: the cache stays f16", 'write "checked": true'
    if types.get(K) != types.get(V) and types:
        both = f"K is {types.get(K, 'f16')}, V is {types.get(V, 'f16')}"
        yield f"{both}: different types take a path many times slower", "give both the same type"
    context = fields.get(CONTEXT)
    if isinstance(context, int) and context < CONTEXT_FLOOR:
        yield f"{CONTEXT} = {context}, below {CONTEXT_FLOOR}", "raise it to 65536, and load the model again"


def _fields(path: Path) -> dict[str, Any]:
    """The fields of loading, by key; none where the file has another shape."""
    try:
        return {field["key"]: field.get("value") for field in read_object(path)["load"]["fields"]}
    except (KeyError, TypeError, AttributeError):
        return {}

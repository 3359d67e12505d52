"""Which draft a preset may be sped up with, by what the headers of its models say; never by a file's name.

Pure: works on the facts of the lock. Whether a draft does speed it up is measured (scripts/choose_draft.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from llama_common.gguf import TOKENS, Header, Length

if TYPE_CHECKING:
    from llama_common.presets import HostConfig, LockedHeader, LockedTokenizer

DraftType = Literal["draft-simple", "draft-mtp"]
SIMPLE: Final = "draft-simple"
MTP: Final = "draft-mtp"
MOST_TOKENS_APART: Final = 128
"""llama.cpp's SPEC_VOCAB_MAX_SIZE_DIFFERENCE: vocabularies are filled up to different sizes."""
_HEAD: Final = "blk.*.nextn.eh_proj.weight"
_TRUNK: Final = re.compile(r"^blk\.\*\.(?:attn_|ffn_|ssm_|shortconv)")
_KEY: Final = "tokenizer.ggml."


@dataclass(frozen=True)
class Draft:
    """What writes ahead: the type as --spec-type names it, and the model; None is the preset's own head."""

    type: DraftType
    model: str | None = None

    @property
    def text(self) -> str:
        """`qwen3-0.6b (draft-simple)`."""
        return f"{self.model or 'its own head'} ({self.type})"


def tokenizer_facts(header: Header) -> dict[str, Any] | None:
    """What the lock keeps of a tokenizer (presets.LockedTokenizer); None of a file without one."""
    tokens = header.metadata.get(TOKENS)
    if not isinstance(tokens, Length) or not tokens.digest:
        return None

    def number(key: str) -> int | None:
        value = header.metadata.get(_KEY + key)
        return value if isinstance(value, int) else None

    def switch(key: str) -> bool | None:
        value = header.metadata.get(_KEY + key)
        return value if isinstance(value, bool) else None

    return {
        "model": str(header.metadata.get(f"{_KEY}model", "")),
        "tokens": tokens.items,
        "sha256": tokens.digest,
        "bos": number("bos_token_id"),
        "eos": number("eos_token_id"),
        "add_bos": switch("add_bos_token"),
        "add_eos": switch("add_eos_token"),
    }


def unlike(model: LockedTokenizer, draft: LockedTokenizer) -> str:
    """Why llama-server would not take the draft's tokenizer beside the model's; "" when it would.

    The rule of llama.cpp's common_speculative_are_compatible. What a header does not say is not held against
    it. How texts are cut into tokens does not matter: a draft is handed tokens, never a text.
    """
    if model.model != draft.model:
        return f"its kind is {draft.model} beside {model.model}"
    for name, added, mine, its in (
        ("beginning", (model.add_bos, draft.add_bos), model.bos, draft.bos),
        ("end", (model.add_eos, draft.add_eos), model.eos, draft.eos),
    ):
        if None not in added and added[0] != added[1]:
            return f"one adds a token at the {name} of a text, the other does not"
        if added[0] and added[1] and None not in (mine, its) and mine != its:
            return f"the {name} of a text is token {its} beside {mine}"
    if abs(model.tokens - draft.tokens) > MOST_TOKENS_APART:
        return f"{draft.tokens} tokens beside {model.tokens}"
    if model.sha256 != draft.sha256:
        return f"{draft.tokens} tokens that are not the same"
    return ""


def headers(config: HostConfig) -> Mapping[str, LockedHeader]:
    """The headers of the lock that are still those of the models' files."""
    return {
        name: header
        for name, header in config.llama_lock.headers.items()
        if name in config.gguf_models
        and (config.gguf_models[name].hf is None or name in config.llama_lock.models)
        and config.files(name)[0].sha256 == header.sha256
    }


def refusal(config: HostConfig, model: str, draft: str) -> str:
    """Why `draft` cannot be the draft model of `model`; "" when nothing known speaks against it."""
    known = headers(config)
    mine = known[model].tokenizer if model in known else None
    its = known[draft].tokenizer if draft in known else None
    return unlike(mine, its) if mine and its else ""


def type_of(config: HostConfig, draft: str) -> DraftType:
    """The --spec-type of a draft model: that of a head when its file is nothing else."""
    header = headers(config).get(draft)
    return MTP if header and _is_head_alone(header) else SIMPLE


def candidates(config: HostConfig, preset: str) -> list[Draft]:
    """What `draft: auto` would try for a preset, the first one first: heads, then the smallest model.

    At most one of each; a release that does not know heads takes the next one.
    """
    name = config.llama_presets[preset].model
    known = headers(config)
    if name not in known:
        return []
    mine = known[name]
    found: list[Draft] = []
    if _has_head(mine) and not _is_head_alone(mine):
        found.append(Draft(MTP))
    else:
        found += [Draft(MTP, one) for one in _smallest(config, known, name, heads=True)]
    return found + [Draft(SIMPLE, one) for one in _smallest(config, known, name, heads=False)]


def _smallest(
    config: HostConfig, known: Mapping[str, LockedHeader], name: str, *, heads: bool
) -> Iterator[str]:
    """The smallest fitting head, or model; nothing when there is none."""
    mine = known[name]
    size = {one: sum(file.size for file in config.files(one)) for one in known}
    fitting = [
        one
        for one, header in known.items()
        if one != name
        and size[one] < size[name]
        and mine.tokenizer
        and header.tokenizer
        and not unlike(mine.tokenizer, header.tokenizer)
        and _is_head_alone(header) == heads
        and (not heads or _place(header) == _place(mine))
    ]
    if fitting:
        yield min(fitting, key=lambda one: (size[one], one))


def _place(header: LockedHeader) -> tuple[str, Any]:
    """What a head must share with its model."""
    return header.architecture, header.numbers.get("embedding_length")


def _has_head(header: LockedHeader) -> bool:
    """Whether the last block predicts further tokens, as llama.cpp recognizes it."""
    last = int(header.numbers.get("block_count", 0)) - 1
    return any(run[3] <= last < run[3] + run[4] for run in header.tensors.get(_HEAD, []))


def _is_head_alone(header: LockedHeader) -> bool:
    """Whether a file is nothing but a head: it has no block before the first that predicts further tokens."""
    if not _has_head(header):
        return False
    first = min(run[3] for run in header.tensors[_HEAD])
    trunk = [run[3] for name, runs in header.tensors.items() if _TRUNK.match(name) for run in runs]
    return all(block >= first for block in trunk)

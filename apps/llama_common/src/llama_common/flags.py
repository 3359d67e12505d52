"""llama-server's flags that a key of the preset sets or no preset may carry, and the checks of extra_args.

Spellings are those of common/arg.cpp at b11434 and of older builds. llama-server itself turns '_' into '-' in
long flags.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from llama_common.problems import show

OWNED: Final[dict[str, tuple[str, ...]]] = {
    "model": (
        "-m",
        "--model",
        "-mu",
        "--model-url",
        "-hf",
        "-hfr",
        "--hf-repo",
        "-hff",
        "--hf-file",
        "-dr",
        "--docker-repo",
    ),
    "context": ("-c", "--ctx-size"),
    "kv_cache_type": ("-ctk", "--cache-type-k", "-ctv", "--cache-type-v"),
    "n_gpu_layers": ("-ngl", "--gpu-layers", "--n-gpu-layers"),
    "n_cpu_moe": ("-ncmoe", "--n-cpu-moe", "-cmoe", "--cpu-moe"),
    "threads": ("-t", "--threads"),
    "flash_attention": ("-fa", "--flash-attn"),
    "parallel": ("-np", "--parallel"),
    "jinja": ("--jinja", "--no-jinja"),
    "listen": ("--host", "--port", "--reuse-port"),
    "draft": (
        "-md",
        "--model-draft",
        "--spec-draft-model",
        "-hfd",
        "-hfrd",
        "--hf-repo-draft",
        "--spec-draft-hf",
    ),
    "projector": ("-mm", "--mmproj", "-mmu", "--mmproj-url"),
}
"""Flags that a key of the preset sets, by key."""

FIXED: Final[dict[str, tuple[str, ...]]] = {
    "every preset runs with --fit off, so that the context is the one written here": (
        "-fit",
        "--fit",
        "-fitt",
        "--fit-target",
        "-fitc",
        "--fit-ctx",
    ),
    "every preset is announced under its own name": ("-a", "--alias"),
    "every preset serves /metrics and /slots: lmswitch and the verification read them": (
        "--metrics",
        "--slots",
        "--no-slots",
    ),
    "every preset allows browser pages of the box itself only": ("--cors-origins",),
    "no preset serves the web page": ("--ui", "--webui", "--no-ui", "--no-webui"),
    "health checks reach the server by plain HTTP at the root path": (
        "--api-prefix",
        "--ssl-key-file",
        "--ssl-cert-file",
    ),
    "one preset serves one model": (
        "--models-dir",
        "--models-preset",
        "--models-max",
        "--models-autoload",
        "--no-models-autoload",
    ),
    "every preset answers chats and completions: switches and verification ask for one": (
        "--embedding",
        "--embeddings",
        "--rerank",
        "--reranking",
    ),
    "it lets whoever reaches the port run commands and read files on this box": (
        "--tools",
        "--tools-runtime",
        "-ag",
        "--agent",
        "--mcp-servers-config",
        "--mcp-servers-json",
        "--ui-mcp-proxy",
        "--webui-mcp-proxy",
    ),
    "it gives files of this box to whoever reaches the port": ("--path", "--media-path"),
    "a unit's command line can be read by every user of the box": ("--api-key", "-hft", "--hf-token"),
    "it prints something and exits instead of serving": (
        "-h",
        "--help",
        "--usage",
        "--version",
        "-cl",
        "--cache-list",
        "--completion-bash",
        "--list-devices",
    ),
}
"""Flags that no preset may carry, by reason."""

_FIXES: Final = {"--api-key": "use --api-key-file with a file that only the service can read"}

REPEATABLE: Final = frozenset(
    {
        "-ot",
        "--override-tensor",
        "-otd",
        "--override-tensor-draft",
        "--spec-draft-override-tensor",
        "--override-kv",
        "--lora",
        "--lora-scaled",
        "--control-vector",
        "--control-vector-scaled",
        "-l",
        "--logit-bias",
        "--spec-type",
    }
)
"""Flags whose values add up when they are given more than once."""

_OWNER: Final = {flag: key for key, flags in OWNED.items() for flag in flags}
_REASON: Final = {flag: reason for reason, flags in FIXED.items() for flag in flags}

_DRAFT_K: Final = ("-ctkd", "--cache-type-k-draft", "--spec-draft-type-k")
_DRAFT_V: Final = ("-ctvd", "--cache-type-v-draft", "--spec-draft-type-v")
_ENVIRONMENT: Final = re.compile(r"(?:export\s+)?((?:LLAMA|GGML|CUDA|HF|MTMD)_[A-Z0-9_]*)\s*=")
_SHORTCUT: Final = re.compile(r"--(?:embd|fim|gpt-oss|vision|tts)-[a-z0-9.-]+-(?:default|spec)")
_FLAG: Final = re.compile(r"--?[A-Za-z]")


@dataclass(frozen=True)
class ArgumentProblem:
    """What is wrong with the item at `index` of extra_args."""

    index: int
    message: str
    fix: str


def is_flag(item: str) -> bool:
    """Whether an item is a flag; a negative number is a value."""
    return _FLAG.match(item.lstrip()) is not None


def normalize(item: str) -> str:
    """The flag in an item as llama-server reads it: '_' is '-' in long ones, '=VALUE' is cut off."""
    flag = item.split("=", 1)[0]
    return flag.replace("_", "-") if flag.startswith("--") else flag


def check_extra_args(items: Sequence[str]) -> Iterator[ArgumentProblem]:
    """Everything in extra_args that contradicts a key, cannot work, or hides one flag behind another."""
    seen: dict[str, int] = {}
    for index, item in enumerate(items):
        environment = _ENVIRONMENT.match(item)
        if environment:
            yield ArgumentProblem(
                index,
                f"sets the environment variable {environment[1]}; extra_args holds arguments only",
                f"write {_key_for_environment(environment[1])}",
            )
            continue
        if not is_flag(item):
            if index == 0:
                yield ArgumentProblem(
                    index, "stands before the first flag, and belongs to none", "begin with the flag"
                )
            continue
        flag = normalize(item.split()[0])
        problem = _owned(index, flag) or _malformed(index, item, flag, items)
        if problem is None and flag in seen and flag not in REPEATABLE:
            problem = ArgumentProblem(
                index, f"{flag} is there twice; llama-server takes the last one only", "remove one of them"
            )
        seen.setdefault(flag, index)
        if problem:
            yield problem
    yield from _draft_cache(items, seen)


def _owned(index: int, flag: str) -> ArgumentProblem | None:
    if flag in _OWNER:
        key = _OWNER[flag]
        why = (
            "K and V cannot differ, so one key sets both"
            if key == "kv_cache_type"
            else f"the key {key} sets {flag}"
        )
        return ArgumentProblem(
            index, f"{flag} may not stand here: {why}", f"remove it and set {key}: of this preset"
        )
    if _SHORTCUT.fullmatch(flag):
        return ArgumentProblem(
            index,
            f"{flag} may not stand here: llama-server reads it as another model, context and port",
            "remove it and write the model as a preset of its own",
        )
    if flag in _REASON:
        return ArgumentProblem(
            index, f"{flag} may not stand here: {_REASON[flag]}", _FIXES.get(flag, "remove it")
        )
    return None


def _malformed(index: int, item: str, flag: str, items: Sequence[str]) -> ArgumentProblem | None:
    if item.startswith("--") and "=" in item.split()[0]:
        name, value = item.split("=", 1)
        return ArgumentProblem(
            index, "llama-server does not read --flag=value", f'write two items: "{name}", {show(value)}'
        )
    if len(item.split()) > 1:
        words = ", ".join(f'"{word}"' for word in item.split()[:4])
        return ArgumentProblem(
            index,
            "a flag and its value in one item reach llama-server as one word",
            f"write one item each: {words}",
        )
    return None


def _draft_cache(items: Sequence[str], seen: dict[str, int]) -> Iterator[ArgumentProblem]:
    """The draft model's K and V cache types must be equal too."""
    keys = [seen[flag] for flag in _DRAFT_K if flag in seen]
    values = [seen[flag] for flag in _DRAFT_V if flag in seen]
    if not keys and not values:
        return
    k_type, v_type = (
        items[where[-1] + 1] if where and where[-1] + 1 < len(items) else "f16" for where in (keys, values)
    )
    if k_type != v_type:
        yield ArgumentProblem(
            (keys or values)[-1],
            f"the draft model's K cache would be {show(k_type)} and its V cache {show(v_type)}; "
            "K and V cannot differ",
            "give --cache-type-k-draft and --cache-type-v-draft the same type",
        )


def _key_for_environment(variable: str) -> str:
    """What to write instead of an environment variable that llama-server reads."""
    by_variable = {
        "LLAMA_ARG_CACHE_TYPE_K": "kv_cache_type:",
        "LLAMA_ARG_CACHE_TYPE_V": "kv_cache_type:",
        "LLAMA_ARG_CTX_SIZE": "context:",
        "LLAMA_ARG_N_GPU_LAYERS": "n_gpu_layers:",
        "LLAMA_ARG_N_PARALLEL": "parallel:",
        "LLAMA_ARG_THREADS": "threads:",
        "LLAMA_ARG_FLASH_ATTN": "flash_attention:",
        "LLAMA_ARG_N_CPU_MOE": "n_cpu_moe:",
        "LLAMA_ARG_HOST": "listen:",
        "LLAMA_ARG_PORT": "listen:",
        "LLAMA_ARG_MODEL": "model:",
    }
    key = by_variable.get(variable)
    return f"{key} of this preset" if key else "the flag for it instead"

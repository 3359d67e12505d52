"""One sound inventory and every way to break it that must be refused, as data.

Unit tests load each case with the data model; tests/lab/test_validate_playbook.py writes each to disk and
runs the real playbook on it. An edit names its place as `file: key.key`, where file is a short name of FILES.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Files = dict[str, Any]

PATHS = {
    "all": "group_vars/all/main.yml",
    "builds": "group_vars/llama_hosts/builds.yml",
    "models": "group_vars/llama_hosts/models.yml",
    "lock": "group_vars/llama_hosts/lock.yml",
    "presets": "group_vars/llm_servers/presets.yml",
    "ocr": "group_vars/ocr_servers.yml",
}
HOST_FILES = {
    "box": ("all", "builds", "models", "lock", "presets"),
    "ocr-box": ("all", "builds", "models", "lock", "ocr"),
}

SHA_A, SHA_B, SHA_C = "a" * 64, "b" * 64, "c" * 64
COMMIT = "0123456789abcdef0123456789abcdef01234567"

SOUND: Files = {
    "all": {"source_server": "https://models.example"},
    "builds": {
        "llama_cpp_builds": {
            "upstream": {
                "repo": "https://git.example/llama.cpp.git",
                "commit": COMMIT,
                "cmake_options": {"GGML_CUDA": True, "CMAKE_CUDA_ARCHITECTURES": "89;120"},
            },
            "fork": {"repo": "https://git.example/fork.git", "ref": "b11434"},
        }
    },
    "models": {
        "gguf_models": {
            "qwen-coder-q4": {
                "url": "{{ source_server }}/Qwen-Coder-Q4_K_M.gguf",
                "sha256": SHA_A,
                "size": 18_556_686_752,
            },
            "qwen-draft-q8": {"path": "/srv/models/qwen-draft-q8.gguf", "sha256": SHA_B, "size": 531_068_096},
            "gemma-q4": {
                "hf": {"repo": "someone/gemma-GGUF", "file": "gemma-Q4_K_M.gguf", "revision": "main"}
            },
            "split-q4": {
                "files": [
                    {
                        "url": "https://models.example/split-00001-of-00002.gguf",
                        "sha256": SHA_A,
                        "size": 1000,
                    },
                    {
                        "url": "https://models.example/split-00002-of-00002.gguf",
                        "sha256": SHA_C,
                        "size": 2000,
                    },
                ]
            },
        }
    },
    "lock": {
        "llama_lock": {
            "builds": {"fork": {"repo": "https://git.example/fork.git", "ref": "b11434", "commit": COMMIT}},
            "models": {
                "gemma-q4": {
                    "repo": "someone/gemma-GGUF",
                    "revision": "main",
                    "commit": COMMIT,
                    "files": [{"file": "gemma-Q4_K_M.gguf", "sha256": SHA_C, "size": 17_000_000_000}],
                }
            },
        }
    },
    "presets": {
        "llama_presets_foreign_units": ["lmstudio.service"],
        "llm_gateway_listen": ["0.0.0.0:1234", "[::1]:4321"],
        "llm_gateway_default_preset": "coder",
        "llm_gateway_model_names": {"claude-*": "coder"},
        "llm_gateway_keys": [
            {"name": "laptop", "sha256": SHA_A, "presets": None, "tokens_per_day": 1_000_000}
        ],
        "llama_presets": {
            "coder": {
                "description": "Qwen Coder, coding agent",
                "build": "upstream",
                "model": "qwen-coder-q4",
                "draft": "qwen-draft-q8",
                "aliases": ["c"],
                "context": 98304,
                "kv_cache_type": "q4_0",
                "n_cpu_moe": 16,
                "threads": 12,
                "extra_args": ["--mlock", "--temp", "0.2"],
                "expect": {
                    "generation_tok_s": {"target": 81.5, "floor": 55},
                    "prefill_tok_s": {"target": 1850},
                },
            },
            "gemma": {
                "description": "Gemma, general work",
                "build": "fork",
                "model": "gemma-q4",
                "aliases": ["g"],
                "context": 32768,
                "kv_cache_type": "q8_0",
            },
            "chat": {
                "description": "Short chats in four slots",
                "build": "upstream",
                "model": "split-q4",
                "context": 16384,
                "kv_cache_type": "f16",
                "parallel": 4,
                "agent": False,
            },
        },
    },
    "ocr": {
        "llama_presets": {
            "vision": {
                "description": "Vision server of the OCR service",
                "build": "upstream",
                "model": "gemma-q4",
                "scope": "system",
                "listen": "127.0.0.1:8090",
                "context": 8192,
                "kv_cache_type": "f16",
                "agent": False,
            }
        }
    },
}


@dataclass(frozen=True)
class Case:
    """One broken inventory: what is changed, and what the refusal must say."""

    name: str
    edit: Callable[[Files], None]
    key: str
    says: str
    fix: str
    file: str = "presets"
    shown: str | None = None
    """What must stand as the value; None for anything."""
    gate: bool = False
    """Whether the real playbook runs on it in the gate; the others run in the long suite."""
    playbook_only: bool = False
    """Whether it takes Ansible to find out (templates, variables that are not set)."""


def inventory(case: Case | None = None) -> Files:
    """The sound inventory, a case's edit applied. A file is data, or text where the text is the point."""
    files = copy.deepcopy(SOUND)
    if case is not None:
        case.edit(files)
    return files


def as_text(content: Any) -> str:
    """A file's content as YAML text."""
    return (
        content
        if isinstance(content, str)
        else yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=500)
    )


def write(files: Files, folder: Path, host_variables: Mapping[str, object]) -> None:
    """Write an inventory: its files, and hosts.yml with two hosts that have `host_variables`."""
    hosts = {
        "all": {
            "vars": dict(host_variables),
            "children": {
                "llama_hosts": {
                    "children": {
                        "llm_servers": {"hosts": {"box": {}}},
                        "ocr_servers": {"hosts": {"ocr-box": {}}},
                    }
                }
            },
        }
    }
    for path, content in {
        **{PATHS[name]: content for name, content in files.items()},
        "hosts.yml": hosts,
    }.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(as_text(content), encoding="utf-8")


def put(place: str, value: object, file: str = "presets") -> Callable[[Files], None]:
    """An edit that sets a key."""

    def edit(files: Files) -> None:
        *parents, last = place.split(".")
        target = files[file]
        for key in parents:
            target = target[int(key) if isinstance(target, list) else key]
        if isinstance(target, list):
            target[int(last)] = value
        else:
            target[last] = value

    return edit


def drop(place: str, file: str = "presets") -> Callable[[Files], None]:
    """An edit that removes a key."""

    def edit(files: Files) -> None:
        *parents, last = place.split(".")
        target = files[file]
        for key in parents:
            target = target[key]
        del target[last]

    return edit


def text(change: Callable[[str], str], file: str = "presets") -> Callable[[Files], None]:
    """An edit of the text itself."""

    def edit(files: Files) -> None:
        files[file] = change(as_text(files[file]))

    return edit


def both(*edits: Callable[[Files], None]) -> Callable[[Files], None]:
    """Several edits in order."""

    def edit(files: Files) -> None:
        for one in edits:
            one(files)

    return edit


def renamed(place: str, name: object, file: str = "presets") -> Callable[[Files], None]:
    """An edit that gives a mapping's entry another name."""

    def edit(files: Files) -> None:
        *parents, last = place.split(".")
        target = files[file]
        for key in parents:
            target = target[key]
        target[name] = target.pop(last)

    return edit


def header(sha256: str, tokens: int) -> dict[str, Any]:
    """A header in the lock, of a model with so many tokens."""
    tokenizer = {"model": "gpt2", "tokens": tokens, "sha256": SHA_C}
    return {
        "sha256": sha256,
        "architecture": "qwen3",
        "numbers": {},
        "tensors": {},
        "tokenizer": tokenizer,
    }


def preset(key: str, value: object) -> Callable[[Files], None]:
    """An edit of the preset coder."""
    return put(f"llama_presets.coder.{key}", value)


def role(name: str, value: object) -> Callable[[Files], None]:
    """An edit that sets a variable of a role for every host."""
    return put(name, value, "all")


def extra(*items: str) -> Callable[[Files], None]:
    """An edit of the preset coder's extra_args."""
    return preset("extra_args", list(items))


def _system(name: str, listen: str | None) -> Callable[[Files], None]:
    entry = {**SOUND["ocr"]["llama_presets"]["vision"], "listen": listen}
    return put(f"llama_presets.{name}", {key: value for key, value in entry.items() if value is not None})


CODER = "llama_presets.coder"
EXTRA = f"{CODER}.extra_args"
MODEL = "gguf_models.qwen-coder-q4"
BUILD = "llama_cpp_builds.upstream"
KEY = {"name": "laptop", "sha256": SHA_A, "presets": ["coder"], "requests_per_minute": 60}

CASES = (
    # Keys and types.
    Case(
        "unknown-key",
        preset("contxt", 32768),
        f"{CODER}.contxt",
        "unknown key",
        "did you mean 'context'?",
        gate=True,
    ),
    Case("unknown-key-far", preset("zzz", 1), f"{CODER}.zzz", "known here: description, build", "remove it"),
    Case(
        "unknown-key-build",
        put(f"{BUILD}.cmake_option", {}, "builds"),
        f"{BUILD}.cmake_option",
        "unknown key",
        "'cmake_options'",
        "builds",
    ),
    Case(
        "unknown-key-model",
        put(f"{MODEL}.sha265", SHA_A, "models"),
        f"{MODEL}.sha265",
        "unknown key",
        "'sha256'",
        "models",
    ),
    Case(
        "unknown-key-hub",
        put("gguf_models.gemma-q4.hf.revison", "main", "models"),
        "gguf_models.gemma-q4.hf.revison",
        "unknown key",
        "'revision'",
        "models",
    ),
    Case(
        "unknown-key-expect",
        preset("expect", {"generation_toks": {"target": 1}}),
        f"{CODER}.expect.generation_toks",
        "unknown key",
        "'generation_tok_s'",
    ),
    Case(
        "unknown-key-part",
        put("gguf_models.split-q4.files.1.sze", 1, "models"),
        "gguf_models.split-q4.files.1.sze",
        "unknown key",
        "'size'",
        "models",
    ),
    Case(
        "misspelt-variable",
        renamed("llama_presets_foreign_units", "llama_preset_foreign_units"),
        "llama_preset_foreign_units",
        "no variable of any role",
        "did you mean 'llama_presets_foreign_units'?",
        gate=True,
    ),
    Case(
        "missing-key",
        drop(f"{CODER}.context"),
        f"{CODER}.context",
        "required",
        "add 'context:'",
        shown="(missing)",
    ),
    Case(
        "missing-description",
        drop(f"{CODER}.description"),
        f"{CODER}.description",
        "required",
        "One line for people",
    ),
    Case(
        "missing-size",
        drop(f"{MODEL}.size", "models"),
        f"{MODEL}.size",
        "needs size",
        "add 'size:'",
        "models",
    ),
    Case(
        "text-for-number",
        preset("context", "98304"),
        f"{CODER}.context",
        "must be a whole number, not text",
        "write it without quotes: context: 98304",
        shown='"98304"',
        gate=True,
    ),
    Case(
        "truth-for-number",
        preset("threads", True),
        f"{CODER}.threads",
        "must be a whole number, not true/false",
        "write a whole number",
        shown="true",
        gate=True,
    ),
    Case(
        "fraction-for-number",
        preset("context", 32768.5),
        f"{CODER}.context",
        "must be a whole number",
        "write a whole number",
    ),
    Case(
        "text-for-truth",
        preset("agent", "yes"),
        f"{CODER}.agent",
        "must be true or false, not text",
        "agent: true",
    ),
    Case(
        "number-for-truth",
        preset("jinja", 1),
        f"{CODER}.jinja",
        "must be true or false, not a whole number",
        "jinja: true",
    ),
    Case(
        "number-for-text",
        preset("description", 42),
        f"{CODER}.description",
        "must be text",
        'put it in quotes: "42"',
    ),
    Case(
        "text-for-list",
        preset("aliases", "c"),
        f"{CODER}.aliases",
        "must be a list, not text",
        'aliases: ["c"]',
    ),
    Case(
        "arguments-in-one-text",
        preset("extra_args", "--mlock --temp 0.2"),
        EXTRA,
        "must be a list, not text",
        "brackets",
    ),
    Case(
        "list-for-mapping",
        put("llama_presets", []),
        "llama_presets",
        "must be a mapping, not a list",
        "write a mapping",
        gate=True,
    ),
    Case(
        "nothing-for-mapping",
        put("llama_presets", None),
        "llama_presets",
        "must be a mapping, not empty",
        "write a mapping",
    ),
    Case("nothing-for-preset", put(CODER, None), CODER, "must be a mapping, not empty", "write a mapping"),
    Case("number-for-name", renamed(CODER, 7), "llama_presets.7", "must be text", 'put it in quotes: "7"'),
    Case(
        "not-a-number",
        preset("expect", {"generation_tok_s": {"target": float("nan")}}),
        f"{CODER}.expect.generation_tok_s.target",
        "must be a finite number",
        "write a finite number",
    ),
    # K and V, through every door.
    Case(
        "kv-short",
        extra("-ctk", "q8_0"),
        f"{EXTRA}.0",
        "K and V cannot differ",
        "set kv_cache_type:",
        shown='"-ctk"',
        gate=True,
    ),
    Case(
        "kv-equals",
        extra("--mlock", "--cache-type-v=f16"),
        f"{EXTRA}.1",
        "K and V cannot differ",
        "kv_cache_type:",
        gate=True,
    ),
    Case(
        "kv-underscores",
        extra("--cache_type_k", "q8_0"),
        f"{EXTRA}.0",
        "K and V cannot differ",
        "kv_cache_type:",
        gate=True,
    ),
    Case("kv-one-item", extra("-ctv q5_1"), f"{EXTRA}.0", "K and V cannot differ", "kv_cache_type:"),
    Case("kv-padded", extra(" -ctk", "q8_0"), f"{EXTRA}.0", "K and V cannot differ", "set kv_cache_type:"),
    Case(
        "kv-environment",
        extra("LLAMA_ARG_CACHE_TYPE_K=q8_0"),
        f"{EXTRA}.0",
        "environment variable LLAMA_ARG_CACHE_TYPE_K",
        "kv_cache_type: of this preset",
        gate=True,
    ),
    Case(
        "kv-environment-spaced",
        extra("export LLAMA_ARG_CACHE_TYPE_V = f16"),
        f"{EXTRA}.0",
        "LLAMA_ARG_CACHE_TYPE_V",
        "kv_cache_type:",
    ),
    Case("kv-draft-alone", extra("-ctkd", "q8_0"), f"{EXTRA}.0", 'V cache "f16"', "the same type"),
    Case(
        "kv-draft-differs",
        extra("--cache-type-k-draft", "q8_0", "--spec-draft-type-v", "q4_0"),
        f"{EXTRA}.0",
        "K and V cannot differ",
        "the same type",
    ),
    Case(
        "kv-hidden-as-value",
        extra("--temp", "-ctk", "q8_0"),
        f"{EXTRA}.1",
        "K and V cannot differ",
        "kv_cache_type:",
    ),
    Case(
        "kv-unknown",
        preset("kv_cache_type", "q3_k"),
        f"{CODER}.kv_cache_type",
        "must be one of f32, f16, bf16, q8_0",
        "write one of them",
        gate=True,
    ),
    Case(
        "kv-list",
        preset("kv_cache_type", ["q8_0", "q4_0"]),
        f"{CODER}.kv_cache_type",
        "must be one of",
        "one of them",
    ),
    Case(
        "kv-without-flash-attention",
        preset("flash_attention", False),
        f"{CODER}.flash_attention",
        "needs flash attention",
        "flash_attention: true",
    ),
    # Flags that are data.
    *(
        Case(
            f"owned{flag}",
            extra(flag, value),
            f"{EXTRA}.0",
            f"the key {key} sets {flag}",
            f"set {key}: of this preset",
            gate=flag in ("--ctx-size", "--port", "-ngl"),
        )
        for flag, value, key in (
            ("--ctx-size", "4096", "context"),
            ("-c", "4096", "context"),
            ("--port", "80", "listen"),
            ("--host", "::", "listen"),
            ("--model", "/x.gguf", "model"),
            ("-hf", "a/b", "model"),
            ("-np", "4", "parallel"),
            ("-ngl", "0", "n_gpu_layers"),
            ("-t", "4", "threads"),
            ("-fa", "off", "flash_attention"),
            ("-ncmoe", "1", "n_cpu_moe"),
            ("-md", "/d.gguf", "draft"),
            ("--mmproj", "/p.gguf", "projector"),
            ("--no-jinja", "x", "jinja"),
        )
    ),
    Case(
        "nothing-left-of-the-gpu",
        both(put("llama_presets_gpu_memory_mib", 1000), put("llama_presets_gpu_reserved_mib", 1024)),
        "llama_presets_gpu_reserved_mib",
        "leaves nothing of the GPU's 1000 MiB",
        "write the MiB that stay free",
        shown="1024",
    ),
    Case(
        "nothing-left-of-main-memory",
        both(put("llama_presets_main_memory_mib", 4096), put("llama_presets_main_reserved_mib", 4096)),
        "llama_presets_main_reserved_mib",
        "leaves nothing of main memory's 4096 MiB",
        "write the MiB that stay free",
        shown="4096",
    ),
    Case("fit-on", extra("--fit", "on"), f"{EXTRA}.0", "--fit off", "remove it", gate=True),
    Case(
        "secret-argument",
        extra("--api-key", "s3cret"),
        f"{EXTRA}.0",
        "can be read by every user",
        "--api-key-file",
        gate=True,
    ),
    Case(
        "secret-argument-equals",
        extra("--api-key=s3cret"),
        f"{EXTRA}.0",
        "can be read by every user",
        "--api-key-file",
        shown='"--api-key=***"',
    ),
    Case("tls", extra("--ssl-key-file", "/k"), f"{EXTRA}.0", "plain HTTP", "remove it"),
    Case("many-models", extra("--models-dir", "/m"), f"{EXTRA}.0", "serves one model", "remove it"),
    *(
        Case(
            f"shortcut{flag}",
            extra(flag),
            f"{EXTRA}.0",
            f"{flag.replace('_', '-')} may not stand here: llama-server reads it as another model",
            "a preset of its own",
            gate=flag == "--embd-gemma-default",
        )
        for flag in (
            "--embd-gemma-default",
            "--embd_gemma_default",
            "--embd-bge-small-en-default",
            "--fim-qwen-1.5b-default",
            "--fim-qwen-3b-default",
            "--fim-qwen-7b-default",
            "--fim-qwen-7b-spec",
            "--fim-qwen-14b-spec",
            "--fim-qwen-30b-default",
            "--gpt-oss-20b-default",
            "--gpt-oss-120b-default",
            "--vision-gemma-4b-default",
            "--vision-gemma-12b-default",
            "--tts-oute-default",
        )
    ),
    Case("embeddings-only", extra("--embedding"), f"{EXTRA}.0", "answers chats", "remove it"),
    Case("reranking-only", extra("--reranking"), f"{EXTRA}.0", "answers chats", "remove it"),
    Case("server-files", extra("--media-path", "/"), f"{EXTRA}.0", "files of this box", "remove it"),
    Case("server-tools", extra("--tools", "all"), f"{EXTRA}.0", "run commands", "remove it"),
    Case("server-agent", extra("-ag"), f"{EXTRA}.0", "run commands", "remove it"),
    Case("server-mcp", extra("--mcp-servers-json", "{}"), f"{EXTRA}.0", "run commands", "remove it"),
    Case("prints-and-exits", extra("--version"), f"{EXTRA}.0", "exits instead of serving", "remove it"),
    Case(
        "flag-twice",
        extra("--temp", "1", "--temp", "2"),
        f"{EXTRA}.2",
        "there twice",
        "remove one",
        gate=True,
    ),
    Case(
        "flag-equals-value",
        extra("--temp=0.2"),
        f"{EXTRA}.0",
        "does not read --flag=value",
        'write two items: "--temp", "0.2"',
    ),
    Case(
        "flag-and-value-in-one",
        extra("--temp 0.2"),
        f"{EXTRA}.0",
        "as one word",
        'one item each: "--temp", "0.2"',
    ),
    Case("empty-argument", extra(""), f"{EXTRA}.0", "at least one character", "remove the empty item"),
    Case(
        "newline-in-argument",
        extra("--mlock\nExecStartPre=/bin/evil"),
        f"{EXTRA}.0",
        "control character U+000A",
        "remove it",
        gate=True,
    ),
    # References and names.
    Case(
        "unknown-build",
        preset("build", "upstrem"),
        f"{CODER}.build",
        "not a key of llama_cpp_builds",
        "did you mean 'upstream'?",
        gate=True,
    ),
    Case(
        "unknown-model",
        preset("model", "qwen-coder-q5"),
        f"{CODER}.model",
        "known: qwen-coder-q4, qwen-draft-q8",
        "did you mean 'qwen-coder-q4'?",
        gate=True,
    ),
    Case(
        "unknown-projector",
        put("llama_presets.vision.projector", "nothing-like-it", "ocr"),
        "llama_presets.vision.projector",
        "not a key of gguf_models",
        "add it to gguf_models",
        "ocr",
    ),
    Case(
        "own-projector",
        preset("projector", "qwen-coder-q4"),
        f"{CODER}.projector",
        "is the model itself",
        "name its mmproj file",
    ),
    Case(
        "unknown-draft",
        preset("draft", "nothing-like-it"),
        f"{CODER}.draft",
        "not a key of gguf_models",
        "add it to gguf_models",
    ),
    Case(
        "own-draft",
        preset("draft", "qwen-coder-q4"),
        f"{CODER}.draft",
        "cannot be its own draft",
        "smaller model, or none",
        gate=True,
    ),
    Case(
        "draft-tokenizer",
        put(
            "llama_lock.headers",
            {"qwen-coder-q4": header(SHA_A, 151_936), "qwen-draft-q8": header(SHA_B, 262_144)},
            "lock",
        ),
        f"{CODER}.draft",
        "has another tokenizer than qwen-coder-q4: 262144 tokens beside 151936",
        "name a model of the same family, or write draft: auto",
        gate=True,
    ),
    Case(
        "draft-auto-of-the-system",
        put("llama_presets.vision.draft", "auto", "ocr"),
        "llama_presets.vision.draft",
        "not behind the gateway",
        "name a draft model, or none",
        "ocr",
    ),
    Case(
        "model-named-auto",
        both(
            renamed("gguf_models.gemma-q4", "auto", "models"),
            renamed("llama_lock.models.gemma-q4", "auto", "lock"),
            put("llama_presets.gemma.model", "auto"),
            put("llama_presets.vision.model", "auto", "ocr"),
        ),
        "gguf_models.auto",
        "meaning of its own",
        "rename the model",
        "models",
    ),
    Case(
        "alias-twice",
        put("llama_presets.gemma.aliases", ["g", "c"]),
        "llama_presets.gemma.aliases.1",
        "already an alias of coder",
        "choose another",
        gate=True,
    ),
    Case(
        "alias-twice-same-preset",
        preset("aliases", ["c", "c"]),
        f"{CODER}.aliases.1",
        "already an alias of coder",
        "choose another",
    ),
    Case(
        "alias-is-preset",
        preset("aliases", ["gemma"]),
        f"{CODER}.aliases.0",
        "already the preset gemma",
        "choose another",
        gate=True,
    ),
    Case(
        "alias-is-verb",
        preset("aliases", ["off"]),
        f"{CODER}.aliases.0",
        "already a word of lmswitch",
        "choose another",
    ),
    Case(
        "alias-too-long",
        preset("aliases", ["c" * 17]),
        f"{CODER}.aliases.0",
        "1 to 16 characters",
        "shorten it",
    ),
    Case(
        "aliases-too-many",
        preset("aliases", [f"c{n}" for n in range(9)]),
        f"{CODER}.aliases",
        "more than 8 items",
        "remove some",
    ),
    Case(
        "preset-is-verb",
        renamed(CODER, "status"),
        "llama_presets.status",
        "already a word of lmswitch",
        "rename the preset",
        gate=True,
    ),
    Case(
        "preset-name-capital", renamed(CODER, "Coder"), "llama_presets.Coder", "a-z, 0-9 and -", "rename it"
    ),
    Case(
        "preset-name-traversal",
        renamed(CODER, "../coder"),
        "llama_presets.../coder",
        "a-z, 0-9 and -",
        "rename it",
        gate=True,
    ),
    Case(
        "preset-name-too-long",
        renamed(CODER, "c" * 33),
        f"llama_presets.{'c' * 33}",
        "1 to 32 characters",
        "rename it",
    ),
    Case(
        "preset-name-of-builds",
        renamed(CODER, "build-me"),
        "llama_presets.build-me",
        "belong to the builds",
        "rename",
    ),
    # Numbers.
    Case(
        "context-under-agent-floor",
        preset("context", 16384),
        f"{CODER}.context",
        "an agent needs at least 32768",
        "write 32768 or more, or agent: false",
        shown="16384",
        gate=True,
    ),
    Case(
        "context-of-a-slot-under-floor",
        preset("parallel", 4),
        f"{CODER}.context",
        "24576 tokens in each of 4 slots; an agent needs at least 32768",
        "write 131072",
        gate=True,
    ),
    Case(
        "context-negative",
        preset("context", -1),
        f"{CODER}.context",
        "at least 256",
        "256 or more",
        gate=True,
    ),
    Case("context-zero", preset("context", 0), f"{CODER}.context", "at least 256", "256 or more"),
    Case(
        "context-too-large",
        preset("context", 1_048_832),
        f"{CODER}.context",
        "at most 1048576",
        "1048576 or less",
    ),
    Case(
        "context-no-multiple",
        preset("context", 98305),
        f"{CODER}.context",
        "multiple of 256",
        "write 98304",
        gate=True,
    ),
    Case(
        "context-no-multiple-of-slots",
        put("llama_presets.chat.parallel", 3),
        "llama_presets.chat.context",
        "multiple of 768 for 3 slots",
        "write 16128",
    ),
    Case("threads-zero", preset("threads", 0), f"{CODER}.threads", "at least 1", "1 or more"),
    Case("n-cpu-moe-negative", preset("n_cpu_moe", -1), f"{CODER}.n_cpu_moe", "at least 0", "0 or more"),
    Case(
        "n-gpu-layers-negative",
        preset("n_gpu_layers", -1),
        f"{CODER}.n_gpu_layers",
        "at least 0",
        "0 or more",
    ),
    Case("parallel-zero", preset("parallel", 0), f"{CODER}.parallel", "at least 1", "1 or more"),
    Case("parallel-too-many", preset("parallel", 65), f"{CODER}.parallel", "at most 64", "64 or less"),
    Case(
        "start-timeout-short",
        preset("start_timeout", 1),
        f"{CODER}.start_timeout",
        "at least 5",
        "5 or more",
    ),
    Case(
        "start-timeout-long",
        preset("start_timeout", 3601),
        f"{CODER}.start_timeout",
        "at most 3600",
        "3600 or less",
    ),
    Case("stop-timeout-zero", preset("stop_timeout", 0), f"{CODER}.stop_timeout", "at least 1", "1 or more"),
    Case(
        "floor-above-target",
        put(f"{CODER}.expect.generation_tok_s.floor", 90),
        f"{CODER}.expect.generation_tok_s.floor",
        "above its target of 81.5 tok/s",
        "write 81.5 or less",
        gate=True,
    ),
    Case(
        "target-zero",
        put(f"{CODER}.expect.prefill_tok_s.target", 0),
        f"{CODER}.expect.prefill_tok_s.target",
        "more than 0",
        "above 0",
    ),
    Case(
        "agent-without-jinja",
        preset("jinja", False),
        f"{CODER}.jinja",
        "tool calls need jinja",
        "jinja: true, or agent: false",
    ),
    # Where it listens.
    Case(
        "scope-unknown",
        preset("scope", "root"),
        f"{CODER}.scope",
        "must be one of user, system",
        "write one of them",
        gate=True,
    ),
    Case(
        "system-without-listen",
        _system("vision", None),
        "llama_presets.vision.listen",
        "a place of its own",
        "add listen:",
        shown="(missing)",
    ),
    Case(
        "port-clash-with-front",
        _system("vision", "127.0.0.1:1234"),
        "llama_presets.vision.listen",
        "already taken by llm_gateway_listen.0",
        "choose another port",
        gate=True,
    ),
    Case(
        "socket-clash-with-front",
        both(put("llama_presets_listen", "/run/llama/x.sock"), _system("vision", "/run/llama/x.sock")),
        "llama_presets.vision.listen",
        "already taken by llama_presets_listen",
        "choose another path",
    ),
    Case(
        "port-clash-of-systems",
        both(_system("vision", "127.0.0.1:8090"), _system("second", "0.0.0.0:8090")),
        "llama_presets.second.listen",
        "already taken by the preset vision",
        "choose another port",
        gate=True,
    ),
    Case(
        "past-the-gateway-by-a-preset",
        preset("listen", "127.0.0.1:8090"),
        f"{CODER}.listen",
        "past the gateway",
        "remove it; llm_gateway_listen says where",
        gate=True,
    ),
    Case(
        "past-the-gateway-by-another-socket",
        preset("listen", "/run/llama/coder.sock"),
        f"{CODER}.listen",
        "listens where the gateway looks",
        "remove it",
    ),
    Case(
        "past-the-gateway-by-the-front",
        put("llama_presets_listen", "0.0.0.0:1234"),
        "llama_presets_listen",
        "past the gateway",
        "remove it; llm_gateway_listen says where",
        gate=True,
    ),
    Case(
        "listen-name",
        preset("listen", "localhost:8090"),
        f"{CODER}.listen",
        "IP:PORT",
        '"127.0.0.1:8090"',
        gate=True,
    ),
    Case("listen-no-port", preset("listen", "127.0.0.1"), f"{CODER}.listen", "IP:PORT", '"127.0.0.1:8090"'),
    Case(
        "listen-port-range",
        preset("listen", "127.0.0.1:65536"),
        f"{CODER}.listen",
        "between 1 and 65535",
        '"127.0.0.1:8090"',
    ),
    Case("listen-bare-ipv6", preset("listen", "::1:8090"), f"{CODER}.listen", "brackets", '"[::1]:8090"'),
    Case(
        "listen-number", preset("listen", 8090), f"{CODER}.listen", "must be text", 'put it in quotes: "8090"'
    ),
    Case(
        "socket-too-long",
        preset("listen", f"/run/{'x' * 98}.sock"),
        f"{CODER}.listen",
        "108 bytes; the path of a UNIX socket has at most 107",
        "shorter folder",
        gate=True,
    ),
    Case(
        "socket-without-sock",
        preset("listen", "/run/llama/vision"),
        f"{CODER}.listen",
        "ends in .sock",
        "/run/llama/vision.sock",
    ),
    Case(
        "front-listen",
        put("llama_presets_listen", "everywhere"),
        "llama_presets_listen",
        "IP:PORT",
        "write it like",
    ),
    Case(
        "front-socket-too-long",
        put("llama_presets_listen", f"/run/user/1500/{'x' * 88}.sock"),
        "llama_presets_listen",
        "108 bytes; the path of a UNIX socket has at most 107",
        "shorter folder",
        gate=True,
    ),
    # The gateway.
    Case(
        "gateway-listen-name",
        put("llm_gateway_listen", ["ancalagon:1234"]),
        "llm_gateway_listen.0",
        "IP:PORT",
        "write it like",
        gate=True,
    ),
    Case(
        "gateway-listen-socket",
        put("llm_gateway_listen", ["127.0.0.1:1234", "/run/llm.sock"]),
        "llm_gateway_listen.1",
        "must be IP:PORT: clients reach the gateway over TCP",
        "write it like",
        gate=True,
    ),
    Case(
        "gateway-listen-text",
        put("llm_gateway_listen", "0.0.0.0:1234"),
        "llm_gateway_listen",
        "must be a list",
        "in brackets",
    ),
    Case(
        "gateway-listen-nowhere",
        put("llm_gateway_listen", []),
        "llm_gateway_listen",
        "needs at least 1 items",
        "add what is missing",
    ),
    Case(
        "gateway-listen-low-port",
        put("llm_gateway_listen", ["0.0.0.0:80"]),
        "llm_gateway_listen.0",
        "may not bind one below 1024",
        "write a port from 1024 to 65535",
    ),
    Case(
        "gateway-listen-twice",
        put("llm_gateway_listen", ["100.64.0.10:1234", "127.0.0.1:1234", "0.0.0.0:1234"]),
        "llm_gateway_listen.2",
        "already taken by llm_gateway_listen.0",
        "remove one of them",
        gate=True,
    ),
    Case(
        "gateway-default-preset",
        put("llm_gateway_default_preset", "codr"),
        "llm_gateway_default_preset",
        "known: coder, gemma, chat",
        "did you mean 'coder'?",
        gate=True,
    ),
    Case(
        "gateway-default-system-preset",
        both(_system("vision", "127.0.0.1:8090"), put("llm_gateway_default_preset", "vision")),
        "llm_gateway_default_preset",
        "not a key of llama_presets with scope user",
        "name a known one",
    ),
    Case(
        "gateway-model-name",
        put("llm_gateway_model_names", {"claude-*": "c"}),
        "llm_gateway_model_names.claude-*",
        "known: coder, gemma, chat",
        "name a known one",
        gate=True,
    ),
    Case(
        "gateway-model-name-taken",
        put("llm_gateway_model_names", {"g": "coder"}),
        "llm_gateway_model_names.g",
        "means a preset already",
        "remove it",
    ),
    Case(
        "gateway-model-name-blank",
        put("llm_gateway_model_names", {"claude *": "coder"}),
        "llm_gateway_model_names.claude *",
        "without blanks",
        'write it like "claude-*"',
    ),
    Case(
        "gateway-key-itself",
        put("llm_gateway_keys", [{**KEY, "sha256": "s3cret"}]),
        "llm_gateway_keys.0.sha256",
        "never the key itself",
        "llmbox-key new NAME",
        shown='"***"',
        gate=True,
    ),
    Case(
        "gateway-key-in-a-field-of-its-own",
        put("llm_gateway_keys", [{**KEY, "key": "s3cret"}]),
        "llm_gateway_keys.0.key",
        "unknown key; known here: name, sha256",
        "remove it",
        shown='"***"',
    ),
    Case(
        "gateway-key-name",
        put("llm_gateway_keys", [{**KEY, "name": "my laptop"}]),
        "llm_gateway_keys.0.name",
        "name of a key's holder",
        "write it like laptop",
    ),
    Case(
        "gateway-key-name-twice",
        put("llm_gateway_keys", [KEY, {**KEY, "sha256": SHA_B}]),
        "llm_gateway_keys.1.name",
        "is that of llm_gateway_keys.0 too",
        "give it another name",
        gate=True,
    ),
    Case(
        "gateway-key-twice",
        put("llm_gateway_keys", [KEY, {**KEY, "name": "phone"}]),
        "llm_gateway_keys.1.sha256",
        "is that of llm_gateway_keys.0 too",
        "llmbox-key new phone",
    ),
    Case(
        "gateway-key-preset",
        put("llm_gateway_keys", [{**KEY, "presets": ["coder", "gema"]}]),
        "llm_gateway_keys.0.presets.1",
        "known: coder, gemma, chat",
        "did you mean 'gemma'?",
        gate=True,
    ),
    Case(
        "gateway-key-budget",
        put("llm_gateway_keys", [{**KEY, "tokens_per_day": 0}]),
        "llm_gateway_keys.0.tokens_per_day",
        "at least 1",
        "1 or more",
        gate=True,
    ),
    Case(
        "gateway-policy",
        role("llm_gateway_switch_policy", "sometimes"),
        "llm_gateway_switch_policy",
        "must be one of off, when_idle, always",
        "write one of them",
        "all",
    ),
    Case(
        "gateway-policy-off",
        role("llm_gateway_switch_policy", False),
        "llm_gateway_switch_policy",
        "must be one of off, when_idle, always",
        'put it in quotes: "off"',
        "all",
        gate=True,
    ),
    Case(
        "gateway-network",
        role("llm_gateway_networks", ["home"]),
        "llm_gateway_networks.0",
        "IP network in CIDR notation",
        "192.168.1.0/24",
        "all",
        gate=True,
    ),
    Case(
        "gateway-network-host",
        role("llm_gateway_networks", ["192.168.1.7/24"]),
        "llm_gateway_networks.0",
        "an address within a network",
        "write 192.168.1.0/24",
        "all",
    ),
    Case(
        "gateway-hold-timeout",
        role("llm_gateway_hold_timeout", 0),
        "llm_gateway_hold_timeout",
        "at least 1",
        "1 or more",
        "all",
    ),
    Case(
        "gateway-dwell",
        role("llm_gateway_min_dwell", 86401),
        "llm_gateway_min_dwell",
        "at most 86400",
        "86400 or less",
        "all",
    ),
    Case(
        "gateway-connections",
        role("llm_gateway_max_connections", 100000),
        "llm_gateway_max_connections",
        "at most 30000",
        "30000 or less",
        "all",
    ),
    # Files, URLs, checksums.
    Case(
        "file-traversal",
        put(f"{MODEL}.file", "../../etc/cron.d/x.gguf", "models"),
        f"{MODEL}.file",
        "plain file name",
        "write the last part only",
        "models",
        gate=True,
    ),
    Case(
        "file-absolute",
        put(f"{MODEL}.file", "/etc/x.gguf", "models"),
        f"{MODEL}.file",
        "no absolute path",
        "last part",
        "models",
    ),
    Case(
        "file-nul",
        put(f"{MODEL}.file", "x\0.gguf", "models"),
        f"{MODEL}.file",
        "control character U+0000",
        "remove it",
        "models",
        shown='"x\\u0000.gguf"',
    ),
    Case(
        "file-dash",
        put(f"{MODEL}.file", "-rf.gguf", "models"),
        f"{MODEL}.file",
        "letters, digits",
        "rename it",
        "models",
    ),
    Case(
        "file-not-gguf",
        put(f"{MODEL}.file", "model.bin", "models"),
        f"{MODEL}.file",
        "ends in .gguf",
        "rename it",
        "models",
    ),
    Case(
        "url-without-name",
        put(f"{MODEL}.url", "https://models.example/get?id=7", "models"),
        f"{MODEL}.url",
        "names the file",
        "add 'file: NAME.gguf'",
        "models",
    ),
    Case(
        "url-hides-traversal",
        put(f"{MODEL}.url", "https://models.example/..%2F..%2Fx.gguf", "models"),
        f"{MODEL}.url",
        "names the file",
        "add 'file:",
        "models",
    ),
    Case(
        "hub-file-traversal",
        put("gguf_models.gemma-q4.hf.file", "../x.gguf", "models"),
        "gguf_models.gemma-q4.hf.file",
        "inside the repository",
        "as the hub lists it",
        "models",
        gate=True,
    ),
    Case(
        "hub-repo",
        put("gguf_models.gemma-q4.hf.repo", "gemma", "models"),
        "gguf_models.gemma-q4.hf.repo",
        "owner/name",
        "as in the page's address",
        "models",
    ),
    Case(
        "path-relative",
        put("gguf_models.qwen-draft-q8.path", "models/x.gguf", "models"),
        "gguf_models.qwen-draft-q8.path",
        "absolute path",
        "from /",
        "models",
    ),
    Case(
        "path-traversal",
        put("gguf_models.qwen-draft-q8.path", "/srv/../etc/x.gguf", "models"),
        "gguf_models.qwen-draft-q8.path",
        "without '..'",
        "from /",
        "models",
    ),
    Case(
        "url-scheme",
        put(f"{MODEL}.url", "ftp://models.example/x.gguf", "models"),
        f"{MODEL}.url",
        "begins with https:// or http://",
        "write it like https://",
        "models",
        gate=True,
    ),
    Case(
        "url-password",
        put(f"{MODEL}.url", "https://me:hunter2@models.example/x.gguf", "models"),
        f"{MODEL}.url",
        "user name or password",
        "before the @",
        "models",
        shown='"https://***@models.example/x.gguf"',
        gate=True,
    ),
    Case(
        "repo-transport",
        put(f"{BUILD}.repo", "ext::sh -c id", "builds"),
        f"{BUILD}.repo",
        "one URL",
        "write it like",
        "builds",
    ),
    Case(
        "repo-option",
        put(f"{BUILD}.repo", "--upload-pack=/bin/sh", "builds"),
        f"{BUILD}.repo",
        "begins with https://",
        "write it like",
        "builds",
    ),
    Case(
        "sha256-short",
        put(f"{MODEL}.sha256", "abc123", "models"),
        f"{MODEL}.sha256",
        "64 lower-case hexadecimal",
        "sha256sum",
        "models",
        gate=True,
    ),
    Case(
        "sha256-capitals",
        put(f"{MODEL}.sha256", SHA_A.upper(), "models"),
        f"{MODEL}.sha256",
        "64 lower-case",
        "sha256sum",
        "models",
    ),
    Case(
        "sha256-number",
        put(f"{MODEL}.sha256", int("1" * 64), "models"),
        f"{MODEL}.sha256",
        "must be text",
        "in quotes",
        "models",
    ),
    Case(
        "size-text",
        put(f"{MODEL}.size", "18 GB", "models"),
        f"{MODEL}.size",
        "whole number",
        "write a whole number",
        "models",
    ),
    Case(
        "size-zero", put(f"{MODEL}.size", 0, "models"), f"{MODEL}.size", "at least 1", "1 or more", "models"
    ),
    Case(
        "commit-short",
        put(f"{BUILD}.commit", "0123456", "builds"),
        f"{BUILD}.commit",
        "40 lower-case hexadecimal",
        "git rev-parse",
        "builds",
    ),
    Case(
        "commit-and-ref",
        put(f"{BUILD}.ref", "b11434", "builds"),
        f"{BUILD}.ref",
        "exactly one",
        "remove one",
        "builds",
        gate=True,
    ),
    Case(
        "neither-commit-nor-ref",
        drop(f"{BUILD}.commit", "builds"),
        f"{BUILD}.commit",
        "one is needed",
        "add 'ref: TAG'",
        "builds",
    ),
    Case(
        "ref-option",
        put("llama_cpp_builds.fork.ref", "--exec=x", "builds"),
        "llama_cpp_builds.fork.ref",
        "tag or branch",
        "b11434",
        "builds",
    ),
    Case(
        "ref-without-lock",
        put("llama_lock.builds", {}, "lock"),
        "llama_cpp_builds.fork.ref",
        "not in the lock",
        "run scripts/lock_models.py --inventory ",
        "builds",
        gate=True,
    ),
    Case(
        "no-lock-at-all",
        put("llama_lock", {}, "lock"),
        "llama_cpp_builds.fork.ref",
        "not in the lock",
        "scripts/lock_models.py",
        "builds",
    ),
    Case(
        "lock-of-other-ref",
        put("llama_cpp_builds.fork.ref", "b11500", "builds"),
        "llama_cpp_builds.fork.ref",
        "the lock is for b11434",
        "scripts/lock_models.py",
        "builds",
    ),
    Case(
        "hub-without-lock",
        put("llama_lock.models", {}, "lock"),
        "gguf_models.gemma-q4.hf.revision",
        "not in the lock",
        "scripts/lock_models.py",
        "models",
    ),
    Case(
        "lock-of-other-repo",
        put("gguf_models.gemma-q4.hf.repo", "other/gemma-GGUF", "models"),
        "gguf_models.gemma-q4.hf.repo",
        "the lock is for someone/gemma-GGUF",
        "scripts/lock_models.py",
        "models",
    ),
    Case(
        "lock-of-other-file",
        put("gguf_models.gemma-q4.hf.file", "gemma-Q8_0.gguf", "models"),
        "gguf_models.gemma-q4.hf.file",
        "the lock is for other files",
        "scripts/lock_models.py",
        "models",
    ),
    Case(
        "lock-edited",
        put("llama_lock.builds.fork.commit", "HEAD", "lock"),
        "llama_lock.builds.fork.commit",
        "whole commit",
        "git rev-parse",
        "lock",
    ),
    Case(
        "two-sources",
        put(f"{MODEL}.hf", SOUND["models"]["gguf_models"]["gemma-q4"]["hf"], "models"),
        f"{MODEL}.hf",
        "has url and hf",
        "keep only url",
        "models",
        gate=True,
    ),
    Case(
        "no-source",
        drop(f"{MODEL}.url", "models"),
        f"{MODEL}.url",
        "has none of url, path, hf and files",
        "add 'url:'",
        "models",
    ),
    Case(
        "hub-with-sum",
        put("gguf_models.gemma-q4.sha256", SHA_A, "models"),
        "gguf_models.gemma-q4.sha256",
        "in the lock",
        "remove it",
        "models",
    ),
    Case(
        "split-gap",
        put("gguf_models.split-q4.files.1.url", "https://models.example/split-00003-of-00003.gguf", "models"),
        "gguf_models.split-q4.files.1.url",
        "part 2 of 2",
        "list all 3 parts",
        "models",
        gate=True,
    ),
    Case(
        "split-foreign",
        put("gguf_models.split-q4.files.1.url", "https://models.example/other-00002-of-00002.gguf", "models"),
        "gguf_models.split-q4.files.1.url",
        "part 2 of 2",
        "write split-00002-of-00002.gguf",
        "models",
    ),
    Case(
        "split-order",
        both(
            put(
                "gguf_models.split-q4.files.0.url",
                "https://models.example/split-00002-of-00002.gguf",
                "models",
            ),
            put(
                "gguf_models.split-q4.files.1.url",
                "https://models.example/split-00001-of-00002.gguf",
                "models",
            ),
        ),
        "gguf_models.split-q4.files.0.url",
        "part 1 of 2",
        "split-00001-of-00002.gguf",
        "models",
    ),
    Case(
        "split-single-part",
        put(f"{MODEL}.url", "https://models.example/x-00001-of-00003.gguf", "models"),
        f"{MODEL}.url",
        "part 1 of 1",
        "list all 3 parts",
        "models",
    ),
    Case(
        "split-of-one",
        put("gguf_models.split-q4.files", SOUND["models"]["gguf_models"]["split-q4"]["files"][:1], "models"),
        "gguf_models.split-q4.files",
        "at least 2 items",
        "add what is missing",
        "models",
    ),
    Case(
        "split-part-without-source",
        put("gguf_models.split-q4.files.1", {"sha256": SHA_C, "size": 2000}, "models"),
        "gguf_models.split-q4.files.1.url",
        "exactly one of url and path",
        "write one of them",
        "models",
    ),
    Case(
        "one-file-name-two-contents",
        put("gguf_models.qwen-draft-q8.file", "Qwen-Coder-Q4_K_M.gguf", "models"),
        "gguf_models.qwen-draft-q8.file",
        "with another SHA-256",
        "file: qwen-draft-q8.gguf",
        "models",
        gate=True,
    ),
    # Text that could break a line, a unit or a terminal.
    Case(
        "description-newline",
        preset("description", "one\nExecStart=/bin/evil"),
        f"{CODER}.description",
        "control character U+000A",
        "one-line",
        shown='"one\\nExecStart=/bin/evil"',
        gate=True,
    ),
    Case(
        "description-escape",
        preset("description", "\x1b[31mred"),
        f"{CODER}.description",
        "U+001B",
        "remove it",
    ),
    Case(
        "description-bidi",
        preset("description", "abc\u202edef"),
        f"{CODER}.description",
        "U+202E",
        "remove it",
        shown='"abc\\u202edef"',
    ),
    Case(
        "description-empty",
        preset("description", ""),
        f"{CODER}.description",
        "without blanks",
        "write one line",
    ),
    Case(
        "description-long",
        preset("description", "x" * 121),
        f"{CODER}.description",
        "at most 120",
        "shorten it",
    ),
    # CMake.
    Case(
        "cmake-name",
        put(f"{BUILD}.cmake_options", {"GGML CUDA": True}, "builds"),
        f"{BUILD}.cmake_options.GGML CUDA",
        "CMake variable",
        "docs/build.md",
        "builds",
        gate=True,
    ),
    Case(
        "cmake-prefix",
        put(f"{BUILD}.cmake_options", {"CMAKE_INSTALL_PREFIX": "/usr"}, "builds"),
        f"{BUILD}.cmake_options.CMAKE_INSTALL_PREFIX",
        "the role sets",
        "docs/build.md",
        "builds",
    ),
    Case(
        "cmake-value",
        put(f"{BUILD}.cmake_options.GGML_CUDA", "$(id)", "builds"),
        f"{BUILD}.cmake_options.GGML_CUDA",
        "characters other than",
        "remove quotes",
        "builds",
    ),
    Case(
        "cmake-list",
        put(f"{BUILD}.cmake_options.CMAKE_CUDA_ARCHITECTURES", [89, 120], "builds"),
        f"{BUILD}.cmake_options.CMAKE_CUDA_ARCHITECTURES",
        "must be true, false, a number or text",
        '"89;120"',
        "builds",
    ),
    Case(
        "cmake-word-on",
        put(f"{BUILD}.cmake_options.GGML_CUDA", "on", "builds"),
        f"{BUILD}.cmake_options.GGML_CUDA",
        "word for true or false",
        "write true, without quotes",
        "builds",
        gate=True,
    ),
    Case(
        "cmake-word-no",
        put(f"{BUILD}.cmake_options.GGML_LTO", "No", "builds"),
        f"{BUILD}.cmake_options.GGML_LTO",
        "word for true or false",
        "write false",
        "builds",
    ),
    Case(
        "cmake-switch-one",
        put(f"{BUILD}.cmake_options.GGML_CUDA", 1, "builds"),
        f"{BUILD}.cmake_options.GGML_CUDA",
        "must be true or false",
        "write true",
        "builds",
        gate=True,
    ),
    Case(
        "cmake-switch-text",
        put(f"{BUILD}.cmake_options.GGML_CUDA", "1", "builds"),
        f"{BUILD}.cmake_options.GGML_CUDA",
        "must be true or false",
        "write true",
        "builds",
    ),
    Case(
        "cmake-switch-zero",
        put(f"{BUILD}.cmake_options.GGML_CUDA", "0", "builds"),
        f"{BUILD}.cmake_options.GGML_CUDA",
        "must be true or false",
        "write false",
        "builds",
    ),
    # Foreign units.
    Case(
        "foreign-system-unit",
        put("llama_presets_foreign_units", [{"name": "ollama.service", "scope": "system"}]),
        "llama_presets_foreign_units.0",
        "cannot conflict with a system unit",
        "systemctl disable --now ollama.service",
        gate=True,
    ),
    Case(
        "foreign-no-service",
        put("llama_presets_foreign_units", ["lmstudio"]),
        "llama_presets_foreign_units.0",
        "ends in .service",
        "lmstudio.service",
    ),
    Case(
        "foreign-ours",
        put("llama_presets_foreign_units", ["llama-coder.service"]),
        "llama_presets_foreign_units.0",
        "unit of a preset",
        "remove it",
    ),
    Case(
        "foreign-twice",
        put("llama_presets_foreign_units", ["a.service", "a.service"]),
        "llama_presets_foreign_units.1",
        "twice",
        "remove one",
    ),
    # Variables of the roles.
    Case(
        "gpu-cuda-too-old",
        role("gpu_host_cuda_version", "12.6.3-1"),
        "gpu_host_cuda_version",
        "for sm_120 (Blackwell), which CUDA knows from 12.8 on",
        "13.0.3-1",
        "all",
        gate=True,
    ),
    Case(
        "gpu-driver-too-old",
        role("gpu_host_driver_version", "550.54.14-0ubuntu1"),
        "gpu_host_driver_version",
        "for sm_120 (Blackwell), which the driver knows from 570 on",
        "580.159.03-1ubuntu1",
        "all",
    ),
    Case(
        "gpu-driver-not-in-full",
        role("gpu_host_driver_version", "580"),
        "gpu_host_driver_version",
        "the vendor's package version in full",
        "apt-cache madison",
        "all",
    ),
    Case(
        "gpu-cuda-not-in-full",
        role("gpu_host_cuda_version", "13.0"),
        "gpu_host_cuda_version",
        "in full",
        "13.0.3-1",
        "all",
    ),
    Case(
        "gpu-fingerprint",
        role("gpu_host_repository_fingerprint", "3bf863cc"),
        "gpu_host_repository_fingerprint",
        "an OpenPGP fingerprint",
        "gpg --show-keys",
        "all",
    ),
    Case(
        "gpu-repository",
        role("gpu_host_repository", "https://mirror.example/cuda"),
        "gpu_host_repository",
        "with / at its end",
        "add the /",
        "all",
    ),
    Case(
        "gpu-card",
        role("gpu_host_card", "yes"),
        "gpu_host_card",
        "must be one of auto, present, absent",
        "write one of them",
        "all",
    ),
    Case(
        "gpu-interface",
        role("gpu_host_wake_on_lan", "eno1; reboot"),
        "gpu_host_wake_on_lan",
        "the name of a network card",
        "eno1",
        "all",
    ),
    Case(
        "gpu-kernel-parameter-shell",
        role("gpu_host_kernel_parameters", ["pcie_aspm=off", 'x="$(reboot)"']),
        "gpu_host_kernel_parameters.1",
        "must be one kernel parameter",
        "pcie_aspm=off",
        "all",
        gate=True,
    ),
    Case(
        "gpu-kernel-parameter-boot",
        role("gpu_host_kernel_parameters", ["init=/bin/sh"]),
        "gpu_host_kernel_parameters.0",
        "decides over what boots",
        "take it out",
        "all",
    ),
    *(
        Case(
            f"gpu-kernel-parameter-{word.partition('=')[0]}",
            role("gpu_host_kernel_parameters", ["pcie_aspm=off", word]),
            "gpu_host_kernel_parameters.1",
            "decides over what boots",
            "take it out",
            "all",
        )
        for word in ("systemd.unit=emergency.target", "systemd.mask=ssh.service", "single")
    ),
    Case(
        "power-wake-address",
        role("power_wake_addresses", ["192.168.1.256"]),
        "power_wake_addresses.0",
        "must be an address, IPv4 or IPv6",
        "192.168.1.20",
        "all",
    ),
    Case(
        "gpu-kernel-parameter-twice",
        role("gpu_host_kernel_parameters", ["pcie_aspm=off", "pcie_aspm=off"]),
        "gpu_host_kernel_parameters",
        "is there twice",
        "take one out",
        "all",
    ),
    Case(
        "role-uid-low",
        role("llm_user_uid", 500),
        "llm_user_uid",
        "must be at least 1000",
        "1000 or more",
        "all",
        gate=True,
    ),
    Case(
        "role-uid-text",
        role("llm_user_uid", "1500"),
        "llm_user_uid",
        "must be a whole number, not text",
        "write it without quotes: llm_user_uid: 1500",
        "all",
    ),
    Case(
        "role-user-root",
        role("llm_user_name", "root"),
        "llm_user_name",
        "not root",
        "write it like llm",
        "all",
        gate=True,
    ),
    Case(
        "role-user-option",
        role("llm_user_name", "-rf"),
        "llm_user_name",
        "unprivileged account",
        "write it like llm",
        "all",
    ),
    Case(
        "role-owner-root",
        role("gguf_models_owner", "root"),
        "gguf_models_owner",
        "not root",
        "write it like llm",
        "all",
    ),
    Case(
        "role-keep-text",
        role("llama_cpp_keep_releases", "two"),
        "llama_cpp_keep_releases",
        "must be a whole number",
        "write a whole number",
        "all",
        gate=True,
    ),
    Case(
        "role-keep-none",
        role("llama_cpp_keep_releases", 0),
        "llama_cpp_keep_releases",
        "must be at least 1",
        "write 1 or more",
        "all",
    ),
    Case(
        "role-body-too-large-to-keep",
        role("llm_gateway_max_body", 300_000_000),
        "llm_gateway_max_body",
        "is more than llm_gateway_max_buffered (268435456 bytes)",
        "lower llm_gateway_max_body or raise llm_gateway_max_buffered",
        "all",
        gate=True,
    ),
    Case(
        "role-no-room-for-a-body",
        role("llm_gateway_max_buffered", 30_000_000),
        "llm_gateway_max_buffered",
        "is less than llm_gateway_max_body (33554432 bytes)",
        "lower llm_gateway_max_body or raise llm_gateway_max_buffered",
        "all",
    ),
    Case(
        "role-root-slash",
        role("llama_cpp_root", "/"),
        "llama_cpp_root",
        "absolute path, not '/' itself",
        "write it from /",
        "all",
        gate=True,
    ),
    Case(
        "role-root-traversal",
        role("llama_cpp_root", "/opt/../etc"),
        "llama_cpp_root",
        "absolute path",
        "write it from /",
        "all",
    ),
    Case(
        "role-home-relative",
        role("llm_user_home", "home/llm"),
        "llm_user_home",
        "absolute path",
        "write it from /",
        "all",
    ),
    Case(
        "role-reserve-text",
        role("gguf_models_reserve_bytes", "2 GB"),
        "gguf_models_reserve_bytes",
        "must be a whole number",
        "write a whole number",
        "all",
        gate=True,
    ),
    Case(
        "role-reserve-negative",
        role("gguf_models_reserve_bytes", -1),
        "gguf_models_reserve_bytes",
        "must be at least 0",
        "write 0 or more",
        "all",
    ),
    Case(
        "role-choice",
        role("gguf_models_verify", "never"),
        "gguf_models_verify",
        "must be one of stat, full",
        "write one of them",
        "all",
        gate=True,
    ),
    Case(
        "role-choice-near",
        role("gguf_models_verify", "stats"),
        "gguf_models_verify",
        "must be one of stat, full",
        "did you mean 'stat'?",
        "all",
    ),
    Case(
        "role-bool-text",
        role("gguf_models_remove_unused", "yes"),
        "gguf_models_remove_unused",
        "must be true or false",
        "gguf_models_remove_unused: true",
        "all",
    ),
    Case(
        "role-list-text",
        role("base_packages", "acl"),
        "base_packages",
        "must be a list",
        "in brackets",
        "all",
    ),
    Case(
        "role-list-item",
        role("llm_user_groups", ["video", "a b"]),
        "llm_user_groups.1",
        "name of a group",
        "write it like video",
        "all",
    ),
    Case(
        "role-package-option",
        role("llama_cpp_packages", ["-oX=y"]),
        "llama_cpp_packages.0",
        "Debian package",
        "write it like ccache",
        "all",
    ),
    Case(
        "role-memory",
        role("llama_cpp_build_memory_max", "lots"),
        "llama_cpp_build_memory_max",
        "MemoryMax=",
        "write it like 80%",
        "all",
    ),
    *(
        Case(
            f"role-{name.replace('_', '-')}{folder.replace('/', '-')}",
            role(name, folder),
            name,
            "a folder of the system",
            "/srv/llm",
            "all",
            gate=folder == "/etc",
        )
        for name in ("llm_user_home", "gguf_models_dir")
        for folder in ("/etc", "/usr/share/llm", "/home", "/var/lib")
    ),
    Case(
        "role-private-key",
        role("llm_user_authorized_keys", ["-----BEGIN OPENSSH PRIVATE KEY-----\ns3cret"]),
        "llm_user_authorized_keys.0",
        "no public key in one line",
        "of a .pub file",
        "all",
        shown='"***"',
        gate=True,
    ),
    Case(
        "role-private-key-no-list",
        role("llm_user_authorized_keys", "-----BEGIN OPENSSH PRIVATE KEY----- s3cret"),
        "llm_user_authorized_keys",
        "must be a list",
        "of a .pub file",
        "all",
        shown='"***"',
    ),
    Case(
        "role-key-without-its-kind",
        role("llm_user_authorized_keys", ["ssh-ed25519 AAAAgood name", "AAAAC3NzaC1lZDI1NTE5AAAAIs3cret"]),
        "llm_user_authorized_keys.1",
        "no public key in one line",
        "of a .pub file",
        "all",
        shown='"***"',
    ),
    Case(
        "repo-in-a-home",
        put(f"{BUILD}.repo", "file:///home/me/llama.cpp", "builds"),
        f"{BUILD}.repo",
        "hidden from it",
        "file:///srv/llama.cpp.git",
        "builds",
        gate=True,
    ),
    Case(
        "cmake-no-server",
        put(f"{BUILD}.cmake_options.LLAMA_BUILD_SERVER", False, "builds"),
        f"{BUILD}.cmake_options.LLAMA_BUILD_SERVER",
        "the role sets or relies on",
        "remove it",
        "builds",
    ),
    Case(
        "argument-without-a-flag",
        extra("0.2", "--mlock"),
        f"{EXTRA}.0",
        "before the first flag",
        "begin with the flag",
        shown='"0.2"',
    ),
    Case(
        "one-file-two-sizes",
        put(
            "gguf_models.again",
            {"url": "https://m.example/Qwen-Coder-Q4_K_M.gguf", "sha256": SHA_A, "size": 5},
            "models",
        ),
        "gguf_models.again.size",
        "with this SHA-256 and 18556686752 bytes",
        "the one size",
        "models",
        shown="5",
    ),
    Case(
        "role-secret",
        role("gguf_models_hf_token", ["s3cret"]),
        "gguf_models_hf_token",
        "must be text",
        "in quotes",
        "all",
        shown='"***"',
    ),
    Case(
        "role-endpoint",
        role("gguf_models_hf_endpoint", "huggingface.co"),
        "gguf_models_hf_endpoint",
        "begins with https://",
        "write it like https://",
        "all",
    ),
    Case(
        "role-newline",
        role("llama_presets_dir", "/etc/llmbox\nx"),
        "llama_presets_dir",
        "control character U+000A",
        "remove it",
        "all",
    ),
    Case(
        "role-unknown",
        role("llama_cpp_keep_release", 3),
        "llama_cpp_keep_release",
        "no variable of the role llama_cpp",
        "did you mean 'llama_cpp_keep_releases'?",
        "all",
        gate=True,
    ),
    Case(
        "role-unknown-far",
        role("llmbox_zzzzzzzzzz", "red"),
        "llmbox_zzzzzzzzzz",
        "no variable of the role llmbox",
        "remove it: roles/llmbox/meta/argument_specs.yml",
        "all",
    ),
    Case(
        "role-unknown-prefix",
        role("lama_cpp_keep_releases", 3),
        "lama_cpp_keep_releases",
        "no variable of any role",
        "did you mean 'llama_cpp_keep_releases'?",
        "all",
    ),
    # The text of the files.
    Case(
        "yaml-duplicate-key",
        text(lambda content: content + "  coder:\n    context: 4096\n"),
        "llama_presets.coder",
        "already on line",
        "keep one",
        gate=True,
    ),
    Case(
        "yaml-duplicate-variable",
        text(lambda content: content + "gguf_models: {}\n", "models"),
        "gguf_models",
        "already on line 1",
        "keep one",
        "models",
    ),
    Case(
        "yaml-syntax",
        text(lambda content: content.replace("context: 98304", "context 98304")),
        "(YAML)",
        "not valid YAML",
        "check",
        gate=True,
    ),
    Case(
        "yaml-tab",
        text(lambda content: content.replace("    context: 98304", "\tcontext: 98304")),
        "(YAML)",
        "not valid YAML",
        "check",
    ),
    Case(
        "yaml-bracket",
        text(lambda content: content + "x: [1\n", "builds"),
        "(YAML)",
        "not valid YAML",
        "check",
        "builds",
    ),
    Case(
        "yaml-control-character",
        text(lambda content: content + "x: \x07\n", "models"),
        "(YAML)",
        "not valid YAML",
        "check",
        "models",
    ),
    Case(
        "yaml-syntax-for-all",
        text(lambda content: content + "x: {\n", "all"),
        "(YAML)",
        "not valid YAML",
        "check",
        "all",
        gate=True,
    ),
    # What only Ansible finds out.
    Case(
        "undefined-variable",
        drop("source_server", "all"),
        f"{MODEL}.url",
        "'source_server' is undefined",
        "define what it names",
        "models",
        gate=True,
        playbook_only=True,
    ),
    Case(
        "firewall-without-ssh",
        role("firewall_enabled", True),
        "firewall_allow.ssh",
        "SSH is missing from the rules",
        "name the network that this machine comes from",
        "all",
        gate=True,
        playbook_only=True,
    ),
    Case(
        "system-preset-beside-the-guard",
        both(_system("vision", "127.0.0.1:8090"), role("gpu_guard_enabled", True)),
        "llama_presets.vision.scope",
        "gpu-guard, a service of the LLM user, could not stop it",
        "make it scope user",
        shown='"system"',
        gate=True,
        playbook_only=True,
    ),
    Case(
        "template-syntax",
        preset("context", "{{ 1 + }}"),
        f"{CODER}.context",
        "cannot be worked out",
        "define what it names",
        playbook_only=True,
    ),
    Case(
        "template-type",
        preset("context", "{{ source_server }}"),
        f"{CODER}.context",
        "must be a whole number",
        "write a whole number",
        playbook_only=True,
    ),
    Case(
        "variable-not-set",
        drop("llama_presets", "ocr"),
        "llama_presets",
        "not set for this host",
        "llama_presets: {}",
        "ocr",
        shown="(missing)",
        gate=True,
        playbook_only=True,
    ),
)

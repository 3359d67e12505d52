"""A llama-server for one session: which model, which draft, which flags."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_common.command import command_line
from llama_common.dialect import Dialect
from llama_common.draft import tokenizer_facts, unlike
from llama_common.gguf import Header, Length
from llama_common.presets import LockedTokenizer, Preset
from llama_common.problems import InventoryError
from pydantic import ValidationError

from local_claude.errors import EXIT_NO_MODEL, EXIT_NOT_STARTED, EXIT_SETTINGS, LocalClaudeError, shown
from local_claude.options import Options, expanded

DEFAULT_CONTEXT = 65536
CONTEXT_STEP = 256
VERSION = 1  # of the file, as llama_common.clients.local_presets writes it
PRESETS = ("~/.config/local-claude/presets.json", "/etc/local-claude/presets.json")


@dataclass(frozen=True)
class GgufFile:
    """A model file: its place, its size, and the short values and the lengths of arrays in its header."""

    path: str
    size: int
    values: Mapping[str, Any]
    lengths: Mapping[str, tuple[int, str]]

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> GgufFile:
        """From what the survey says."""
        lengths = {key: (items, digest) for key, (items, digest) in found["lengths"].items()}
        return cls(found["path"], found["size"], found["values"], lengths)

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return Path(self.path).name.removesuffix(".gguf")

    @property
    def context(self) -> int | None:
        """Tokens that the model was made for."""
        value = self.values.get(f"{self.values.get('general.architecture')}.context_length")
        return value if isinstance(value, int) else None

    @property
    def tokenizer(self) -> LockedTokenizer | None:
        """What decides which drafts fit; None of a file that has none, or a nonsensical one."""
        arrays = {key: Length(*length) for key, length in self.lengths.items()}
        facts = tokenizer_facts(Header({**self.values, **arrays}, ()))
        with suppress(ValidationError):
            return LockedTokenizer.model_validate(facts) if facts else None
        return None

    def unlike(self, draft: GgufFile) -> str:
        """Why llama-server would not take the draft's tokenizer beside this one; "" when it would."""
        mine, its = self.tokenizer, draft.tokenizer
        return unlike(mine, its) if mine and its else "a file without a tokenizer"


@dataclass(frozen=True)
class Plan:
    """A llama-server to start: its words without an address, the alias it serves under, why this draft."""

    alias: str
    preset: Preset
    program: str
    model: str
    draft: str | None
    dialect: Dialect
    notes: tuple[str, ...]
    size: int

    @property
    def what(self) -> str:
        """What it is wherever it listens: another file of the same name is another size."""
        return f"{shlex.join(self.command('127.0.0.1:1'))} # {self.size}"

    def command(self, listen: str) -> list[str]:
        """The whole command line. Raises LocalClaudeError when this binary lacks what the preset needs."""
        try:
            return command_line(
                self.alias,
                self.preset,
                binary=self.program,
                model_path=self.model,
                draft_path=self.draft,
                listen=listen,
                dialect=self.dialect,
            )
        except InventoryError as error:
            problem = error.problems[0]
            raise LocalClaudeError(
                EXIT_NOT_STARTED, f"{problem.key}: {problem.message}", problem.fix
            ) from None


def plan(
    found: Mapping[str, Any], wanted: Options, pick: Callable[[list[GgufFile]], GgufFile | None]
) -> Plan:
    """What to start with what the survey found. `pick` asks a person. Raises LocalClaudeError."""
    if not found["program"]:
        raise LocalClaudeError(
            EXIT_NOT_STARTED,
            "there is no llama-server",
            "install llama.cpp, or name it: LOCAL_CLAUDE_LLAMA_SERVER=/path/llama-server",
        )
    files = [GgufFile.of(entry) for entry in found["files"]]
    presets = load_presets()
    name = wanted.preset or (wanted.model if wanted.model in presets else None)
    if wanted.preset and wanted.preset not in presets:
        raise LocalClaudeError(
            EXIT_NO_MODEL,
            f"--preset {shown(wanted.preset)} is not in {' or '.join(PRESETS)}",
            f"one of {', '.join(presets)}" if presets else "run the playbook client.yml, which writes it",
        )
    model = _model(files, wanted, presets.get(name or "", {}).get("file"), pick)
    if name is None:
        name = next(
            (each for each, keys in presets.items() if keys.get("file") == Path(model.path).name), None
        )
    notes = [f"context, KV cache and flags of the preset {name}"] if name else []
    preset = _preset(presets[name] if name else {}, name, model, wanted)
    draft, why = choose_draft(model, files, wanted.draft)
    return Plan(
        name or model.name,
        preset,
        found["program"],
        model.path,
        draft.path if draft else None,
        Dialect.from_help(found["help"]),
        (*notes, why),
        model.size,
    )


def choose_draft(model: GgufFile, files: list[GgufFile], wanted: str) -> tuple[GgufFile | None, str]:
    """The smallest other model with the same tokens, by the headers, and why. Raises LocalClaudeError."""
    if wanted == "none":
        return None, "no draft model (--draft none)"
    if wanted != "auto":
        named = next((file for file in files if wanted in (file.path, file.name, Path(file.path).name)), None)
        if named is None:
            raise LocalClaudeError(
                EXIT_NO_MODEL, f"--draft {shown(wanted)} is not there", "auto, none or a file"
            )
        reason = model.unlike(named)
        if reason:
            raise LocalClaudeError(
                EXIT_NO_MODEL,
                f"{named.name} cannot be a draft of {model.name}: {reason}",
                "--draft auto or none",
            )
        return named, f"draft model {named.name}"
    fitting = [
        file
        for file in files
        if file.path != model.path and 2 * file.size < model.size and not model.unlike(file)
    ]
    if not fitting:
        return None, "no draft model: no smaller one writes in the same tokens"
    smallest = min(fitting, key=lambda file: (file.size, file.path))
    return smallest, f"draft model {smallest.name}: the smallest with the same tokenizer"


def _model(
    files: list[GgufFile],
    wanted: Options,
    of_preset: str | None,
    pick: Callable[[list[GgufFile]], GgufFile | None],
) -> GgufFile:
    """The file that is meant. Raises LocalClaudeError."""
    names = ", ".join(shown(file.name) for file in files[:12]) or "none"
    asked = of_preset or wanted.model
    if asked is not None:
        for file in files:
            if asked in (file.path, file.name, Path(file.path).name):
                return file
        raise LocalClaudeError(EXIT_NO_MODEL, f"there is no GGUF file {shown(asked)}", f"one of {names}")
    if len(files) == 1:
        return files[0]
    if not files:
        raise LocalClaudeError(
            EXIT_NO_MODEL, "there is no GGUF file", "set LOCAL_CLAUDE_MODELS to the folder that holds them"
        )
    picked = pick(files)
    if picked is None:
        raise LocalClaudeError(EXIT_NO_MODEL, "there are several models", f"--model with one of {names}")
    return picked


def _preset(keys: Mapping[str, Any], name: str | None, model: GgufFile, wanted: Options) -> Preset:
    """The preset that matches, or one for any machine; --context comes before both."""
    most = min(DEFAULT_CONTEXT, model.context or DEFAULT_CONTEXT)
    general = {
        "description": model.name[:80] or "model",
        "build": "local",
        "model": "local",
        "context": most // CONTEXT_STEP * CONTEXT_STEP,
        "kv_cache_type": "q8_0",
    }
    own = {key: value for key, value in keys.items() if key in Preset.model_fields}
    if wanted.context:
        own["context"] = max(CONTEXT_STEP, wanted.context // CONTEXT_STEP * CONTEXT_STEP)
    try:
        return Preset.model_validate({**general, **own})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise LocalClaudeError(
            EXIT_SETTINGS, f"preset {name}: {where}: {first['msg']}", "run the playbook client.yml again"
        ) from None


def load_presets() -> dict[str, dict[str, Any]]:
    """The presets that the playbook wrote, by name; none where there is no file. Raises LocalClaudeError."""
    for place in (os.environ.get("LOCAL_CLAUDE_PRESETS", ""), *PRESETS):
        path = expanded("LOCAL_CLAUDE_PRESETS", place)
        if not place or not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["version"] != VERSION:
                raise ValueError
            return {str(name): dict(keys) for name, keys in content["presets"].items()}
        except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
            raise LocalClaudeError(
                EXIT_SETTINGS, f"{path} is no file of presets", "run the playbook client.yml, which writes it"
            ) from None
    return {}

"""`presets.json`: what the role llama_presets renders on the box, checked again before anything acts on it.

`python -m llmbox.presets FILE` checks one file: exit 0, or 2 and one line that says what is wrong.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llmbox import rendered
from llmbox.errors import UsageError

PRESETS_FILE = "/etc/llmbox/presets.json"
VERSION = 1
VERBS = ("off", "sleep", "resume", "status", "list", "logs")
REMEDY = "run the playbook llm_server.yml, which writes it"

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,31}$")]
Unit = Annotated[str, Field(pattern=r"^[A-Za-z0-9:_.@\\-]{1,240}\.service$")]


class BoxModel(BaseModel):
    """A model that a preset is started with. `tensor_types`: none where the lock has no header of it."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    name: str
    files: list[Path] = []
    tensor_types: list[int] = []


class BoxPreset(BaseModel):
    """The part of a planned preset that acts on the box. Seconds for timeouts, tokens for context."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    name: Name
    description: str
    aliases: list[Name] = []
    build: Name
    model: str
    context: int = Field(gt=0)
    scope: Literal["user", "system"] = "user"
    listen: str = Field(pattern=r"^(/[^\x00-\x1f]{1,106}|[^/\x00-\x20]+:[0-9]{1,5})$")
    unit: Unit
    command: list[str] = Field(min_length=1)
    model_files: list[Path] = []
    models: list[BoxModel] = []
    parallel: int = Field(default=1, gt=0)
    draft: str = "none"
    draft_type: str | None = None
    draft_choice: dict[str, Any] | None = None
    start_timeout: float = Field(default=180, gt=0)
    stop_timeout: float = Field(default=15, gt=0)


class PresetsFile(BaseModel):
    """The whole of presets.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1]
    user: str
    foreign_units: list[Unit] = []
    presets: dict[Name, BoxPreset]

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("presets"), dict):
            named = {
                name: {**fields, "name": name} if isinstance(fields, dict) else fields
                for name, fields in data["presets"].items()
            }
            return {**data, "presets": named}
        return data

    @model_validator(mode="after")
    def _distinct(self) -> PresetsFile:
        words = [word for preset in self.presets.values() for word in (preset.name, *preset.aliases)]
        for word in words:
            if words.count(word) > 1:
                raise ValueError(f"{word!r} names two presets; rename one of them")
            if word in VERBS:
                raise ValueError(f"{word!r} is a verb of lmswitch and cannot name a preset")
        return self

    @property
    def exclusive(self) -> list[BoxPreset]:
        """The presets that share the card, of which one runs at a time."""
        return [preset for preset in self.presets.values() if preset.scope == "user"]

    def find(self, word: str) -> BoxPreset:
        """The preset of this name or alias. Raises UsageError, which lists what there is."""
        for preset in self.presets.values():
            if word == preset.name or word in preset.aliases:
                return preset
        known = ", ".join(
            f"{preset.name} ({'/'.join(preset.aliases)})" if preset.aliases else preset.name
            for preset in self.presets.values()
        )
        raise UsageError(
            f"unknown preset or verb {word!r}; presets: {known or 'none'}; verbs: {', '.join(VERBS)}"
        )


def presets_path() -> Path:
    """Where presets.json is; LLMBOX_PRESETS names another one for tests."""
    return Path(os.environ.get("LLMBOX_PRESETS") or PRESETS_FILE)


def load(path: Path) -> PresetsFile:
    """Read and check presets.json. Raises UsageError in one line with the remedy."""
    return rendered.read(path, PresetsFile, REMEDY)


def check_thoroughly(path: Path) -> None:
    """Hold each preset to the model that the inventory is held to. Raises UsageError in one line.

    Apart from `load`, because llama_common's model takes 0.2 s to import: too long for `lmswitch status`.
    """
    from llama_common.presets import Preset

    for name, fields in json.loads(path.read_text())["presets"].items():
        own = {key: value for key, value in fields.items() if key in Preset.model_fields}
        try:
            Preset.model_validate(own)
        except ValidationError as error:
            said = rendered.problem(error, "presets", name)
            raise UsageError(f"{path}: {said}; {REMEDY}") from None


def check(path: Path) -> None:
    """Everything that can be wrong with the file. Raises UsageError in one line."""
    load(path)
    check_thoroughly(path)


if __name__ == "__main__":
    sys.exit(rendered.main(check))

"""`keys.json`: who may use the gateway, what with and how much, as the role llm_gateway renders it.

`python -m llmbox.gateway.keyfile FILE` checks one: exit 0, or 2 and one line that says what is wrong.

The file holds a SHA-256 of each key. A slow hash protects words that a person chose; a key has 256 random
bits (`llmbox-key new`), which nobody finds from any hash, and a slow one would only delay every request.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llmbox import rendered
from llmbox.presets import Name

REMEDY = "mend llm_gateway_keys in the inventory and run the playbook llm_server.yml"

Budget = Literal["requests_per_minute", "requests_per_day", "tokens_per_minute", "tokens_per_day"]
BUDGETS: tuple[Budget, ...] = get_args(Budget)

Limit = Annotated[int, Field(gt=0, le=10**12)]
NAME = r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$"
KeyName = Annotated[str, Field(pattern=NAME)]


class Key(BaseModel):
    """An entry of the keys file. `presets`: null means all; a limit that is null is none.

    `measures`: it may have the server for itself.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)

    name: KeyName
    sha256: str = Field(pattern=r"^[0-9a-fA-F]{64}$", repr=False)
    presets: list[Name] | None = None
    measures: bool = False
    requests_per_minute: Limit | None = None
    requests_per_day: Limit | None = None
    tokens_per_minute: Limit | None = None
    tokens_per_day: Limit | None = None


class KeysFile(BaseModel):
    """The whole of keys.json."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)

    version: Literal[1]
    keys: list[Key]

    @model_validator(mode="after")
    def _distinct(self) -> KeysFile:
        names = [key.name for key in self.keys]
        hashes = [key.sha256.lower() for key in self.keys]
        for name, digest in zip(names, hashes, strict=True):
            if names.count(name) > 1:
                raise ValueError(f"{name!r} is there twice; give each key a name of its own")
            if hashes.count(digest) > 1:
                raise ValueError(
                    f"{name!r} has the sha256 of another key; make one with: llmbox-key new {name}"
                )
        return self


def read_keys(path: Path) -> list[Key]:
    """The entries of a keys file. Raises UsageError in one line, which never shows a value of the file."""
    return rendered.read(path, KeysFile, REMEDY, _problem).keys


def _problem(error: ValidationError) -> str:
    """What is wrong, without a word of what stands there: it may be a key, pasted into the wrong place."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    fields = [*Key.model_fields, *KeysFile.model_fields]
    where = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part in fields)
    if first["type"] == "extra_forbidden":
        return f"{where or 'the whole'}: a field that is none of {', '.join(Key.model_fields)}"
    if first["loc"][-1:] == ("sha256",):
        return f"{where}: must be the 64 hexadecimal digits that llmbox-key new prints, not the key"
    return f"{where or 'the whole'}: {rendered.own_words(first['msg'])}"


if __name__ == "__main__":
    sys.exit(rendered.main(read_keys))

"""`gateway.json`: what the role llm_gateway renders; its defaults are the one place of the figures."""

from __future__ import annotations

import fnmatch
import ipaddress
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from llmbox import rendered
from llmbox.errors import UsageError
from llmbox.presets import Name, PresetsFile

SETTINGS_FILE = "/etc/llmbox/gateway.json"
REMEDY = "run the playbook llm_server.yml, which writes it"

Seconds = Annotated[float, Field(ge=0, le=86400)]
Count = Annotated[int, Field(gt=0)]
Network = Annotated[str, Field(min_length=1)]


class Settings(BaseModel):
    """The settings of the gateway. Times in seconds, sizes in bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    hold_timeout: Seconds
    commit_after: Seconds
    drain_timeout: Seconds
    switch_policy: Literal["off", "when_idle", "always"]
    min_dwell: Seconds
    default_preset: Name | Literal[""]
    model_names: dict[str, Name]
    queue_limit: Count
    queue_limit_per_key: Count
    idle_unload: Seconds
    prefetch: bool
    max_body: Count
    max_buffered: Count
    max_connections: Count
    request_timeout: Seconds
    shutdown_grace: Seconds
    networks: list[Network]
    keys_file: str
    state_dir: str
    audit_file: str
    audit_max_size: Count
    audit_keep: Count
    audit_content: bool

    @field_validator("networks")
    @classmethod
    def _networks(cls, networks: list[str]) -> list[str]:
        for network in networks:
            ipaddress.ip_network(network)  # its ValueError says what is wrong
        return networks

    @model_validator(mode="after")
    def _room_for_one(self) -> Settings:
        if self.max_body > self.max_buffered:
            raise ValueError(
                f"max_body = {self.max_body} is larger than max_buffered = {self.max_buffered}: "
                "a body of that size could never be kept; lower the one or raise the other"
            )
        return self

    def check(self, presets: PresetsFile) -> None:
        """Hold the names of presets against presets.json. Raises UsageError in one line."""
        names = [preset.name for preset in presets.exclusive]
        for key, name in [
            ("default_preset", self.default_preset),
            *((f"model_names.{pattern}", name) for pattern, name in self.model_names.items()),
        ]:
            if name and name not in names:
                raise UsageError(
                    f"{SETTINGS_FILE}: {key} = {name!r}: no such user preset ({', '.join(names)}); {REMEDY}"
                )

    def preset_named(self, model: str | None, presets: Sequence[tuple[str, Sequence[str]]]) -> str | None:
        """The preset that a request's `model` means: a name, an alias, a pattern of `model_names`; else None.

        `presets` are pairs of a name and its aliases.
        """
        if model is None:
            return None
        for name, aliases in presets:
            if model == name or model in aliases:
                return name
        for pattern, name in self.model_names.items():
            if fnmatch.fnmatchcase(model, pattern):
                return name
        return None


def load(path: Path) -> Settings:
    """Read and check gateway.json. Raises UsageError in one line with the remedy."""
    return rendered.read(path, Settings, REMEDY)


def check(path: Path) -> None:
    """Everything that can be wrong with the file, beside presets.json. Raises UsageError in one line."""
    from llmbox.presets import load as load_presets
    from llmbox.presets import presets_path

    load(path).check(load_presets(presets_path()))


if __name__ == "__main__":
    sys.exit(rendered.main(check))

"""`gpu-guard.json`: what the role gpu_guard renders; its defaults are the one place of the figures.

`python -m llmbox.guard.settings FILE` checks one file: exit 0, or 2 and one line that says what is wrong.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from llmbox import rendered

REMEDY = "run the playbook llm_server.yml, which writes it"

Seconds = Annotated[float, Field(gt=0, le=3600)]
Celsius = Annotated[int, Field(gt=0, le=120)]


class Settings(BaseModel):
    """The settings of the guard. Times in seconds, temperatures in °C."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    interval: Seconds
    timeout: Seconds
    hold: Seconds
    temperature_warning: Celsius
    temperature_critical: Celsius
    thermal_throttle_reasons: list[Annotated[int, Field(gt=0)]]
    fatal_xids: list[Annotated[int, Field(gt=0)]]
    hook: list[str]
    hook_timeout: Seconds
    events_dir: str
    events_keep: Annotated[int, Field(gt=0)]

    @model_validator(mode="after")
    def _in_order(self) -> Settings:
        if self.temperature_warning >= self.temperature_critical:
            raise ValueError(
                f"temperature_warning = {self.temperature_warning} is not below temperature_critical = "
                f"{self.temperature_critical}; lower the one or raise the other"
            )
        # The last good look may be one interval old when the trouble begins: it counts as trouble, too.
        if self.interval > self.hold / 2 or self.timeout > self.hold:
            raise ValueError(
                f"hold = {self.hold:g} must be at least timeout = {self.timeout:g} and twice interval = "
                f"{self.interval:g}; raise hold"
            )
        return self

    @property
    def throttle_mask(self) -> int:
        """All thermal throttle reasons in one number."""
        mask = 0
        for bit in self.thermal_throttle_reasons:
            mask |= bit
        return mask


def load(file: Path) -> Settings:
    """Read and check gpu-guard.json. Raises UsageError in one line with the remedy."""
    return rendered.read(file, Settings, REMEDY)


if __name__ == "__main__":
    sys.exit(rendered.main(load))

"""What nvidia-smi says of the card: its temperature and why its clocks are held down."""

from __future__ import annotations

import re
from dataclasses import dataclass

from llmbox.guard.command import Command, Unreadable, first_line

# The second one under both of its names: driver 535 gave it the first, older ones know only the other.
FIELDS = ("temperature.gpu,clocks_event_reasons.active", "temperature.gpu,clocks_throttle_reasons.active")
PLAUSIBLE = range(1, 131)  # °C: 0 is what a reading that failed looks like
_UNKNOWN_FIELD = "not a valid field"
_LINE = re.compile(r"\s*(?P<temperature>[0-9]{1,4})\s*,\s*0x(?P<throttle>[0-9a-fA-F]{1,16})\s*")


@dataclass(frozen=True)
class Reading:
    """The hottest card's temperature in °C, all cards' throttle reasons, and how many cards there are."""

    temperature: int
    throttle: int
    cards: int = 1


class Card:
    """Asks nvidia-smi."""

    def __init__(self, command: Command) -> None:
        self._command = command
        self._fields = 0

    def look(self) -> Reading:
        """One reading. Raises Unreadable."""
        code, out, err = self._ask()
        if code != 0 and _UNKNOWN_FIELD in (out + err).lower():
            self._fields = 1 - self._fields
            code, out, err = self._ask()
        if code != 0:
            raise Unreadable(f"nvidia-smi failed with status {code}: {first_line(err, out) or 'no word why'}")
        return parse(out)

    def _ask(self) -> tuple[int, str, str]:
        query = f"--query-gpu={FIELDS[self._fields]}"
        return self._command.run(["nvidia-smi", query, "--format=csv,noheader,nounits"])


def parse(text: str) -> Reading:
    """One line for each card, as nvidia-smi prints them. Raises Unreadable for anything else."""
    lines = [line for line in text.splitlines() if line.strip()]
    found = [_LINE.fullmatch(line) for line in lines]
    if not lines:
        raise Unreadable("nvidia-smi names no card")
    for line, match in zip(lines, found, strict=True):
        if match is None or int(match["temperature"]) not in PLAUSIBLE:
            raise Unreadable(f"nvidia-smi's answer makes no sense: {line.strip()[:80]!r}")
    readings = [(int(match["temperature"]), int(match["throttle"], 16)) for match in found if match]
    throttle = 0
    for _, reasons in readings:
        throttle |= reasons
    return Reading(max(temperature for temperature, _ in readings), throttle, len(readings))

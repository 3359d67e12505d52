"""The NVIDIA card of this machine, as nvidia-smi describes it; a nvidia-smi that hangs is left behind."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass

TIMEOUT_S = 10.0
FIELDS = ("name", "memory.total", "driver_version", "compute_cap")


class NoCard(Exception):
    """There is no card to work with; the message is one line."""


@dataclass(frozen=True)
class Card:
    """The first card. `architecture` as CMake names it: 89 is compute capability 8.9; "" is the CPU."""

    name: str
    memory_mib: int
    driver: str
    architecture: str

    @property
    def slug(self) -> str:
        """The name as part of a file's."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower().removeprefix("nvidia ")).strip("-")


def card() -> Card:
    """The card of this machine. Raises NoCard."""
    rows = _ask(*FIELDS)
    name, memory, driver, capability = rows[0]
    if not re.fullmatch(r"\d+\.\d", capability) or not memory.isdecimal():
        raise NoCard(f"nvidia-smi says {', '.join(rows[0])}, which names no card of a known kind")
    return Card(name, int(memory), driver, capability.replace(".", ""))


def used_mib() -> int:
    """What is in use of the first card's memory. Raises NoCard."""
    value = _ask("memory.used")[0][0]
    if not value.isdecimal():
        raise NoCard(f"nvidia-smi says {value} of the memory in use")
    return int(value)


def _ask(*fields: str) -> list[list[str]]:
    argv = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    except OSError:
        raise NoCard("no NVIDIA GPU: nvidia-smi is not installed") from None
    try:
        out, _ = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise NoCard(f"nvidia-smi hangs: no answer in {TIMEOUT_S:g} s") from None
    lines = [line for line in out.splitlines() if line.strip()]
    if process.returncode != 0:
        said = lines[-1].strip() if lines else "nothing"
        raise NoCard(f"nvidia-smi failed with exit code {process.returncode}: {said}")
    rows = [[field.strip() for field in line.split(",")] for line in lines]
    if not rows or any(len(row) != len(fields) for row in rows):
        raise NoCard("nvidia-smi printed something else than was asked")
    return rows

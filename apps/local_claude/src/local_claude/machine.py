"""Which machine this is, and what the table recommends for it."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

GIB = 2**30
ASK_TIMEOUT_S = 5


@dataclass(frozen=True)
class Machine:
    """`apple`, `nvidia` or `cpu`, the memory that counts there in GiB, and its name."""

    system: str
    memory_gib: float
    name: str


def ask(*argv: str) -> str:
    """What a program says, "" when it is not there, fails or takes too long."""
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=ASK_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def this_machine(system: str | None = None, ask: Callable[..., str] = ask) -> Machine:
    """This machine; on a Mac the shared memory counts, beside an NVIDIA card the card's."""
    if (system or platform.system()) == "Darwin":
        memory = ask("sysctl", "-n", "hw.memsize")
        name = ask("sysctl", "-n", "machdep.cpu.brand_string") or "Mac"
        return Machine("apple", int(memory) / GIB if memory.isdigit() else 0.0, name)
    cards = ask("nvidia-smi", "--query-gpu=memory.total,name", "--format=csv,noheader,nounits").splitlines()
    sizes = [line.partition(",") for line in cards if line.partition(",")[0].strip().isdigit()]
    if sizes:
        size, _, name = max(sizes, key=lambda found: int(found[0]))
        return Machine("nvidia", int(size) / 1024, name.strip())
    return Machine("cpu", _main_memory_gib(), platform.machine())


def _main_memory_gib(file: Path = Path("/proc/meminfo")) -> float:
    try:
        words = file.read_text().split()
        return int(words[words.index("MemTotal:") + 1]) / 2**20
    except (OSError, ValueError, IndexError):
        return 0.0


def table() -> dict[str, list[dict[str, Any]]]:
    """The one table of recommendations."""
    found: dict[str, list[dict[str, Any]]] = json.loads(
        resources.files("local_claude").joinpath("machines.json").read_text(encoding="utf-8")
    )
    return found


def recommend(machine: Machine) -> dict[str, Any]:
    """The row for a machine."""
    for row in table()["rows"]:
        if row["system"] == machine.system and row["from"] <= machine.memory_gib < row["to"]:
            return row
    return table()["rows"][-1]


def of_context(tokens: int) -> str:
    """What a context is good for."""
    return next(str(row["verdict"]) for row in table()["contexts"] if tokens < row["below"])


def of_model(name: str) -> str:
    """What is known of a model by its name, "" for one that the table does not have."""
    plain = name.lower().replace("_", "-").replace(":", "-").replace(" ", "-")
    return next((str(row["verdict"]) for row in table()["models"] if row["name"] in plain), "")

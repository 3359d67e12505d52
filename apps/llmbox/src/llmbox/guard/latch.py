"""The latch: a file that says why the card is out of service. While it is there no preset is started.

In the user's runtime directory: a reboot, which is what most of these faults need, removes it.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

LATCH, STATE = "llmbox/gpu-guard.stop", "llmbox/gpu-guard.json"
CLEAR = "when the cause is gone: gpu-guard clear (as the LLM user)"


def write(file: Path, value: dict[str, Any]) -> None:
    """Replace a file whole. Raises OSError."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = file.with_name(f"{file.name}.new")
    try:
        fresh.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        fresh.replace(file)
    except OSError:
        with suppress(OSError):
            fresh.unlink()
        raise


def read(file: Path) -> dict[str, Any] | None:
    """What it says; {} when that cannot be understood, None when it is not there."""
    try:
        found = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def close(runtime: Path, reason: str, since: float) -> None:
    """Take the card out of service; `since` is seconds since the epoch. Raises OSError."""
    write(runtime / LATCH, {"reason": reason, "since": since})


def open_again(runtime: Path) -> None:
    """Put it back into service."""
    with suppress(FileNotFoundError):
        (runtime / LATCH).unlink()


def refusal(runtime: Path) -> str:
    """Why no preset may be started; empty when one may."""
    said = read(runtime / LATCH)
    return "" if said is None else told(str(said.get("reason") or f"{runtime / LATCH} does not say why"))


def told(reason: str) -> str:
    """A reason as clients and people see it."""
    return f"the GPU guard has taken the card out of service: {reason}; {CLEAR}"

"""Which preset the gateway stopped because nobody used it, to be started by the next request.

In the user's runtime directory: a restart of the gateway changes nothing, a boot of the machine does.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

FILE = "llmbox/unloaded"


def remember(runtime: Path, preset: str | None) -> None:
    """Keep which preset was stopped, None for none. Raises OSError."""
    file = runtime / FILE
    if preset is None:
        file.unlink(missing_ok=True)
        return
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    file.write_text(f"{preset}\n", encoding="utf-8")


def recall(runtime: Path) -> str | None:
    """The preset that was stopped; None for none."""
    with suppress(OSError):
        return (runtime / FILE).read_text(encoding="utf-8", errors="replace").strip() or None
    return None

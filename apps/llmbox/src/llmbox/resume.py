"""What `lmswitch sleep` stopped, for `lmswitch resume`; on the disk: who sleeps may lose power."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

FILE = ".local/state/llmbox/resume"


def remember(preset: str | None) -> None:
    """Keep which preset was stopped, None for none. Raises OSError."""
    file = Path.home() / FILE
    if preset is None:
        file.unlink(missing_ok=True)
        return
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    file.write_text(f"{preset}\n", encoding="utf-8")


def recall() -> str | None:
    """The preset that was stopped; None for none."""
    with suppress(OSError):
        return (Path.home() / FILE).read_text(encoding="utf-8", errors="replace").strip() or None
    return None

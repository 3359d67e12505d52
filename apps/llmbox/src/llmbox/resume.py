"""What `lmswitch sleep` stopped, for `lmswitch resume`; on the disk: who sleeps may lose power."""

from __future__ import annotations

from pathlib import Path

from llmbox.errors import LlmboxError

FILE = ".local/state/llmbox/resume"


def remember(preset: str | None) -> None:
    """Keep which preset was stopped, None for none. Raises LlmboxError when that cannot be written."""
    file = Path.home() / FILE
    try:
        if preset is None:
            file.unlink(missing_ok=True)
            return
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file.write_text(f"{preset}\n", encoding="utf-8")
    except OSError as error:
        raise LlmboxError(
            f"{file} cannot be written ({error.strerror}): what `lmswitch resume` starts is kept there; "
            f"fix: look at its owner and mode, and with: df {Path.home()}"
        ) from error


def recall() -> str | None:
    """The preset that was stopped; None for none. Raises LlmboxError when it cannot be read."""
    file = Path.home() / FILE
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip() or None
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LlmboxError(
            f"{file} cannot be read ({error.strerror}): it says what served; fix: look at its owner and mode"
        ) from error

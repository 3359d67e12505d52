"""Problems found in inventory data, and how one is put into a single readable line."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

SHOWN_CHARACTERS: Final = 72
"""A value is cut to this many characters when it is shown in a line."""

HIDDEN: Final = "***"
"""What is shown for a secret."""


class _Missing:
    """The value of a key that is not there."""

    def __repr__(self) -> str:
        return "MISSING"


MISSING: Final = _Missing()

_USERINFO = re.compile(r"(?<=://)[^/@\s\"']+@")
_SECRET_PARAMETER = re.compile(
    r"(?i)\b((?:access_?|auth_?|api_?)?(?:token|key|secret|password|signature|sig)=)[^&\s\"']+"
)
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")


def _visible(character: str) -> str:
    """One character, escaped when it would break the line or turn its direction."""
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        code = ord(character)
        return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
    return character


def redact(text: str) -> str:
    """`text` without passwords and tokens: URL userinfo, `token=` parameters, Hugging Face tokens."""
    return _TOKEN.sub("hf_***", _SECRET_PARAMETER.sub(r"\1***", _USERINFO.sub("***@", text)))


def show(value: object) -> str:
    """`value` as one short line: as YAML would have it, control characters escaped, secrets removed, cut."""
    if value is MISSING:
        return "(missing)"
    if isinstance(value, Mapping | Sequence | bool | int | float) or value is None:
        text = json.dumps(value, ensure_ascii=False, default=str)
    else:
        text = str(value)
    text = redact("".join(_visible(character) for character in text))
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"


def one_line(text: str) -> str:
    """`text` with everything that could break a line escaped, secrets removed."""
    return redact("".join(_visible(character) for character in text))


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with the data.

    `path` leads from a top-level variable to the value (list positions as text), `message` says what is wrong
    and names the limit, `fix` says what to write or run instead.
    """

    path: tuple[str, ...]
    value: Any
    message: str
    fix: str

    @property
    def key(self) -> str:
        """The dotted key, as a person would look for it."""
        return one_line(".".join(self.path))[:160]

    def line(self, file: str) -> str:
        """The refusal in one line. `file` may carry a line number: `path:12`."""
        return (
            f"refused: {one_line(file)}: {self.key} = {show(self.value)}: "
            f"{one_line(self.message)}; fix: {one_line(self.fix)}"
        )


class InventoryError(ValueError):
    """The data is refused. `problems` holds every reason, the first one first."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        first = self.problems[0].line("inventory")
        more = f" (+{len(self.problems) - 1} more)" if len(self.problems) > 1 else ""
        super().__init__(first + more)

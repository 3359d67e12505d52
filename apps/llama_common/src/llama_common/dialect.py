"""Which flags one llama-server binary knows, read from its own --help."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from llama_common.translate import closest

_HEAD: Final = re.compile(
    r"^ {0,2}(?P<flags>--?[A-Za-z0-9][^\s,]*(?:, +--?[A-Za-z0-9][^\s,]*)*)(?P<rest>.*)$"
)
_HELP_COLUMN: Final = re.compile(r" {2,}")
_REMOVED: Final = "argument has been removed"
_TWO_VALUES: Final = re.compile(r"[A-Z]+ [A-Z]+")


@dataclass(frozen=True)
class Dialect:
    """The flags of one binary. `hints` maps a spelling to its value hint (`N`, `[on|off]`), '' for a switch.

    `removed` holds flags that the help still lists only to say that they are gone, with what it says instead.
    """

    hints: Mapping[str, str]
    removed: Mapping[str, str] = field(default_factory=dict)
    complete: bool = True

    @classmethod
    def from_help(cls, text: str | None) -> Dialect:
        """Read the output of `llama-server --help`; None or a text without flags is the current dialect."""
        hints: dict[str, str] = {}
        removed: dict[str, str] = {}
        entry: tuple[list[str], str, list[str]] | None = None
        for line in [*(text or "").splitlines(), "-"]:
            head = _HEAD.match(line)
            if entry is not None and (head or not line.startswith(" " * 8)):
                flags, hint, words = entry
                description = " ".join(words)
                for flag in flags:
                    if _REMOVED in description:
                        removed[flag] = description
                    else:
                        hints[flag] = hint
                entry = None
            if head:
                hint, _, description = (
                    head["rest"].strip().partition("  ") if head["rest"].startswith(" ") else ("", "", "")
                )
                if _HELP_COLUMN.match(head["rest"]):
                    hint, description = "", head["rest"].strip()
                entry = (head["flags"].replace(",", " ").split(), hint.strip(), [description.strip()])
            elif entry is not None:
                entry[2].append(line.strip())
        return cls(hints, removed) if hints else CURRENT

    def knows(self, flag: str) -> bool:
        """Whether the binary takes this flag."""
        return flag in self.hints

    def first_known(self, *flags: str) -> str | None:
        """The first of several spellings that the binary takes."""
        return next((flag for flag in flags if self.knows(flag)), None)

    def values(self, flag: str) -> int:
        """How many values follow the flag: 0, 1 or 2."""
        hint = self.hints.get(flag, "")
        if not hint:
            return 0
        return 2 if _TWO_VALUES.fullmatch(hint) else 1

    def knows_draft(self, kind: str) -> bool:
        """Whether --spec-type takes this kind of draft; a help that lists no kinds takes it at its word."""
        kinds = self.hints.get("--spec-type")
        return kinds is not None and ("," not in kinds or kind in kinds.strip("[]{}").split(","))

    def closest(self, flag: str) -> str | None:
        """A known flag that looks like this one."""
        return closest(flag, self.hints)


CURRENT: Final = Dialect(
    {
        "--model": "FNAME",
        "--mmproj": "FILE",
        "--alias": "STRING",
        "--host": "HOST",
        "--port": "PORT",
        "--ctx-size": "N",
        "--parallel": "N",
        "--n-gpu-layers": "N",
        "--n-cpu-moe": "N",
        "--threads": "N",
        "--cache-type-k": "TYPE",
        "--cache-type-v": "TYPE",
        "--flash-attn": "[on|off|auto]",
        "--fit": "[on|off]",
        "--jinja": "",
        "--no-jinja": "",
        "--metrics": "",
        "--slots": "",
        "--no-ui": "",
        "--cors-origins": "ORIGINS",
        "--spec-draft-model": "FNAME",
        "--spec-draft-ngl": "N",
        "--spec-type": "TYPES",
    },
    complete=False,
)
"""What a command line is composed of for a binary whose help nobody has read yet: llama.cpp b11434."""

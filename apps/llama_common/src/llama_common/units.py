"""Quoting for systemd unit files."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

_BARE = re.compile(r"[A-Za-z0-9_@%+=:,./^~-]+")
_PROGRAM = re.compile(r"/[A-Za-z0-9_+=:,./-]+")


def quote_argument(argument: str) -> str:
    """One argument of ExecStart=, handed over as it is: no specifier, no variable, no splitting.

    Raises ValueError for control characters, which a unit file cannot carry as they are.
    """
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in argument):
        raise ValueError(f"a control character cannot stand in a unit file: {argument!r}")
    escaped = argument.replace("%", "%%").replace("$", "$$")
    if _BARE.fullmatch(argument):
        return escaped
    return '"' + escaped.replace("\\", "\\\\").replace('"', '\\"') + '"'


def systemd_quote(argv: Sequence[str]) -> str:
    """A whole command line for ExecStart=.

    Raises ValueError when the program is not an absolute path of plain characters: systemd reads some
    characters before it (@ - : + !) as settings.
    """
    if not argv or not _PROGRAM.fullmatch(argv[0]):
        raise ValueError(f"the program must be an absolute path of plain characters: {argv[:1]!r}")
    return " ".join([argv[0], *(quote_argument(argument) for argument in argv[1:])])

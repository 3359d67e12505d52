"""Keeps Claude Code's prompts cacheable on builds of llama.cpp that do not see to it themselves.

Claude Code begins its system prompt with `x-anthropic-billing-header: …; cch=a5145;`, and cch differs in each
request: nothing behind it would be found in the prompt cache. Newer builds mask it, and then bodies pass
untouched: normalize_anthropic_billing_header in tools/server/server-chat.cpp,
https://github.com/ggml-org/llama.cpp/pull/21793.
"""

from __future__ import annotations

import logging
import mmap
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

HEADER = b"x-anthropic-billing-header"
MASK = b"fffff"  # what llama.cpp writes there
# Looked at: the first and the last names of the header (the system prompt may stand behind messages that tell
# of it), and the bytes about each. A whole body would take a second.
NAMES, BEFORE, AFTER = 8, 512, 512
log = logging.getLogger(__name__)
_ATTRIBUTION = re.compile(
    rb'("system"\s*:\s*(?:\[\s*\{[^\]}]{0,200}?"text"\s*:\s*)?"'
    + HEADER
    + rb':[^"\\]{0,300}?cch=)[^;"\\]{5}(?=;)'
)


class Guard:
    """Masks for the presets whose builds do not; `commands` are their llama-servers by preset."""

    def __init__(self, commands: Mapping[str, str]) -> None:
        self._commands = commands
        self._masks: dict[Path, bool] = {}

    def applied(self, preset: str, body: bytes) -> bytes:
        """The body as this preset is to get it. A build is looked at once, and again after an update."""
        if HEADER not in body or preset not in self._commands:
            return body
        server = Path(self._commands[preset]).resolve()
        if server not in self._masks:
            try:
                self._masks[server] = masks_by_itself(programs_of(server))
            except OSError as error:
                log.warning("%s cannot be read (%s): its prompts are masked", server, error.strerror)
                self._masks[server] = False
        return body if self._masks[server] else masked(body)


def masked(body: bytes) -> bytes:
    """The body with the varying part at the head of the system prompt made the same in every request."""
    for at in _names(body):
        found = _ATTRIBUTION.search(body, max(0, at - BEFORE), at + AFTER)
        if found:
            return body[: found.end(1)] + MASK + body[found.end() :]
    return body


def _names(body: bytes) -> Iterator[int]:
    """Where the header is named: at most NAMES places from the front, then as many from the end."""
    at = -1
    for _ in range(NAMES):
        at = body.find(HEADER, at + 1)
        if at < 0:
            return
        yield at
    at = len(body)
    for _ in range(NAMES):
        at = body.rfind(HEADER, 0, at)
        if at < 0:
            return
        yield at


def masks_by_itself(programs: Iterable[Path]) -> bool:
    """Whether a build masks it: a program or library of its release knows the header's name.

    Raises OSError for a file that cannot be read.
    """
    for path in programs:
        if path.is_file() and path.stat().st_size:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                if content.find(HEADER) >= 0:
                    return True
    return False


def programs_of(server: Path) -> list[Path]:
    """The server of a release and those of its libraries that hold its own code (not ggml's kernels)."""
    return [server, *sorted(path for path in server.parent.glob("lib*.so*") if "ggml" not in path.name)]

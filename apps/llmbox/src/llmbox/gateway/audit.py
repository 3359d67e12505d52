"""The log of requests: one JSON object a line, never what was asked or answered unless that is asked for."""

from __future__ import annotations

import json
import logging
import math
import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic

from llmbox.gateway.usage import Usage

ERROR_LIMIT = 500  # characters
LOG_AGAIN_S = 60.0  # between two log lines about a file that cannot be written
# Lines in STRANGERS_S about who has no key: whoever guesses must not push out what those with one did.
STRANGERS, STRANGERS_S = 10, 60.0
REFUSED = (401, 403)

log = logging.getLogger(__name__)


@dataclass
class Entry:
    """What became of a request. `waited_s` is the wait for its preset, `seconds` all of it.

    `wanted` is the preset that it named, `preset` the one that served it. `switch` is `caused` or `waited`
    when the box went over to another preset for it, or while it waited.
    """

    path: str
    client: str = ""
    key: str = ""
    wanted: str | None = None
    preset: str | None = None
    stream: bool = False
    waited_s: float = 0.0
    usage: Usage = field(default_factory=Usage)
    status: int = 0
    error: str = ""
    switch: str = ""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    time: datetime = field(default_factory=lambda: datetime.now(UTC))
    began: float = field(default_factory=monotonic)
    seconds: float = 0.0

    def end(self, status: int) -> None:
        """The request is over."""
        self.status = status
        self.seconds = monotonic() - self.began


class Audit:
    """Writes to `path`; a file that would pass `max_size` bytes becomes `path.1`, up to `path.<keep>`.

    Written at once and in place: a line in the page cache takes microseconds, and no death of the gateway
    loses it. The file is opened for each line, so whoever moves or removes it does no harm.
    """

    def __init__(self, path: Path, max_size: int, keep: int, clock: Callable[[], float] = monotonic) -> None:
        self.path = path
        self.max_size = max_size
        self.keep = keep
        self.lost = 0
        self._clock = clock
        self._said = float("-inf")
        self._strangers = 0
        self._strangers_since = float("-inf")

    def write(self, entry: Entry, body: bytes = b"") -> None:
        """Write an entry, and the request's body if one is given. Requests go on when that fails."""
        if entry.status in REFUSED and not entry.key and not self._admits_stranger():
            return
        try:
            self._append(line(entry, body))
        except OSError as error:
            self.lost += 1
            now = self._clock()
            if now - self._said >= LOG_AGAIN_S:
                self._said = now
                reason = error.strerror or "no line of it"
                log.error("%s cannot be written (%s): %d requests not logged", self.path, reason, self.lost)

    def _admits_stranger(self) -> bool:
        now = self._clock()
        if now - self._strangers_since >= STRANGERS_S:
            self._strangers, self._strangers_since = 0, now
        self._strangers += 1
        if self._strangers == STRANGERS + 1:
            log.warning(
                "more than %d requests without a valid key in %g s: not all are logged",
                STRANGERS,
                STRANGERS_S,
            )
        return self._strangers <= STRANGERS

    def _append(self, text: bytes) -> None:
        file = self._open()
        try:
            size = os.fstat(file).st_size
            if size and size + len(text) > self.max_size:
                os.close(file)
                file = -1
                self._rotate()
                file = self._open()
                size = os.fstat(file).st_size
            try:
                written = 0
                while written < len(text):
                    written += os.write(file, text[written:])
            except OSError:
                with suppress(OSError):
                    os.ftruncate(file, size)  # half a line would spoil the next one
                raise
        finally:
            if file >= 0:
                os.close(file)

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            return os.open(self.path, flags, 0o600)
        except FileNotFoundError:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            return os.open(self.path, flags, 0o600)

    def _rotate(self) -> None:
        for number in range(self.keep, 0, -1):
            older = self._numbered(number - 1) if number > 1 else self.path
            with suppress(FileNotFoundError):
                older.replace(self._numbered(number))
        if not self.keep:
            self.path.unlink(missing_ok=True)

    def _numbered(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")


def line(entry: Entry, body: bytes = b"") -> bytes:
    """The entry as a line of ASCII, in which JSON escapes every control character."""
    usage = entry.usage
    told: dict[str, object] = {
        "time": entry.time.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "id": entry.id,
        "key": entry.key or None,
        "client": entry.client or None,
        "path": entry.path,
        "wanted": entry.wanted,
        "preset": entry.preset,
        "stream": entry.stream,
        "status": entry.status,
        "error": entry.error[:ERROR_LIMIT] or None,
        "seconds": _number(entry.seconds),
        "wait_s": _number(entry.waited_s),
        "switch": entry.switch or None,
        "prompt_tokens": usage.prompt,
        "cached_tokens": usage.cached,
        "generated_tokens": usage.generated,
        "prefill_tok_s": _number(usage.prefill_tok_s),
        "generation_tok_s": _number(usage.generation_tok_s),
    }
    if body:
        told["body"] = body.decode(errors="replace")
    return json.dumps(told, allow_nan=False).encode() + b"\n"


def _number(value: float | None) -> float | None:
    return round(value, 3) if value is not None and math.isfinite(value) else None

"""Who may use the router and how much: keys by their SHA-256, budgets that halt on breach, and two logs.

`requests.jsonl` has one line for each request. `egress.jsonl` has one for each time that something was sent
out of the network, before it was sent. Neither is readable by others.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MINUTE, DAY = 60, 86_400
Limit = int | None


class Key(BaseModel):
    """Who may use the router. A limit that is null is none."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")
    sha256: str = Field(pattern=r"^[0-9a-fA-F]{64}$", repr=False)
    requests_per_minute: Limit = Field(None, gt=0)
    tokens_per_day: Limit = Field(None, gt=0)
    cloud: bool = False
    cloud_tokens_per_day: Limit = Field(None, gt=0)


class Box(BaseModel):
    """A gateway, and what it is asked with."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    url: str
    key: str = Field("", repr=False)


class Model(BaseModel):
    """A preset, and the tokens of context that a request has on each box that serves it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    context: int = Field(gt=0)


class Settings(BaseModel):
    """router.json, as the role litellm_router renders it. `cloud` is a model of the list, or empty: none."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    version: Literal[1]
    keys: list[Key] = []
    boxes: list[Box] = []
    models: list[Model] = []
    cloud: str = ""
    tool_retries: int = Field(1, ge=0, le=5)
    hold_size: int = Field(4 * 1024 * 1024, ge=65_536)
    hold_seconds: float = Field(300, gt=0)
    health_interval: float = Field(5, gt=0)
    log_max_size: int = Field(10 * 1024 * 1024, ge=65_536)
    log_keep: int = Field(5, ge=0)
    egress_content: bool = True
    state_dir: str
    listen: str = Field("127.0.0.1:4000", pattern=r"^(\[[0-9a-fA-F:]+\]|[0-9.]+):[0-9]{1,5}$")
    stop_seconds: int = Field(30, gt=0)

    @classmethod
    def read(cls, file: Path) -> Settings:
        """Raises OSError, ValueError."""
        return cls.model_validate_json(file.read_text())


class Refused(Exception):
    """A request that may not go on; the text is for its sender."""

    def __init__(self, status: int, text: str, retry_after: int = 0) -> None:
        super().__init__(text)
        self.status, self.retry_after = status, retry_after


@dataclass
class Used:
    """What a key used: on which day, and when its last requests came."""

    day: int = 0
    tokens: int = 0
    cloud_tokens: int = 0
    recent: deque[float] = field(default_factory=deque)


class Ledger:
    """The keys and what they used; survives a restart."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._keys = {key.sha256.lower(): key for key in settings.keys}
        self._file = Path(settings.state_dir) / "usage.json"
        self._used: dict[str, Used] = {}
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            for name, (day, tokens, cloud) in json.loads(self._file.read_text()).items():
                self._used[name] = Used(int(day), int(tokens), int(cloud))

    def key(self, *shown: str) -> Key:
        """The first known one of the keys that were shown. Raises Refused."""
        for one in shown:
            if found := self._keys.get(hashlib.sha256(one.encode()).hexdigest()):
                return found
        raise Refused(401, "no known key; send it as `Authorization: Bearer KEY`, or as x-api-key")

    def admit(self, key: Key) -> None:
        """Count a request. Raises Refused when a budget is used up."""
        used, now = self._of(key.name), self._clock()
        while used.recent and used.recent[0] <= now - MINUTE:
            used.recent.popleft()
        if key.requests_per_minute and len(used.recent) >= key.requests_per_minute:
            wait = int(used.recent[0] + MINUTE - now) + 1
            raise Refused(
                429, f"{key.name}: requests_per_minute = {key.requests_per_minute} is used up", wait
            )
        if key.tokens_per_day and used.tokens >= key.tokens_per_day:
            raise Refused(
                429, f"{key.name}: tokens_per_day = {key.tokens_per_day} is used up", self._tomorrow()
            )
        used.recent.append(now)

    def admit_to_cloud(self, key: Key) -> None:
        """Raises Refused when a key that may ask the cloud model has used up its budget there."""
        if key.cloud and not self.may_leave(key):
            limit = f"cloud_tokens_per_day = {key.cloud_tokens_per_day}"
            raise Refused(429, f"{key.name}: {limit} is used up", self._tomorrow())

    def may_leave(self, key: Key) -> bool:
        """Whether a request of this key may go to the cloud model."""
        used = self._of(key.name)
        return key.cloud and not (key.cloud_tokens_per_day and used.cloud_tokens >= key.cloud_tokens_per_day)

    def spend(self, name: str, tokens: int, cloud_tokens: int = 0) -> None:
        """Book what a request took, and how much of it the cloud's. Raises OSError."""
        used = self._of(name)
        used.tokens += tokens
        used.cloud_tokens += cloud_tokens
        content = {name: [one.day, one.tokens, one.cloud_tokens] for name, one in self._used.items()}
        half = self._file.with_suffix(".new")
        half.write_text(json.dumps(content))
        half.replace(self._file)

    def _of(self, name: str) -> Used:
        used, day = self._used.setdefault(name, Used()), int(self._clock()) // DAY
        if used.day != day:
            used.day, used.tokens, used.cloud_tokens = day, 0, 0
        return used

    def _tomorrow(self) -> int:
        return DAY - int(self._clock()) % DAY


class Log:
    """A file of JSON lines that is turned over at a size, a few old ones kept."""

    def __init__(self, file: Path, max_size: int, keep: int) -> None:
        self._file, self._max, self._keep = file, max_size, keep

    def write(self, entry: Mapping[str, Any]) -> None:
        """Add a line. Raises OSError."""
        line = json.dumps(entry, ensure_ascii=False, default=str) + "\n"
        with contextlib.suppress(FileNotFoundError):
            if self._file.stat().st_size + len(line) > self._max:
                self._turn()
        descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "a", encoding="utf-8", errors="replace") as stream:
            stream.write(line)

    def _turn(self) -> None:
        for number in range(self._keep, 0, -1):
            older = self._file.with_name(f"{self._file.name}.{number}")
            newer = self._file.with_name(f"{self._file.name}.{number - 1}") if number > 1 else self._file
            with contextlib.suppress(FileNotFoundError):
                newer.replace(older)
        if not self._keep:
            self._file.unlink(missing_ok=True)

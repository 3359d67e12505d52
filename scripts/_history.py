"""Every measured run of a host, kept on the controller: one JSON object a line, oldest first, bounded."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from math import inf
from pathlib import Path

LIMIT = 5000  # runs of a host that are kept, about 400 bytes each
SLACK = 500  # so many more are let in before the file is written anew
SAME_LENGTH = 0.02  # prompts whose tokens differ by this share at most; a nonce changes them by a few

Gpu = Mapping[str, float | None]


@dataclass(frozen=True)
class Run:
    """One measured run. Speeds in tokens per second, `time` in ISO 8601 (UTC).

    `shape` is the prompt's, short or deep. `release` is llama.cpp's, `driver` NVIDIA's ("none": no GPU).
    `gpu` has utilization_percent, power_w, temperature_c and memory_mib; None without a GPU.
    """

    time: str
    preset: str
    shape: str
    release: str
    driver: str
    prompt_tokens: int
    prefill_tok_s: float
    generated_tokens: int
    generation_tok_s: float
    gpu: Gpu | None = None

    def alike(self, other: Run) -> bool:
        """Whether both say something about the same thing: only such runs are compared.

        A deep prompt is as long as the preset's context allows, and the speed goes with its length.
        """
        mine = (self.preset, self.shape, self.release, self.driver)
        shorter, longer = sorted((self.prompt_tokens, other.prompt_tokens))
        near = longer - shorter <= SAME_LENGTH * longer
        return near and mine == (other.preset, other.shape, other.release, other.driver)


class History:
    """The file of one host. Lines that cannot be read, as after a crash, are passed over."""

    def __init__(self, file: Path) -> None:
        self.file = file

    @classmethod
    def of(cls, inventory: Path, host: str) -> History:
        """That of a host of an inventory, which is known by the name of its folder."""
        state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state")
        return cls(state / "llmbox" / "throughput" / inventory.resolve().name / f"{host}.jsonl")

    def ensure_writable(self) -> None:
        """Find out before anything is measured whether it can be kept. Raises OSError (one line)."""
        try:
            with self._locked():
                self.file.open("a").close()
        except OSError as error:
            raise OSError(
                f"the history {self.file}: {error.strerror}; fix: XDG_STATE_HOME=DIR that can be written"
            ) from None

    def append(self, run: Run) -> None:
        """Keep a run; the oldest go when there are more than LIMIT. Raises OSError."""
        with self._locked():
            with self.file.open("a+b") as file:
                text = json.dumps(asdict(run)) + "\n"
                if file.tell() and self.file.read_bytes()[-1:] != b"\n":  # the last one was torn by a crash
                    text = f"\n{text}"
                file.write(text.encode())
            lines = self._text().splitlines(keepends=True)
            if len(lines) > LIMIT + SLACK:
                new = self.file.with_suffix(".new")
                new.write_text("".join(lines[-LIMIT:]))
                new.replace(self.file)

    def runs(self) -> list[Run]:
        """All runs, oldest first. Raises OSError when the file is there and cannot be read."""
        try:
            lines = self._text().splitlines()
        except FileNotFoundError:
            return []
        return [run for line in lines if (run := _read(line)) is not None]

    def _text(self) -> str:
        """All of it; what a crash left that is no UTF-8 spoils its own line and no other. Raises OSError."""
        return self.file.read_text(encoding="utf-8", errors="replace")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Nobody else writes meanwhile; the lock is beside the file, which may be replaced."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


_NAMES = {field.name for field in fields(Run)}
_NUMBERS = ("prompt_tokens", "prefill_tok_s", "generated_tokens", "generation_tok_s")


def _read(line: str) -> Run | None:
    """The run on a line, or None: torn, or of another version of this program."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    if not isinstance(found, dict) or found.keys() != _NAMES:
        return None
    sound = all(isinstance(found[name], int | float) and 0 < found[name] < inf for name in _NUMBERS)
    sound = sound and isinstance(found["gpu"], dict | None)
    return Run(**found) if sound else None

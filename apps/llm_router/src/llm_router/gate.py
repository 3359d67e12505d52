"""Holds the beginning of an answer back until it is known to be of use, and asks again where it is not.

Pure: what asks, and what a chunk looks like, is given. Nothing reaches the client before the verdict, so
another answer can take the place of a bad one, or of one whose server was lost.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llm_router.answers import Answer, early_fault, fault

Chunk = Any
Ask = Callable[[], Awaitable[AsyncIterator[Chunk]]]
_CHECK_EVERY = 8192  # bytes between two looks at an unfinished answer


BROKEN_OFF = "the answer broke off"


class BrokenOff(Exception):
    """A stream whose beginning is with the client already came to no end."""


@dataclass(frozen=True)
class Bounds:
    """How much of an answer is held back at most: past either it goes out unjudged."""

    size: int = 4 * 1024 * 1024
    seconds: float = 300.0


@dataclass
class Verdict:
    """What became of a request: the faults of thrown away answers, and how the last one went out."""

    faults: list[str] = field(default_factory=list)
    judged: bool = False
    passed_on: str = ""  # the fault of an answer that went out because there was no better one
    answers: list[Answer] = field(default_factory=list)  # one for each attempt: a server worked for each

    def attempt(self) -> Answer:
        """Begin a further one; what came of its answer counts, however it ends."""
        self.answers.append(Answer())
        return self.answers[-1]


class Decoder:
    """Chunks as events, in either protocol: objects with model_dump, mappings, or bytes."""

    def __init__(self) -> None:
        self._rest = b""

    def events(self, chunk: Chunk) -> list[Mapping[str, Any]]:
        """The events that a chunk completes."""
        if isinstance(chunk, Mapping):
            return [chunk]
        if isinstance(chunk, bytes | str):
            return self._lines(chunk.encode() if isinstance(chunk, str) else chunk)
        dump = getattr(chunk, "model_dump", None)
        found = dump() if callable(dump) else None
        return [found] if isinstance(found, dict) else []

    def _lines(self, data: bytes) -> list[Mapping[str, Any]]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        found: list[Mapping[str, Any]] = []
        for line in lines:
            if line.startswith(b"data:"):
                try:
                    event = json.loads(line[5:])
                except ValueError:
                    continue
                if isinstance(event, dict):
                    found.append(event)
        return found


def size_of(chunk: Chunk) -> int:
    """About how many bytes a chunk holds."""
    return len(chunk) if isinstance(chunk, bytes | str) else len(str(chunk))


def error_of(events: Sequence[Mapping[str, Any]]) -> str:
    """The error that a stream tells as an event of its own, or nothing."""
    for event in events:
        if error := event.get("error"):
            return " ".join(str(error.get("message") if isinstance(error, Mapping) else error).split())[:200]
    return ""


async def guarded(
    first: AsyncIterator[Chunk],
    again: Sequence[Ask],
    request: Mapping[str, Any],
    verdict: Verdict,
    bounds: Bounds,
    clock: Callable[[], float] = time.monotonic,
) -> AsyncGenerator[Chunk]:
    """The chunks of the first answer that is of use. Raises what the last attempt raised.

    With tools an answer is held back whole. Without them only until its first word: what follows cannot be
    taken back, and what came before has told the client nothing.
    """
    whole = bool(request.get("tools"))
    kept: list[Chunk] | None = None  # the first answer that had a fault, for want of a better one
    kept_fault = ""
    sources: list[Ask] = [lambda: _ready(first), *again]
    for number, ask in enumerate(sources):
        held: list[Chunk] = []
        answer, decoder = verdict.attempt(), Decoder()
        found, released, size, looked = "", False, 0, 0
        began = clock()
        try:
            stream = await ask()
            async for chunk in stream:
                events = decoder.events(chunk)
                for event in events:
                    answer.take(event)
                if released:
                    yield chunk
                    continue
                held.append(chunk)
                size += size_of(chunk)
                if found := error_of(events):
                    break
                if whole and size - looked > _CHECK_EVERY:
                    looked = size
                    if found := early_fault(answer, request):
                        break
                enough = size > bounds.size or clock() - began > bounds.seconds
                if enough or (not whole and (answer.said or answer.thought)):
                    released = True
                    for one in held:
                        yield one
                    held = []
            if not found and not released and whole:
                found = fault(answer, request) or ("" if answer.stop else BROKEN_OFF)
        except (GeneratorExit, asyncio.CancelledError):
            raise
        except Exception as error:
            if released or (number == len(sources) - 1 and kept is None):
                raise
            found, held = f"the server was lost: {type(error).__name__}", []
        if released:
            if not answer.stop:
                raise BrokenOff(BROKEN_OFF)
            return
        if not found:
            verdict.judged = whole
            for one in held:
                yield one
            return
        verdict.faults.append(found)
        if kept is None and held:
            kept, kept_fault = held, found
    verdict.passed_on = kept_fault
    for one in kept or []:
        yield one


async def _ready(stream: AsyncIterator[Chunk]) -> AsyncIterator[Chunk]:
    return stream

"""Tokens and speeds of one request, read from the end of llama-server's answer."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

WHOLE_BYTES = 1024 * 1024  # of an answer that is parsed as a whole; of a larger one only its figures are
FIGURES_BYTES = 4 * 1024
TAIL_BYTES = 64 * 1024  # the last events of a stream, which hold the figures; they are far smaller
HEAD_BYTES = 4 * 1024  # its first event, which tells Anthropic's clients of the prompt


@dataclass
class Usage:
    """Tokens of a request; tok/s for the speeds. None where the server did not say."""

    prompt: int | None = None
    cached: int | None = None
    generated: int | None = None
    prefill_tok_s: float | None = None
    generation_tok_s: float | None = None

    @property
    def total(self) -> int:
        """What counts against a budget: the prompt without its cached part, and what was generated."""
        return (self.prompt or 0) - (self.cached or 0) + (self.generated or 0)

    def add(self, other: Usage) -> None:
        """Take in another answer to the same request: its tokens count as well, its speeds are the newest."""
        for name in ("prompt", "cached", "generated"):
            more = getattr(other, name)
            if more is not None:
                setattr(self, name, (getattr(self, name) or 0) + more)
        self.prefill_tok_s = other.prefill_tok_s or self.prefill_tok_s
        self.generation_tok_s = other.generation_tok_s or self.generation_tok_s


class Tail:
    """The first and last bytes of a stream, and how many events it had (one a token, nearly)."""

    def __init__(self) -> None:
        self.events = 0
        self._chunks: deque[bytes] = deque()
        self._size = 0
        self._head = b""

    def add(self, chunk: bytes) -> None:
        """Take in the next piece."""
        if len(self._head) < HEAD_BYTES:
            self._head = (self._head + chunk)[:HEAD_BYTES]
        # At the head of a line: a text that tells of events has none there, as JSON escapes its line breaks.
        self.events += chunk.count(b"\ndata: ") + chunk.startswith(b"data: ")
        self._chunks.append(chunk)
        self._size += len(chunk)
        while self._size - len(self._chunks[0]) >= TAIL_BYTES:
            self._size -= len(self._chunks.popleft())

    def usage(self) -> Usage:
        """The figures in the first and the last events."""
        found = Usage()
        for line in b"\n".join([self._head, b"".join(self._chunks)]).split(b"\n"):
            if line.startswith(b"data: {") and (b"usage" in line or b"timings" in line):
                _take(found, _parsed(line[6:]))
        return found


def usage_of(body: bytes) -> Usage:
    """The figures in an answer that was not streamed; of a list of answers, all of them together.

    With several choices llama-server tells the tokens of the first alone: each is taken to have as many.
    """
    if len(body) > WHOLE_BYTES:
        answers: list[Any] = [_figures(body)]
    else:
        told = _parsed(body)
        answers = told if isinstance(told, list) else [told]
    whole = Usage()
    for answer in answers:
        if isinstance(answer, dict):
            one = Usage()
            _take(one, answer)
            choices = answer.get("choices")
            if isinstance(choices, list) and len(choices) > 1 and one.generated:
                one.generated *= len(choices)
            whole.add(one)
    return whole


def _figures(body: bytes) -> Mapping[str, Any]:
    """The objects with the figures of a large answer: to parse its numbers would take seconds."""
    found: dict[str, Any] = {}
    for name in ("usage", "timings"):
        start = body.rfind(f'"{name}":'.encode())
        if start >= 0:
            text = body[start : start + FIGURES_BYTES].decode(errors="replace").partition(":")[2].lstrip()
            with suppress(ValueError):
                found[name], _ = json.JSONDecoder().raw_decode(text)
    return found


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return {}


def _take(found: Usage, event: Mapping[str, Any]) -> None:
    message = event.get("message")
    if isinstance(message, dict) and isinstance(message.get("usage"), dict):
        # Anthropic's message_start: nothing is generated yet, whatever it says of that.
        _take_usage(found, {**message["usage"], "output_tokens": None})
    # OpenAI and llama-server: at the top; responses: in response.
    for holder in (event, event.get("response")):
        if not isinstance(holder, dict):
            continue
        usage, timings = holder.get("usage"), holder.get("timings")
        if isinstance(usage, dict):
            _take_usage(found, usage)
        if isinstance(timings, dict):
            _take_timings(found, timings)


def _take_usage(found: Usage, usage: Mapping[str, Any]) -> None:
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    read = usage.get("cache_read_input_tokens")
    if isinstance(usage.get("prompt_tokens"), int):
        found.prompt = usage["prompt_tokens"]
    elif isinstance(usage.get("input_tokens"), int):
        # Anthropic counts what came from the cache apart from input_tokens; /v1/responses within it.
        found.prompt = usage["input_tokens"] + (read if isinstance(read, int) else 0)
    for value in (cached, read):
        if isinstance(value, int):
            found.cached = value
    for key in ("completion_tokens", "output_tokens"):
        if isinstance(usage.get(key), int):
            found.generated = usage[key]


def _take_timings(found: Usage, timings: Mapping[str, Any]) -> None:
    cached, processed = timings.get("cache_n"), timings.get("prompt_n")
    if isinstance(processed, int):
        found.prompt = processed + (cached if isinstance(cached, int) else 0)
    if isinstance(cached, int):
        found.cached = cached
    if isinstance(timings.get("predicted_n"), int):
        found.generated = timings["predicted_n"]
    for key, name in (("prompt_per_second", "prefill_tok_s"), ("predicted_per_second", "generation_tok_s")):
        if isinstance(timings.get(key), int | float):
            setattr(found, name, round(float(timings[key]), 2))

"""Clients that never retry: chats through a base URL, some streamed, some on connections of their own."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx

TIMEOUT_S = 300.0
CUT_S = 1.0  # after a kill of the server: by then every stream that it had has ended


@dataclass(frozen=True)
class Sent:
    """One request and what became of it. Seconds; `tokens` are the pieces of text that arrived."""

    began: float
    took: float
    model: str | None
    stream: bool
    status: int
    tokens: int
    error: str = ""
    event: bool = False  # the error arrived as an event of the stream
    waited_ms: int = 0

    @property
    def ok(self) -> bool:
        """An answer, whole and without an error."""
        return not self.error

    @property
    def ended(self) -> float:
        """When it was over."""
        return self.began + self.took


@dataclass
class Traffic:
    """What the clients sent, and when somebody killed their server: from when to when at the latest."""

    sent: list[Sent] = field(default_factory=list)
    kills: list[tuple[float, float]] = field(default_factory=list)

    @property
    def failed(self) -> list[Sent]:
        """Requests without an answer, but for the excused ones."""
        return [one for one in self.sent if not one.ok and not self.excused(one)]

    def excused(self, one: Sent) -> bool:
        """Whether it is a stream that had given tokens and said plainly, at a kill, that it is cut off."""
        cut = any(begun <= one.ended <= over + CUT_S for begun, over in self.kills)
        return cut and one.event and one.tokens > 0

    def kill(self, kill: Callable[[], object]) -> None:
        """Have the server killed."""
        begun = time.monotonic()
        kill()
        self.kills.append((begun, time.monotonic()))

    def summary(self) -> str:
        """One line: how many, of what kind, how they ended."""
        kinds = Counter("stream" if one.stream else "whole" for one in self.sent)
        ends = Counter("ok" if one.ok else "excused" if self.excused(one) else "failed" for one in self.sent)
        longest = max((one.took for one in self.sent), default=0.0)
        return f"{len(self.sent)} requests {dict(kinds)}: {dict(ends)}; the longest took {longest:.1f} s"


async def chat(client: httpx.AsyncClient, model: str | None, *, stream: bool, tokens: int) -> Sent:
    """One chat of a few tokens."""
    began = time.monotonic()
    body = {
        "messages": [{"role": "user", "content": f"Count from {random.randrange(90)} on."}],  # noqa: S311
        "max_tokens": tokens,
        "stream": stream,
        **({"model": model} if model else {}),
    }
    status, pieces, error, event, waited = 0, 0, "", False, 0
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as reply:
            status = reply.status_code
            waited = int(reply.headers.get("x-queue-wait-ms", 0))
            if status != 200:
                error = (await reply.aread()).decode(errors="replace")[:300]
            elif stream:
                pieces, error, event = await _read_stream(reply)
            else:
                text = json.loads(await reply.aread())["choices"][0]["message"]["content"]
                pieces = 1 if text else 0
    except (httpx.HTTPError, ValueError, KeyError) as problem:
        error = f"{type(problem).__name__}: {problem}"
    took = time.monotonic() - began
    return Sent(began, took, model, stream, status, pieces, error, event, waited)


async def _read_stream(reply: httpx.Response) -> tuple[int, str, bool]:
    pieces, done = 0, False
    async for line in reply.aiter_lines():
        if not line.startswith("data: "):
            continue
        if line == "data: [DONE]":
            done = True
            continue
        event = json.loads(line[6:])
        if "error" in event:
            return pieces, str(event["error"]), True
        if event["choices"] and event["choices"][0]["delta"].get("content"):
            pieces += 1
    return pieces, "" if done else "the stream ended without [DONE]", False


async def run_clients(
    url: str,
    traffic: Traffic,
    models: Sequence[str | None],
    *,
    clients: int,
    until: Callable[[], bool],
    tokens: int = 6,
    pause_s: float = 0.0,
    seed: int = 1,
) -> None:
    """`clients` at once, until `until` says so: even ones stream, every second pair keeps its connection."""

    async def one(number: int) -> None:
        chooser = random.Random(seed * 1000 + number)  # noqa: S311  (a series to repeat, not a secret)
        stream, keep = number % 2 == 0, number // 2 % 2 == 0
        kept = _client(url)
        try:
            while not until():
                client = kept if keep else _client(url)
                traffic.sent.append(await chat(client, chooser.choice(models), stream=stream, tokens=tokens))
                if not keep:
                    await client.aclose()
                if pause_s:
                    await asyncio.sleep(pause_s)
        finally:
            await kept.aclose()

    await asyncio.gather(*(one(number) for number in range(clients)))


@contextmanager
def clients_beside(
    url: str, models: Sequence[str | None], *, clients: int, pause_s: float
) -> Iterator[Traffic]:
    """Clients while the body runs; when it has ended, what they sent is whole."""
    traffic, over = Traffic(), threading.Event()
    sending = run_clients(url, traffic, models, clients=clients, until=over.is_set, pause_s=pause_s)
    thread = threading.Thread(target=asyncio.run, args=(sending,))
    thread.start()
    try:
        yield traffic
    finally:
        over.set()
        thread.join()


def _client(url: str) -> httpx.AsyncClient:
    # No retries, and no proxy of the machine on the way to a host of the lab.
    return httpx.AsyncClient(
        base_url=url, timeout=TIMEOUT_S, trust_env=False, transport=httpx.AsyncHTTPTransport(retries=0)
    )

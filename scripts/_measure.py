"""Measure a preset through its gateway, one request at a time, each with the server for itself.

`Meter` is what every measuring script uses. A request with the header X-Llmbox-Alone is a lease: the gateway
lets it go when no other request runs, holds all others until it has ended, and tells the server's process ID.
It ends with its connection, at the latest after half of the gateway's hold_timeout.
"""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from scripts._refusal import refusal

ALONE = "X-Llmbox-Alone"
NOT_LET_IN = (401, 403, 429)  # the last one may pass: a full queue, a key's tokens
# A prompt of fewer tokens is read so fast that its speed says nothing.
SHORT_TOKENS, SHORT_GENERATE = 1536, 400
DEEP_TOKENS, DEEP_GENERATE = 16384, 128
ROOM = 128  # tokens for the question, the nonce, and for words that become more tokens than foreseen
QUESTION = "Explain quantum entanglement in exactly 5 paragraphs"
TEMPERATURE = 0.2
ATTEMPTS = 10  # at one run, before the box counts as too busy
PAUSE_S = 3.0  # between two of them: whoever waited goes first
TIMEOUT_S = 600.0  # the gateway ends every wait long before
TEXT = """the river was wide and slow here so they let the boat drift past old stone houses while a dog ran
along the bank and rain began to fall on every roof in town until evening when light came back over them"""
WORDS = TEXT.split()


class NotMeasured(Exception):
    """There is nothing to measure, or it cannot be; the message is one line."""


class NotLetIn(NotMeasured):
    """The gateway refuses this client, for its key or what that may use. It says nothing of a server."""


class Disturbed(Exception):
    """This run says nothing, another one may; the message is one line. `kind` if none of them does."""

    def __init__(self, message: str, kind: type[NotMeasured] = NotMeasured) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Shape:
    """A kind of run: how long its prompt is and how much is generated after it, in tokens."""

    name: str
    prompt: int
    generate: int


@dataclass(frozen=True)
class Timed:
    """One valid run, in llama-server's own figures; `began` and `ended` by this machine's monotonic clock."""

    prompt_tokens: int
    prefill_tok_s: float
    generated_tokens: int
    generation_tok_s: float
    began: float
    ended: float


def shapes(context: int) -> list[Shape]:
    """The runs that a slot of `context` tokens has room for: short, and deep when that is deeper by half.

    Raises NotMeasured when there is room for none.
    """
    short = Shape("short", SHORT_TOKENS, SHORT_GENERATE)
    least = short.prompt + short.generate + ROOM
    if context < least:
        raise NotMeasured(f"a slot of {context} tokens has no room for a canonical run: it needs {least}")
    deep = Shape("deep", min(DEEP_TOKENS, context - DEEP_GENERATE - ROOM), DEEP_GENERATE)
    return [short, deep] if deep.prompt >= 1.5 * short.prompt else [short]


def prompt(words: int, nonce: str) -> str:
    """A prompt that no cache has seen: the nonce stands first, and decides the order of the words after it.

    The words are the same in every prompt, so that all have as many tokens but for the nonce.
    """
    text = [WORDS[number % len(WORDS)] for number in range(words)]
    random.Random(nonce).shuffle(text)  # noqa: S311  (an order, not a secret)
    return f"{nonce} {' '.join(text)}\n\n{QUESTION}"


class Meter:
    """Times runs of one preset. The first run of every server process is warm-up, and is thrown away.

    `disturbed` is told why a run counts for nothing, before it is repeated; it raises to have no more.
    """

    def __init__(
        self,
        client: httpx.Client,
        preset: str,
        tell: Callable[[str], None] = lambda _: None,
        sleep: Callable[[float], None] = time.sleep,
        disturbed: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.client = client
        self.preset = preset
        self.tell = tell
        self.disturbed = disturbed
        self._sleep = sleep
        self._warm = ""  # the process that has answered already
        self._tokens_per_word = 0.0

    def wake(self) -> None:
        """Have the preset serve: the gateway switches to it as for any request. Raises NotMeasured."""
        sample = " ".join(WORDS * 10)
        try:
            reply = self._post("/tokenize", {"content": sample}, {})
        except Disturbed as error:
            raise NotMeasured(str(error)) from None
        if reply.status_code != 200:
            raise refused(reply)
        try:
            self._tokens_per_word = len(reply.json()["tokens"]) / len(sample.split())
        except (ValueError, KeyError, TypeError):
            raise NotMeasured("/tokenize gave no tokens: no llama-server answers there") from None

    def series(self, shape: Shape, count: int) -> Iterator[Timed]:
        """`count` valid runs one after the other; a disturbed one is repeated. Raises NotMeasured."""
        if not self._tokens_per_word:
            self.wake()
        for _ in range(count):
            yield self._valid(shape)

    def _valid(self, shape: Shape) -> Timed:
        disturbed = Disturbed("")
        for attempt in range(ATTEMPTS):
            if attempt:
                self._sleep(PAUSE_S)
            try:
                return self._run(shape)
            except Disturbed as error:
                disturbed = error
                self.disturbed(str(error))
                self.tell(f"{self.preset}: {error}; once more")
        raise disturbed.kind(f"no run of {ATTEMPTS} was undisturbed; the last: {disturbed}")

    def _run(self, shape: Shape) -> Timed:
        """One run, after one to warm up when the server is a new process. Raises Disturbed, NotMeasured."""
        timed, process = self._ask(shape)
        if process == self._warm:
            return timed
        self._warm = process
        self.tell(f"{self.preset}: the first run of this server is thrown away")
        timed, process = self._ask(shape)
        if process != self._warm:
            self._warm = ""
            raise Disturbed("its server was started anew")
        return timed

    def _ask(self, shape: Shape) -> tuple[Timed, str]:
        """One request with the server for itself, and that server's process."""
        body = {
            "prompt": prompt(round(shape.prompt / self._tokens_per_word), secrets.token_hex(8)),
            "n_predict": shape.generate,
            "temperature": TEMPERATURE,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        began = time.monotonic()
        reply = self._post("/completion", body, {ALONE: "1"})
        ended = time.monotonic()
        if reply.status_code in (429, 502, 503):
            raise Disturbed(refusal(reply), type(refused(reply)))
        if reply.status_code != 200:
            raise refused(reply)
        process = reply.headers.get(ALONE)
        if process is None:
            raise NotMeasured("the gateway gives no leases, it is an older one; fix: run site.yml")
        return timings(reply, shape, began, ended), process

    def _post(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> httpx.Response:
        try:
            named = {"model": self.preset, **body}
            return self.client.post(path, json=named, headers=headers, timeout=TIMEOUT_S)
        except httpx.HTTPError as error:
            said = f"POST {path}: {type(error).__name__}: {error}".splitlines()[0]
            raise Disturbed(said) from None


def refused(reply: httpx.Response) -> NotMeasured:
    """What an answer without a measurement is to be raised as."""
    return (NotLetIn if reply.status_code in NOT_LET_IN else NotMeasured)(refusal(reply))


def timings(reply: httpx.Response, shape: Shape, began: float, ended: float) -> Timed:
    """What llama-server says about its own answer. Raises NotMeasured when that is no honest measurement."""
    try:
        found = reply.json()["timings"]
        cached, read, generated = (int(found[name]) for name in ("cache_n", "prompt_n", "predicted_n"))
        prefill, generation = (float(found[name]) for name in ("prompt_per_second", "predicted_per_second"))
    except (ValueError, KeyError, TypeError):
        raise NotMeasured("its answer has no timings: cache_n, prompt_n, prompt_per_second, …") from None
    if cached:
        raise NotMeasured(f"{cached} tokens of the prompt came from a cache: cache_n must be 0")
    if generated < shape.generate or prefill <= 0 or generation <= 0:
        raise NotMeasured(f"it generated {generated} tokens of {shape.generate}")
    return Timed(read, prefill, generated, generation, began, ended)

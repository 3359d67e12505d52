"""Nothing of an answer leaves before the verdict; a bad answer, or a lost server, is replaced."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from llm_router.gate import BROKEN_OFF, Ask, Bounds, BrokenOff, Decoder, Verdict, guarded

TOOLS: dict[str, Any] = {"tools": [{"name": "Write"}], "messages": [{"role": "user", "content": "go"}]}
PLAIN: dict[str, Any] = {"messages": TOOLS["messages"]}


class Lost(Exception):
    """The connection broke."""


def words(*pieces: str) -> list[Any]:
    """An answer in pieces, whole."""
    ends = [*[None] * (len(pieces) - 1), "stop"]
    return [
        {"choices": [{"delta": {"content": piece}, "finish_reason": end}]}
        for piece, end in zip(pieces, ends, strict=True)
    ]


def source(chunks: Sequence[Any], pulled: list[Any] | None = None) -> AsyncIterator[Any]:
    async def stream() -> AsyncIterator[Any]:
        for chunk in chunks:
            await asyncio.sleep(0)
            if pulled is not None:
                pulled.append(chunk)
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk

    return stream()


def another(chunks: Sequence[Any]) -> Ask:
    async def ask() -> AsyncIterator[Any]:
        if chunks and isinstance(chunks[0], Lost):
            raise chunks[0]
        return source(chunks)

    return ask


def run(
    first: Sequence[Any],
    *again: Sequence[Any],
    request: dict[str, Any] = TOOLS,
    bounds: Bounds = Bounds(),  # noqa: B008 - frozen
    verdict: Verdict | None = None,
) -> tuple[list[Any], Verdict]:
    async def all_of() -> list[Any]:
        asks = [another(chunks) for chunks in again]
        return [chunk async for chunk in guarded(source(first), asks, request, found, bounds)]

    found = verdict or Verdict()
    return asyncio.run(all_of()), found


def test_a_good_answer_goes_out_as_it_came() -> None:
    out, verdict = run(words("Hello", " there"), words("other"))
    assert out == words("Hello", " there") and verdict.judged and not verdict.faults
    assert verdict.answers[-1].text == "Hello there"


@pytest.mark.parametrize(
    "bad",
    [words("Done <unused49>"), words(" "), [], words("<tool_call>{"), [*words("Hel"), Lost()], [Lost()]],
)
def test_a_bad_answer_is_replaced_before_a_byte_left(bad: list[Any]) -> None:
    out, verdict = run(bad, words("better"))
    assert out == words("better") and len(verdict.faults) == 1 and len(verdict.answers) == 2


def test_an_answer_without_an_end_broke_off() -> None:
    """A server that dies may leave a stream that ends like any other."""
    half = words("Hello", "there")[:1]
    out, verdict = run(half, words("again"))
    assert out == words("again") and verdict.faults == [BROKEN_OFF]
    with pytest.raises(BrokenOff):
        run(half, words("again"), request=PLAIN)


def test_the_chain_goes_on_to_its_end() -> None:
    out, verdict = run(words(""), [Lost()], words("<|im_end|>"), words("cloud"))
    assert out == words("cloud") and len(verdict.faults) == 3 and len(verdict.answers) == 4


def test_the_first_answer_goes_out_when_there_is_no_better_one() -> None:
    out, verdict = run(words("x<unused1>"), words(""), [Lost()])
    assert out == words("x<unused1>") and verdict.passed_on == "template tokens leaked: <unused1>"
    assert not verdict.judged and len(verdict.faults) == 3


def test_a_server_that_is_lost_with_nobody_else_is_an_error() -> None:
    with pytest.raises(Lost):
        run([*words("Hel"), Lost()])
    with pytest.raises(Lost):
        run([Lost()], [Lost()])


def test_an_early_fault_ends_the_reading() -> None:
    pulled: list[Any] = []
    long = [*words("<unused7>"), *words(*["x" * 9000] * 5)]

    async def all_of() -> list[Any]:
        stream = guarded(source(long, pulled), [another(words("ok"))], TOOLS, Verdict(), Bounds())
        return [chunk async for chunk in stream]

    assert asyncio.run(all_of()) == words("ok") and len(pulled) < len(long)


def test_without_tools_it_is_held_only_to_its_first_word() -> None:
    """What breaks before it is repeated; what breaks after it is an error."""
    out, verdict = run([*words("", ""), Lost()], words("again"), request=PLAIN)
    assert out == words("again") and verdict.faults == ["the server was lost: Lost"]
    with pytest.raises(Lost):
        run([*words("Hello"), Lost()], words("again"), request=PLAIN)
    assert run(words("a<unused1>"), words("again"), request=PLAIN)[0] == words("a<unused1>")


def test_what_is_held_is_bounded() -> None:
    chunks = words(*["x" * 100] * 50, "<unused1>")
    out, verdict = run(chunks, words("again"), bounds=Bounds(size=1000, seconds=100))
    assert out == chunks and not verdict.judged and not verdict.faults
    late = run(words("a", "<unused1>"), words("b"), bounds=Bounds(size=10**6, seconds=-1))
    assert late[0] == words("a", "<unused1>") and not late[1].judged and not late[1].faults


def test_an_error_event_counts_as_a_fault() -> None:
    out, verdict = run([{"error": {"message": "the server\nwent down"}}], words("fine"))
    assert out == words("fine") and verdict.faults == ["the server went down"]


def test_server_sent_events_in_any_pieces() -> None:
    event = {"type": "content_block_delta", "delta": {"text": "é <unused1>"}}
    data = b"event: x\n" + f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode() + b": ping\n\n"
    for size in (1, 7, len(data)):
        decoder = Decoder()
        pieces = [data[at : at + size] for at in range(0, len(data), size)]
        assert [found for piece in pieces for found in decoder.events(piece)] == [event]
    assert Decoder().events(b"data: [DONE]\n\ndata: {no\n") == [] and Decoder().events(7) == []


def test_a_client_that_goes_away_stops_everything() -> None:
    asked: list[str] = []

    async def ask() -> AsyncIterator[Any]:
        asked.append("again")
        return source([])

    async def leave() -> None:
        stream = guarded(source(words("a", "b")), [ask], PLAIN, Verdict(), Bounds())
        assert await anext(stream) == words("a", "b")[0]
        await stream.aclose()

    asyncio.run(leave())
    assert asked == []

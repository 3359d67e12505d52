"""A request on its way: waiting, comments, a server that dies under it, a drain; over a real socket."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import threading
from collections.abc import Awaitable, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from llmbox.gateway import relay
from llmbox.gateway.board import Ticket
from llmbox.gateway.refusals import Refusal
from llmbox.gateway.requests import ALONE, ROUTES, Asked, read_body

from tests.unit.fake_box import FakeBox
from tests.unit.gateway_place import ANTHROPIC, OPENAI, PATIENCE_S, Answer, Place
from tests.unit.gateway_settings import settings

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = b'data: {"choices": []}\n\n'


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


async def stream(writer: asyncio.StreamWriter) -> None:
    """A whole stream."""
    writer.write(HEAD + chunk(EVENT) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")


async def whole(writer: asyncio.StreamWriter) -> None:
    """A whole answer."""
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}")


async def loading(writer: asyncio.StreamWriter) -> None:
    """What llama-server says while it loads."""
    said = b'{"error": {"code": 503, "message": "Loading model"}}'
    head = b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: %d"
    writer.write(head % len(said) + b"\r\n\r\n" + said)


def dying(box: FakeBox, *said: bytes) -> Answer:
    """The server says this and is gone."""

    async def die(writer: asyncio.StreamWriter) -> None:
        box.die()
        writer.writelines(said)

    return die


async def go_on(writer: asyncio.StreamWriter) -> None:
    """A stream that does not end."""
    writer.write(HEAD + chunk(EVENT))
    await asyncio.sleep(PATIENCE_S)


def run(body: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(body())  # type: ignore[arg-type]


@pytest.mark.parametrize(("asked", "answer"), [({"stream": True}, stream), ({}, whole)])
def test_a_request_is_sent_again_once_when_its_server_dies(
    tmp_path: Path, asked: dict[str, Any], answer: Answer
) -> None:
    async def body() -> None:
        box = FakeBox()
        place = Place(tmp_path, dying(box), answer, box=box)
        async with place.running():
            status, headers, said = await place.ask(asked)
            assert status == 200 and b"error" not in said and len(place.bodies) == 2
            assert place.bodies[0] == place.bodies[1] == json.dumps(asked).encode()
            assert int(headers[b"x-queue-wait-ms"]) >= 0

    run(body)


def test_signs_of_life_are_no_answer_yet(tmp_path: Path) -> None:
    """llama-server sends the head as it begins with a prompt, and a comment where that takes long."""

    async def body() -> None:
        box = FakeBox()
        place = Place(tmp_path, dying(box, HEAD, chunk(b":\n\n")), stream, box=box)
        async with place.running():
            status, _, said = await place.ask({"stream": True})
            assert status == 200 and len(place.bodies) == 2
            assert said.startswith(b":\n\n" + EVENT) and b"error" not in said

    run(body)


def test_a_server_that_says_it_is_loading_has_not_had_the_request(tmp_path: Path) -> None:
    async def body() -> None:
        place = Place(tmp_path, loading, loading, loading, whole)
        async with place.running():
            assert (await place.ask({})).status == 200 and len(place.bodies) == 4

    run(body)


def test_a_crash_after_that_is_its_first_one(tmp_path: Path) -> None:
    async def body() -> None:
        box = FakeBox()
        place = Place(tmp_path, loading, dying(box), whole, box=box)
        async with place.running():
            assert (await place.ask({})).status == 200 and len(place.bodies) == 3

    run(body)


@pytest.mark.parametrize(
    ("status", "said"),
    [(b"200 OK", b'{"content": "Loading model"}'), (b"503 Service Unavailable", b'{"error": "no slot"}')],
)
def test_what_only_looks_like_loading_is_an_answer(tmp_path: Path, status: bytes, said: bytes) -> None:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n" % (status, len(said)) + said)

    async def body() -> None:
        place = Place(tmp_path, answer)
        async with place.running():
            told = await place.ask({})
            assert (told.status, told.body) == (int(status[:3]), said) and len(place.bodies) == 1

    run(body)


def test_whose_turn_is_taken_back_before_it_is_sent_is_not_sent(tmp_path: Path) -> None:
    async def body() -> None:
        place = Place(tmp_path, whole)
        async with place.running():
            while not place.board.serving:
                await asyncio.sleep(0.001)
            before = place.board.ask("a", "k", slot=True)
            waiting = asyncio.create_task(place.ask({}))
            while not place.board.queued:
                await asyncio.sleep(0.001)
            place.board.leave(before)
            assert place.board.in_flight == 1
            place.board.block("the card is hot")
            told = await waiting
            assert told.status == 503 and b"the card is hot" in told.body and not place.bodies

    run(body)


def test_at_the_second_crash_it_is_given_up_and_remembered(tmp_path: Path) -> None:
    async def body() -> None:
        box = FakeBox()
        die = dying(box)
        place = Place(tmp_path, die, die, die, whole, box=box)
        async with place.running():
            status, _, said = await place.ask({"poison": 1})
            assert (status, len(place.bodies)) == (502, 2) and b"went down twice" in said
            status, _, _ = await place.ask({"poison": 1})
            assert (status, len(place.bodies)) == (502, 3), "a request that took two servers gets no third"
            status, _, _ = await place.ask({"harmless": 1})
            assert status == 200

    run(body)


def test_the_log_names_a_request_that_was_at_two_crashes_without_a_word_of_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        box = FakeBox()
        place = Place(tmp_path, dying(box), box=box)
        async with place.running():
            await place.ask({"diary": "secret"})
        name = hashlib.sha256(place.bodies[0]).hexdigest()[:16]
        once, twice = (record for record in caplog.records if record.name == relay.__name__)
        assert once.levelname == "WARNING" and f"request {name} lost its server" in once.getMessage()
        assert twice.levelname == "ERROR" and f"request {name} was with a at two" in twice.getMessage()
        assert "secret" not in caplog.text

    run(body)


@pytest.mark.parametrize(
    ("route", "event"),
    [(OPENAI, b'\n\ndata: {"error": '), (ANTHROPIC, b'\n\nevent: error\ndata: {"type": "error"')],
)
def test_after_its_first_token_it_is_never_sent_again(tmp_path: Path, route: Any, event: bytes) -> None:
    async def body() -> None:
        box = FakeBox()
        place = Place(tmp_path, dying(box, HEAD, chunk(EVENT)), stream, box=box)
        async with place.running():
            status, _, said = await place.ask({"stream": True}, route)
            assert status == 200 and said.startswith(EVENT) and len(place.bodies) == 1
            assert event in said and b"[DONE]" not in said

    run(body)


def test_a_sign_of_life_behind_its_first_token_does_not_have_it_sent_again(tmp_path: Path) -> None:
    async def body() -> None:
        box = FakeBox()

        async def die(writer: asyncio.StreamWriter) -> None:
            writer.write(HEAD + chunk(EVENT))
            await writer.drain()
            await asyncio.sleep(0.05)  # so that both are read by themselves
            await dying(box, chunk(b":\n\n"))(writer)

        place = Place(tmp_path, die, stream, box=box)
        async with place.running():
            _, _, said = await place.ask({"stream": True})
            assert len(place.bodies) == 1 and said.count(EVENT) == 1 and b'"error"' in said

    run(body)


@pytest.mark.parametrize("size", [relay.PIECE, relay.PIECE + 1])
def test_a_large_answer_comes_whole_and_ends(tmp_path: Path, size: int) -> None:
    async def large(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + b"x" * size)

    async def body() -> None:
        place = Place(tmp_path, large)
        async with place.running():
            told = await place.ask({})
            assert told.headers[b"content-length"] == b"%d" % size == b"%d" % len(told.body)

    run(body)


def test_a_waiting_stream_is_begun_with_comments_and_then_served(tmp_path: Path) -> None:
    async def body() -> None:
        box = FakeBox(load_s=0.3)
        place = Place(tmp_path, stream, box=box, commit_after=0.05)
        async with place.running():
            status, headers, said = await place.ask({"stream": True, "model": "b"})
            assert status == 200 and headers[b"content-type"] == b"text/event-stream"
            assert said.startswith(b": queue position 1, estimate ") and said.endswith(b"data: [DONE]\n\n")

    run(body)


def test_a_waiting_stream_is_told_again_and_again_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "COMMENT_INTERVAL_S", 0.1)

    async def body() -> None:
        place = Place(tmp_path, stream, box=FakeBox(load_s=PATIENCE_S / 2), commit_after=0.05)
        place.board.load_s["b"] = 40.0
        told: list[tuple[float, str]] = []
        position = place.relay._position

        def tell(ticket: Ticket) -> str:
            told.append((place.board.clock(), position(ticket)))
            if len(told) == 3:
                leaves.set()
            return told[-1][1]

        leaves = asyncio.Event()
        monkeypatch.setattr(place.relay, "_position", tell)
        async with place.running():
            said = (await place.ask({"stream": True, "model": "b"}, leaves=leaves)).body
        assert len(told) >= 3
        assert re.findall(rb"^: (.*)$", said, re.MULTILINE) == [words.encode() for _, words in told]
        for (then, words), (now, _) in pairwise(told):
            assert re.fullmatch(r"queue position 1, estimate (3[0-9]|40) s", words) and now - then >= 0.1

    run(body)


def test_what_never_streams_is_not_begun_as_a_stream(tmp_path: Path) -> None:
    async def body() -> None:
        place = Place(tmp_path, whole, box=FakeBox(load_s=0.3), commit_after=0.05)
        async with place.running():
            for number, path in enumerate(("/v1/embeddings", "/v1/messages/count_tokens", "/rerank")):
                asked = {"stream": True, "model": "ab"[(number + 1) % 2]}
                told = await place.ask(asked, ROUTES["POST", path])
                assert (told.status, told.body) == (200, b"{}"), path
                assert told.headers[b"content-type"] == b"application/json"

    run(body)


def test_what_is_not_asked_as_a_stream_is_not_begun_as_one(tmp_path: Path) -> None:
    async def body() -> None:
        place = Place(tmp_path, whole, box=FakeBox(load_s=0.2), commit_after=0.05)
        async with place.running():
            told = await place.ask({"model": "b"})
            assert (told.status, told.body) == (200, b"{}")
            assert 150 <= int(told.headers[b"x-queue-wait-ms"]) < 5000

    run(body)


def test_until_commit_after_a_failure_is_a_status(tmp_path: Path) -> None:
    async def body() -> None:
        box = FakeBox(load_s=0.7)
        box.failing["b"] = "b cannot load"
        place = Place(tmp_path, stream, box=box, commit_after=1.2)
        async with place.running():
            status, headers, _ = await place.ask({"stream": True, "model": "b"})
            assert status == 503 and headers[b"x-queue-position"] == b"1"
            assert headers[b"x-queue-estimate-s"] and headers[b"retry-after"]

    run(body)


def test_a_failure_after_the_comments_is_an_event_and_before_them_a_status(tmp_path: Path) -> None:
    async def body() -> None:
        box = FakeBox(load_s=0.2)
        box.failing["b"] = "b cannot load"
        place = Place(tmp_path, stream, box=box, commit_after=0.05)
        async with place.running():
            status, _, said = await place.ask({"stream": True, "model": "b"})
            assert status == 200 and b'data: {"error": {"message": "b cannot load"' in said
            status, headers, said = await place.ask({"stream": True, "model": "b"})
            assert status == 503 and b"b cannot load" in said and headers[b"retry-after"]

    run(body)


def test_whoever_waits_too_long_is_told_position_and_estimate(tmp_path: Path) -> None:
    async def body() -> None:
        box = FakeBox(load_s=5)
        place = Place(tmp_path, whole, box=box, hold_timeout=0.1)
        async with place.running():
            status, headers, said = await place.ask({"model": "b"})
            assert status == 503 and b"hold_timeout (0.1 s)" in said
            assert headers[b"retry-after"] and headers[b"x-queue-position"] == b"1"
            assert headers[b"x-queue-estimate-s"]

    run(body)


def test_what_outlasts_the_drain_ends_with_an_event_or_a_status(tmp_path: Path) -> None:
    async def hang(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(PATIENCE_S)

    async def body() -> None:
        place = Place(tmp_path, go_on, hang, whole, presets={"a": 2, "b": 1}, drain_timeout=0.1)
        async with place.running():
            long = asyncio.create_task(place.ask({"stream": True}))
            while not place.bodies:
                await asyncio.sleep(0.01)
            not_streamed = asyncio.create_task(place.ask({}))
            while len(place.bodies) < 2:
                await asyncio.sleep(0.01)
            status, _, _ = await place.ask({"model": "b"})
            _, _, said = await long
            assert status == 200 and said.startswith(EVENT)
            refused = await not_streamed
            assert (
                refused.status == 503 and refused.headers[b"retry-after"] and b"send it again" in refused.body
            )
            assert b'"error"' in said and b"drain_timeout" in said

    run(body)


def test_an_answer_that_is_too_large_to_keep_is_an_error_and_no_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "ANSWER_LIMIT", 100_000)

    async def large(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n" + b"x" * 200_000)

    async def body() -> None:
        place = Place(tmp_path, large)
        async with place.running():
            for number in (1, 2):  # it is no suspect afterwards
                status, _, said = await place.ask({})
                assert status == 502 and b"larger than 100000 bytes" in said and len(place.bodies) == number
                assert place.board.serving and place.board.phase == "ready"

    run(body)


def test_large_answers_share_one_bound_and_small_ones_have_always_room(tmp_path: Path) -> None:
    begun = asyncio.Event()
    rest = asyncio.Event()

    async def large(writer: asyncio.StreamWriter) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1500000\r\n\r\n"
        writer.write(head + b"x" * 1_200_000)
        await writer.drain()
        begun.set()
        await rest.wait()
        writer.write(b"x" * 300_000)

    async def body() -> None:
        place = Place(tmp_path, large, large, whole, presets={"a": 3}, max_buffered=1_300_000)
        async with place.running():
            one = asyncio.create_task(place.ask({}))
            await begun.wait()
            while place.relay.bodies.buffered < 900_000:
                await asyncio.sleep(0.01)
            other = asyncio.create_task(place.ask({}))
            refused = await other
            assert refused.status == 503 and refused.headers[b"retry-after"]
            assert b"fill 1300000 bytes" in refused.body
            assert (await place.ask({})).body == b"{}"
            rest.set()
            told = await one
            assert told.status == 200 and told.body == b"x" * 1_500_000
            assert place.relay.bodies.buffered == 0 and place.board.phase == "ready"

    run(body)


MEASUREMENT = (ALONE, b"1")


def test_a_measurement_is_told_the_server_that_it_had_for_itself(tmp_path: Path) -> None:
    async def body() -> None:
        place = Place(tmp_path, whole)
        async with place.running():
            _, headers, _ = await place.ask({}, OPENAI, MEASUREMENT)
            assert headers[ALONE] == b"%d" % place.box.pid
            assert ALONE not in (await place.ask({}))[1]

    run(body)


@pytest.mark.parametrize(("key", "status"), [({"measures": True}, 200), ({}, 403), (None, 200)])
def test_with_keys_only_some_may_measure(tmp_path: Path, key: dict[str, Any] | None, status: int) -> None:
    async def body() -> None:
        place = Place(tmp_path, whole, key=key)
        async with place.running():
            assert (await place.ask({}))[0] == 200
            told = await place.ask({}, OPENAI, MEASUREMENT)
            assert told.status == status and (status == 200) != (b"measures: true" in told.body)
            assert len(place.bodies) == 1 + (status == 200)

    run(body)


def test_what_generates_nothing_is_no_measurement(tmp_path: Path) -> None:
    async def body() -> None:
        place = Place(tmp_path, whole, key={})
        async with place.running():
            told = await place.ask({}, ROUTES["POST", "/tokenize"], MEASUREMENT)
            assert told.status == 200 and ALONE not in told.headers

    run(body)


def test_a_measurement_ends_with_its_holder(tmp_path: Path) -> None:
    async def body() -> None:
        place = Place(tmp_path, go_on, whole)
        async with place.running():
            leaves = asyncio.Event()
            held = asyncio.create_task(place.ask({"stream": True}, OPENAI, MEASUREMENT, leaves=leaves))
            while not place.board.in_flight:
                await asyncio.sleep(0.01)
            waiting = asyncio.create_task(place.ask({}))
            while not place.board.queued:
                await asyncio.sleep(0.01)
            leaves.set()
            assert (await waiting)[0] == 200
            await held

    run(body)


def test_a_measurement_is_never_sent_again(tmp_path: Path) -> None:
    async def body() -> None:
        box = FakeBox()
        place = Place(tmp_path, dying(box), whole, box=box)
        async with place.running():
            status, _, _ = await place.ask({}, OPENAI, MEASUREMENT)
            assert (status, len(place.bodies)) == (502, 1)

    run(body)


def test_a_measurement_that_lasts_too_long_or_gets_no_turn_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "LOOK_INTERVAL_S", 0.02)

    async def body() -> None:
        place = Place(tmp_path, go_on, whole, hold_timeout=0.2)
        async with place.running():
            began = asyncio.get_running_loop().time()
            long = asyncio.create_task(place.ask({"stream": True}, OPENAI, MEASUREMENT))
            while not place.board.in_flight:
                await asyncio.sleep(0.01)
            status, _, said = await place.ask({}, OPENAI, MEASUREMENT)
            assert status == 503 and b"not free for a measurement" in said
            assert (await place.ask({}))[0] == 200
            assert asyncio.get_running_loop().time() - began >= 0.1
            assert b"half of hold_timeout" in (await long)[2]

    run(body)


def test_while_a_large_body_is_read_others_are_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = threading.Event()

    def slow(text: bytes) -> Asked:
        if len(text) > relay.LARGE_BODY:
            assert answered.wait(PATIENCE_S), "nobody else was answered meanwhile"
        return read_body(text)

    monkeypatch.setattr(relay, "read_body", slow)

    async def body() -> None:
        place = Place(tmp_path, whole)
        async with place.running():
            large = asyncio.create_task(place.ask({"prompt": "x" * relay.LARGE_BODY}))
            await asyncio.sleep(0)
            assert (await place.ask({})).status == 200
            answered.set()
            assert (await large).status == 200

    run(body)


def test_many_large_bodies_of_one_client_are_not_read_before_the_first_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let = threading.Semaphore(0)

    def slow(_: bytes) -> Asked:
        assert let.acquire(timeout=PATIENCE_S)
        return Asked()

    monkeypatch.setattr(relay, "read_body", slow)

    async def body() -> None:
        place, large = Place(tmp_path, whole), b"x" * (relay.LARGE_BODY + 1)
        done: list[str] = []

        async def read(client: str) -> None:
            await place.relay._read(large, client)
            done.append(client)

        many = [asyncio.create_task(read("10.0.0.1")) for _ in range(5)]
        await asyncio.sleep(0)
        one = asyncio.create_task(read("10.0.0.2"))
        await asyncio.sleep(0)
        for _ in range(6):
            let.release()
        await asyncio.gather(one, *many)
        assert done.index("10.0.0.2") <= 1, done

    run(body)


def test_the_bodies_of_one_client_leave_room_for_those_of_another() -> None:
    ends = asyncio.Event()

    async def body() -> None:
        bodies = relay.Bodies(settings(max_body=400, max_buffered=1000))

        async def read(size: int, client: str) -> bytes:
            given = iter([{"body": b"x" * size, "more_body": True}])

            async def receive() -> dict[str, Any]:
                part = next(given, None)
                if part is None:
                    await ends.wait()
                return {"type": "http.request", **(part or {"body": b""})}

            return await bodies.read({"headers": []}, receive, client)

        one = [asyncio.create_task(read(250, "one")) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Refusal, match="your requests that wait fill 500 bytes") as caught:
            await read(1, "one")
        assert caught.value.status == 429
        other = asyncio.create_task(read(400, "other"))
        await asyncio.sleep(0)
        with pytest.raises(Refusal, match="fill 1000 bytes"):
            await read(101, "third")
        assert bodies.buffered == 900
        ends.set()
        for size, client, reading in ((250, "one", one[0]), (250, "one", one[1]), (400, "other", other)):
            assert len(await reading) == size
            bodies.give_back(size, client)
        assert bodies.buffered == 0
        assert len(await read(400, "one")) == 400, "what was given back can be had again"

    run(body)


def test_what_a_client_has_given_back_counts_no_longer_and_the_rest_does() -> None:
    async def body() -> None:
        bodies = relay.Bodies(settings(max_body=400, max_buffered=800))

        async def read(size: int) -> bytes:
            async def receive() -> dict[str, Any]:
                return {"type": "http.request", "body": b"x" * size}

            return await bodies.read({"headers": []}, receive, "one")

        for size in (250, 100):
            await read(size)
        bodies.give_back(100, "one")
        await read(150)
        with pytest.raises(Refusal, match="your requests that wait fill 400 bytes"):
            await read(1)

    run(body)


def test_what_is_for_the_gateway_alone_does_not_reach_the_server(tmp_path: Path) -> None:
    async def body() -> None:
        place = Place(tmp_path, whole, key={"presets": ["a"]})
        ours = [(b"cookie", b"c"), (b"origin", b"http://o"), (b"accept-encoding", b"gzip")]
        async with place.running():
            assert (await place.ask({}, OPENAI, *ours, (b"x-request", b"theirs"))).status == 200
        names = [line.partition(b":")[0].lower() for line in place.heads[0].split(b"\r\n")]
        assert b"x-request" in names
        assert not {b"x-api-key", b"authorization", *(name for name, _ in ours)} & set(names)

    run(body)

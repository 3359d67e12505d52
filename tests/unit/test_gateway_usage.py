"""What the relay tells accounts, log and figures of a request: with a llama-server behind a real socket."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from llmbox.gateway.requests import ROUTES, Route, read_body
from llmbox.gateway.usage import TAIL_BYTES, WHOLE_BYTES, Tail, usage_of

from tests.unit.fake_box import FakeBox
from tests.unit.gateway_place import ADDRESS, ANTHROPIC, KEY, OPENAI, Answer, Place

COUNT = ROUTES["POST", "/v1/messages/count_tokens"]
PRESETS = {"coder": 4, "tiny": 1}  # coder serves
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


def place_of_alice(path: Path, answer: Answer, **key: Any) -> Place:
    return Place(path, answer, presets=PRESETS, key=key)


def whole(status: bytes, body: bytes) -> Answer:
    async def answer(writer: asyncio.StreamWriter) -> None:
        head = b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        writer.write(head % (status, len(body)) + body)

    return answer


async def endless(writer: asyncio.StreamWriter) -> None:
    writer.write(STREAM_HEAD)
    while True:
        writer.write(b'data: {"choices": []}\n\n')
        await writer.drain()
        await asyncio.sleep(0.0005)


def test_streams_side_by_side_share_the_budget(tmp_path: Path) -> None:
    async def test() -> None:
        place = place_of_alice(tmp_path, endless, tokens_per_minute=100)
        async with place.running():
            answers = await asyncio.gather(*(place.ask({"stream": True}) for _ in range(3)))
            events = sum(body.count(b'"choices"') for _, _, body in answers)
            assert 100 <= events <= 130  # all three together, but for what one read brings
            for _, _, body in answers:
                assert b"used up its tokens_per_minute (100)" in body.split(b"\n\n")[-2]
            assert [told["status"] for told in place.logged()] == [429] * 3
            status, _, _ = await place.ask({"stream": True})
            assert (status, len(place.bodies)) == (429, 3)
        assert place.accounts.breaches["tokens_per_minute"] == 4

    asyncio.run(test())


def test_what_the_server_counted_is_what_is_spent(tmp_path: Path) -> None:
    async def answer(writer: asyncio.StreamWriter) -> None:
        last = {"timings": {"prompt_n": 40, "cache_n": 60, "predicted_n": 7, "predicted_per_second": 12.5}}
        await asyncio.sleep(0.02)
        writer.write(STREAM_HEAD + b"data: {}\n\n" * 20 + b"data: " + json.dumps(last).encode() + b"\n\n")

    async def test() -> None:
        place = place_of_alice(tmp_path, answer, tokens_per_minute=1000)
        async with place.running():
            await place.ask({"stream": True, "model": "coder"})
        assert place.accounts.identify([(b"x-api-key", KEY.encode())], "").tokens_left() == 1000 - 47
        told = place.logged()[0]
        assert (told["key"], told["client"], told["wanted"]) == ("alice", ADDRESS, "coder")
        assert (told["prompt_tokens"], told["cached_tokens"], told["generated_tokens"]) == (100, 60, 7)
        assert (told["generation_tok_s"], told["stream"], told["status"]) == (12.5, True, 200)
        assert told["seconds"] >= 0.02

    asyncio.run(test())


def test_of_a_large_answer_only_the_figures_are_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"usage": {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4}}}
    told = {"choices": [{"text": '"usage":{"prompt_tokens":1}'}], **figures, "data": [0.5] * WHOLE_BYTES}
    monkeypatch.setattr("llmbox.gateway.usage._parsed", lambda _: pytest.fail("the whole was parsed"))
    for separators in ((",", ":"), (", ", ": ")):
        found = usage_of(json.dumps(told, separators=separators).encode())
        assert (found.prompt, found.cached, found.generated) == (9, 4, None)
    assert usage_of(b'{"usage":{"prompt' + b"x" * WHOLE_BYTES).prompt is None


def test_of_a_list_of_answers_every_one_counts() -> None:
    one = {"timings": {"prompt_n": 4, "cache_n": 2, "predicted_n": 7, "predicted_per_second": 10.0}}
    two = {"timings": {"prompt_n": 5, "predicted_n": 1, "predicted_per_second": 12.0}}
    found = usage_of(json.dumps([one, two, "no answer"]).encode())
    assert (found.prompt, found.cached, found.generated, found.generation_tok_s) == (11, 2, 8, 12.0)
    assert found.total == 17


def test_of_several_choices_each_counts() -> None:
    # As llama-server answers "n": 2: every choice is there, the usage is of the first.
    told = {"choices": [{"index": 0}, {"index": 1}], "usage": {"prompt_tokens": 10, "completion_tokens": 8}}
    found = usage_of(json.dumps(told).encode())
    assert (found.prompt, found.generated) == (10, 16)
    assert usage_of(json.dumps({**told, "choices": [{"index": 0}]}).encode()).generated == 8
    assert usage_of(json.dumps({"choices": [{}, {}]}).encode()).generated is None


def test_what_a_stream_brought_is_charged_though_its_figures_tell_of_less(tmp_path: Path) -> None:
    async def answer(writer: asyncio.StreamWriter) -> None:
        last = {"timings": {"prompt_n": 3, "predicted_n": 10}}  # of the last of several choices
        writer.write(STREAM_HEAD + b"data: {}\n\n" * 29 + b"data: " + json.dumps(last).encode() + b"\n\n")

    async def test() -> None:
        place = place_of_alice(tmp_path, answer, tokens_per_day=1_000_000)
        async with place.running():
            await place.ask({"stream": True})
        assert left(place) == 1_000_000 - 30

    asyncio.run(test())


def left(place: Place) -> int | None:
    """The tokens that alice may still use of her million."""
    return place.accounts.identify([(b"x-api-key", KEY.encode())], "").tokens_left()


START = {"message": {"usage": {"input_tokens": 40, "cache_read_input_tokens": 60, "output_tokens": 0}}}
FIRST = b"event: message_start\ndata: " + json.dumps(START).encode() + b"\n\n"
PIECE = b"event: content_block_delta\ndata: {}\n\n"


def test_a_long_stream_s_prompt_is_charged_though_only_its_first_event_tells_it(tmp_path: Path) -> None:
    pieces = 30 * TAIL_BYTES // len(PIECE)
    generated = pieces + 7

    async def answer(writer: asyncio.StreamWriter) -> None:
        last = b'data: {"usage": {"output_tokens": %d}}\n\n' % generated
        writer.write(STREAM_HEAD + FIRST + PIECE * pieces + last)

    async def test() -> None:
        place = place_of_alice(tmp_path, answer, tokens_per_day=1_000_000)
        async with place.running():
            await place.ask({"stream": True}, ANTHROPIC)
        assert left(place) == 1_000_000 - 40 - generated
        told = place.logged()[0]
        figures = (told["prompt_tokens"], told["cached_tokens"], told["generated_tokens"])
        assert figures == (100, 60, generated)

    asyncio.run(test())


@pytest.mark.parametrize(
    ("route", "stream", "charged"),
    [
        (ANTHROPIC, FIRST + PIECE * 5, 40 + 6),  # as it was told, and what came
        (OPENAI, b"data: {}\n\n" * 5, 1000 + 5),  # a quarter of the body's bytes
        (OPENAI, b"", 1000),  # it left while its prompt was read
        (COUNT, b"", 0),  # nothing is generated here
    ],
    ids=["told", "estimated", "before the first token", "counting"],
)
def test_who_leaves_early_is_charged_its_prompt(
    tmp_path: Path, route: Route, stream: bytes, charged: int
) -> None:
    leaves = asyncio.Event()

    async def answer(writer: asyncio.StreamWriter) -> None:
        if stream:
            writer.write(STREAM_HEAD + stream)
            await writer.drain()
            await asyncio.sleep(0.05)
        leaves.set()
        await asyncio.Event().wait()

    async def test() -> None:
        place = place_of_alice(tmp_path, answer, tokens_per_day=1_000_000)
        async with place.running():
            body = {"stream": bool(stream), "prompt": ""}
            await place.ask({**body, "prompt": "x" * (4000 - len(json.dumps(body)))}, route, leaves=leaves)
        assert left(place) == 1_000_000 - charged
        assert place.logged()[0]["prompt_tokens"] == (100 if route is ANTHROPIC else None)

    asyncio.run(test())


def test_the_estimate_is_never_more_than_the_context(tmp_path: Path) -> None:
    async def answer(_: asyncio.StreamWriter) -> None:
        leaves.set()
        await asyncio.Event().wait()

    async def test() -> None:
        place = place_of_alice(tmp_path, answer, tokens_per_day=1_000_000)
        place.relay.contexts = {"coder": 4096}
        async with place.running():
            await place.ask({"image": "x" * 50_000}, leaves=leaves)
        assert left(place) == 1_000_000 - 4096

    leaves = asyncio.Event()
    asyncio.run(test())


def test_a_stream_that_its_budget_ends_is_charged_its_prompt(tmp_path: Path) -> None:
    async def test() -> None:
        place = place_of_alice(tmp_path, endless, tokens_per_day=50)
        async with place.running():
            assert b"used up" in (await place.ask({"stream": True, "prompt": "x" * 4000}))[2]
        assert (left(place) or 0) < -1000

    asyncio.run(test())


def test_a_key_does_not_reach_a_foreign_preset_by_naming_none(tmp_path: Path) -> None:
    async def test() -> None:
        place = place_of_alice(tmp_path, whole(b"200 OK", b"{}"), presets=["tiny"])
        async with place.running():
            for body in ({}, {"model": "unheard of"}, {"model": "coder"}):
                status, _, said = await place.ask(body)
                assert status == 403 and b"may not use the preset coder" in said
        assert (place.bodies, place.board.in_flight, place.board.queued) == ([], 0, 0)
        assert [told["status"] for told in place.logged()] == [403] * 3

    asyncio.run(test())


def test_a_key_does_not_start_a_foreign_preset_by_naming_none(tmp_path: Path) -> None:
    async def test() -> None:
        box = FakeBox(None)
        place = Place(
            tmp_path,
            whole(b"200 OK", b"{}"),
            presets=PRESETS,
            box=box,
            key={"presets": ["tiny"]},
            default_preset="coder",
        )
        async with place.running():
            for body in ({}, {"model": "unheard of"}, {"stream": True}):
                status, headers, said = await place.ask(body)
                assert status == 403 and b"may not start coder" in said and b"retry-after" not in headers
            assert not box.log
            status, _, _ = await place.ask({"model": "tiny"})
            assert (status, box.log) == (200, ["switch tiny"])

    asyncio.run(test())


EMBEDDINGS, COMPLETION = ROUTES["POST", "/embeddings"], ROUTES["POST", "/completion"]


@pytest.mark.parametrize(
    ("route", "stream", "answer", "charged"),
    [
        (COMPLETION, False, whole(b"200 OK", b'{"content": "' + b"x" * 400 + b'"}'), 1000 + 103),
        (COMPLETION, True, whole(b"200 OK", b'{"content": ""}'), 1000 + 3),
        (EMBEDDINGS, False, whole(b"200 OK", b'[{"embedding": [[0.5]]}]'), 1000),
        (COUNT, False, whole(b"200 OK", b'{"input_tokens": 3}'), 0),
        (COMPLETION, False, whole(b"400 Bad Request", b"{}"), 0),
    ],
    ids=["response_fields", "no stream after all", "vectors", "counting", "refused"],
)
def test_an_answer_without_figures_is_charged_by_an_estimate(
    tmp_path: Path, route: Route, stream: bool, answer: Answer, charged: int
) -> None:
    """As with `response_fields`, with which a client has llama-server leave them out."""

    async def test() -> None:
        place = place_of_alice(tmp_path, answer, tokens_per_day=1_000_000)
        async with place.running():
            body = {"stream": stream, "prompt": ""}
            body["prompt"] = "x" * (4000 - len(json.dumps(body)))
            await place.ask(body, route)
        assert left(place) == 1_000_000 - charged

    asyncio.run(test())


def test_a_stream_without_figures_is_charged_its_prompt_and_what_came(tmp_path: Path) -> None:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD + b"data: {}\n\n" * 5)

    async def test() -> None:
        place = place_of_alice(tmp_path, answer, tokens_per_day=1_000_000)
        async with place.running():
            await place.ask({"stream": True, "prompt": "x" * (4000 - 29)})
        assert left(place) == 1_000_000 - 1000 - 5

    asyncio.run(test())


@pytest.mark.parametrize(
    ("stream", "size", "charged"),
    [
        (True, 0, 25_000 + 1 + 0),  # four bytes of the body a token, and what was generated
        (False, 0, 25_000 + 2),
        (False, WHOLE_BYTES, 25_000 + 1 + WHOLE_BYTES // 4),
    ],
    ids=["stream", "list", "long list"],
)
def test_of_many_prompts_all_are_charged_though_the_figures_may_be_of_the_last(
    tmp_path: Path, stream: bool, size: int, charged: int
) -> None:
    figures = {"prompt_n": 10, "predicted_n": 1}

    async def streamed(writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD + b"data: " + json.dumps({"timings": figures}).encode() + b"\n\n")

    told = [{"content": "x" * size, "timings": figures}, {"content": "", "timings": figures}]

    async def test() -> None:
        answer = streamed if stream else whole(b"200 OK", json.dumps(told, separators=(",", ":")).encode())
        place = place_of_alice(tmp_path, answer, tokens_per_day=10_000_000)
        async with place.running():
            body = {"stream": stream, "prompt": ["", "b"]}
            body["prompt"] = ["a" * (100_000 - len(json.dumps(body))), "b"]
            await place.ask(body, COMPLETION)
        used = 10_000_000 - (left(place) or 0)
        assert charged <= used <= charged + 100

    asyncio.run(test())


@pytest.mark.parametrize("prompt", [["x" * 400], [[1.0] * 100], [1, 2, 3], "x", None])
def test_a_list_of_one_prompt_is_charged_as_it_was_told(prompt: object) -> None:
    assert not read_body(json.dumps({"prompt": prompt}).encode()).several


def test_an_answer_that_is_too_large_to_keep_costs_its_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmbox.gateway.relay.ANSWER_LIMIT", 1000)

    async def test() -> None:
        place = place_of_alice(tmp_path, whole(b"200 OK", b"x" * 2000), tokens_per_day=1_000_000)
        async with place.running():
            assert (await place.ask({"prompt": "x" * (4000 - 14)})).status == 502
        assert left(place) == 1_000_000 - 1000

    asyncio.run(test())


def test_an_answer_that_should_have_been_a_stream_stays_out_of_the_log(tmp_path: Path) -> None:
    async def test() -> None:
        answering = whole(b"200 OK", b'{"content": "the secret answer"}')
        place = Place(tmp_path, answering, box=FakeBox(load_s=0.1), commit_after=0.02)
        async with place.running():
            told = await place.ask({"model": "b", "stream": True})
            assert b"did not stream" in told.body and b'"code": 502' in told.body
        assert "secret" not in place.audit.path.read_text()

    asyncio.run(test())


def test_tokens_that_are_used_up_while_a_request_waits_are_a_429(tmp_path: Path) -> None:
    async def test() -> None:
        place = Place(
            tmp_path,
            whole(b"200 OK", b"{}"),
            presets=PRESETS,
            box=FakeBox("coder", load_s=0.1),
            key={"tokens_per_minute": 10},
        )
        async with place.running():
            asking = asyncio.ensure_future(place.ask({"model": "tiny"}))
            while not place.board.queued:
                await asyncio.sleep(0.001)
            place.accounts.identify([(b"x-api-key", KEY.encode())], "").spend(11)
            status, headers, said = await asking
            assert (status, len(place.bodies)) == (429, 0) and headers[b"retry-after"]
            assert b"tokens_per_minute (10)" in said

    asyncio.run(test())


def test_a_request_counts_before_anything_of_it_is_read(tmp_path: Path) -> None:
    async def test() -> None:
        place = place_of_alice(tmp_path, whole(b"200 OK", b"{}"), requests_per_minute=3)
        async with place.running():
            told = [(await place.ask({"model": ["no", "name"]})).status for _ in range(5)]
        assert told == [400, 400, 400, 429, 429]

    asyncio.run(test())


def test_the_words_of_a_request_do_not_come_back_into_the_log(tmp_path: Path) -> None:
    quoted = b'{"error": {"message": "cannot parse: my secret diary"}}'

    async def test() -> None:
        place = place_of_alice(tmp_path, whole(b"400 Bad Request", quoted))
        async with place.running():
            status, _, said = await place.ask({"prompt": "my secret diary"})
            assert (status, said) == (400, quoted)
        assert place.logged()[0]["error"] == "llama-server refused it"
        assert "diary" not in place.audit.path.read_text()
        page = (await place.metrics.render()).decode()
        assert f'llmbox_requests_total{{preset="coder",route="{OPENAI.path}",status="400"}} 1.0' in page

    asyncio.run(test())


def test_the_words_of_a_request_stay_out_of_the_log_when_its_stream_had_begun(tmp_path: Path) -> None:
    quoted = b'{"error": {"message": "cannot parse: my secret diary"}}'

    async def test() -> None:
        refusing = whole(b"400 Bad Request", quoted)
        place = Place(tmp_path, refusing, box=FakeBox(load_s=0.1), commit_after=0.02)
        async with place.running():
            status, _, said = await place.ask({"model": "b", "stream": True, "prompt": "my secret diary"})
            assert status == 200 and said.startswith(b": queue position 1")
            event = json.loads(said.rsplit(b"data: ", 1)[1])
            assert event["error"]["code"] == 400
            assert event["error"]["message"] == "cannot parse: my secret diary"
        told = place.logged()[0]
        assert (told["status"], told["error"]) == (400, "llama-server refused it")

    asyncio.run(test())


def test_the_log_tells_how_long_a_request_waited_and_why_it_was_refused(tmp_path: Path) -> None:
    async def test() -> None:
        place = Place(tmp_path, whole(b"200 OK", b"{}"), presets=PRESETS, box=FakeBox("coder", load_s=0.1))
        place.box.failing["tiny"] = "no such file"
        async with place.running():
            assert (await place.ask({})).status == 200
            assert (await place.ask({"model": "tiny"})).status == 503
            place.box.become("tiny")
            assert (await place.ask({"model": "coder"})).status == 200
        none, refused, waited = place.logged()
        assert (none["error"], refused["error"]) == (None, "no such file")
        assert none["wait_s"] < 0.1 <= min(refused["wait_s"], waited["wait_s"])
        assert refused["wait_s"] <= refused["seconds"] < 5 and waited["wait_s"] <= waited["seconds"] < 5

    asyncio.run(test())


def test_what_the_gateway_does_not_expect_is_logged_as_its_own_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(*_: object) -> None:
        raise RuntimeError

    async def test() -> None:
        place = place_of_alice(tmp_path, whole(b"200 OK", b"{}"))
        monkeypatch.setattr(place.upstream, "send", fails)
        async with place.running():
            with pytest.raises(RuntimeError):
                await place.ask({})
            assert place.board.in_flight == 0
        assert place.logged()[0]["status"] == 500

    asyncio.run(test())


def test_what_was_asked_is_logged_only_where_that_is_wanted(tmp_path: Path) -> None:
    async def test() -> None:
        for wanted in (True, False):
            path = tmp_path / str(wanted)
            path.mkdir()
            place = Place(path, whole(b"200 OK", b"{}"), audit_content=wanted, max_body=100)
            async with place.running():
                assert (await place.ask({"prompt": "hello"})).status == 200
                assert (await place.ask({"prompt": "x" * 100})).status == 413
            asked, refused = place.logged()
            assert asked.get("body") == ('{"prompt": "hello"}' if wanted else None)
            assert refused["status"] == 413 and "body" not in refused

    asyncio.run(test())


def test_the_log_tells_who_caused_a_switch_and_who_waited_for_it(tmp_path: Path) -> None:
    async def test() -> None:
        place = Place(tmp_path, whole(b"200 OK", b"{}"), presets=PRESETS, box=FakeBox("coder", load_s=0.1))
        async with place.running():
            assert (await place.ask({})).status == 200
            asked = asyncio.gather(*(place.ask({"model": "tiny"}) for _ in range(2)))
            assert [status for status, _, _ in await asked] == [200, 200]
        assert [told["switch"] for told in place.logged()] == [None, "caused", "waited"]

    asyncio.run(test())


def test_tokens_used_up_meanwhile_stop_what_waits(tmp_path: Path) -> None:
    async def test() -> None:
        used = whole(b"200 OK", b'{"usage": {"prompt_tokens": 90, "completion_tokens": 10}}')
        place = place_of_alice(tmp_path, used, tokens_per_minute=100)
        place.board.slots["coder"] = 1
        async with place.running():
            answers = await asyncio.gather(*(place.ask({}) for _ in range(3)))
        assert [status for status, _, _ in answers] == [200, 429, 429]
        assert (len(place.bodies), place.board.in_flight) == (1, 0)

    asyncio.run(test())


def test_a_client_that_left_is_logged_as_499(tmp_path: Path) -> None:
    async def hang(_: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    async def test() -> None:
        place = place_of_alice(tmp_path, hang)
        async with place.running():
            gone = asyncio.Event()
            gone.set()
            await place.ask({}, leaves=gone)
        assert [(told["status"], told["error"]) for told in place.logged()] == [(499, "the client went away")]

    asyncio.run(test())


def test_a_client_that_leaves_while_it_waits_waits_no_longer(tmp_path: Path) -> None:
    async def test() -> None:
        place = Place(tmp_path, endless, presets={"coder": 1})
        async with place.running():
            served = asyncio.create_task(place.ask({"stream": True}))
            while not place.bodies:
                await asyncio.sleep(0.001)
            gone = asyncio.Event()
            waiting = asyncio.create_task(place.ask({}, leaves=gone))
            while not place.board.queued:
                await asyncio.sleep(0.001)
            gone.set()
            await waiting
            assert (place.board.queued, len(place.bodies)) == (0, 1)
            served.cancel()
        told = place.logged()[0]
        assert (told["status"], told["error"], told["preset"]) == (499, "the client went away", None)

    asyncio.run(test())


def test_an_event_begins_its_line() -> None:
    """A text about events has "data: " in it, and is not charged for each."""
    tail = Tail()
    tail.add(b'data: {"content": "data: one data: two\\ndata: three"}\n\n')
    tail.add(b'data: {"content": "x"}\n\nevent: ping\ndata: {}\n\n')
    assert tail.events == 3

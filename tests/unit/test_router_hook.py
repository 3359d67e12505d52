"""The hook with a LiteLLM that is played: what it lets in, what it sends where, and what it writes down."""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import json
import sys
import types
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import HTTPException

GOOD = {"choices": [{"message": {"content": "fine"}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 9}}
BAD = {"choices": [{"message": {"content": "x <unused1>"}, "finish_reason": "stop"}]}
MODELS = [{"name": "coder", "context": 98304}]
TOOLS = [{"type": "function", "function": {"name": "Write"}}]


class PlayedRouter:
    """Answers in turn, and remembers what it was asked."""

    def __init__(self) -> None:
        self.answers: list[Any] = []
        self.asked: list[dict[str, Any]] = []

    async def acompletion(self, **asked: Any) -> Any:
        self.asked.append(asked)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    aanthropic_messages = acompletion


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """The module llm_router.hook, with modules of LiteLLM's names beneath it."""
    router = PlayedRouter()
    played: dict[str, dict[str, Any]] = {
        "litellm": {},
        "litellm.integrations": {},
        "litellm.integrations.custom_logger": {"CustomLogger": object},
        "litellm.proxy": {},
        "litellm.proxy._types": {"UserAPIKeyAuth": types.SimpleNamespace},
        "litellm.proxy.proxy_server": {"llm_router": router},
    }
    for name, content in played.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    keys = [
        {"name": "me", "sha256": hashlib.sha256(b"k1").hexdigest()},
        {"name": "cloudy", "sha256": hashlib.sha256(b"k2").hexdigest(), "cloud": True},
        {"name": "tight", "sha256": hashlib.sha256(b"k3").hexdigest(), "requests_per_minute": 1},
    ]
    file = tmp_path / "router.json"
    settings = {"version": 1, "keys": keys, "state_dir": str(tmp_path), "cloud": "cloud", "models": MODELS}
    file.write_text(json.dumps(settings))
    monkeypatch.setenv("LLM_ROUTER_SETTINGS", str(file))
    monkeypatch.delitem(sys.modules, "llm_router.hook", raising=False)
    hook = importlib.import_module("llm_router.hook")
    monkeypatch.setattr(hook.Watch, "begin", lambda self: None)
    yield types.SimpleNamespace(hook=hook.router_hook, module=hook, router=router, folder=tmp_path)
    sys.modules.pop("llm_router.hook", None)


def request(call: str = "id-1", **more: Any) -> dict[str, Any]:
    body = {"model": "coder", "messages": [{"role": "user", "content": "go"}], **more}
    return {**body, "litellm_call_id": call, "proxy_server_request": {"body": dict(body)}}


def begin(world: Any, key: str = "me", call_type: str = "completion", **more: Any) -> dict[str, Any]:
    who = types.SimpleNamespace(key_alias=key)
    data: dict[str, Any] = asyncio.run(world.hook.async_pre_call_hook(who, None, request(**more), call_type))
    return data


def whole(world: Any, data: dict[str, Any], response: Any) -> Any:
    return asyncio.run(world.hook.async_post_call_success_hook(data, None, response))


def streamed(world: Any, data: dict[str, Any], chunks: list[Any]) -> list[Any]:
    async def source() -> AsyncIterator[Any]:
        for chunk in chunks:
            yield chunk

    async def all_of() -> list[Any]:
        stream = world.hook.async_post_call_streaming_iterator_hook(None, source(), data)
        return [chunk async for chunk in stream]

    return asyncio.run(all_of())


def lines(world: Any, name: str = "requests.jsonl") -> list[dict[str, Any]]:
    file = world.folder / name
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.parametrize("key", ["me", "cloudy"])
@pytest.mark.parametrize(
    "model",
    [
        *(
            "anthropic/claude-haiku-4-5",
            "coder,cloud",
            "coder,coder",
            "openai/coder",
            "coder@messages",
            "cloud@messages",
        ),
        *("*", " coder", ["coder"], {"a": 1}, "x" * 5000),
    ],
)
def test_a_model_is_one_of_the_list_and_nothing_else_that_litellm_would_take(
    world: Any, key: str, model: Any
) -> None:
    with pytest.raises(HTTPException) as refused:
        begin(world, key, model=model)
    assert refused.value.status_code == 404 and len(refused.value.detail) < 200


def counted(world: Any, key: str, content: bytes) -> None:
    async def body() -> bytes:
        return content

    where = types.SimpleNamespace(path="/v1/messages/count_tokens")
    asked = types.SimpleNamespace(url=where, headers={"x-api-key": key}, body=body)
    asyncio.run(world.module.authenticate(asked, ""))


def test_tokens_are_counted_for_presets_only_and_each_count_is_a_request(world: Any) -> None:
    counted(world, "k1", b'{"model": "coder", "messages": []}')
    for key in ("k1", "k2"):
        for wrong, status in (
            (b'{"model": "cloud"}', 404),
            (b'{"model": "anthropic/claude-haiku-4-5"}', 404),
            (b'{"model": ["coder"]}', 404),
            (b"[]", 404),
            (b"nonsense", 400),
        ):
            with pytest.raises(HTTPException) as refused:
                counted(world, key, wrong)
            assert refused.value.status_code == status
    counted(world, "k3", b'{"model": "coder"}')
    with pytest.raises(HTTPException) as refused:
        counted(world, "k3", b'{"model": "coder"}')
    assert refused.value.status_code == 429
    statuses = [line["status"] for line in lines(world)]
    assert statuses == [200, 404, 404, 404, 404, 404, 404, 404, 404, 200, 429]


def test_a_good_answer_is_left_alone_and_written_down(world: Any) -> None:
    assert whole(world, begin(world, tools=TOOLS), GOOD) is GOOD
    (line,) = lines(world)
    assert (line["key"], line["model"], line["status"], line["judged"]) == ("me", "coder", 200, True)
    assert line["prompt_tokens"] == 9 and "go" not in json.dumps(line)
    assert json.loads((world.folder / "usage.json").read_text())["me"][1] == 9


def test_a_bad_whole_answer_is_asked_for_again_without_what_litellm_added(world: Any) -> None:
    world.router.answers = [GOOD]
    data = begin(world, tools=TOOLS)
    assert whole(world, {**data, "metadata": {"secret": 1}}, BAD) is GOOD
    (asked,) = world.router.asked
    assert asked["model"] == "coder" and asked["fallbacks"] == [] and "metadata" not in asked
    assert lines(world)[0]["faults"] == ["template tokens leaked: <unused1>"]


def test_the_cloud_is_asked_last_and_only_for_a_key_that_may(world: Any) -> None:
    world.router.answers = [RuntimeError("lost"), GOOD]
    assert whole(world, begin(world, "cloudy", tools=TOOLS), BAD) is GOOD
    assert [asked["model"] for asked in world.router.asked] == ["coder", "cloud"]
    world.router.answers, world.router.asked = [BAD], []
    assert whole(world, begin(world, "me", tools=TOOLS), BAD) is BAD
    assert [asked["model"] for asked in world.router.asked] == ["coder"]
    assert lines(world)[-1]["passed_on"] == "template tokens leaked: <unused1>"


def test_an_answer_of_the_cloud_is_not_asked_of_it_again(world: Any) -> None:
    """It would be paid for twice."""
    world.router.answers = [BAD]
    data = begin(world, "cloudy", tools=TOOLS)
    asyncio.run(world.hook.async_pre_call_deployment_hook({**data, "model_info": {"cloud": True}}, None))
    assert whole(world, data, BAD) is BAD
    assert [asked["model"] for asked in world.router.asked] == ["coder"]


def test_a_stream_is_judged_in_its_own_protocol(world: Any) -> None:
    async def better() -> AsyncIterator[bytes]:
        yield b'data: {"type": "content_block_delta", "delta": {"text": "fine"}}\n\n'
        yield b'data: {"type": "message_delta", "delta": {"stop_reason": "end_turn"}}\n\n'

    world.router.answers = [better()]
    data = begin(world, call_type="anthropic_messages", tools=[{"name": "Write"}], stream=True)
    assert data["model"] == "coder@messages"
    bad = b'data: {"type": "content_block_delta", "delta": {"text": "<tool_call>{"}}\n\n'
    assert b"fine" in b"".join(streamed(world, data, [bad]))
    assert world.router.asked[0]["model"] == "coder@messages"
    assert lines(world)[0]["protocol"] == "anthropic" and lines(world)[0]["judged"]


def test_litellm_gets_a_fallback_only_for_a_key_that_may(world: Any) -> None:
    assert "fallbacks" not in begin(world, "me")
    assert begin(world, "cloudy")["fallbacks"] == ["cloud"]
    assert begin(world, "cloudy", "anthropic_messages")["fallbacks"] == ["cloud@messages"]


def test_what_leaves_is_written_down_before_it_leaves(world: Any) -> None:
    data = begin(world, "cloudy", tools=TOOLS)
    sent = {**data, "model": "anthropic/claude", "api_key": "s3cret", "model_info": {"cloud": True}}
    asyncio.run(world.hook.async_pre_call_deployment_hook(sent, None))
    (line,) = lines(world, "egress.jsonl")
    assert (line["key"], line["to"], line["why"]) == ("cloudy", "anthropic/claude", "no box answered")
    text = json.dumps(line["content"], ensure_ascii=False).encode()
    assert line["content"]["messages"] == data["messages"]
    assert (line["bytes"], line["sha256"]) == (len(text), hashlib.sha256(text).hexdigest())
    assert "s3cret" not in json.dumps(line)
    assert (world.folder / "egress.jsonl").stat().st_mode & 0o077 == 0
    whole(world, data, GOOD)
    assert lines(world)[-1]["cloud"] is True


@pytest.mark.parametrize(("cloud", "booked"), [(True, 9), (False, 0)])
def test_what_the_cloud_took_counts_against_its_own_budget(cloud: bool, booked: int, world: Any) -> None:
    data = begin(world, "cloudy")
    if cloud:
        asyncio.run(world.hook.async_pre_call_deployment_hook({**data, "model_info": {"cloud": True}}, None))
    whole(world, data, GOOD)
    assert json.loads((world.folder / "usage.json").read_text())["cloudy"][1:] == [9, booked]


def test_every_server_that_worked_is_booked_and_the_cloud_apart(world: Any) -> None:
    """Box, box, cloud: the answer of the first goes out, for none was any better."""
    data = begin(world, "cloudy", tools=TOOLS)

    async def asked(**said: Any) -> Any:
        if said["model"] == "cloud":
            leaves = {**said, "model_info": {"cloud": True}}
            await world.hook.async_pre_call_deployment_hook(leaves, None)
        return {**BAD, "usage": {"prompt_tokens": 10 if said["model"] == "coder" else 1000}}

    world.router.acompletion = asked
    bad = {**BAD, "usage": {"prompt_tokens": 1, "completion_tokens": 1}}
    assert whole(world, data, bad) is bad
    (line,) = lines(world)
    assert (line["prompt_tokens"], line["output_tokens"], line["cloud_tokens"]) == (1011, 1, 1000)
    assert json.loads((world.folder / "usage.json").read_text())["cloudy"][1:] == [1012, 1000]


def test_the_thrown_away_answers_of_a_stream_are_booked(world: Any) -> None:
    async def better() -> AsyncIterator[Any]:
        yield {"choices": [{"delta": {"content": "fine"}, "finish_reason": "stop"}], "usage": GOOD["usage"]}

    world.router.answers = [better()]
    streamed(world, begin(world, tools=TOOLS, stream=True), [{**BAD, "usage": {"prompt_tokens": 30}}])
    assert lines(world)[0]["prompt_tokens"] == 39


@pytest.mark.parametrize("leaves", ["cancelled", "closed"])
def test_a_client_that_leaves_while_an_answer_is_held_has_used_it(leaves: str, world: Any) -> None:
    """A server that listens to its socket cancels what it waits for; one that does not closes the stream."""

    async def leave() -> None:
        came = asyncio.Event()

        async def source() -> AsyncIterator[Any]:
            yield {"type": "message_start", "message": {"usage": {"input_tokens": 50}}}
            if leaves == "closed":
                yield {"type": "content_block_delta", "delta": {"text": "word"}}
            came.set()
            await asyncio.sleep(60)

        tools: dict[str, Any] = {"tools": TOOLS} if leaves == "cancelled" else {}
        data = await world.hook.async_pre_call_hook(
            types.SimpleNamespace(key_alias="me"), None, request(**tools), "anthropic_messages"
        )
        stream = world.hook.async_post_call_streaming_iterator_hook(None, source(), data)
        if leaves == "closed":
            await anext(stream)
            await stream.aclose()
            return
        reading = asyncio.create_task(anext(stream))
        await came.wait()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading

    asyncio.run(leave())
    (line,) = lines(world)
    assert (line["status"], line["error"], line["prompt_tokens"]) == (499, "the client went away", 50)
    assert (line["output_tokens"], line["estimated"]) == ((1, True) if leaves == "closed" else (0, False))


def test_a_client_that_leaves_before_an_answer_has_its_line_and_keeps_no_box_busy(world: Any) -> None:
    data = begin(world, tools=TOOLS)
    asyncio.run(world.hook.async_pre_call_deployment_hook({**data, "model_info": {"box": "one"}}, None))
    for _ in range(2):
        world.hook.left("id-1")
    (line,) = lines(world)
    assert (line["status"], line["error"], line["box"]) == (499, "the client went away", "one")
    one, two = ({"model_info": {"box": name}} for name in ("one", "two"))
    assert asyncio.run(world.hook.async_filter_deployments("coder", [one, two], None, begin(world))) == [one]


def test_who_always_leaves_before_the_end_uses_up_a_budget_too(world: Any) -> None:
    """Servers tell what an answer took with its last event, which such a client never waits for."""

    async def words() -> AsyncIterator[Any]:
        for _ in range(7):
            yield {"choices": [{"delta": {"content": "word "}}]}

    async def leave() -> None:
        messages = [{"role": "user", "content": "x" * 4000}]
        data = await world.hook.async_pre_call_hook(
            types.SimpleNamespace(key_alias="me"), None, request(messages=messages), "acompletion"
        )
        stream = world.hook.async_post_call_streaming_iterator_hook(None, words(), data)
        for _ in range(3):
            await anext(stream)
        await stream.aclose()

    asyncio.run(leave())
    (line,) = lines(world)
    assert line["estimated"] and line["output_tokens"] == 3
    assert 1000 <= line["prompt_tokens"] <= 1100
    used = json.loads((world.folder / "usage.json").read_text())["me"][1]
    assert used == line["prompt_tokens"] + 3


def test_what_was_said_stays_out_of_the_log_where_that_is_wanted(world: Any) -> None:
    world.hook.settings = world.hook.settings.model_copy(update={"egress_content": False})
    sent = {**begin(world, "cloudy"), "model": "anthropic/claude", "model_info": {"cloud": True}}
    asyncio.run(world.hook.async_pre_call_deployment_hook(sent, None))
    text = (world.folder / "egress.jsonl").read_text()
    assert "content" not in text and '"go"' not in text and len(json.loads(text)["sha256"]) == 64


def test_what_litellm_does_to_a_request_is_not_asked_again(world: Any) -> None:
    """It adds to messages and tools in place, and so may each further try."""
    data = begin(world, tools=[{"type": "function", "function": {"name": "Write"}}])
    before = [{"role": "user", "content": "go"}]
    data["messages"][0]["content"] = "changed"
    data["tools"][0]["function"]["name"] = "changed"

    async def changes(**asked: Any) -> Any:
        world.router.asked.append(json.loads(json.dumps(asked)))
        asked["messages"][0]["content"] = "changed again"
        return BAD

    world.router.acompletion = changes
    world.hook.settings = world.hook.settings.model_copy(update={"tool_retries": 2})
    whole(world, data, BAD)
    assert [asked["messages"] for asked in world.router.asked] == [before, before]
    assert world.router.asked[0]["tools"][0]["function"]["name"] == "Write"


@pytest.mark.parametrize(
    ("call_type", "clients", "own"),
    [
        ("anthropic_messages", "metadata", "litellm_metadata"),
        ("acompletion", "litellm_metadata", "metadata"),
    ],
)
def test_what_a_client_says_of_itself_goes_nowhere(
    call_type: str, clients: str, own: str, world: Any
) -> None:
    said = {"user_id": "u1", "team": "x"}
    beside = {} if call_type == "anthropic_messages" else said
    places = {own: {"endpoint": "/", "requester_metadata": said, **beside}, clients: dict(said)}
    data = begin(world, "cloudy", call_type, **places)
    assert data[own] == {"endpoint": "/"} and clients not in data


def test_what_cannot_be_written_down_does_not_leave(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(world.hook._egress, "write", full)
    sent = {**begin(world, "cloudy"), "model_info": {"cloud": True}}
    with pytest.raises(OSError, match="no space left"):
        asyncio.run(world.hook.async_pre_call_deployment_hook(sent, None))


def test_a_box_is_not_asked_twice_for_a_request_and_a_lost_one_is_gone(world: Any) -> None:
    data = begin(world)
    one, two = ({"model_info": {"box": name}} for name in ("one", "two"))

    def choose() -> list[Any]:
        found: list[Any] = asyncio.run(world.hook.async_filter_deployments("coder", [one, two], None, data))
        return found

    assert choose() == [one, two]
    asyncio.run(world.hook.async_pre_call_deployment_hook({**data, **one}, None))
    for name in ("id-2", "id-3"):  # box two has more to do, and is the one left for this request
        other = begin(world, call=name, messages=[{"role": "user", "content": name}])
        asyncio.run(world.hook.async_pre_call_deployment_hook({**other, **two}, None))
    assert choose() == [two]
    error = type("APIConnectionError", (Exception,), {})()
    asyncio.run(world.hook.async_post_call_failure_deployment_hook(data, error))
    assert not world.hook.watch.states["one"].alive


@pytest.mark.parametrize("status", [400, 413, 422, 401, 429, 500])
def test_what_a_box_has_read_and_refuses_does_not_leave(status: int, world: Any) -> None:
    """The client's own mistake is no reason to send the prompt away; a box that fails is one."""
    data = begin(world, "cloudy")
    asyncio.run(world.hook.async_pre_call_deployment_hook({**data, "model_info": {"box": "one"}}, None))
    error = type("BadRequestError", (Exception,), {"status_code": status})()
    asyncio.run(world.hook.async_post_call_failure_deployment_hook(data, error))
    leaving = world.hook.async_pre_call_deployment_hook({**data, "model_info": {"cloud": True}}, None)
    if status in (400, 413, 422):
        with pytest.raises(type(error)):
            asyncio.run(leaving)
        assert not (world.folder / "egress.jsonl").exists()
    else:
        asyncio.run(leaving)
        assert lines(world, "egress.jsonl")[0]["why"] == "no box answered"


def test_who_asks_for_the_cloud_is_told_of_its_budget(world: Any) -> None:
    data = begin(world, "cloudy", model="cloud")
    asyncio.run(world.hook.async_pre_call_deployment_hook({**data, "model_info": {"cloud": True}}, None))
    assert lines(world, "egress.jsonl")[0]["why"] == "it was asked for"
    key = world.hook._keys["cloudy"]
    world.hook._keys["cloudy"] = key.model_copy(update={"cloud_tokens_per_day": 5})
    world.hook.ledger.spend("cloudy", 5, 5)
    with pytest.raises(HTTPException, match="cloudy: cloud_tokens_per_day = 5 is used up") as refused:
        begin(world, "cloudy", model="cloud")
    world.router.answers = [BAD]
    assert whole(world, begin(world, "cloudy", tools=TOOLS), BAD) is BAD
    assert [asked["model"] for asked in world.router.asked] == ["coder"], "nor for a better answer"
    assert refused.value.status_code == 429 and int((refused.value.headers or {})["Retry-After"]) > 0
    assert "fallbacks" not in begin(world, "cloudy")


@pytest.mark.parametrize(
    ("name", "alive"),
    [
        *(("APIConnectionError", False), ("InternalServerError", False), ("Timeout", False)),
        *(("RateLimitError", True), ("BadRequestError", True), ("AuthenticationError", True)),
    ],
)
def test_only_an_error_of_the_box_makes_it_gone(name: str, alive: bool, world: Any) -> None:
    """What a client did wrong must not take a box away from the others."""
    data = begin(world)
    one = {"model_info": {"box": "one"}}
    asyncio.run(world.hook.async_pre_call_deployment_hook({**data, **one}, None))
    error = type(name, (Exception,), {})()
    asyncio.run(world.hook.async_post_call_failure_deployment_hook(data, error))
    assert world.hook.watch._state(one).alive is alive


def test_the_box_with_the_fewest_requests_in_flight_is_asked(world: Any) -> None:
    one, two = ({"model_info": {"box": name}} for name in ("one", "two"))
    data = begin(world)
    asyncio.run(world.hook.async_pre_call_deployment_hook({**data, **one}, None))
    other = {"litellm_call_id": "id-2"}
    assert asyncio.run(world.hook.async_filter_deployments("coder", [one, two], None, other)) == [two]
    whole(world, data, GOOD)
    assert asyncio.run(world.hook.async_filter_deployments("coder", [one, two], None, other)) == [one, two]


def turn(text: str, number: int, marks: bool) -> list[dict[str, Any]]:
    """What a client sends at a turn: all that was said, the marks of the cache at the last of it."""
    said: list[dict[str, Any]] = [{"role": "user", "content": text}]
    said += [{"role": ("assistant", "user")[one % 2], "content": f"{one}"} for one in range(2 * number)]
    if marks:
        block = {"type": "text", "text": said[-1]["content"], "cache_control": {"type": "ephemeral"}}
        said[-1] = {"role": "user", "content": [block]}
    return said


@pytest.mark.parametrize("marks", [True, False])
def test_a_conversation_stays_with_the_box_that_has_its_prompt(marks: bool, world: Any) -> None:
    """The other one would read all of it anew; where the box is busy with another request that is faster."""
    one, two = ({"model_info": {"box": name}} for name in ("one", "two"))

    def asked(text: str, number: int, key: str = "me") -> tuple[dict[str, Any], list[Any]]:
        data = begin(world, key, messages=turn(text, number, marks))
        return data, asyncio.run(world.hook.async_filter_deployments("coder", [one, two], None, data))

    for text, box in (("first", one), ("second", two)):
        data, found = asked(text, 0)
        assert found == [one, two]
        asyncio.run(world.hook.async_pre_call_deployment_hook({**data, **box}, None))
        whole(world, data, GOOD)
    for number in (1, 2):
        for text, box in (("first", one), ("second", two)):
            data, found = asked(text, number)
            assert found == [box]
            whole(world, data, GOOD)
    assert asked("first", 3, "cloudy")[1] == [one, two], "another key's prompt is another conversation"
    busy = {**request(), "litellm_call_id": "id-2"}
    who = types.SimpleNamespace(key_alias="me")
    asyncio.run(world.hook.async_pre_call_hook(who, None, busy, "completion"))
    asyncio.run(world.hook.async_pre_call_deployment_hook({**busy, **one}, None))
    assert asked("first", 3)[1] == [two]


def test_what_is_kept_of_requests_and_conversations_is_bounded(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world.module, "OPEN_REQUESTS", 3)
    monkeypatch.setattr(world.module, "CONVERSATIONS", 3)
    who = types.SimpleNamespace(key_alias="me")
    for number in range(9):
        data = {**request(messages=turn(str(number), 0, False)), "litellm_call_id": str(number)}
        asyncio.run(world.hook.async_pre_call_hook(who, None, data, "completion"))
        asyncio.run(world.hook.async_pre_call_deployment_hook({**data, "model_info": {"box": "one"}}, None))
        assert number == 0 or "two" in world.hook._last.values(), "the oldest, but the one that is in use"
        use = {**request(messages=turn("0", 0, False)), "litellm_call_id": "in use"}
        asyncio.run(world.hook.async_pre_call_hook(who, None, use, "completion"))
        asyncio.run(world.hook.async_pre_call_deployment_hook({**use, "model_info": {"box": "two"}}, None))
    assert len(world.hook._open) == len(world.hook._last) == 3
    body = {"messages": turn("0", 0, False)}
    names = {world.module.conversation_of(key, model, body) for key in ("a", "b") for model in ("c", "d")}
    assert len(names) == 4, "another model's cache has nothing of it"


@pytest.mark.parametrize(
    ("more", "status"),
    [
        ({"model": ""}, 400),
        ({"model": "cloud"}, 404),
        ({"model": "coder@messages"}, 404),
        ({"api_base": "http://evil"}, 400),
        ({"fallbacks": ["cloud"]}, 400),
        ({"litellm_call_id": "id-2"}, 400),
        ({"mock_response": "x"}, 400),
        ({"tools": TOOLS, "n": 2}, 400),  # of several answers only the first would be judged
    ],
)
def test_what_only_the_router_may_say_is_refused(more: dict[str, Any], status: int, world: Any) -> None:
    with pytest.raises(HTTPException) as refused:
        begin(world, **more)
    assert refused.value.status_code == status and lines(world)[0]["status"] == status


def test_a_budget_halts_with_a_line_and_retry_after(world: Any) -> None:
    begin(world, "tight")
    with pytest.raises(HTTPException) as refused:
        begin(world, "tight")
    assert refused.value.status_code == 429 and int((refused.value.headers or {})["Retry-After"]) > 0
    assert lines(world)[-1]["error"] == "tight: requests_per_minute = 1 is used up"


def test_a_field_that_no_client_needs_goes_no_further(world: Any) -> None:
    assert "store" not in begin(world, store=True) and begin(world, temperature=0.5)["temperature"] == 0.5


def test_one_answer_with_tools_and_several_without_go_on(world: Any) -> None:
    assert begin(world, tools=TOOLS, n=1)["n"] == 1 and begin(world, n=2)["n"] == 2


def test_a_failed_request_has_its_line(world: Any) -> None:
    error = type("Busy", (Exception,), {"status_code": 503})("not\nready")
    asyncio.run(world.hook.async_post_call_failure_hook(begin(world), error, None))
    assert (lines(world)[0]["status"], lines(world)[0]["error"]) == (503, "not ready")


def test_only_a_known_key_gets_in_and_only_to_its_paths(world: Any) -> None:
    def shows(path: str, **headers: str) -> Any:
        asked = types.SimpleNamespace(url=types.SimpleNamespace(path=path), headers=headers)
        return asyncio.run(world.module.authenticate(asked, ""))

    assert shows("/v1/messages", **{"x-api-key": "k1"}).key_alias == "me"
    assert shows("/v1/chat/completions", authorization="Bearer k2").key_alias == "cloudy"
    for path, headers, status in (
        ("/v1/messages", {}, 401),
        ("/v1/messages", {"x-api-key": "k9"}, 401),
        ("/key/generate", {"x-api-key": "k1"}, 404),
    ):
        with pytest.raises(HTTPException) as refused:
            shows(path, **headers)
        assert refused.value.status_code == status
